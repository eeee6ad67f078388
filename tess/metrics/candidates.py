"""Several samples of each source, as DiffuSeq's program scores them: MBR choice and diversity.

For every source, the program compares its n candidates with each other by sentence BLEU. The one
with the highest sum over the others is chosen (minimum Bayes risk with samples); the mean over
pairs is self-BLEU between candidates, and the share of distinct 4-grams of all candidates together
is div-4.
"""

from collections.abc import Sequence

import numpy as np

from tess.errors import UserError
from tess.metrics.catalog import MEASURES_OF_CHOICE
from tess.metrics.measures import Measure, mean_measure, measures, ngrams
from tess.metrics.ngrams import sentence_bleu
from tess.metrics.tokens import tokenize_bert


def candidate_measures(
    candidates: Sequence[Sequence[str]], references: Sequence[Sequence[str]]
) -> dict[str, Measure]:
    """The measures of `tess.metrics.catalog.CANDIDATE_MEASURES`.

    Args:
        candidates: N rows of n texts each, n the same for all and at least 2.
        references: N rows.

    Raises:
        UserError: another number of rows, or of candidates.
    """
    counts = {len(row) for row in candidates}
    if len(candidates) != len(references):
        raise UserError(
            f"expected candidates for {len(references)} sources, got them for {len(candidates)}"
        )
    if len(counts) != 1 or min(counts) < 2:
        raise UserError(
            "expected the same number of candidates, two or more, for every source, got "
            f"{min(counts)} to {max(counts)}"
        )
    utilities = [pairwise_bleu(row) for row in candidates]
    chosen = [row[mbr_choice(u)] for row, u in zip(candidates, utilities, strict=True)]
    of_choice = measures(MEASURES_OF_CHOICE, chosen, references, [""] * len(chosen))
    result = {
        f"mbr_{name}": Measure(f"mbr_{name}", m.rows, m.combine, m.higher_is_better)
        for name, m in of_choice.items()
    }
    upper = np.triu_indices(counts.pop(), k=1)
    diversity = (u[upper].mean() for u in utilities)
    result["candidates_self_bleu"] = mean_measure(
        "candidates_self_bleu", diversity, higher_is_better=False
    )
    result["candidates_div4"] = mean_measure("candidates_div4", map(_div4, candidates))
    return result


def pairwise_bleu(texts: Sequence[str]) -> np.ndarray:
    """[n, n] sentence BLEU, 0-100, entry (i, j) with text i as reference of text j."""
    rows = [tokenize_bert(text) for text in texts]
    return np.stack([sentence_bleu(rows, [[reference]] * len(rows)) for reference in rows])


def mbr_choice(utilities: np.ndarray) -> int:
    """The text with the highest sum of its row of [n, n] without itself; the first of equals."""
    without_self = utilities * (1 - np.eye(len(utilities)))
    return int(np.argmax(without_self.sum(axis=1)))


def _div4(texts: Sequence[str]) -> float:
    grams = [gram for text in texts for gram in ngrams(tokenize_bert(text), 4)]
    return len(set(grams)) / len(grams) if grams else 0.0
