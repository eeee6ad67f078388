#!/usr/bin/env bash
# transformers 5.24.0: a ModelOutput of one's own with a field `past_key_values`, as 5.23 models have,
# can no longer be made by keyword: the keyword is renamed to `cache` before the dataclass sees it.
# Reading `.past_key_values` of an output with a field `cache` still works.
# Seen 1 December 2026: Old.__init__() got an unexpected keyword argument 'cache'
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python3 -m venv "$scratch/venv"
"$scratch/venv/bin/pip" install --quiet torch==2.13.0
"$scratch/venv/bin/pip" install --quiet transformers==5.24.0
"$scratch/venv/bin/python" - <<'PY'
from dataclasses import dataclass
from typing import Any

from transformers.utils import ModelOutput


@dataclass
class Old(ModelOutput):
    logits: Any = None
    past_key_values: Any = None


@dataclass
class New(ModelOutput):
    logits: Any = None
    cache: Any = None


try:
    Old(logits=1, past_key_values=2)
except TypeError as error:
    print(error)
    assert "unexpected keyword argument 'cache'" in str(error)
else:
    raise SystemExit("the output was made")
assert New(logits=1, cache=2).past_key_values == 2
PY
