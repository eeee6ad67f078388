"""SARI (Xu et al. 2016, "Optimizing Statistical Machine Translation for Text Simplification").

For n-grams of order 1 to 4, SARI asks of every n-gram whether adding, keeping or deleting it
was right, given the source and all references. With #I, #O the counts of an n-gram in source and
output, and #R its mean count over the references of the row:

    keep    kept by the output min(#I, #O), by the references min(#I, #R)
    delete  deleted by the output max(#I - #O, 0), by the references max(#I - #R, 0)
    add     added by the output: 1 if #O > 0 and #I = 0; by the references: 1 if #R > 0 and #I = 0

Precision is the agreed amount over the output's, recall the agreed amount over the references',
F1 their harmonic mean, and SARI = (F_add + F_keep + X_delete) / 3. Published programs differ in
the rest, so there are three protocols:

`easse`     totals over the whole corpus, then F1 per order, then the mean over orders; F1 also for
            deletion; 0/0 = 0. This is EASSE's `corpus_sari` and the default: what recent papers
            report. EASSE scales by the number of references instead of averaging them, which
            is the same number as long as all rows have equally many references.
`original`  the authors' SARI.py: the mean over rows of a score per row; precision only for
            deletion; keep and delete precision, and keep recall, are means over *distinct*
            n-grams; 0/0 = 0. Row by row this is not the formula of the paper (which sums counts
            and averages precision and recall over orders before F1), but what was used.
`evaluate`  `original` as changed by tensor2tensor and Hugging Face `evaluate` (the TESS paper's
            figures): keep recall is summed over counts, and 0/0 = 1, so a perfect output gets 100.

Tokenisation is lower-cased 13a (sacrebleu's mteval-v13a), as in EASSE and `evaluate`; with
`tokenize="split"` it is lower-cased text split at blanks, as in SARI.py (which splits at single
spaces: two spaces in a row make an empty token there, and none here). The Java STAR implementation
normalises output and references but not the source; we treat all three alike.
"""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from tess.errors import UserError
from tess.metrics.ngrams import divide
from tess.metrics.tokens import Tokenize, check_parallel, tokenize_13a_lower

MAX_ORDER = 4
PROTOCOLS = ("easse", "original", "evaluate")
Ngram = tuple[str, ...]


class Sari(NamedTuple):
    """SARI and its three parts, each from 0 to 100."""

    sari: float
    add: float
    keep: float
    delete: float


def tokenize_split(text: str) -> tuple[str, ...]:
    """Lower-cased text split at blanks, for text that is tokenised already."""
    return tuple(text.lower().split())


TOKENIZERS: dict[str, Tokenize] = {"13a": tokenize_13a_lower, "split": tokenize_split}


def sari(
    sources: Sequence[str],
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    protocol: str = "easse",
    tokenize: str = "13a",
) -> Sari:
    """SARI of a corpus; row i has its own list `references[i]` of one or more references.

    Raises:
        UserError: unknown protocol or tokenisation, no rows, lists of different lengths, a row
            without a reference, or a blank one.
    """
    if protocol not in PROTOCOLS:
        raise UserError(f"unknown SARI protocol {protocol!r}; known are {list(PROTOCOLS)}")
    if tokenize not in TOKENIZERS:
        raise UserError(f"unknown tokenisation {tokenize!r}; known are {sorted(TOKENIZERS)}")
    check_parallel(sources, predictions, references)
    rows = sari_rows(sources, predictions, references, protocol=protocol, tokenize=tokenize)
    return Sari(*sari_of_sums(rows.sum(axis=0), protocol=protocol).tolist())


def sari_rows(
    sources: Sequence[str],
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    protocol: str = "easse",
    tokenize: str = "13a",
) -> np.ndarray:
    """Statistics of each row, of whose sums `sari_of_sums` makes SARI.

    [N, 36] for `easse`: agreed, done by the output, wanted by the references, of order 1 to 4, of
    add, keep and delete. [N, 4] for the others: the row's add, keep and delete, and a 1.
    """
    split = TOKENIZERS[tokenize]
    rows = (
        [_row_counts(source, prediction, refs, n, split) for n in range(1, MAX_ORDER + 1)]
        for source, prediction, refs in zip(sources, predictions, references, strict=True)
    )
    if protocol == "easse":
        return np.array([_row_amounts(row) for row in rows])
    if_empty = 1.0 if protocol == "evaluate" else 0.0
    return np.array([(*_row_scores(row, if_empty=if_empty), 1.0) for row in rows])


def sari_of_sums(sums: np.ndarray, *, protocol: str = "easse") -> np.ndarray:
    """[..., 4]: SARI, add, keep and delete, 0-100, of summed `sari_rows`."""
    if protocol == "easse":
        amounts = sums.reshape(*sums.shape[:-1], 3, MAX_ORDER, 3)
        agreed, output, wanted = amounts[..., 0], amounts[..., 1], amounts[..., 2]
        precision, recall = divide(agreed, output), divide(agreed, wanted)
        parts = divide(2 * precision * recall, precision + recall).mean(axis=-1)
    else:
        parts = divide(sums[..., :3], sums[..., 3:])
    return 100.0 * np.concatenate([parts.mean(axis=-1, keepdims=True), parts], axis=-1)


class _Counts(NamedTuple):
    """N-gram amounts of one row at one order; references are averaged."""

    source: Counter[Ngram]
    prediction: Counter[Ngram]
    reference: dict[Ngram, float]


def _row_counts(source: str, prediction: str, refs: Sequence[str], n: int, split: Tokenize):
    total: Counter[Ngram] = Counter()
    for reference in refs:
        total.update(_ngrams(split(reference), n))
    mean = {gram: count / len(refs) for gram, count in total.items()}
    return _Counts(_ngrams(split(source), n), _ngrams(split(prediction), n), mean)


def _ngrams(tokens: tuple[str, ...], n: int) -> Counter[Ngram]:
    return Counter(zip(*(tokens[i:] for i in range(n)), strict=False))


class _Amounts(NamedTuple):
    """Per distinct n-gram: what the output did, what the references did, and what both did."""

    output: dict[Ngram, float]
    wanted: dict[Ngram, float]
    agreed: dict[Ngram, float]


def _added(counts: _Counts) -> _Amounts:
    output = {g: 1.0 for g in counts.prediction if g not in counts.source}
    wanted = {g: 1.0 for g in counts.reference if g not in counts.source}
    return _Amounts(output, wanted, {g: 1.0 for g in output if g in wanted})


def _kept(counts: _Counts) -> _Amounts:
    output, wanted, agreed = {}, {}, {}
    for gram, count in counts.source.items():
        done = min(count, counts.prediction.get(gram, 0))
        right = min(count, counts.reference.get(gram, 0.0))
        output[gram], wanted[gram], agreed[gram] = done, right, min(done, right)
    return _Amounts(_positive(output), _positive(wanted), _positive(agreed))


def _deleted(counts: _Counts, *, leftover: bool) -> _Amounts:
    """`leftover`: SARI.py takes what is left of the deletion after the references' whole count,
    max(#I - #O - #R, 0), where the paper takes min(#I - #O, #I - #R); the same at counts of 1."""
    output, wanted, agreed = {}, {}, {}
    for gram, count in counts.source.items():
        done = max(count - counts.prediction.get(gram, 0), 0)
        right = max(count - counts.reference.get(gram, 0.0), 0.0)
        both = max(done - counts.reference.get(gram, 0.0), 0.0) if leftover else min(done, right)
        output[gram], wanted[gram], agreed[gram] = done, right, both
    return _Amounts(_positive(output), _positive(wanted), _positive(agreed))


def _positive(amounts: dict[Ngram, float]) -> dict[Ngram, float]:
    return {gram: amount for gram, amount in amounts.items() if amount > 0}


def _f1(precision: float, recall: float) -> float:
    total = precision + recall
    return 2 * precision * recall / total if total > 0 else 0.0


def _ratio(part: float, whole: float, if_empty: float = 0.0) -> float:
    return part / whole if whole > 0 else if_empty


def _row_amounts(row: list[_Counts]) -> list[float]:
    """Sums over the n-grams of a row: operations, then orders, then agreed, output, wanted."""
    amounts = [
        operation(counts)
        for operation in (_added, _kept, lambda counts: _deleted(counts, leftover=False))
        for counts in row
    ]
    return [
        sum(part.values()) for each in amounts for part in (each.agreed, each.output, each.wanted)
    ]


def _row_scores(row: list[_Counts], *, if_empty: float) -> tuple[float, float, float]:
    """Add, keep and delete, 0-1: `original` with if_empty 0, `evaluate` with if_empty 1 (and keep
    recall over counts)."""
    adds, keeps, deletes = [], [], []
    for counts in row:
        added, kept = _added(counts), _kept(counts)
        deleted = _deleted(counts, leftover=True)
        adds.append(
            _f1(
                _ratio(len(added.agreed), len(added.output), if_empty),
                _ratio(len(added.agreed), len(added.wanted), if_empty),
            )
        )
        if if_empty:
            recall = _ratio(sum(kept.agreed.values()), sum(kept.wanted.values()), if_empty)
        else:
            recall = _mean_share(kept.agreed, kept.wanted, if_empty)
        keeps.append(_f1(_mean_share(kept.agreed, kept.output, if_empty), recall))
        deletes.append(_mean_share(deleted.agreed, deleted.output, if_empty))
    return sum(adds) / MAX_ORDER, sum(keeps) / MAX_ORDER, sum(deletes) / MAX_ORDER


def _mean_share(part: dict[Ngram, float], whole: dict[Ngram, float], if_empty: float) -> float:
    """The mean over the distinct n-grams of `whole` of part / whole."""
    return _ratio(sum(amount / whole[gram] for gram, amount in part.items()), len(whole), if_empty)
