"""How sure a figure is, and whether two systems differ: bootstrap and randomisation over rows.

Intervals are percentiles of the bootstrap over rows (Efron; Koehn 2004, "Statistical Significance
Tests for Machine Translation Evaluation"): they answer how much the figure would move with other
rows of the same kind, not with other training seeds. Paired p-values are of the approximate
randomisation test (Noreen 1989; Riezler and Maxwell 2005): both systems' rows change sides at
random, and the share of such changes with a difference at least as large is the p-value.

Shapes: N rows, R resamples, S statistics.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from tess.errors import UserError
from tess.metrics.measures import Measure

RESAMPLES = 2000
LEVEL = 0.95
_BLOCK = 1 << 21
"""Most entries of one matrix of counts (16 MiB)."""


class Interval(NamedTuple):
    """Bounds of a percentile interval, in the units of the measure."""

    low: float
    high: float


class PairedTest(NamedTuple):
    """First minus second system: the difference, its interval, and a two-sided p-value."""

    difference: float
    low: float
    high: float
    p_value: float


def bootstrap_interval(
    measure: Measure, *, resamples: int = RESAMPLES, level: float = LEVEL, seed: int = 0
) -> Interval:
    """Percentile interval of a figure over resamples of its rows; the same for the same seed.

    Raises:
        UserError: no resample, or a level outside (0, 1).
    """
    _check(resamples, level)
    return _percentiles(_resampled(measure, resamples, seed), level)


def paired_test(
    a: Measure,
    b: Measure,
    *,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
) -> PairedTest:
    """Does system a differ from system b on the same rows?

    The interval is that of the difference when both are resampled together (Koehn's paired
    bootstrap); the p-value that of approximate randomisation, (1 + changes at least as large) /
    (1 + resamples), so never 0.

    Raises:
        UserError: measures of another name or another number of rows, no resample, or a level
            outside (0, 1).
    """
    _check(resamples, level)
    if a.name != b.name or a.rows.shape != b.rows.shape:
        raise UserError(
            f"a paired test needs one measure on the same rows, got {a.name!r} on {len(a.rows)} "
            f"and {b.name!r} on {len(b.rows)} rows"
        )
    difference = a.value - b.value
    moved = _resampled(a, resamples, seed) - _resampled(b, resamples, seed)
    bounds = _percentiles(moved, level)
    changed = _exchanged(a, b, resamples, seed)
    # rounding must not tell a change of sides from the observed difference
    large = np.abs(changed) >= abs(difference) - 1e-9 * max(abs(a.value), abs(b.value), 1e-9)
    p_value = (1 + int(large.sum())) / (1 + resamples)
    return PairedTest(difference, bounds.low, bounds.high, p_value)


def _resampled(measure: Measure, resamples: int, seed: int) -> np.ndarray:
    """[R] values on rows drawn with replacement; equal N and seed draw the same rows."""
    return np.concatenate(
        [
            np.atleast_1d(measure.combine(counts @ measure.rows))
            for counts in _blocks(_counts, len(measure.rows), resamples, seed)
        ]
    )


def _exchanged(a: Measure, b: Measure, resamples: int, seed: int) -> np.ndarray:
    """[R] differences after each row has changed sides with probability a half."""
    sums_a, sums_b, gap = a.rows.sum(axis=0), b.rows.sum(axis=0), b.rows - a.rows
    return np.concatenate(
        [
            a.combine(sums_a + sides @ gap) - b.combine(sums_b - sides @ gap)
            for sides in _blocks(_sides, len(gap), resamples, seed)
        ]
    )


def _blocks(draw, rows: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """[R', N] matrices of R resamples in all, none too large to hold."""
    size = max(1, _BLOCK // rows)
    for number, start in enumerate(range(0, resamples, size)):
        yield draw(rows, min(size, resamples - start), seed, number)


# The measures of a report, and its systems, use the same draws one after the other.


@lru_cache(4)
def _counts(rows: int, resamples: int, seed: int, block: int) -> np.ndarray:
    generator = np.random.default_rng([seed, block, 0])
    drawn = generator.integers(rows, size=(resamples, rows))
    drawn += rows * np.arange(resamples)[:, None]
    counts = np.bincount(drawn.ravel(), minlength=resamples * rows)
    return counts.reshape(resamples, rows).astype(np.float64)


@lru_cache(4)
def _sides(rows: int, resamples: int, seed: int, block: int) -> np.ndarray:
    generator = np.random.default_rng([seed, block, 1])
    return generator.integers(2, size=(resamples, rows), dtype=np.int8).astype(np.float64)


def _percentiles(values: np.ndarray, level: float) -> Interval:
    tail = (1 - level) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return Interval(float(low), float(high))


def _check(resamples: int, level: float) -> None:
    if resamples < 1:
        raise UserError(f"resamples must be at least 1, got {resamples}")
    if not 0 < level < 1:
        raise UserError(f"level must be between 0 and 1, got {level}")
