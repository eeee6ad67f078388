"""The denoising loop: a batch of examples goes through the timesteps, and finished ones leave."""

# B examples, A of them still being written, L positions, V vocabulary, H hidden

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tess.denoiser import TessDenoiser
from tess.sampling.control import FREE, TokenProcessor, chain, pin, token_processors
from tess.sampling.guidance import Guidance
from tess.sampling.options import SamplerOptions
from tess.sampling.request import Request
from tess.sampling.sources import Context
from tess.sampling.steps import StepTrace
from tess.schedulers.base import SimplexScheduler
from tess.schedulers.simplex import SoftTokens
from tess.schedulers.stopping import StoppingRule, StoppingState, text_mask
from tess.self_conditioning import Prediction


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """How tokens are chosen and when a text is done.

    top_p, temperature: None takes the likeliest token, else the nucleus to draw from.
    guidance: see there.
    logits_processor: see `tess.sampling.control.token_processors`.
    stopping: None goes through all timesteps.
    confidence_threshold: a position whose token has at least this probability keeps it from then
        on, noised as all others are; None: none does. When all do, the text is done.
    """

    top_p: float | None = None
    temperature: float = 1.0
    guidance: Guidance = field(default_factory=Guidance)
    logits_processor: Sequence[TokenProcessor] = ()
    stopping: StoppingRule | None = None
    confidence_threshold: float | None = None

    @classmethod
    def of(
        cls,
        options: SamplerOptions,
        request: Request,
        tokenizer: PreTrainedTokenizerBase,
        never: Sequence[TokenProcessor] = (),
    ) -> "SamplingSettings":
        """What was asked for, with its words as token ids; `never` comes before its processors."""
        return cls(
            top_p=request.top_p,
            temperature=request.temperature,
            guidance=Guidance(
                scale=options.guidance_scale,
                form=options.guidance_form,
                reward=options.reward,
                reward_scale=options.reward_scale,
                reward_steps=options.reward_steps,
            ),
            logits_processor=[*never, *options.processors(tokenizer)],
            stopping=options.stopping,
            confidence_threshold=options.confidence_threshold,
        )


@dataclass(frozen=True, eq=False)
class Batch:
    """The examples that are still being written.

    index: [A] int64 on the CPU, their places among all.
    sample: of the scheduler.
    target_mask: [A, L], 1 inside the canvas.
    context, empty: the sources, and the empty source for each under guidance.
    fixed_ids: [A, L], `FREE` where the model writes: clean context; None: nothing is given.
    held_ids: [A, L], the same for tokens that stay but are noised as all others.
    left_ids: [A, L], the tokens as they stand.
    previous, stopping: of the last step.
    """

    index: Tensor
    sample: Any
    target_mask: Tensor
    context: Context
    empty: Context | None = None
    fixed_ids: Tensor | None = None
    held_ids: Tensor | None = None
    left_ids: Tensor | None = None
    previous: Prediction | None = None
    stopping: StoppingState | None = None

    def select(self, rows: Tensor) -> "Batch":
        """The examples `rows` (int64) of these, in that order."""
        changed = {}
        for name, value in vars(self).items():
            if value is not None:
                tensor = isinstance(value, Tensor)
                changed[name] = value[rows.to(value.device)] if tensor else value.select(rows)
        return Batch(**changed)


StepHook = Callable[[int, Tensor, Prediction, Tensor, Batch], Prediction]
"""(step, timestep, prediction, hidden state [A, L, H], batch) -> the prediction to go on with."""


TraceHook = Callable[[int, int, StepTrace], Any]
"""(step, number of steps, the state of all examples)."""


@dataclass(frozen=True, eq=False)
class Denoised:
    """The result for all examples, on the CPU.

    token_ids: [B, L] int64. log_probs: [B, L], of those tokens in the last prediction.
    nfe: network evaluations of each example.
    trace: a `StepTrace` per step, where asked for.
    """

    token_ids: Tensor
    log_probs: Tensor
    nfe: list[int]
    trace: list[StepTrace] | None = None


class _Record:
    """What is known of all examples after each step; outside their canvases there is padding."""

    def __init__(self, target_mask: Tensor, pad_token_id: int) -> None:
        self.inside = target_mask.bool().cpu()
        batch, length = self.inside.shape
        self.token_ids = torch.full((batch, length), pad_token_id)
        self.log_probs, self.entropies = (torch.zeros(batch, length) for _ in range(2))
        self.nfe = [0] * batch

    def count(self, index: Tensor, evaluations: int) -> None:
        for row in index.tolist():
            self.nfe[row] += evaluations

    def write(self, index: Tensor, prediction: Prediction) -> None:
        """Copies from the device, which waits for it: not done in every step without need."""
        for name in ("token_ids", "log_probs", "entropies"):
            kept, new = getattr(self, name), getattr(prediction, name).cpu()
            kept[index] = torch.where(self.inside[index], new, kept[index])

    def snapshot(self, index: Tensor, timestep: Tensor) -> StepTrace:
        """All examples as they stand; `index` are those that were evaluated."""
        active_B = torch.zeros(len(self.nfe), dtype=torch.bool)
        active_B[index] = True
        state = (self.token_ids.clone(), self.log_probs.clone(), self.entropies.clone())
        return StepTrace(float(timestep), *state, active_B)


@torch.no_grad()
def denoise(
    denoiser: TessDenoiser,
    scheduler: SimplexScheduler,
    batch: Batch,
    settings: SamplingSettings,
    *,
    eos_token_id: Sequence[int] | None = None,
    pad_token_id: int = 0,
    on_step: StepHook | None = None,
    on_trace: TraceHook | None = None,
    after_step: Callable[[], Any] = lambda: None,
    keep_trace: bool = False,
    interrupted: Callable[[], bool] = lambda: False,
) -> Denoised:
    """Go through `scheduler.timesteps` until every example is done.

    eos_token_id: those that end a text; None: it fills its canvas.
    pad_token_id: what stands outside of it.
    on_step: called after each evaluation, before the scheduler's step.
    on_trace: called with the state of all examples in each step.
    after_step: called with nothing, likewise.
    keep_trace: give the trace back.
    interrupted: asked in each step; once it says so the texts are left as they stand.
    """
    guidance, stopping = settings.guidance, settings.stopping
    record = _Record(batch.target_mask, pad_token_id)
    trace: list[StepTrace] = []
    if stopping is not None:
        batch = replace(batch, stopping=stopping.start())
    steps = len(scheduler.timesteps)
    for step, timestep in enumerate(scheduler.timesteps):
        hidden_ALH, other_ALH = _evaluate(denoiser, scheduler, batch, timestep, guidance)
        choice_ALH, processors = _choice(denoiser, batch, settings, hidden_ALH, other_ALH)
        prediction = _predict(
            denoiser, scheduler, batch, settings, hidden_ALH, choice_ALH, processors
        )
        state = hidden_ALH if choice_ALH is None else choice_ALH
        prediction = _hold(denoiser, prediction, batch, state)
        if on_step is not None:
            changed = on_step(step, timestep, prediction, hidden_ALH, batch)
            prediction = _with_tokens(denoiser, prediction, changed.token_ids, state, changed)
        record.count(batch.index, 2 if guidance.contrasts else 1)
        batch, done_A = _settle(batch, settings, prediction, eos_token_id)
        finished = step + 1 == steps or (done_A is not None and bool(done_A.all()))
        finished = finished or interrupted()
        leaving = not finished and done_A is not None and bool(done_A.any())
        if finished or leaving or keep_trace or on_trace is not None:
            record.write(batch.index, prediction)
        if keep_trace or on_trace is not None:
            snapshot = record.snapshot(batch.index, timestep)
            if keep_trace:
                trace.append(snapshot)
            if on_trace is not None:
                on_trace(step, steps, snapshot)
                finished = finished or interrupted()
        after_step()
        if finished:
            break
        batch = _advance(denoiser, scheduler, batch, timestep, prediction, state, processors)
        if leaving:
            batch = batch.select((~done_A).nonzero()[:, 0])
    return Denoised(record.token_ids, record.log_probs, record.nfe, trace if keep_trace else None)


def _evaluate(
    denoiser: TessDenoiser,
    scheduler: SimplexScheduler,
    batch: Batch,
    timestep: Tensor,
    guidance: Guidance,
) -> tuple[Tensor, Tensor | None]:
    """The network's last hidden state for the source, and for the empty one under guidance."""
    inputs: dict[str, Any] = {
        "sample": scheduler.scale_model_input(batch.sample, timestep),
        "timesteps": timestep.expand(len(batch.index)),
        "previous": batch.previous,
        "target_mask": batch.target_mask,
    }
    if batch.fixed_ids is not None:
        free_AL = batch.fixed_ids == FREE
        inputs |= {"clean_ids": batch.fixed_ids.clamp(min=0), "noise_mask": free_AL.long()}
    hidden_ALH = denoiser(**inputs, **batch.context.arguments()).last_hidden_state
    if not guidance.contrasts:
        return hidden_ALH, None
    return hidden_ALH, denoiser(**inputs, **batch.empty.arguments()).last_hidden_state


def _choice(
    denoiser: TessDenoiser,
    batch: Batch,
    settings: SamplingSettings,
    hidden_ALH: Tensor,
    other_ALH: Tensor | None,
) -> tuple[Tensor | None, Any]:
    """The state to choose tokens from, if it is another, and what is done with its logits."""
    guidance = settings.guidance
    choice_ALH = guidance.guided_hidden(hidden_ALH, other_ALH)
    rewarded = None
    if guidance.reward is not None:
        state = hidden_ALH if choice_ALH is None else choice_ALH
        rewarded = guidance.reward_processor(denoiser.logits(state), batch.target_mask)
    left_AL = batch.left_ids
    processors = chain(
        guidance.mixed_probabilities(other_ALH, denoiser.head_weight()),
        rewarded,
        token_processors(settings.logits_processor, left_AL),
    )
    return choice_ALH, processors


def _predict(
    denoiser: TessDenoiser,
    scheduler: SimplexScheduler,
    batch: Batch,
    settings: SamplingSettings,
    hidden_ALH: Tensor,
    choice_ALH: Tensor | None,
    processors: Any,
) -> Prediction:
    # Self-conditioning is on the source's own prediction, as in TESS.
    soft = scheduler.config.num_soft_tokens if scheduler.reads == "soft_tokens" else None
    return denoiser.predict(
        hidden_ALH,
        top_p=settings.top_p,
        temperature=settings.temperature,
        uniforms=None if settings.top_p is None else batch.sample.uniforms(),
        choice_BLH=choice_ALH,
        processors=processors,
        num_soft_tokens=soft,
    )


def _hold(
    denoiser: TessDenoiser, prediction: Prediction, batch: Batch, state_ALH: Tensor
) -> Prediction:
    """The prediction with the tokens that stay; of those that are given nothing is unsure."""
    if batch.held_ids is not None:
        held_AL = batch.held_ids
        token_ids = torch.where(held_AL == FREE, prediction.token_ids, held_AL)
        prediction = _with_tokens(denoiser, prediction, token_ids, state_ALH)
    if batch.fixed_ids is not None:
        given_AL = batch.fixed_ids != FREE
        prediction = replace(
            prediction,
            token_ids=torch.where(given_AL, batch.fixed_ids, prediction.token_ids),
            log_probs=prediction.log_probs.masked_fill(given_AL, 0),
            entropies=prediction.entropies.masked_fill(given_AL, 0),
        )
    return prediction


def _with_tokens(
    denoiser: TessDenoiser,
    prediction: Prediction,
    token_ids: Tensor,
    state_ALH: Tensor,
    changed: Prediction | None = None,
) -> Prediction:
    """The prediction (or what became of it) with other tokens and their log-probabilities."""
    changed = prediction if changed is None else changed
    if token_ids is prediction.token_ids:
        return changed
    logit_AL = (state_ALH * denoiser.head_weight()[token_ids]).sum(dim=-1).float()
    same_AL = token_ids == prediction.token_ids
    log_probs = torch.where(same_AL, prediction.log_probs, logit_AL - prediction.log_sum_exp)
    return replace(changed, token_ids=token_ids, log_probs=log_probs)


def _advance(
    denoiser: TessDenoiser,
    scheduler: SimplexScheduler,
    batch: Batch,
    timestep: Tensor,
    prediction: Prediction,
    state_ALH: Tensor,
    processors: Any,
) -> Batch:
    """The batch at the next, less noisy time."""
    output: Tensor | SoftTokens = prediction.token_ids
    if scheduler.reads != "tokens":
        if scheduler.reads == "soft_tokens":
            output = prediction.soft
        else:
            output = denoiser.logits(state_ALH)
            if processors is not None:
                output = processors(0, output.flatten(0, 1)).view_as(output)
        for given in (batch.fixed_ids, batch.held_ids):
            if given is not None:
                output = pin(output, given.clamp(min=0), given != FREE)
    sample = scheduler.step(output, timestep, batch.sample).prev_sample
    return replace(batch, sample=sample, previous=prediction, left_ids=prediction.token_ids)


def _settle(
    batch: Batch,
    settings: SamplingSettings,
    prediction: Prediction,
    eos_token_id: Sequence[int] | None,
) -> tuple[Batch, Tensor | None]:
    """Hold what is sure enough; which examples are done, [A] bool (None: nothing says so)."""
    if settings.confidence_threshold is None and settings.stopping is None:
        return batch, None
    token_ids = prediction.token_ids
    done_A = torch.zeros(len(token_ids), dtype=torch.bool, device=token_ids.device)
    text_AL = text_mask(token_ids, batch.target_mask, eos_token_id)
    if settings.stopping is not None:
        written_AL = text_AL if batch.fixed_ids is None else text_AL & (batch.fixed_ids == FREE)
        stopping, done_A = batch.stopping.update(
            token_ids, prediction.entropies, text_AL, written_AL
        )
        batch = replace(batch, stopping=stopping)
    if settings.confidence_threshold is not None:
        sure_AL = (prediction.log_probs.exp() >= settings.confidence_threshold) & text_AL
        held_AL = torch.where((batch.held_ids == FREE) & sure_AL, token_ids, batch.held_ids)
        batch = replace(batch, held_ids=held_AL)
        open_AL = text_AL & (held_AL == FREE)
        if batch.fixed_ids is not None:
            open_AL &= batch.fixed_ids == FREE
        done_A |= ~open_AL.any(dim=1)
    return batch, done_A
