"""The learned density of training times, and the monotone fit under it."""

import pytest
import torch

from tess.schedulers.density import LearnedDensity, pool_adjacent_violators
from tess.schedulers.renoising import RenoisingScheduler
from tess.training.start import learned_density


def rising_fit(values: torch.Tensor) -> torch.Tensor:
    """Isotonic regression by its max-min formula: max over i <= j of min over k >= j of means."""
    fit = []
    for j in range(len(values)):
        lows = (
            min(values[i : k + 1].mean().item() for k in range(j, len(values)))
            for i in range(j + 1)
        )
        fit.append(max(lows))
    return torch.tensor(fit, dtype=torch.float64)


@pytest.mark.parametrize("count", [1, 2, 7, 30])
def test_the_fit_is_isotonic_regression(count):
    for _ in range(20):
        values = torch.randn(count, dtype=torch.float64) + torch.linspace(0, 1, count)
        got = pool_adjacent_violators(values)
        assert (got.diff() >= 0).all()
        torch.testing.assert_close(got, rising_fit(values))
    rising = torch.arange(count).double()
    assert torch.equal(pool_adjacent_violators(rising), rising)


def test_mass_goes_where_the_loss_rises():
    density = LearnedDensity(torch.tensor([0.0, 0.0, 1.0, 4.0, 4.0, 4.0]), uniform_share=0.1)
    times = density.sample(torch.linspace(1e-4, 1, 10_000))
    assert (times.diff() >= 0).all() and times.min() > 0 and times.max() == 1
    # at the bins' edges the loss is 0, 0, 0.5, 2.5, 4, 4, 4: between its averages in their middles
    for cell, mass in enumerate((0, 0.125, 0.5, 0.375, 0, 0)):
        inside = ((times > cell / 6) & (times <= (cell + 1) / 6)).double()
        assert inside.mean().item() == pytest.approx(0.9 * mass + 0.1 / 6, abs=1e-3)


def test_it_learns_the_profile_of_the_losses_and_leaves_out_what_is_not_finite():
    density = LearnedDensity(torch.linspace(0, 5, 16), decay=0.9)
    profile = lambda t: 3 * (t > 0.5).float()  # noqa: E731
    for _ in range(300):
        times = torch.rand(16)
        density.update(times, profile(times))
    want = 3 * (torch.arange(16) >= 8).double()
    assert (density.losses - want).abs().max() < 0.1
    times = density.sample(torch.rand(4_000))
    assert ((times > 0.4) & (times < 0.6)).double().mean() > 0.85
    before = density.losses.clone()
    density.update(torch.tensor([0.1, 0.2]), torch.tensor([float("nan"), float("inf")]))
    assert torch.equal(density.losses, before)


def test_a_share_of_the_mass_stays_uniform():
    density = LearnedDensity(torch.tensor([0.0, 0.0, 0.0, 1.0]), uniform_share=0.2)
    assert density.pdf(torch.linspace(0, 1, 101)).min() == pytest.approx(0.2)
    flat = LearnedDensity(torch.tensor([0.0, 1.0]))
    flat.load(torch.tensor([1.0, 1.0]))
    assert torch.equal(flat.sample(torch.tensor([0.25, 0.5])), torch.tensor([0.25, 0.5]))


def test_it_starts_near_the_density_that_is_even_in_recoverability():
    scheduler = RenoisingScheduler(vocab_size=32_000)
    uniforms = torch.linspace(0.01, 1, 100)
    learned = learned_density(scheduler).sample(uniforms)
    assert (learned - scheduler.training_timesteps(uniforms)).abs().max() < 0.03


def test_its_state_is_its_losses():
    one, other = (LearnedDensity(torch.linspace(0, top, 8)) for top in (1, 2))
    one.update(torch.rand(5), torch.rand(5))
    other.load(one.losses)
    uniforms = torch.rand(50)
    assert torch.equal(one.sample(uniforms), other.sample(uniforms))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"uniform_share": 0.0}, r"uniform_share must be in \(0, 1\], got 0.0"),
        ({"decay": 1.0}, r"decay must be in \[0, 1\), got 1.0"),
        ({"losses": torch.ones(4)}, "rise from the first to the last"),
        ({"losses": torch.ones(1)}, r"losses must be \[M\] with M > 1"),
    ],
)
def test_mistakes_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        LearnedDensity(**{"losses": torch.linspace(0, 1, 4)} | arguments)
    with pytest.raises(ValueError, match=r"expected losses \[4\], got \[5\]"):
        LearnedDensity(torch.linspace(0, 1, 4)).load(torch.ones(5))
