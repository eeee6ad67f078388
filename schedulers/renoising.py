"""The sampler of TESS and SSD-LM: predict the text, snap it to a vertex, noise it again, less."""

# B examples, L positions, V vocabulary

import math
from dataclasses import dataclass, replace
from numbers import Integral, Real

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from tess.schedulers.noise import SCHEDULES, alpha_bar
from tess.schedulers.recoverability import (
    RecoverabilityDensity,
    auto_simplex_value,
    recoverability_grid,
)
from tess.schedulers.simplex import NUM_TOP, NoisedSimplex, check_noise, dense_logits

SPACINGS = ("recoverability", "uniform")

TIME_TOLERANCE = 1e-6
"""Two times of a grid closer than this are one: float32 has 6e-8 at 1."""


@dataclass
class RenoisingSchedulerOutput(BaseOutput):
    """Result of one step.

    prev_sample: the state at the next, less noisy time, of the kind of the sample that was given
        (a NoisedSimplex, or a dense [B, L, V] tensor).
    token_ids: [B, L], the tokens that were chosen; the text, at the last step.
    """

    prev_sample: NoisedSimplex | Tensor
    token_ids: Tensor


class RenoisingScheduler(SchedulerMixin, ConfigMixin):
    """Re-noising sampler (SSD-LM, arXiv 2210.17432, Algorithm 2; TESS, arXiv 2305.08379).

    A step from t to t' takes tokens and gives sqrt(a) S(tokens) + sqrt(1 - a) k eps with
    a = alpha_bar(t') and fresh noise. Nothing of the old sample is kept. Times are reals in (0, 1],
    decreasing; the last step lands on the clean vertex at t = 0.

    The defaults follow the vocabulary (docs/architecture.md, section 4);
    `RenoisingScheduler(vocab_size=V, **SCHEDULER_PRESETS["tess"])` has TESS's published settings.

    Args:
        vocab_size: V, the dimension of the simplex.
        num_train_timesteps: T, the number of discrete times in training; the most steps allowed.
        simplex_value: k, or "auto" for (ln V - 0.82) / 2, which is saved as a number.
        beta_schedule, cosine_s, beta_start, beta_end: see `tess.schedulers.noise.alpha_bar`.
        timestep_spacing: of sampling steps: "recoverability" (equal steps of the probability that
            a noised token can be told, `recoverability_grid`) or "uniform" (1, (N-1)/N, ..., 1/N).
        timestep_density: of training times: the same two names (`RecoverabilityDensity`).
        timestep_uniform_share: of both "recoverability" ways, the share that is uniform in t.
        noise: how noise is drawn, "order_statistics" or "dense" (`NoisedSimplex`).
        num_top: order statistics that are drawn exactly.

    Raises ValueError for values out of range and for unknown names.
    """

    order = 1

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
        noise: str = "order_statistics",
        num_top: int = NUM_TOP,
    ) -> None:
        if vocab_size is None or vocab_size < 2:
            raise ValueError(
                "the scheduler needs vocab_size, the number of tokens of the simplex (at least 2), "
                f"got {vocab_size}; a scheduler_config.json from before has none: add it there"
            )
        if num_train_timesteps < 1:
            raise ValueError(f"num_train_timesteps must be at least 1, got {num_train_timesteps}")
        self.register_to_config(simplex_value=resolve_simplex_value(simplex_value, vocab_size))
        if beta_schedule not in SCHEDULES:
            raise ValueError(
                f"unknown beta_schedule {beta_schedule!r}; known are {', '.join(SCHEDULES)}"
            )
        for name, value in (
            ("timestep_spacing", timestep_spacing),
            ("timestep_density", timestep_density),
        ):
            if value not in SPACINGS:
                raise ValueError(f"{name} must be one of {', '.join(SPACINGS)}, got {value!r}")
        if not 0 < timestep_uniform_share <= 1:
            raise ValueError(
                f"timestep_uniform_share must be in (0, 1], got {timestep_uniform_share}"
            )
        check_noise(noise, num_top)
        self.num_inference_steps: int | None = None
        self.timesteps: Tensor | None = None
        self._density: RecoverabilityDensity | None = None
        self._grids: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    def alpha_bar(self, t: Tensor | float) -> Tensor:
        """This scheduler's signal share at times t in [0, 1]."""
        return alpha_bar(
            t,
            self.config.beta_schedule,
            self.config.cosine_s,
            num_train_timesteps=self.config.num_train_timesteps,
            beta_start=self.config.beta_start,
            beta_end=self.config.beta_end,
        )

    def set_timesteps(
        self, num_inference_steps: int, device: str | torch.device | None = None
    ) -> None:
        """Choose N sampling steps; `timesteps` becomes [N] float32, from exactly 1 down."""
        most = self.config.num_train_timesteps
        if not isinstance(num_inference_steps, Integral):
            raise ValueError(f"num_inference_steps must be an integer, got {num_inference_steps!r}")
        if not 1 <= num_inference_steps <= most:
            raise ValueError(
                f"num_inference_steps must be from 1 to {most}, the number of training steps, "
                f"got {num_inference_steps}"
            )
        if num_inference_steps not in self._grids:  # the same for every batch of an evaluation
            self._grids[num_inference_steps] = self._grid(int(num_inference_steps))
        self.num_inference_steps = num_inference_steps
        self.timesteps = self._grids[num_inference_steps].to(device)

    def _grid(self, num_steps: int) -> Tensor:
        if self.config.timestep_spacing == "uniform":
            return torch.arange(num_steps, 0, -1, dtype=torch.float32) / num_steps
        share, size = self.config.timestep_uniform_share, self.config.vocab_size
        return recoverability_grid(num_steps, self.alpha_bar, size, share).float()

    def training_timesteps(self, uniforms: Tensor) -> Tensor:
        """Training times in (0, 1], from numbers that are uniform on (0, 1]; the same shape."""
        if self.config.timestep_density == "uniform":
            return uniforms
        return self.density().sample(uniforms)

    def density(self) -> RecoverabilityDensity:
        """The density of training times that is even in recoverability, whatever is configured."""
        if self._density is None:
            self._density = RecoverabilityDensity(
                self.alpha_bar, self.config.vocab_size, self.config.timestep_uniform_share
            )
        return self._density

    def scale_model_input(
        self, sample: NoisedSimplex | Tensor, timestep: Tensor | float | None = None
    ) -> NoisedSimplex | Tensor:
        """The sample itself: this process needs no scaling of the network's input."""
        return sample

    def initial(self, shape: tuple[int, int], keys: Tensor) -> NoisedSimplex:
        """Pure noise k eps at t = 1 for a [B, L] canvas, on the device of the keys ([B] int64)."""
        ones_B1 = torch.ones(shape[0], 1, device=keys.device)
        token_ids = torch.zeros(shape, dtype=torch.long, device=keys.device)
        return self._simplex(token_ids, torch.zeros_like(ones_B1), ones_B1, keys, 0)

    def add_noise(
        self,
        token_ids: Tensor,
        timesteps: Tensor,
        noise: Tensor | None = None,
        *,
        keys: Tensor | None = None,
        counter: int = 0,
    ) -> NoisedSimplex | Tensor:
        """The forward process x_t = sqrt(a) S(ids) + sqrt(1 - a) k eps, a = alpha_bar(t).

        token_ids: [B, L]. timesteps: [B] or [B, L] in [0, 1]. With `keys` [B] a `NoisedSimplex`
        comes back, the same in every batch; with `noise`, [B, L, V] standard normals, the dense
        tensor [B, L, V].
        """
        if (noise is None) == (keys is None):
            raise ValueError("add_noise needs either keys or a noise tensor, not both")
        t = timesteps.double().to(token_ids.device)
        share = self.alpha_bar(t[:, None] if t.dim() == 1 else t)
        scales = share.sqrt().float(), (1 - share).sqrt().float()
        if keys is not None:
            return self._simplex(token_ids, *scales, keys, counter)
        shape = [*token_ids.shape, self.config.vocab_size]
        if list(noise.shape) != shape:
            raise ValueError(f"noise must be {shape}, got {list(noise.shape)}")
        return dense_logits(token_ids, *scales, self.config.simplex_value, noise)

    def _simplex(
        self, token_ids: Tensor, signal: Tensor, noise: Tensor, keys: Tensor, counter: int
    ) -> NoisedSimplex:
        return NoisedSimplex(
            token_ids=token_ids,
            signal_scale=signal,
            noise_scale=noise,
            simplex_value=self.config.simplex_value,
            vocab_size=self.config.vocab_size,
            keys=keys,
            counter=counter,
            noise=self.config.noise,
            num_top=self.config.num_top,
        )

    def previous_timestep(self, timestep: Tensor | float) -> float:
        """The time after `timestep` in the current grid; 0 after the last."""
        if self.timesteps is None:
            raise ValueError("call set_timesteps before step")
        gap_N = (self.timesteps.double() - float(timestep)).abs()
        index = int(gap_N.argmin())
        if not float(gap_N[index]) <= TIME_TOLERANCE:
            raise ValueError(f"timestep {float(timestep)} is not one of the {len(gap_N)} timesteps")
        return float(self.timesteps[index + 1]) if index + 1 < len(gap_N) else 0.0

    @torch.no_grad()
    def step(
        self,
        model_output: Tensor,
        timestep: Tensor | float,
        sample: NoisedSimplex | Tensor,
        *,
        temperature: float = 1.0,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> RenoisingSchedulerOutput | tuple[NoisedSimplex | Tensor, Tensor]:
        """One step of the reverse process.

        model_output: the tokens [B, L] int64 that were chosen, or logits [B, L, V] to choose from.
        timestep: the time of `sample`, one of `timesteps`.
        top_p: for logits. None takes the arg-max, as TESS does, and the temperature has no part in
        it; otherwise a token is drawn from the nucleus of mass top_p in (0, 1] of
        softmax(logits / temperature). Samples with keys draw from them; `generator` serves dense
        samples only.
        """
        time = self.previous_timestep(timestep)
        keyed = isinstance(sample, NoisedSimplex)
        if not model_output.is_floating_point():
            if top_p is not None or temperature != 1:
                raise ValueError(
                    "top_p and temperature choose from logits, and the model's output is tokens"
                )
            token_ids = model_output
            if token_ids.dtype != torch.int64 or token_ids.shape != sample.shape[:2]:
                raise ValueError(
                    f"tokens must be int64 {list(sample.shape[:2])} as the sample is, got "
                    f"{token_ids.dtype} {list(token_ids.shape)}"
                )
        elif top_p is None:
            token_ids = model_output.argmax(dim=-1)
        else:
            shape, device = model_output.shape[:2], model_output.device
            draw_BL = sample.uniforms() if keyed else _rand(shape, generator, device)
            token_ids = sample_nucleus(model_output, draw_BL, top_p, temperature)
        batch_times = torch.full(token_ids.shape[:1], time, device=token_ids.device).double()
        prev_sample: NoisedSimplex | Tensor
        if keyed:
            keys, counter = sample.keys, sample.counter + 1
            fresh = self.add_noise(token_ids, batch_times, keys=keys, counter=counter)
            # what the sample was made with stays, should the scheduler differ from it
            scales = {name: getattr(fresh, name) for name in ("signal_scale", "noise_scale")}
            prev_sample = replace(sample, token_ids=token_ids, counter=counter, **scales)
        else:
            shape = (*token_ids.shape, self.config.vocab_size)
            noise = randn_tensor(shape, generator=generator, device=token_ids.device)
            prev_sample = self.add_noise(token_ids, batch_times, noise)
        if not return_dict:
            return prev_sample, token_ids
        return RenoisingSchedulerOutput(prev_sample=prev_sample, token_ids=token_ids)


def resolve_simplex_value(simplex_value: float | str, vocab_size: int) -> float:
    """k as a number.

    Raises ValueError for a name other than "auto", for "auto" below 3 tokens, and for what is no
    finite number above 0.
    """
    if isinstance(simplex_value, str):
        if simplex_value != "auto":
            raise ValueError(f'simplex_value must be a number or "auto", got {simplex_value!r}')
        return auto_simplex_value(vocab_size)
    number = isinstance(simplex_value, Real) and not isinstance(simplex_value, bool)
    if not (number and 0 < simplex_value < math.inf):
        raise ValueError(f"simplex_value must be above 0 and finite, got {simplex_value}")
    return float(simplex_value)


def sample_nucleus(logits: Tensor, draw_BL: Tensor, top_p: float, temperature: float) -> Tensor:
    """Tokens [B, L] from the smallest set of likeliest tokens whose mass reaches top_p.

    draw_BL: uniforms in [0, 1) that choose by the inverse of the cumulative distribution, so that a
    position's token depends on its own logits and its own number alone.
    """
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")
    if temperature <= 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    probs_BLV = (logits.float() / temperature).softmax(dim=-1)
    probs_BLV, order_BLV = probs_BLV.sort(dim=-1, descending=True, stable=True)
    cumulative_BLV = probs_BLV.cumsum(dim=-1)
    # A token is in while the mass before it is below top_p; the first always is.
    kept_BL = (cumulative_BLV - probs_BLV < top_p).sum(dim=-1, keepdim=True).clamp_(min=1)
    mass_BL = cumulative_BLV.gather(-1, kept_BL - 1)
    rank_BL = (cumulative_BLV <= draw_BL.unsqueeze(-1) * mass_BL).sum(dim=-1, keepdim=True)
    return order_BLV.gather(-1, rank_BL.minimum(kept_BL - 1)).squeeze(-1)


def _rand(
    shape: tuple[int, int], generator: torch.Generator | None, device: torch.device
) -> Tensor:
    source = generator.device if generator is not None else device
    return torch.rand(shape, generator=generator, device=source).to(device)
