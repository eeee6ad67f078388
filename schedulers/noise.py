"""Noise schedules: how much of the clean simplex is left at time t, as functions on [0, 1].

alpha_bar is the share of the signal's variance: x_t = sqrt(alpha_bar) S + sqrt(1 - alpha_bar) eps.
It is 1 at t = 0 for every schedule.
"""

import functools
import math

import torch
from torch import Tensor

MAX_BETA = 0.999
SIGMOID_RANGE = 6.0

SCHEDULES = ("squaredcos_improved_ddpm", "squaredcos_cap_v2", "linear", "scaled_linear", "sigmoid")


def alpha_bar(
    t: Tensor | float,
    schedule: str = "squaredcos_improved_ddpm",
    s: float = 1e-4,
    *,
    num_train_timesteps: int = 5000,
    beta_start: float = 1e-4,
    beta_end: float = 0.02,
) -> Tensor:
    """The cumulative signal share at time t in [0, 1], computed in float64.

    squaredcos_improved_ddpm: f(t) / f(0) with f(t) = cos^2(((t + s) / (1 + s)) pi / 2)
        (Nichol and Dhariwal, arXiv 2102.09672, eq. 17; TESS takes s = 1e-4, images take 0.008).
    squaredcos_cap_v2: the same with every step's beta at most 0.999: t = 1 is not pure noise.
    linear, scaled_linear, sigmoid: prod(1 - beta_j) over the first t * num_train_timesteps of betas
        that rise from beta_start to beta_end linearly, as squares of a line, or along a sigmoid on
        [-6, 6]; between two steps log alpha_bar is interpolated. Only these use beta_start and
        beta_end.

    Returns a tensor of t's shape and floating dtype (float64 for a Python number).
    Raises ValueError for an unknown schedule and for t outside [0, 1].
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"unknown noise schedule {schedule!r}; known are {', '.join(SCHEDULES)}")
    t = torch.as_tensor(t, dtype=None if isinstance(t, Tensor) else torch.float64)
    dtype = t.dtype if t.is_floating_point() else torch.float64
    time = t.double()
    if time.numel() and not (0.0 <= time.min() and time.max() <= 1.0):
        low, high = float(time.min()), float(time.max())
        raise ValueError(f"times must be in [0, 1], got values from {low} to {high}")
    if schedule == "squaredcos_improved_ddpm":
        return _squared_cosine(time, s).to(dtype)
    if schedule == "squaredcos_cap_v2":
        # Only the last step's beta can pass the cap, because f is 0 at t = 1 alone.
        floor = (1 - MAX_BETA) * _squared_cosine(time.new_tensor(1 - 1 / num_train_timesteps), s)
        return _squared_cosine(time, s).maximum(floor).to(dtype)
    table = _log_alpha_bar_table(schedule, num_train_timesteps, beta_start, beta_end)
    table = table.to(time.device)
    place = time * num_train_timesteps
    low = place.floor().long().clamp(max=num_train_timesteps - 1)
    return torch.lerp(table[low], table[low + 1], place - low).exp().to(dtype)


def _squared_cosine(time: Tensor, s: float) -> Tensor:
    """f(time) / f(0) in time's own precision."""

    def f(u: Tensor) -> Tensor:
        return torch.cos((u + s) / (1 + s) * (math.pi / 2)).square()

    return f(time) / f(time.new_zeros(()))


@functools.lru_cache(maxsize=16)
def _log_alpha_bar_table(schedule: str, steps: int, start: float, end: float) -> Tensor:
    """log alpha_bar at i / steps for i = 0 .. steps, so entry 0 is 0."""
    if schedule == "sigmoid":
        line = torch.linspace(-SIGMOID_RANGE, SIGMOID_RANGE, steps, dtype=torch.float64)
        betas = torch.sigmoid(line) * (end - start) + start
    elif schedule == "scaled_linear":
        betas = torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64).square()
    else:
        betas = torch.linspace(start, end, steps, dtype=torch.float64)
    return torch.cat([torch.zeros(1, dtype=torch.float64), torch.log1p(-betas).cumsum(0)])
