"""Intervals cover what they should, paired tests see what is there, and wrong variants do not."""

import numpy as np
import pytest

import tess.metrics.significance
from tess.errors import UserError
from tess.metrics.measures import Measure, mean_measure, measures, ratio
from tess.metrics.significance import Interval, PairedTest, bootstrap_interval, paired_test


def mean_of(values) -> Measure:
    return mean_measure("score", values)


def test_interval_of_a_mean_is_that_of_the_normal_law():
    values = np.random.default_rng(1).normal(5.0, 2.0, size=400)
    low, high = bootstrap_interval(mean_of(values), resamples=4000)
    half = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - half, abs=0.02)
    assert high == pytest.approx(values.mean() + half, abs=0.02)
    narrow = bootstrap_interval(mean_of(values), resamples=4000, level=0.5)
    assert narrow.high - narrow.low == pytest.approx(2 * 0.6745 * values.std() / 20, abs=0.02)


def covers(interval) -> bool:
    """Does a nominal 95 % interval hold the truth in 92 to 98 % of 600 synthetic test sets?

    Rows are (numerator, denominator) of a ratio of totals, whose true value is 2.
    """
    rng, hits = np.random.default_rng(2), 0
    for trial in range(600):
        whole = rng.exponential(1.0, size=150) + 0.5
        rows = np.stack([2 * whole + rng.normal(0, 1, size=150), whole], axis=1)
        low, high = interval(Measure("ratio", rows, ratio, True), trial)
        hits += low <= 2 <= high
    return 0.92 <= hits / 600 <= 0.98


def test_intervals_cover_the_truth_as_often_as_they_say():
    assert covers(lambda measure, seed: bootstrap_interval(measure, resamples=400, seed=seed))


def test_the_coverage_check_rejects_wrong_intervals():
    def of_rows(measure, seed):  # the spread of single rows, not of their mean
        return Interval(*np.quantile(measure.rows[:, 0] / measure.rows[:, 1], [0.025, 0.975]))

    def half_as_wide(measure, seed):
        low, high = bootstrap_interval(measure, resamples=400, seed=seed)
        return Interval(low + (high - low) / 4, high - (high - low) / 4)

    assert not covers(of_rows)
    assert not covers(half_as_wide)


def systems(seed: int, shift: float, rows: int = 100) -> tuple[Measure, Measure]:
    """Two systems whose rows are hard or easy together."""
    rng = np.random.default_rng(seed)
    hardness = rng.normal(50, 20, size=rows)
    first = hardness + rng.normal(0, 2, size=rows) + shift
    return mean_of(first), mean_of(hardness + rng.normal(0, 2, size=rows))


def finds_a_small_difference(test) -> bool:
    """Power over 0.8 at a shift of one unit, where rows differ by 20 and systems by 3."""
    found = sum(test(*systems(seed, shift=1.0), seed) < 0.05 for seed in range(50))
    return found / 50 > 0.8


def test_a_paired_test_finds_what_an_unpaired_one_does_not():
    def unpaired(a, b, seed):
        rng, pool = np.random.default_rng(seed), np.concatenate([a.rows[:, 0], b.rows[:, 0]])
        mixed = np.stack([rng.permutation(pool) for _ in range(200)])
        gaps = mixed[:, :100].mean(axis=1) - mixed[:, 100:].mean(axis=1)
        return (1 + (np.abs(gaps) >= abs(a.value - b.value)).sum()) / 201

    def paired(a, b, seed):
        return paired_test(a, b, resamples=200, seed=seed).p_value

    assert finds_a_small_difference(paired)
    assert not finds_a_small_difference(unpaired)


def test_p_values_are_uniform_where_systems_do_not_differ():
    p_values = [
        paired_test(*systems(seed, shift=0.0), resamples=200).p_value for seed in range(300)
    ]
    assert 0.02 <= np.mean(np.array(p_values) <= 0.05) <= 0.09
    assert 0.42 <= np.mean(np.array(p_values) <= 0.5) <= 0.58


def test_the_interval_of_a_difference_is_that_of_the_paired_rows():
    a, b = systems(3, shift=1.0)
    got = paired_test(a, b)
    gaps = a.rows[:, 0] - b.rows[:, 0]
    half = 1.96 * gaps.std() / 10
    assert got.difference == pytest.approx(gaps.mean())
    assert got.low == pytest.approx(gaps.mean() - half, abs=0.1)
    assert got.high == pytest.approx(gaps.mean() + half, abs=0.1)


def test_a_system_against_itself_does_not_differ():
    texts = ["a b c", "d e", ""], [["a b"], ["d e"], ["f"]], ["a", "d", "f"]
    for name in ("bleu", "ibleu", "sari", "rougeL"):
        one = measures([name], *texts)[name]
        assert paired_test(one, one) == PairedTest(0.0, 0.0, 0.0, 1.0)
    a, _ = systems(4, shift=0.0)
    shifted = mean_of(a.rows[:, 0] - 1.0)
    got = paired_test(a, shifted)
    assert got.difference == pytest.approx(1.0) and got.p_value == pytest.approx(1 / 2001)


def test_a_corpus_figure_is_exchanged_row_by_row():
    # Observed: (4 + 1) / (5 + 1) - (1 + 1) / (1 + 4) = 0.433. With one of the rows changed over:
    # (1 + 1) / (1 + 1) - (4 + 1) / (5 + 4) = 0.444, so every one of the 4 ways is as large.
    # Of 3 rows, the observed way and its mirror are 2 of 8, and no other is as large.
    a = Measure("ratio", np.array([[4.0, 5.0], [1.0, 1.0]]), ratio, True)
    b = Measure("ratio", np.array([[1.0, 1.0], [1.0, 4.0]]), ratio, True)
    assert paired_test(a, b).difference == pytest.approx(5 / 6 - 2 / 5)
    assert paired_test(a, b).p_value == 1.0
    three = np.array([[3.0, 4.0], [2.0, 3.0], [5.0, 6.0]])
    a, b = (Measure("ratio", three - lost * np.array([1.0, 0.0]), ratio, True) for lost in (0, 1))
    assert paired_test(a, b, resamples=8000).p_value == pytest.approx(2 / 8, abs=0.02)


def test_rounding_does_not_make_a_difference():
    # only one row differs, so that every way to change sides is as large as the observed one
    rng = np.random.default_rng(0)
    for _ in range(20):
        values = rng.random(7)
        other = values + 0.1 * (np.arange(7) == 3)
        assert paired_test(mean_of(values), mean_of(other), resamples=50).p_value == 1.0


def test_the_same_seed_gives_the_same_figures_and_another_one_others():
    a, b = systems(5, shift=0.3)
    tess.metrics.significance._counts.cache_clear()
    first = bootstrap_interval(a, seed=3), paired_test(a, b, seed=3)
    tess.metrics.significance._counts.cache_clear()
    tess.metrics.significance._sides.cache_clear()
    assert first == (bootstrap_interval(a, seed=3), paired_test(a, b, seed=3))
    assert first[0] != bootstrap_interval(a, seed=4)


def test_resamples_that_do_not_fit_at_once_come_in_blocks(monkeypatch):
    a, b = systems(6, shift=0.5)
    whole = bootstrap_interval(a, resamples=2001), paired_test(a, b, resamples=2001)
    monkeypatch.setattr(tess.metrics.significance, "_BLOCK", 700 * 100)
    blocks = bootstrap_interval(a, resamples=2001), paired_test(a, b, resamples=2001)
    assert tess.metrics.significance._resampled(a, 2001, 0).shape == (2001,)
    # no block comes again
    assert len(np.unique(tess.metrics.significance._resampled(a, 2001, 0))) > 1950
    assert blocks[0] == pytest.approx(whole[0], abs=0.5)
    assert blocks[1] == pytest.approx(whole[1], abs=0.1)
    monkeypatch.setattr(tess.metrics.significance, "_BLOCK", 10)  # less than one resample
    assert tess.metrics.significance._resampled(a, 3, 0).shape == (3,)


def test_one_row_says_nothing():
    a, b = mean_of([3.0]), mean_of([1.0])
    assert bootstrap_interval(a) == (3.0, 3.0)
    assert paired_test(a, b) == PairedTest(2.0, 2.0, 2.0, 1.0)


def test_wrong_arguments_are_refused():
    a, b = mean_of([1.0, 2.0]), mean_of([1.0])
    with pytest.raises(UserError, match="same rows, got 'score' on 2 and 'score' on 1"):
        paired_test(a, b)
    with pytest.raises(UserError, match="one measure"):
        paired_test(a, mean_measure("other", [1.0, 2.0]))
    with pytest.raises(UserError, match="resamples must be at least 1, got 0"):
        bootstrap_interval(a, resamples=0)
    with pytest.raises(UserError, match="between 0 and 1, got 95"):
        paired_test(a, a, level=95)
