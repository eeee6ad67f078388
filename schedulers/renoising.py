"""The sampler of TESS and SSD-LM: predict the text, snap it to a vertex, noise it again, less."""

# B examples, L positions, V vocabulary

from dataclasses import dataclass, replace

import torch
from diffusers import SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from tess.schedulers.base import SimplexScheduler
from tess.schedulers.simplex import NUM_TOP, NoisedSimplex, Simplex


@dataclass
class RenoisingSchedulerOutput(BaseOutput):
    """Result of one step.

    prev_sample: the state at the next, less noisy time, of the kind of the sample that was given
        (a NoisedSimplex, or a dense [B, L, V] tensor).
    token_ids: [B, L], the tokens that were chosen; the text, at the last step.
    """

    prev_sample: NoisedSimplex | Tensor
    token_ids: Tensor


class RenoisingScheduler(SimplexScheduler, SchedulerMixin):
    """Re-noising sampler (SSD-LM, arXiv 2210.17432, Algorithm 2; TESS, arXiv 2305.08379).

    A step from t to t' takes tokens and gives sqrt(a) S(tokens) + sqrt(1 - a) k eps with
    a = alpha_bar(t') and fresh noise. Nothing of the old sample is kept. The last step lands on the
    clean vertex at t = 0.

    The defaults follow the vocabulary (docs/architecture.md, section 4);
    `RenoisingScheduler(vocab_size=V, **SCHEDULER_PRESETS["tess"])` has TESS's published settings.

    Args: those of `SimplexScheduler`.

    Raises ValueError for values out of range and for unknown names.
    """

    reads = "tokens"

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
    ) -> None:
        self._set_up()

    def initial(self, shape: tuple[int, int], keys: Tensor) -> NoisedSimplex:
        """Pure noise k eps at t = 1 for a [B, L] canvas, on the device of the keys ([B] int64)."""
        ones_B1 = torch.ones(shape[0], 1, device=keys.device)
        token_ids = torch.zeros(shape, dtype=torch.long, device=keys.device)
        return self._simplex(token_ids, torch.zeros_like(ones_B1), ones_B1, keys, 0)

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
        if isinstance(sample, Simplex) and not keyed:
            raise ValueError(
                "the re-noising sampler takes a NoisedSimplex or a tensor, got a "
                f"{type(sample).__name__}"
            )
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
