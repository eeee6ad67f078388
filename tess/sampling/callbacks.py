"""`callback_on_step_end` as in diffusers: what a callback is shown, and what it may change."""

# B examples, L positions, V vocabulary, H hidden

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from tess.errors import UserError
from tess.sampling.loop import Batch, StepHook
from tess.self_conditioning import Prediction

StepCallback = Callable[[Any, int, Tensor, dict[str, Tensor]], dict[str, Tensor] | None]
"""Its first argument is the pipeline."""

SHOWN = ("token_ids", "log_probs", "entropies", "hidden_state", "logits")
"""What a callback may ask for."""


def check_shown(names: Sequence[str] | None, allowed: Sequence[str] = SHOWN) -> tuple[str, ...]:
    """The names as a tuple; None asks for "token_ids".

    Raises:
        UserError: no list of strings, or a name that is not among `allowed`.
    """
    if names is None:
        return SHOWN[:1]
    unknown = [names] if isinstance(names, str) else [n for n in names if n not in allowed]
    if unknown:
        raise UserError(
            f"callback_on_step_end_tensor_inputs takes a list of some of {', '.join(allowed)}, got "
            f"{', '.join(map(repr, unknown))}"
        )
    return tuple(names)


def step_hook(
    callback: Callable[[int, Tensor, dict[str, Tensor]], dict[str, Tensor] | None],
    names: Sequence[str],
    *,
    logits: Callable[[Tensor], Tensor],
    reads: str,
    self_conditioning: str | None,
) -> StepHook:
    """The user's callback as the loop calls it.

    Args:
        callback: takes the step, its time and the tensors, by name.
        names: those it gets, some of `SHOWN`.
        logits: [B, L, V] of a hidden state [B, L, H].
        reads: what the scheduler's step reads of a prediction; see `SimplexScheduler.reads`.
        self_conditioning: of the denoiser's config.

    The hook raises UserError for tensors that cannot be taken back.
    """

    def hook(
        step: int, timestep: Tensor, prediction: Prediction, hidden_BLH: Tensor, batch: Batch
    ) -> Prediction:
        made = {"hidden_state": lambda: hidden_BLH, "logits": lambda: logits(hidden_BLH)}
        tensors = {
            name: made[name]() if name in made else getattr(prediction, name) for name in names
        }
        returned = callback(step, timestep, dict(tensors)) or {}
        # diffusers' callbacks give back all they were given
        new = {name: value for name, value in returned.items() if value is not tensors.get(name)}
        return _replaced(prediction, new, reads, self_conditioning)

    return hook


def _replaced(
    prediction: Prediction, changed: dict[str, Tensor], reads: str, self_conditioning: str | None
) -> Prediction:
    """The prediction with what a callback returned; logits replace its soft part."""
    if unknown := sorted(set(changed) - {"token_ids", "logits"}):
        raise UserError(
            f"callback_on_step_end may return token_ids and logits, got {', '.join(unknown)}"
        )
    if "token_ids" in changed and reads != "tokens":
        raise UserError(
            "callback_on_step_end returned token_ids, but this scheduler goes on with the whole "
            f"prediction ({reads}); only the re-noising scheduler takes tokens"
        )
    token_ids = changed.get("token_ids", prediction.token_ids)
    if "logits" not in changed:
        return replace(prediction, token_ids=token_ids)
    if self_conditioning is None or "projection" in self_conditioning:
        raise UserError(
            "callback_on_step_end returned logits, which "
            f"self_conditioning={self_conditioning!r} does not read"
        )
    return replace(prediction, token_ids=token_ids, embedding=None, logits=changed["logits"])
