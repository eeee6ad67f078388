"""The sampler of TESS and SSD-LM: predict the text, snap it to a vertex, noise it again, less."""

# B examples, L positions, V vocabulary

from dataclasses import dataclass, replace
from numbers import Integral

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from tess.kernels import random
from tess.schedulers.noise import SCHEDULES, alpha_bar
from tess.schedulers.simplex import NoisedSimplex


@dataclass
class RenoisingSchedulerOutput(BaseOutput):
    """Result of one step.

    prev_sample: the state at the next, less noisy time, of the kind of the sample that was given
        (a NoisedSimplex, or a dense [B, L, V] tensor).
    token_ids: [B, L], the tokens that were chosen from the logits; the text, at the last step.
    """

    prev_sample: NoisedSimplex | Tensor
    token_ids: Tensor


class RenoisingScheduler(SchedulerMixin, ConfigMixin):
    """Re-noising sampler (SSD-LM, arXiv 2210.17432, Algorithm 2; TESS, arXiv 2305.08379).

    A step from t to t' takes tokens from the logits and gives sqrt(a) S(tokens) + sqrt(1 - a) k eps
    with a = alpha_bar(t') and fresh noise. Nothing of the old sample is kept. Times are reals in
    (0, 1], decreasing: 1, (N-1)/N, ..., 1/N; the last step lands on the clean vertex at t = 0.

    num_train_timesteps: T, the number of discrete times in training; the most steps allowed.
    simplex_value: k.
    beta_schedule, cosine_s, beta_start, beta_end: see `tess.schedulers.noise.alpha_bar`.
    """

    order = 1

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 5000,
        simplex_value: float = 5.0,
        beta_schedule: str = "squaredcos_improved_ddpm",
        cosine_s: float = 1e-4,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
    ) -> None:
        if num_train_timesteps < 1:
            raise ValueError(f"num_train_timesteps must be at least 1, got {num_train_timesteps}")
        if simplex_value <= 0:
            raise ValueError(f"simplex_value must be above 0, got {simplex_value}")
        if beta_schedule not in SCHEDULES:
            raise ValueError(
                f"unknown beta_schedule {beta_schedule!r}; known are {', '.join(SCHEDULES)}"
            )
        self.num_inference_steps: int | None = None
        self.timesteps: Tensor | None = None

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
        """Choose N sampling steps; `timesteps` becomes [N] float32: 1, (N-1)/N, ..., 1/N."""
        most = self.config.num_train_timesteps
        if not isinstance(num_inference_steps, Integral):
            raise ValueError(f"num_inference_steps must be an integer, got {num_inference_steps!r}")
        if not 1 <= num_inference_steps <= most:
            raise ValueError(
                f"num_inference_steps must be from 1 to {most}, the number of training steps, "
                f"got {num_inference_steps}"
            )
        self.num_inference_steps = num_inference_steps
        steps = torch.arange(num_inference_steps, 0, -1, device=device, dtype=torch.float32)
        self.timesteps = steps / num_inference_steps

    def scale_model_input(
        self, sample: NoisedSimplex | Tensor, timestep: Tensor | float | None = None
    ) -> NoisedSimplex | Tensor:
        """The sample itself: this process needs no scaling of the network's input."""
        return sample

    def initial(self, shape: tuple[int, int], vocab_size: int, keys: Tensor) -> NoisedSimplex:
        """Pure noise k eps at t = 1 for a [B, L] canvas, on the device of the keys ([B] int64)."""
        ones_B1 = torch.ones(shape[0], 1, device=keys.device)
        return NoisedSimplex(
            token_ids=torch.zeros(shape, dtype=torch.long, device=keys.device),
            signal_scale=torch.zeros_like(ones_B1),
            noise_scale=ones_B1,
            simplex_value=self.config.simplex_value,
            vocab_size=vocab_size,
            keys=keys,
        )

    def add_noise(
        self,
        token_ids: Tensor,
        timesteps: Tensor,
        noise: Tensor | None = None,
        *,
        keys: Tensor | None = None,
        vocab_size: int | None = None,
        counter: int = 0,
    ) -> NoisedSimplex:
        """The forward process x_t = sqrt(a) S(ids) + sqrt(1 - a) k eps, a = alpha_bar(t).

        token_ids: [B, L]. timesteps: [B] or [B, L] in [0, 1]. Give either `noise`, [B, L, V]
        standard normals (the fast way), or `keys` [B] with `vocab_size` (the same in every batch).
        """
        if noise is None and vocab_size is None:
            raise ValueError("add_noise needs vocab_size when no noise tensor is given")
        t = timesteps.double().to(token_ids.device)
        share = self.alpha_bar(t[:, None] if t.dim() == 1 else t)
        return NoisedSimplex(
            token_ids=token_ids,
            signal_scale=share.sqrt().float(),
            noise_scale=(1 - share).sqrt().float(),
            simplex_value=self.config.simplex_value,
            vocab_size=vocab_size if noise is None else noise.shape[-1],
            keys=keys,
            counter=counter,
            noise=noise,
        )

    def previous_timestep(self, timestep: Tensor | float) -> float:
        """The time after `timestep` in the current grid; 0 after the last."""
        if self.num_inference_steps is None:
            raise ValueError("call set_timesteps before step")
        place = float(timestep) * self.num_inference_steps
        index = round(place)
        if index < 1 or abs(place - index) > 1e-3:
            raise ValueError(
                f"timestep {float(timestep)} is not one of the {self.num_inference_steps} timesteps"
            )
        return (index - 1) / self.num_inference_steps

    @torch.no_grad()
    def step(
        self,
        logits: Tensor,
        timestep: Tensor | float,
        sample: NoisedSimplex | Tensor,
        *,
        temperature: float = 1.0,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> RenoisingSchedulerOutput | tuple[NoisedSimplex | Tensor, Tensor]:
        """One step of the reverse process.

        logits: [B, L, V] from the network. timestep: the time of `sample`, one of `timesteps`.
        top_p None takes the arg-max, as TESS does, and the temperature has no part in it; otherwise
        a token is drawn from the nucleus of mass top_p in (0, 1] of softmax(logits / temperature).
        Samples with keys draw from them; `generator` serves dense tensors and dense noise only.
        """
        time = self.previous_timestep(timestep)
        keyed = isinstance(sample, NoisedSimplex) and sample.keys is not None
        if top_p is None:
            token_ids = logits.argmax(dim=-1)
        elif keyed:
            draw_BL = random.uniform(sample.keys, sample.counter, logits.shape[1])
            token_ids = sample_nucleus(logits, draw_BL, top_p, temperature)
        else:
            draw_BL = _rand(logits.shape[:2], generator, logits.device)
            token_ids = sample_nucleus(logits, draw_BL, top_p, temperature)
        noise = (
            None if keyed else randn_tensor(logits.shape, generator=generator, device=logits.device)
        )
        batch_times = torch.full(token_ids.shape[:1], time, device=token_ids.device)
        prev_sample: NoisedSimplex | Tensor = self.add_noise(
            token_ids,
            batch_times.double(),
            noise,
            keys=sample.keys if keyed else None,
            vocab_size=logits.shape[-1],
            counter=sample.counter + 1 if keyed else 0,
        )
        if isinstance(sample, NoisedSimplex):
            prev_sample = replace(prev_sample, simplex_value=sample.simplex_value)
        else:
            prev_sample = prev_sample.logits()
        if not return_dict:
            return prev_sample, token_ids
        return RenoisingSchedulerOutput(prev_sample=prev_sample, token_ids=token_ids)


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
