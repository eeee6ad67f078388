"""BLEU and chrF as functions of sums of row statistics.

`bleu_rows` counts once per row; `corpus_bleu` and `sentence_bleu` are two ways to make figures of
the counts. Names of shapes: N rows, 10 BLEU columns (length, reference length, matches of order
1-4, n-grams of order 1-4), 18 chrF columns (n-grams of the text, of the reference, matches; for
order 1-6).
"""

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

BLEU_ORDER = 4
CHRF_ORDER = 6
CHRF_BETA = 2
METHOD4_K = 5.0
Tokens = Sequence[str]


@lru_cache(64)  # candidates are compared pair by pair
def ngram_counts(tokens: tuple[str, ...]) -> Counter[tuple[str, ...]]:
    """How often each n-gram of order 1 to 4 stands in a text; the length of a key is its order."""
    return Counter(
        tokens[start : start + n]
        for n in range(1, BLEU_ORDER + 1)
        for start in range(len(tokens) - n + 1)
    )


def bleu_rows(predictions: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> np.ndarray:
    """[N, 10] statistics of BLEU; row i has its own list `references[i]` of one or more.

    A match is clipped by the most that one reference has of it; the reference length is the
    closest to the text's, the shorter of two that are as close (Papineni et al. 2002).
    """
    rows = np.zeros((len(predictions), 2 + 2 * BLEU_ORDER))
    for row, prediction, refs in zip(rows, predictions, references, strict=True):
        tokens = tuple(prediction)
        wanted = [tuple(reference) for reference in refs]
        counts = [ngram_counts(reference) for reference in wanted]
        row[0] = len(tokens)
        row[1] = min((abs(len(r) - len(tokens)), len(r)) for r in wanted)[1]
        for gram, count in ngram_counts(tokens).items():
            order = len(gram) - 1
            row[2 + order] += min(count, max(c.get(gram, 0) for c in counts))
            row[2 + BLEU_ORDER + order] += count
    return rows


def corpus_bleu(sums: np.ndarray, *, smooth: str = "exp") -> np.ndarray:
    """Corpus BLEU of order 4, 0-100, of summed statistics [..., 10].

    Args:
        smooth: "exp" halves the matches of each further order that has none, from a half on
            (mteval-v13a, sacrebleu's default); "none" gives 0 then (fairseq). Without n-grams of
            every order, or without any match, BLEU is 0 in both.
    """
    matches, totals = _orders(sums)
    empty = matches == 0
    smoothed = np.exp2(-np.cumsum(empty, axis=-1)) if smooth == "exp" else 0.0
    precisions = divide(np.where(empty, smoothed, matches), totals)
    usable = (precisions > 0).all(axis=-1) & ~empty.all(axis=-1)
    logs = np.log(np.where(precisions > 0, precisions, 1.0)).mean(axis=-1)
    return np.where(usable, 100.0 * _brevity(sums) * np.exp(logs), 0.0)


def sentence_bleu(rows: np.ndarray) -> np.ndarray:
    """BLEU of each row alone, 0-100, [...] of [..., 10], as NLTK's `sentence_bleu` gives it with
    `SmoothingFunction().method4` (Chen and Cherry 2014).

    With its ways: the k-th order without a match counts ln(length) / (5 * 2^k) matches; an order
    longer than the text counts as one n-gram; a text of one word is not smoothed, and its orders
    without a match are left out of the mean but not of its weights; no common word gives 0.
    """
    matches, totals = _orders(rows)
    empty = matches == 0
    length = rows[..., :1]
    log_length = np.log(np.maximum(length, 1.0))
    smoothed = log_length / (METHOD4_K * np.exp2(np.cumsum(empty, axis=-1)))
    precisions = np.where(empty, smoothed, matches) / np.maximum(totals, 1.0)
    logs = np.log(np.where(precisions > 0, precisions, 1.0)).sum(axis=-1) / BLEU_ORDER
    return np.where(matches[..., 0] > 0, 100.0 * _brevity(rows) * np.exp(logs), 0.0)


def chrf_rows(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """[N, 18] statistics of chrF, against the reference of each row that gives it the best."""
    rows = np.zeros((len(predictions), 3 * CHRF_ORDER))
    for row, prediction, refs in zip(rows, predictions, references, strict=True):
        counts = _character_counts(prediction)
        options = np.array([_chrf_row(counts, _character_counts(r)) for r in refs])
        row[:] = options[np.argmax(corpus_chrf(options))]
    return rows


def corpus_chrf(sums: np.ndarray) -> np.ndarray:
    """chrF2, 0-100, of summed statistics [..., 18]: F2 of the mean precision and recall over the
    orders that both sides have (Popović 2015; sacrebleu's)."""
    stats = sums.reshape(*sums.shape[:-1], CHRF_ORDER, 3)
    texts, wanted, matches = stats[..., 0], stats[..., 1], stats[..., 2]
    used = (texts > 0) & (wanted > 0)
    orders = used.sum(axis=-1)
    precision = divide((divide(matches, texts) * used).sum(axis=-1), orders)
    recall = divide((divide(matches, wanted) * used).sum(axis=-1), orders)
    weight = CHRF_BETA**2
    return 100.0 * divide((1 + weight) * precision * recall, weight * precision + recall)


def _character_counts(text: str) -> tuple[Counter[str], ...]:
    letters = "".join(text.split())
    return tuple(
        Counter(letters[i : i + n] for i in range(len(letters) - n + 1))
        for n in range(1, CHRF_ORDER + 1)
    )


def _chrf_row(text: Sequence[Counter[str]], reference: Sequence[Counter[str]]) -> list[int]:
    row = []
    for have, want in zip(text, reference, strict=True):
        matches = sum(min(count, want.get(gram, 0)) for gram, count in have.items())
        row += [have.total() if want else 0, want.total(), matches]  # sacrebleu: no order, no text
    return row


def _orders(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return rows[..., 2 : 2 + BLEU_ORDER], rows[..., 2 + BLEU_ORDER :]


def _brevity(rows: np.ndarray) -> np.ndarray:
    length, wanted = rows[..., 0], rows[..., 1]
    penalty = np.exp(np.minimum(0.0, 1.0 - wanted / np.maximum(length, 1e-9)))
    return np.where(length > 0, penalty, 0.0)


def divide(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """The quotient, 0 where the whole is 0."""
    return np.divide(part, whole, out=np.zeros(np.broadcast_shapes(part.shape, whole.shape)),
                     where=whole > 0)
