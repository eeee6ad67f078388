"""BLEU and chrF: statistics of rows, and figures as functions of their sums.

The counts of BLEU are sacrebleu's, the BLEU of single sentences is NLTK's. Names of shapes: N rows,
10 BLEU columns (length, reference length, matches of order 1-4, n-grams of order 1-4), 18 chrF
columns (n-grams of the text, of the reference, matches; for order 1-6).
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np
from nltk.translate import bleu_score
from sacrebleu.metrics import BLEU

BLEU_ORDER = 4
CHRF_ORDER = 6
CHRF_BETA = 2
Tokens = Sequence[str]

_COUNTS = BLEU(tokenize="none", force=True, effective_order=True)  # for what it counts, no figure
_METHOD4 = bleu_score.SmoothingFunction().method4


def bleu_rows(predictions: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> np.ndarray:
    """[N, 10] statistics of BLEU; row i has its own list `references[i]` of one or more.

    A match is clipped by the most that one reference has of it; the reference length is the
    closest to the text's, the shorter of two that are as close (Papineni et al. 2002).
    """
    rows = np.zeros((len(predictions), 2 + 2 * BLEU_ORDER))
    for row, prediction, refs in zip(rows, predictions, references, strict=True):
        found = _COUNTS.sentence_score(" ".join(prediction), [" ".join(tokens) for tokens in refs])
        row[:] = found.sys_len, found.ref_len, *found.counts, *found.totals
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


def sentence_bleu(
    predictions: Sequence[Tokens], references: Sequence[Sequence[Tokens]]
) -> np.ndarray:
    """[N] BLEU of each row alone, 0-100, with smoothing method 4 of Chen and Cherry (2014)."""
    return np.array(
        [
            100.0 * float(bleu_score.sentence_bleu(refs, text, smoothing_function=_METHOD4))
            for text, refs in zip(predictions, references, strict=True)
        ]
    )


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
