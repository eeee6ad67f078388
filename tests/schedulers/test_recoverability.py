"""How likely the noised arg-max is the true token, and the grid and density of times made of it."""

import math

import numpy
import pytest
import torch

from tess.schedulers.noise import alpha_bar
from tess.schedulers.recoverability import (
    RecoverabilityDensity,
    auto_simplex_value,
    recoverability,
    recoverability_grid,
)
from tess.schedulers.renoising import RenoisingScheduler

RELEASED = 131_072
ROBERTA = 50_265
ACCURACIES = [0.99, 0.90, 0.75, 0.50, 0.25, 0.10, 0.01]
# times at which TESS's cosine schedule (s = 1e-4) has these accuracies, to a digit or two more
# than the third decimal
PUBLISHED = {
    ROBERTA: [0.185, 0.220, 0.245, 0.280, 0.328, 0.385, 0.528],
    RELEASED: [0.180, 0.213, 0.235, 0.270, 0.312, 0.363, 0.493],
}
MIDPOINTS = [0.401, 0.341, 0.312, 0.292, 0.277, 0.263, 0.249, 0.236, 0.222, 0.200]


def share_of_gap(gap: float) -> float:
    """The signal share whose gap is 2 sqrt(a / (1 - a))."""
    return (gap / 2) ** 2 / (1 + (gap / 2) ** 2)


def gauss_hermite(gap: float, vocab_size: int, nodes: int = 256) -> float:
    """The same integral by a rule that has nothing in common with the one under test."""
    x, weight = numpy.polynomial.hermite.hermgauss(nodes)
    log_below = (vocab_size - 1) * torch.special.log_ndtr(torch.tensor(x * math.sqrt(2) + gap))
    return float(log_below.exp().numpy() @ weight / math.sqrt(math.pi))


def maxima(vocab_size: int, samples: int) -> torch.Tensor:
    """Largest of V - 1 drawn normals, `samples` times, in float64."""
    step = max(1, 4_000_000 // vocab_size)
    parts = [
        torch.randn(min(step, samples - start), vocab_size - 1).amax(dim=1)
        for start in range(0, samples, step)
    ]
    return torch.cat(parts).double()


def standard_errors(estimates: torch.Tensor, value: float) -> float:
    """How far the mean of independent estimates is from a value, in its standard errors."""
    return abs(estimates.mean().item() - value) / (estimates.std() / len(estimates) ** 0.5).item()


# --- the probability ---


@pytest.mark.parametrize("vocab_size, samples", [(50, 400_000), (4096, 20_000), (ROBERTA, 4_000)])
def test_recoverability_is_what_drawn_noise_gives(vocab_size, samples):
    largest = maxima(vocab_size, samples)
    middle = math.sqrt(2 * math.log(vocab_size))
    for gap in (middle - 1.5, middle, middle + 0.8):
        # given the others' maximum, the chance of the true token's own noise is exact
        estimates = torch.special.ndtr(gap - largest)
        expected = float(recoverability(share_of_gap(gap), vocab_size))
        assert standard_errors(estimates, expected) < 4
        assert estimates.std() / samples**0.5 < 2e-3
        # half of the others forgotten: a factor two in the vocabulary is seen
        wrong = float(recoverability(share_of_gap(gap), vocab_size // 2))
        assert standard_errors(estimates, wrong) > 4


@pytest.mark.parametrize("vocab_size, rows", [(50, 40_000), (4096, 1_000)])
@pytest.mark.parametrize("simplex_value", [1.0, 5.0])
def test_recoverability_is_the_accuracy_of_the_noised_simplex(vocab_size, rows, simplex_value):
    scheduler = RenoisingScheduler(vocab_size=vocab_size, simplex_value=simplex_value)
    time = float(recoverability_grid(5, scheduler.alpha_bar, vocab_size)[3])
    expected = float(recoverability(scheduler.alpha_bar(time), vocab_size))  # about 0.6
    ids = torch.randint(vocab_size, (1, rows))
    noised = scheduler.add_noise(ids, torch.tensor([time]), torch.randn(1, rows, vocab_size))
    right = (noised.argmax(dim=-1) == ids).double()[0]
    assert standard_errors(right, expected) < 4
    # half the gap would be another schedule altogether
    half = float(recoverability(share_of_gap(0.5 * gap_of(scheduler, time)), vocab_size))
    assert standard_errors(right, half) > 10


def gap_of(scheduler: RenoisingScheduler, time: float) -> float:
    share = float(scheduler.alpha_bar(time))
    return 2 * math.sqrt(share / (1 - share))


@pytest.mark.parametrize("vocab_size", [2, 3, 50, 4096, ROBERTA, RELEASED])
def test_the_integral_agrees_with_gauss_hermite(vocab_size):
    for gap in (0.0, 0.5, 2.0, 4.0, 5.0, 7.0):
        got = float(recoverability(share_of_gap(gap), vocab_size))
        assert abs(got - gauss_hermite(gap, vocab_size)) < 1e-6


@pytest.mark.parametrize("vocab_size", [2, 3, 1000, RELEASED, 10_000_000])
def test_pure_noise_recovers_by_chance_and_a_clean_token_always(vocab_size):
    assert float(recoverability(0.0, vocab_size)) == pytest.approx(1 / vocab_size, rel=1e-9)
    assert float(recoverability(1.0, vocab_size)) == pytest.approx(1.0, abs=1e-14)


def test_two_tokens_have_the_closed_form():
    # the difference of two normals is a normal of variance 2
    for gap in (0.0, 0.3, 1.0, 4.0):
        expected = 0.5 * math.erfc(-gap / 2)
        assert float(recoverability(share_of_gap(gap), 2)) == pytest.approx(expected, rel=1e-12)


def test_recoverability_rises_with_the_signal_and_falls_with_the_vocabulary():
    shares = torch.linspace(0, 0.9, 200, dtype=torch.float64)
    curves = torch.stack([recoverability(shares, size) for size in (2, 10, 1000, RELEASED)])
    assert curves.dtype == torch.float64
    assert (curves.diff(dim=1) > 0).all() and (curves.diff(dim=0) < 0).all()


def test_recoverability_keeps_the_shape():
    shares = torch.rand(3, 1, 4)
    got = recoverability(shares, 100)
    assert got.shape == (3, 1, 4) and got.dtype == torch.float64
    assert recoverability(float(shares[2, 0, 1]), 100).shape == ()
    assert float(got[2, 0, 1]) == pytest.approx(float(recoverability(float(shares[2, 0, 1]), 100)))


# --- times ---


@pytest.mark.parametrize(
    "vocab_size, levels, times",
    [(size, ACCURACIES, times) for size, times in PUBLISHED.items()]
    + [(RELEASED, [(i + 0.5) / 10 for i in range(10)], MIDPOINTS)],
)
def test_accuracies_are_reached_at_the_known_times(vocab_size, levels, times):
    before, after = (
        recoverability(alpha_bar(torch.tensor(times, dtype=torch.float64) + shift), vocab_size)
        for shift in (-0.002, 0.002)
    )
    levels = torch.tensor(levels, dtype=torch.float64)
    assert (before > levels).all() and (after < levels).all()


@pytest.mark.parametrize("num_steps", [1, 2, 10, 1000])
@pytest.mark.parametrize("vocab_size", [2, 100, RELEASED])
def test_the_grid_has_equal_steps_of_recoverability_from_pure_noise_to_clean_text(
    num_steps, vocab_size
):
    grid = recoverability_grid(num_steps, alpha_bar, vocab_size)
    assert grid.shape == (num_steps,) and grid.dtype == torch.float64
    assert grid[0] == 1.0 and (grid.float().diff() < 0).all() and grid[-1] > 0
    levels = torch.cat([recoverability(alpha_bar(grid), vocab_size), torch.ones(1).double()])
    steps = levels.diff()
    expected = (1 - 1 / vocab_size) / num_steps
    assert (steps - expected).abs().max() < 1e-7


def test_the_grid_follows_other_schedules():
    scheduler = RenoisingScheduler(vocab_size=RELEASED, beta_schedule="linear")
    grid = recoverability_grid(8, scheduler.alpha_bar, 1000)
    levels = recoverability(scheduler.alpha_bar(grid), 1000)
    assert (levels[1:] - torch.arange(1, 8) / 8).abs().max() < 2e-3


# --- density ---


@pytest.mark.parametrize("uniform_share", [0.0, 0.3, 1.0])
def test_a_grid_with_a_uniform_share_has_equal_steps_of_the_mixture(uniform_share):
    scheduler = RenoisingScheduler(vocab_size=RELEASED)
    times = recoverability_grid(16, scheduler.alpha_bar, RELEASED, uniform_share)
    told = recoverability(scheduler.alpha_bar(times), RELEASED)
    done = (1 - uniform_share) * (told - told[0]) / (1 - told[0]) + uniform_share * (1 - times)
    want = torch.arange(16, dtype=torch.float64) / 16
    torch.testing.assert_close(done, want, rtol=0, atol=1e-9)
    if uniform_share > 0:  # the quantiles of the density of training times
        density = RecoverabilityDensity(scheduler.alpha_bar, RELEASED, uniform_share)
        torch.testing.assert_close(density.sample(1 - want), times, rtol=0, atol=1e-3)


def test_the_density_is_that_of_its_samples():
    density = RecoverabilityDensity(alpha_bar, RELEASED)
    count = 200_000
    times = density.sample(torch.rand(count, dtype=torch.float64))
    edges = torch.tensor([0, 0.1, 0.18, 0.2, 0.23, 0.26, 0.3, 0.35, 0.45, 0.7, 1]).double()
    seen = torch.histogram(times, edges).hist
    centres = [torch.linspace(a, b, 4001).double()[:-1] + (b - a) / 8000 for a, b in
               zip(edges.tolist(), edges.tolist()[1:])]
    mass = torch.stack([density.pdf(c).mean() for c in centres]) * edges.diff()
    assert float(mass.sum()) == pytest.approx(1, abs=1e-4)
    assert chi_squared(seen, count * mass) < 27.9  # 9 degrees of freedom, 99.9th percentile
    uniform = count * edges.diff()
    assert chi_squared(seen, uniform) > 1000
    bare = RecoverabilityDensity(alpha_bar, RELEASED, uniform_share=0.11)
    wrong = torch.stack([bare.pdf(c).mean() for c in centres]) * edges.diff()
    assert chi_squared(seen, count * wrong) > 60


def chi_squared(seen: torch.Tensor, expected: torch.Tensor) -> float:
    return float(((seen - expected) ** 2 / expected).sum())


def test_the_density_is_even_in_recoverability_but_for_its_uniform_share():
    density = RecoverabilityDensity(alpha_bar, RELEASED, uniform_share=0.2)
    times = recoverability_grid(20, alpha_bar, RELEASED)[1:]
    levels = recoverability(alpha_bar(times), RELEASED)
    # F(t) = 0.2 t + 0.8 (1 - R(t)), but for the 1/V that R keeps at t = 1
    got = density.sample(0.2 * times + 0.8 * (1 - levels))
    torch.testing.assert_close(got, times, rtol=0, atol=1e-4)
    late = density.pdf(torch.tensor([0.9, 1.0]))
    assert (late >= 0.2).all() and (late < 0.21).all()


def test_a_uniform_share_of_one_is_the_uniform_density():
    density = RecoverabilityDensity(alpha_bar, 1000, uniform_share=1.0)
    uniforms = torch.rand(50)
    torch.testing.assert_close(density.sample(uniforms), uniforms, rtol=0, atol=1e-6)
    assert torch.allclose(density.pdf(uniforms), torch.ones(50))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sampled_times_rise_with_the_uniforms_and_stay_inside(dtype):
    density = RecoverabilityDensity(alpha_bar, RELEASED)
    times = density.sample(torch.linspace(0, 1, 1001, dtype=dtype).view(7, 143))
    assert times.shape == (7, 143) and times.dtype == dtype
    assert (times.flatten().diff() > 0).all()
    assert times.min() > 0 and times.max() == 1
    assert density.pdf(times).isfinite().all() and density.pdf(times).dtype == dtype
    assert (density.pdf(torch.tensor([0.0, 1.0])) > 0).all()


# --- the simplex value ---


@pytest.mark.parametrize("vocab_size", [1000, ROBERTA, RELEASED])
def test_the_automatic_simplex_value_keeps_the_clean_token_s_share(vocab_size):
    weight = math.exp(2 * auto_simplex_value(vocab_size))
    assert weight / (weight + vocab_size - 1) == pytest.approx(0.305, abs=0.01)


def test_the_automatic_simplex_value_is_tess_s_own_at_its_vocabulary():
    assert auto_simplex_value(ROBERTA) == pytest.approx(5.0, abs=0.01)
    assert auto_simplex_value(3) > 0


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="at least 3 tokens, got 2"):
        auto_simplex_value(2)
    with pytest.raises(ValueError, match="vocab_size must be at least 2, got 1"):
        recoverability(0.5, 1)
    for bad in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"alpha_bar must be in \[0, 1\]"):
            recoverability(torch.tensor([0.5, bad]), 10)
    with pytest.raises(ValueError, match="num_steps must be at least 1"):
        recoverability_grid(0, alpha_bar, 10)
    for bad in (0.0, 1.5):
        with pytest.raises(ValueError, match=r"uniform_share must be in \(0, 1\]"):
            RecoverabilityDensity(alpha_bar, 10, uniform_share=bad)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_grid_above_a_lowest_time_has_equal_steps_down_to_it(share):
    vocabulary, lowest, steps = 4096, 0.3, 5
    times = recoverability_grid(steps, alpha_bar, vocabulary, share, lowest)
    assert times[0] == 1 and times[-1] > lowest
    told = recoverability(alpha_bar(torch.cat([times, times.new_tensor([lowest])])), vocabulary)
    done = torch.lerp(
        (told - told[0]) / (1 - told[0]), 1 - torch.cat([times, times.new_tensor([lowest])]), share
    )
    torch.testing.assert_close(done.diff(), (done[-1] / steps).expand(steps), rtol=0, atol=1e-9)
    whole = recoverability_grid(steps, alpha_bar, vocabulary, share)
    assert torch.equal(whole, recoverability_grid(steps, alpha_bar, vocabulary, share, 0.0))
    assert whole[-1] < times[-1]
    with pytest.raises(ValueError, match=r"lowest must be in \[0, 1\), got 1.0"):
        recoverability_grid(steps, alpha_bar, vocabulary, share, 1.0)
