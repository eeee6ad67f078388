"""DDIM: one noise over all steps, or part of it drawn again."""

# B examples, L positions, V vocabulary

import math

import torch
from diffusers import SchedulerMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from tess.schedulers.carried import CarriedSimplex
from tess.schedulers.simplex import NUM_TOP, SoftTokens
from tess.schedulers.soft import NUM_SOFT_TOKENS, Sample, SoftScheduler, SoftSchedulerOutput


class SimplexDDIMScheduler(SoftScheduler, SchedulerMixin):
    """DDIM (Song, Meng and Ermon, arXiv 2010.02502) on the noised simplex.

    A step from signal share a to a' is its equation 12 with the predicted clean simplex x0 and
    noise of scale k:

        x' = sqrt(a') x0 + sqrt(1 - a' - sigma^2) (x - sqrt(a) x0) / sqrt(1 - a) + sigma k eps,
        sigma = eta sqrt((1 - a') / (1 - a)) sqrt(1 - a / a')    (equation 16).

    Args: those of `SoftScheduler`, and
        eta: in [0, 1]. 0 is deterministic; 1 is the ancestral step of DDPM. Above 0 new noise meets
            the old, which only noise="dense" can add.

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
        eta: float = 0.0,
    ) -> None:
        self._set_up()
        if not 0 <= eta <= 1:
            raise ValueError(f"eta must be in [0, 1], got {eta}")
        if eta > 0 and self.reads == "soft_tokens":
            raise ValueError(_needs_dense(eta))

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
        """One step of the reverse process.

        model_output: logits [B, L, V] (or x0, see `prediction_type`); `SoftTokens` for a
        `CarriedSimplex`. timestep: the time of `sample`, one of `timesteps`. Noise of samples with
        keys follows from them; `generator` serves the others.
        """
        now, then = self.scales(float(timestep)), self.scales(self.previous_timestep(timestep))
        state, clean = self._read(model_output, sample)
        scale, factor, sigma = ddim_factors(now, then, self.config.eta)
        additions = [(factor, clean)]
        if sigma > 0:
            if isinstance(state, CarriedSimplex):
                raise ValueError(_needs_dense(self.config.eta))
            additions.append((sigma * state.simplex_value, state.fresh_noise(generator)))
        return self._result(state.moved(scale, additions), clean, sample, return_dict)


def ddim_factors(
    now: tuple[float, float], then: tuple[float, float], eta: float = 0.0
) -> tuple[float, float, float]:
    """A, C and sigma of x' = A x + C x0 + sigma k eps (arXiv 2010.02502, equations 12 and 16).

    now, then: sqrt(alpha_bar) and sqrt(1 - alpha_bar) before and after the step.
    """
    (signal, noise), (next_signal, next_noise) = now, then
    sigma = eta * next_noise / noise * math.sqrt(max(0.0, 1 - (signal / next_signal) ** 2))
    scale = math.sqrt(max(0.0, next_noise**2 - sigma**2)) / noise
    return scale, next_signal - scale * signal, sigma


def _needs_dense(eta: float) -> str:
    return (
        "eta above 0 adds new noise to the old, which order statistics cannot hold: take "
        f'noise="dense" or eta=0, got eta={eta}'
    )
