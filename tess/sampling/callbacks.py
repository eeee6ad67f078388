"""`callback_on_step_end` as in diffusers: what a callback is shown, and what it may change."""

# B examples, L positions, V vocabulary, H hidden

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from diffusers import DiffusionPipeline
from torch import Tensor

from tess.errors import UserError
from tess.sampling.loop import Batch, StepHook
from tess.self_conditioning import Prediction

StepCallback = Callable[
    [DiffusionPipeline, int, Tensor, dict[str, Tensor]], dict[str, Tensor] | None
]

SHOWN = ("token_ids", "log_probs", "entropies", "hidden_state", "logits")
"""What a callback may ask for."""


def check_shown(names: Sequence[str]) -> None:
    """Raises UserError for a name that is not among `SHOWN`."""
    if unknown := sorted(set(names) - set(SHOWN)):
        raise UserError(
            f"callback_on_step_end_tensor_inputs may name {', '.join(SHOWN)}, got "
            f"{', '.join(unknown)}"
        )


def step_hook(
    pipeline: DiffusionPipeline, callback: StepCallback, names: Sequence[str]
) -> StepHook:
    """The user's callback as the loop calls it; `names` are some of `SHOWN`.

    The hook raises UserError for tensors that cannot be taken back.
    """

    def hook(
        step: int, timestep: Tensor, prediction: Prediction, hidden_BLH: Tensor, batch: Batch
    ) -> Prediction:
        made: dict[str, Any] = {
            "hidden_state": lambda: hidden_BLH,
            "logits": lambda: pipeline.denoiser.logits(hidden_BLH),
        }
        tensors = {
            name: made[name]() if name in made else getattr(prediction, name) for name in names
        }
        returned = callback(pipeline, step, timestep, dict(tensors)) or {}
        # diffusers' callbacks give back all they were given
        new = {name: value for name, value in returned.items() if value is not tensors.get(name)}
        return _replaced(pipeline, prediction, new)

    return hook


def _replaced(
    pipeline: DiffusionPipeline, prediction: Prediction, changed: dict[str, Tensor]
) -> Prediction:
    """The prediction with what a callback returned; logits replace its soft part."""
    if unknown := sorted(set(changed) - {"token_ids", "logits"}):
        raise UserError(
            f"callback_on_step_end may return token_ids and logits, got {', '.join(unknown)}"
        )
    if "token_ids" in changed and pipeline.scheduler.reads != "tokens":
        raise UserError(
            f"callback_on_step_end returned token_ids, but {type(pipeline.scheduler).__name__} "
            "goes on with the whole prediction; only the re-noising scheduler takes tokens"
        )
    token_ids = changed.get("token_ids", prediction.token_ids)
    if "logits" not in changed:
        return replace(prediction, token_ids=token_ids)
    kind = pipeline.denoiser.config.self_conditioning
    if kind is None or "projection" in kind:
        raise UserError(
            f"callback_on_step_end returned logits, which self_conditioning={kind!r} does not read"
        )
    return replace(prediction, token_ids=token_ids, embedding=None, logits=changed["logits"])
