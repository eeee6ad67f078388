"""DPM-Solver++: multistep solver of the probability flow, second order."""

# B examples, L positions, V vocabulary

import math
from dataclasses import replace

import torch
from diffusers import SchedulerMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from tess.schedulers.simplex import NUM_TOP, SoftTokens
from tess.schedulers.soft import NUM_SOFT_TOKENS, Sample, SoftScheduler, SoftSchedulerOutput


class SimplexDPMSolverScheduler(SoftScheduler, SchedulerMixin):
    """DPM-Solver++(2M) (Lu et al., arXiv 2211.01095, algorithm 2) on the noised simplex.

    With lambda = log(sqrt(a) / sqrt(1 - a)) and h = lambda' - lambda, a step is

        x' = sqrt(1 - a') / sqrt(1 - a) x - sqrt(a') (e^-h - 1) D,
        D = (1 + 1 / 2r) x0 - 1 / 2r x0_before,    r = h_before / h,

    where x0_before is what the step before predicted; the sample keeps it in its `history`. The
    first step has none, and the step to t = 0 has an infinite h: both take D = x0, which is DDIM's
    step.

    Args: those of `SoftScheduler`, and
        solver_order: 2, or 1 for D = x0 throughout.

    Raises ValueError for values out of range and for unknown names.
    """

    @register_to_config
    def __init__(
        self,
        *,  # diffusers takes what is given by position for a default, which from_config drops
        vocab_size: int | None = None,
        num_train_timesteps: int = 5000,
        simplex_value: float | str = "auto",
        beta_schedule: str = "squaredcos_improved_ddpm",
        cosine_s: float = 1e-4,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        timestep_spacing: str = "recoverability",
        timestep_density: str = "recoverability",
        timestep_uniform_share: float = 0.5,
        lowest_timestep: float = 0.0,
        noise: str = "order_statistics",
        num_top: int = NUM_TOP,
        prediction_type: str = "logits",
        num_soft_tokens: int = NUM_SOFT_TOKENS,
        solver_order: int = 2,
    ) -> None:
        self._set_up()
        if solver_order not in (1, 2):
            raise ValueError(f"solver_order must be 1 or 2, got {solver_order!r}")

    @torch.no_grad()
    def step(
        self,
        model_output: Tensor | SoftTokens,
        timestep: Tensor | float,
        sample: Sample | Tensor,
        *,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> SoftSchedulerOutput | tuple[Sample | Tensor, Tensor | SoftTokens]:
        """One step of the reverse process; arguments as in `SimplexDDIMScheduler.step`.

        There is no noise to draw, so `generator` has no part. Raises ValueError for a plain tensor
        with solver_order=2, which has no place for the earlier prediction.
        """
        second = self.config.solver_order == 2
        if second and isinstance(sample, Tensor):
            raise ValueError(
                "a tensor has no place for the earlier prediction that solver_order=2 needs: pass "
                "DenseSimplex(tensor), or take solver_order=1"
            )
        index = self.index_of(timestep)
        times = [float(timestep), self.previous_timestep(timestep)]
        state, clean = self._read(model_output, sample)
        before = state.history[0] if second and state.history and index else None
        if before is not None:
            times.insert(0, float(self.timesteps[index - 1]))
        scale, factors = dpm_solver_factors([self.scales(t) for t in times])
        predictions = (clean,) if before is None else (clean, before)
        moved = state.moved(scale, list(zip(factors, predictions, strict=False)))
        if second:
            moved = replace(moved, history=(clean,))
        return self._result(moved, clean, sample, return_dict)


def dpm_solver_factors(scales: list[tuple[float, float]]) -> tuple[float, list[float]]:
    """A and the C_j, latest first, of x' = A x + sum_j C_j x0_j (arXiv 2211.01095, algorithm 2).

    scales: sqrt(alpha_bar) and sqrt(1 - alpha_bar) at the time before (for second order), now and
    then, in that order. At t = 0 there is no second order.
    """
    (signal, noise), (next_signal, next_noise) = scales[-2:]
    step = _log_snr(next_signal, next_noise) - _log_snr(signal, noise)
    whole = -next_signal * math.expm1(-step)
    if len(scales) == 2 or step == math.inf:
        return next_noise / noise, [whole]
    ratio = (_log_snr(signal, noise) - _log_snr(*scales[0])) / step
    return next_noise / noise, [whole * (1 + 0.5 / ratio), -whole * 0.5 / ratio]


def _log_snr(signal: float, noise: float) -> float:
    """lambda; infinite at t = 0."""
    return math.log(signal) - math.log(noise) if noise > 0 else math.inf
