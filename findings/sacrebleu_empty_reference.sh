#!/usr/bin/env bash
# sacrebleu 2.6.0: an empty string among the references is a reference of length 0. It is the closest
# in length to a text that is too short, so the brevity penalty goes and the score rises.
# Seen 1 December 2026: one reference 22.3, the same beside an empty one 100.0
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python3 -m venv "$scratch/venv"
"$scratch/venv/bin/pip" install --quiet sacrebleu==2.6.0
"$scratch/venv/bin/python" - <<'PY'
from sacrebleu.metrics import BLEU

text, reference = ["the cat sat on"], ["the cat sat on the mat while the dog slept"]
alone = BLEU(effective_order=True).corpus_score(text, [reference]).score
beside = BLEU(effective_order=True).corpus_score(text, [reference, [""]]).score
print(f"one reference {alone:.1f}, the same beside an empty one {beside:.1f}")
assert beside > 2 * alone
PY
