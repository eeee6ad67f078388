"""What a set of predictions scores against references and sources, as one flat dictionary.

`score` gives these keys, always all of them, in this order. "0-100" is a percentage; the other
figures are plain ratios. "Tokens" are lower-cased 13a tokens (sacrebleu's mteval-v13a).

| key | meaning |
|---|---|
| `rouge1` `rouge2` `rougeL` `rougeLsum` | mean over rows of the best F1 of a reference, 0-100 |
| `bleu` `bleu_signature` | corpus BLEU over all references, 0-100, and sacrebleu's signature |
| `chrf` `chrf_signature` | corpus chrF2, 0-100, and its signature |
| `sari` `sari_add` `sari_keep` `sari_delete` | corpus SARI as EASSE does it, 0-100
(`tess.metrics.sari`) |
| `sari_evaluate` | mean row SARI as Hugging Face `evaluate` does it (the TESS paper's), 0-100 |
| `self_bleu` | corpus BLEU of the predictions against their *sources*: 100 is a copy, 0-100 |
| `ibleu` | 0.8 bleu - 0.2 self_bleu (Sun and Zhou 2012): paraphrase without credit for copying |
| `distinct1` ... `distinct4` | mean over rows of distinct n-grams / n-grams (rows long enough) |
| `corpus_distinct1` ... `corpus_distinct4` | distinct n-grams / n-grams of all rows together |
| `repeated_words` | share of tokens that equal the token before them |
| `copy_rate` | share of the predictions' tokens that are in the source, each used once at most |
| `exact_copies` | number of predictions equal to their source but for blanks around words |
| `length_ratio` | tokens of the predictions / tokens of the references (mean over a row's) |
| `source_length_ratio` | tokens of the predictions / tokens of the sources |
| `empty_predictions` | number of predictions with no visible character |
| `rows` | number of rows |

ROUGE is rouge-score's with stemming; for Lsum, texts are split into sentences by rule
(`tess.text.sentences`). Its tokenizer keeps only a-z and 0-9, so on other scripts it is 0: use chrF
there. A ratio over nothing is 0.
"""

from collections.abc import Sequence
from itertools import chain

import numpy as np
from sacrebleu.metrics import BLEU, CHRF

from tess.metrics.measures import (
    ORDERS,
    ROUGE_TYPES,
    distinct_rows,
    measures,
    ngrams,
    ratio,
    rouge_rows,
)
from tess.metrics.tokens import tokenize_13a_lower

_FIRST = (*ROUGE_TYPES, "bleu", "chrf", "sari", "sari_add", "sari_keep", "sari_delete")
_FIRST += ("sari_evaluate", "self_bleu", "ibleu")
_SIGNED = {"bleu": BLEU, "chrf": CHRF}
_SURFACE = ("repeated_words", "copy_rate", "exact_copy_share", "length_ratio")
_SURFACE += ("source_length_ratio",)


def score(
    predictions: Sequence[str], references: Sequence[Sequence[str]], sources: Sequence[str]
) -> dict[str, float | int | str]:
    """All metrics of the table at the top of this module; rows may have different numbers of
    references. The figures are those of `tess.metrics.measures`.

    Raises:
        UserError: no rows, lists of different lengths, a row without a reference, or a blank one.
    """
    found = measures((*_FIRST, *_SURFACE), predictions, references, sources)
    result: dict[str, float | int | str] = {}
    for name in _FIRST:
        result[name] = found[name].value
        if name in _SIGNED:
            result[f"{name}_signature"] = _signature(_SIGNED[name](), references)
    result |= distinct(predictions)
    for name in _SURFACE:
        if name == "exact_copy_share":
            result["exact_copies"] = int(found[name].rows[:, 0].sum())
        else:
            result[name] = found[name].value
    result["empty_predictions"] = sum(not text.strip() for text in predictions)
    result["rows"] = len(predictions)
    return result


def rouge(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Mean ROUGE F1 (0-100), the best reference of each row for each type."""
    rows = rouge_rows(predictions, references)
    return {kind: 100.0 * float(values.mean()) for kind, values in rows.items()}


def distinct(texts: Sequence[str]) -> dict[str, float]:
    """Distinct n-grams over all n-grams, n = 1 to 4: per text then averaged, and in one pool."""
    tokens = [tokenize_13a_lower(text) for text in texts]
    per_text, pooled = {}, {}
    for n in ORDERS:
        per_text[f"distinct{n}"] = float(ratio(distinct_rows(tokens, n).sum(axis=0)))
        pool = list(chain.from_iterable(ngrams(row, n) for row in tokens))
        pooled[f"corpus_distinct{n}"] = float(ratio(np.array([len(set(pool)), len(pool)], float)))
    return per_text | pooled


def _signature(metric: BLEU | CHRF, references: Sequence[Sequence[str]]) -> str:
    """sacrebleu's own, of these numbers of references."""
    numbers = {len(row) for row in references}
    metric.num_refs = numbers.pop() if len(numbers) == 1 else -1
    return str(metric.get_signature())
