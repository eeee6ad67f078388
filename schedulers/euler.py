"""Euler's method on the straight line between a text and noise."""

# B examples, L positions, V vocabulary

import torch
from diffusers import SchedulerMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from tess.schedulers.carried import CarriedSimplex
from tess.schedulers.simplex import NUM_TOP, SoftTokens
from tess.schedulers.soft import NUM_SOFT_TOKENS, Sample, SoftScheduler, SoftSchedulerOutput


class SimplexEulerScheduler(SoftScheduler, SchedulerMixin):
    """Euler steps of the probability flow in the linear interpolation (flow matching, rectified
    flow: arXiv 2210.02747, 2209.03003).

    y = x / (sqrt(a) + sqrt(1 - a)) lies at s = sqrt(1 - a) / (sqrt(a) + sqrt(1 - a)) on the line
    y = (1 - s) x0 + s k eps, whose flow is dy/ds = (y - x0) / s. A step to s' is
    y' = y + (s' - s) (y - x0) / s. The sample stays x, which the denoiser reads.

    Over such a step x0 is held, and then Euler's is the exact solution of the flow: **the
    deterministic sampler is DDIM with eta = 0**, in exact arithmetic the same numbers. It is here
    under the name and with the options under which others look for it, not as another method.

    Args: those of `SoftScheduler`, and
        stochastic_sampling: draw the whole noise again at every step, y' = (1 - s') x0 + s' k eps:
            the re-noising sampler with the soft prediction in place of a token.

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
        stochastic_sampling: bool = False,
    ) -> None:
        self._set_up()

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
        """One step of the reverse process; arguments as in `SimplexDDIMScheduler.step`."""
        now, then = self.scales(float(timestep)), self.scales(self.previous_timestep(timestep))
        state, clean = self._read(model_output, sample)
        if self.config.stochastic_sampling:
            signal, noise = then  # of x' = (sqrt(a') + sqrt(1 - a')) y'
            own = {} if isinstance(state, CarriedSimplex) else {"generator": generator}
            moved = state.renoised(noise, [(signal, clean)], **own)
        else:
            scale, factor = euler_factors(now, then)
            moved = state.moved(scale, [(factor, clean)])
        return self._result(moved, clean, sample, return_dict)


def euler_factors(now: tuple[float, float], then: tuple[float, float]) -> tuple[float, float]:
    """A and C of Euler's step x' = A x + C x0.

    now, then: sqrt(alpha_bar) and sqrt(1 - alpha_bar) before and after the step.
    """
    length, next_length = sum(now), sum(then)
    s, next_s = now[1] / length, then[1] / next_length
    kept = 1 + (next_s - s) / s  # of y; the rest of the step is x0
    return next_length / length * kept, next_length * (1 - kept)
