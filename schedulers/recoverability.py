"""Recoverability: how likely the arg-max of a noised simplex is the token that was noised.

In x = sqrt(a) S(y) + sqrt(1 - a) k eps the token's own coordinate lies 2k sqrt(a) above the others
before the noise, which has standard deviation k sqrt(1 - a). Their ratio d = 2 sqrt(a / (1 - a))
does not depend on k, and with phi, Phi the standard normal density and distribution

    P(arg-max x = y) = integral of Phi(g + d)^(V - 1) phi(g) dg:

the chance that a normal, raised by d, is above V - 1 others. It falls from 1 at t = 0 to 1/V at
pure noise, for large V within a small part of [0, 1]: times before that are trivial, times after it
say nothing of the token. A density of training times and a grid of sampling steps can follow it.
"""

# V vocabulary, N steps, Q points of the integral

import math
from collections.abc import Callable

import torch
from torch import Tensor

from tess.schedulers.density import TableDensity

# Equal steps converge faster than any power of the step for this integrand: these give it to 1e-14
# up to V = 10^7. 256 nodes of Gauss-Hermite leave 3e-6 at 10^6, and numpy has no weights for 400.
INTEGRAL_LIMIT = 10.0
INTEGRAL_STEPS = 400
BISECTIONS = 60
# ln V - 2k at which a clean vertex of TESS (k = 5, V = 50,265) has its 0.305 of the mass
CLEAN_OFFSET = 0.82


def recoverability(alpha_bar: Tensor | float, vocab_size: int) -> Tensor:
    """Probability that the noised arg-max is the true token, at signal shares alpha_bar in [0, 1].

    Returns float64 in the shape of alpha_bar: 1/V at 0, 1 at 1. Works with 401 numbers a value.
    Raises ValueError for shares outside [0, 1] and for a vocabulary of fewer than 2 tokens.
    """
    if vocab_size < 2:
        raise ValueError(f"vocab_size must be at least 2, got {vocab_size}")
    share = torch.as_tensor(alpha_bar, dtype=torch.float64)
    if not ((share >= 0) & (share <= 1)).all():
        raise ValueError("alpha_bar must be in [0, 1]")
    gap = 2 * (share / (1 - share)).sqrt()
    points_Q = torch.linspace(
        -INTEGRAL_LIMIT,
        INTEGRAL_LIMIT,
        INTEGRAL_STEPS + 1,
        dtype=torch.float64,
        device=share.device,
    )
    log_below = (vocab_size - 1) * torch.special.log_ndtr(points_Q + gap[..., None])
    return log_below.exp() @ (-points_Q.square() / 2).softmax(dim=0)


def recoverability_grid(
    num_steps: int,
    alpha_bar_function: Callable[[Tensor], Tensor],
    vocab_size: int,
    uniform_share: float = 0.0,
    lowest: float = 0.0,
) -> Tensor:
    """N times [N] in float64, falling from exactly 1, at equal steps of recoverability.

    Time i has recoverability c + (1 - c) i/N with c that at t = 1, as the uniform grid has times
    1 - i/N: the step after the last time lands on the clean text. With `uniform_share` u the steps
    are equal in (1 - u) (recoverability - c) / (1 - c) + u (1 - t) instead, the distribution of
    `RecoverabilityDensity`; u = 1 is the uniform grid. With `lowest` above 0 the steps are equal
    between 1 and that time.
    Raises ValueError for num_steps below 1, shares outside [0, 1] and `lowest` outside [0, 1).
    """
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}")
    if not 0 <= uniform_share <= 1:
        raise ValueError(f"uniform_share must be in [0, 1], got {uniform_share}")
    if not 0 <= lowest < 1:
        raise ValueError(f"lowest must be in [0, 1), got {lowest}")
    chance = recoverability(alpha_bar_function(torch.ones((), dtype=torch.float64)), vocab_size)

    def done(times: Tensor) -> Tensor:
        told = recoverability(alpha_bar_function(times), vocab_size)
        return torch.lerp((told - chance) / (1 - chance), 1 - times, uniform_share)

    parts_N = torch.arange(num_steps, dtype=torch.float64) / num_steps
    times_N = _latest(done, parts_N * done(torch.tensor(lowest, dtype=torch.float64)))
    times_N[0] = 1.0
    return times_N


def _latest(falling: Callable[[Tensor], Tensor], values: Tensor) -> Tensor:
    """The latest times in [0, 1] at which the falling function has at least the values."""
    early, late = torch.zeros_like(values), torch.ones_like(values)
    for _ in range(BISECTIONS):
        middle = (early + late) / 2
        above = falling(middle) >= values
        early, late = torch.where(above, middle, early), torch.where(above, late, middle)
    return early  # 60 halvings of a distance to 1 are exactly 1 in float64


class RecoverabilityDensity(TableDensity):
    """A density of training times on (0, 1]: equal mass for equal steps of recoverability.

    `uniform_share` of the mass is uniform in t instead, because generation starts at pure noise and
    the density would hardly train there. The distribution is a table over `cells` equal cells of
    time, linear in between, so that `pdf` is exactly the density of `sample`.

    alpha_bar_function: times in float64 to signal shares, falling from 1 at time 0.
    Raises ValueError unless uniform_share is in (0, 1].
    """

    def __init__(
        self,
        alpha_bar_function: Callable[[Tensor], Tensor],
        vocab_size: int,
        uniform_share: float = 0.1,
        cells: int = 2048,
    ) -> None:
        if not 0 < uniform_share <= 1:
            raise ValueError(f"uniform_share must be in (0, 1], got {uniform_share}")
        times = torch.linspace(0, 1, cells + 1, dtype=torch.float64)
        recovered = recoverability(alpha_bar_function(times), vocab_size)
        lost = (recovered[0] - recovered) / (recovered[0] - recovered[-1])
        super().__init__(torch.lerp(lost, times, uniform_share))


def auto_simplex_value(vocab_size: int) -> float:
    """k = (ln V - 0.82) / 2, at which a clean vertex gives its token 0.305 of the mass at every V.

    That is TESS's own share (k = 5, V = 50,265): softmax of a vertex is e^2k / (e^2k + V - 1).
    Raises ValueError below 3 tokens, where k would not be positive.
    """
    if vocab_size < 3:
        raise ValueError(f"an automatic simplex value needs at least 3 tokens, got {vocab_size}")
    return (math.log(vocab_size) - CLEAN_OFFSET) / 2
