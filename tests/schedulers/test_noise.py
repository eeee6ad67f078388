"""Golden values of the noise schedules, computed here from the papers' equations in float64."""

import math

import pytest
import torch

from tess.schedulers.noise import SCHEDULES, alpha_bar
from tess.schedulers.renoising import RenoisingScheduler


def cosine_share(t: float, s: float = 1e-4) -> float:
    """arXiv 2102.09672, eq. 17."""
    return math.cos((t + s) / (1 + s) * math.pi / 2) ** 2 / math.cos(s / (1 + s) * math.pi / 2) ** 2


def test_improved_cosine_has_the_values_of_the_equation():
    times = [0.0, 0.1, 0.25, 0.5, 0.7342, 0.999, 1.0]
    got = alpha_bar(torch.tensor(times, dtype=torch.float64))
    expected = torch.tensor([cosine_share(t) for t in times], dtype=torch.float64)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-15)
    # a figure that can be checked by hand: cos^2(pi/4) at the middle, moved a little by s
    assert abs(float(got[3]) - 0.5) < 2e-4


def test_linear_schedules_are_the_product_over_steps():
    steps, start, end = 50, 1e-3, 0.3
    grids = {
        "linear": [start + (end - start) * i / (steps - 1) for i in range(steps)],
        "scaled_linear": [
            (start**0.5 + (end**0.5 - start**0.5) * i / (steps - 1)) ** 2 for i in range(steps)
        ],
        "sigmoid": [
            start + (end - start) / (1 + math.exp(6 - 12 * i / (steps - 1))) for i in range(steps)
        ],
    }
    for name, betas in grids.items():
        for i in (0, 1, 17, steps):
            got = alpha_bar(
                i / steps, name, num_train_timesteps=steps, beta_start=start, beta_end=end
            )
            assert float(got) == pytest.approx(math.prod(1 - b for b in betas[:i]), rel=1e-10)


def test_capped_cosine_keeps_a_thousandth_of_the_last_but_one_step():
    steps = 40
    for i in (0, 1, 20, 39):
        got = float(alpha_bar(i / steps, "squaredcos_cap_v2", num_train_timesteps=steps))
        assert got == pytest.approx(cosine_share(i / steps), rel=1e-10)
    last = float(alpha_bar(1.0, "squaredcos_cap_v2", num_train_timesteps=steps))
    assert last == pytest.approx(0.001 * cosine_share(39 / steps), rel=1e-10)


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_start_clean_and_never_rise(name):
    times = torch.linspace(0, 1, 501)
    share = alpha_bar(times, name)
    assert share.dtype == torch.float32 and share[0] == 1
    assert (share[1:] <= share[:-1]).all() and 0 <= share[-1] < 1e-3


def test_schedule_mistakes_are_named():
    with pytest.raises(ValueError, match="unknown noise schedule 'cosin'; known are squaredcos"):
        alpha_bar(0.5, "cosin")
    with pytest.raises(ValueError, match=r"times must be in \[0, 1\]"):
        alpha_bar(torch.tensor([0.5, 1.5]))
    with pytest.raises(ValueError, match="unknown beta_schedule 'cosin'"):
        RenoisingScheduler(vocab_size=7, beta_schedule="cosin")
