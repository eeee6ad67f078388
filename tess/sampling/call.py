"""A call from sources to texts: what the pipeline and the `tess` decoder have in common."""

# B examples, N candidates of each, L positions

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from inspect import signature
from types import SimpleNamespace
from typing import Any, Literal

import torch
from diffusers.utils import BaseOutput
from torch import Tensor
from transformers import PreTrainedTokenizerBase, SuppressTokensLogitsProcessor

from tess.config import TessConfig
from tess.denoiser import TessDenoiser
from tess.errors import UserError
from tess.sampling.blocks import Blocks
from tess.sampling.callbacks import SHOWN, StepCallback, check_shown, step_hook
from tess.sampling.candidates import Candidates, choose_candidates
from tess.sampling.control import fixed_canvas
from tess.sampling.loop import Denoised, SamplingSettings, StepHook, TraceHook
from tess.sampling.options import SamplerOptions
from tess.sampling.request import Request
from tess.sampling.sources import derived_keys, draw_seed, example_keys, id_rows
from tess.sampling.steps import StepTrace
from tess.sampling.writer import Writer, check_batch, check_canvas, target_lengths
from tess.schedulers.base import SimplexScheduler
from tess.schedulers.stopping import text_mask
from tess.text.alphabet import warn_of_strange_texts
from tess.text.end_tokens import end_tokens
from tess.text.padding import right_mask
from tess.text.tokenization import (
    cut_sources,
    decode,
    encode_sources,
    fit_tokenizer,
    surplus_ids,
)

logger = logging.getLogger(__name__)

DEFAULT_INFERENCE_STEPS = 16
"""Or the scheduler's training steps, where these are fewer."""


@dataclass
class TessPipelineOutput(BaseOutput):
    """What a pipeline call gives back.

    sequences: [B, L] token ids, on the CPU: the text, `</s>` if there was one, then padding.
    texts: B strings, cut at the first `</s>`; None with output_type="seq".
    nfe: network evaluations spent on each example, all candidates together (two a step under
        guidance).
    lengths: each example's canvas, in tokens.
    candidates: all of them, where there were several (`tess.sampling.candidates.Candidates`).
    trace: with return_trace, one `StepTrace` per step, of all B N rows.
    """

    sequences: Tensor
    texts: list[str] | None
    nfe: list[int]
    lengths: list[int]
    candidates: Candidates | None = None
    trace: list[StepTrace] | None = None


class TextDiffusion:
    """Generates text for a source by denoising a noised simplex (TESS, arXiv 2305.08379).

    The source is encoded once, for all steps and candidates; every step predicts all target tokens
    and noises them less. An example's noise depends on the generator's seed, its source and how
    many equal sources stand before it in the batch, so its text depends neither on the batch nor on
    the order. `tess.pipeline.TessPipeline` is the same as a pipeline of diffusers.

    Raises:
        UserError: when tokenizer, denoiser and scheduler do not fit each other.
    """

    _callback_tensor_inputs = list(SHOWN)  # where diffusers looks for it

    def __init__(
        self,
        denoiser: TessDenoiser,
        scheduler: SimplexScheduler,
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        fit_tokenizer(tokenizer, denoiser.config.backbone_config)
        check_scheduler(scheduler, denoiser.config)
        self.denoiser, self.scheduler, self.tokenizer = denoiser, scheduler, tokenizer
        self._interrupt, self._num_timesteps, self._warned = False, 0, False

    @property
    def _execution_device(self) -> torch.device:
        return self.denoiser.device

    def progress_bar(self, total: int) -> AbstractContextManager[Any]:
        """None; a pipeline shows its steps here."""
        return nullcontext(SimpleNamespace(update=lambda: None))

    def maybe_free_model_hooks(self) -> None:
        """Nothing; a pipeline that keeps its models elsewhere sends them back."""

    @property
    def default_num_inference_steps(self) -> int:
        """The steps of a call that names none: 16, or all training steps where these are fewer."""
        return min(DEFAULT_INFERENCE_STEPS, self.scheduler.config.num_train_timesteps)

    @property
    def interrupt(self) -> bool:
        """Whether the call that runs was told to stop; see `callback_on_step_end`."""
        return self._interrupt

    @property
    def num_timesteps(self) -> int:
        """The steps of the call that runs, or ran last."""
        return self._num_timesteps

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        input_ids: Tensor | Sequence[Sequence[int]] | None = None,
        gen_length: int | Sequence[int] | None = None,
        num_inference_steps: int | None = None,
        timesteps: Sequence[float] | None = None,
        top_p: float | None = None,
        temperature: float = 1.0,
        *,
        options: SamplerOptions | None = None,
        fixed_tokens: Tensor | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        keys: Tensor | None = None,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] | None = ("token_ids",),
        return_trace: bool = False,
        on_trace: TraceHook | None = None,
        use_cache: bool = True,
        output_type: Literal["text", "seq"] = "text",
        return_dict: bool = True,
        strict: bool = False,
        **changes: Any,
    ) -> TessPipelineOutput | tuple[Tensor, list[str] | None, list[int]]:
        """Generate one text for every source.

        Every option of `SamplerOptions` may be given by its name instead of in `options`, or beside
        them, in their place: `pipe(text, guidance_scale=2.0, num_candidates=4)`. What most calls
        name of them:

            guidance_scale, guidance_form: classifier-free guidance (`Guidance`).
            reward, reward_scale, reward_steps: climb a differentiable score (`Guidance`).
            stopping: when an example is done before the last step, a `StoppingRule`; None: never.
            confidence_threshold: a token of at least this probability stays.
            logits_processor: transformers' logits processors, or functions like them; `forbid` and
                `no_repeat_ngram` make the usual ones.
            num_candidates, choose_by, scorer: write N texts for every source and give the best by
                "confidence", "mbr_bleu", "mbr_chrf" or "ar", the last with the causal model
                `scorer`. The first candidate is the text that N = 1 gives.
            block_length: write blocks of so many tokens one after the other, each with the source
                and all blocks before it as its context, up to gen_length tokens in all: for texts
                longer than the canvas the model was trained on (objective "block").
            scheduler, timestep_spacing, lowest_timestep, noise, eta: another sampler for this call.

        Args:
            prompt: the source texts; or
            input_ids: sources as token ids, bos and eos included: rows of any length, or [B, S]
                with padding at either end. `[[bos, eos]]` is the empty source.
            gen_length: canvas length in tokens, `</s>` included, one for all or one per example.
                None: by the model's length head or rule, for every example its own.
            num_inference_steps: from 1 to the scheduler's num_train_timesteps; None: 16, or that
                number where it is less; or
            timesteps: the times themselves, falling, in (0, 1].
            top_p: None for the arg-max; otherwise the mass of the nucleus to sample from.
                Schedulers that read whole predictions go on with those, and only the tokens shown
                are drawn.
            temperature: divides the logits; only with top_p.
            options: how to sample; None: the defaults.
            fixed_tokens: [B, L] int64, tokens that are given as clean context, -1 where the model
                writes: prefixes, infilling (`tess.sampling.control.template_tokens`). Without
                gen_length L is the canvas.
            generator: gives the seed; a list has one for each example, whose text is then the one
                that it would have alone. None takes torch's global generator.
            keys: [B] int64, the examples' own random keys (`example_keys`), in place of a seed: for
                a batch that is part of a larger set.
            callback_on_step_end: called as (pipeline, step, timestep, tensors) in each step, with
                the examples that are not done. It may return other "token_ids", with which the step
                goes on, and other "logits", which the next step's self-conditioning reads. With
                `pipeline._interrupt = True` it ends the call with the texts as they stand.
            callback_on_step_end_tensor_inputs: which of "token_ids", "log_probs" and "entropies"
                [B, L], "hidden_state" [B, L, H] and "logits" [B, L, V] the callback gets. The
                first three belong to the distribution that tokens are chosen from, guided if there
                is guidance in the "logits" form, before processors, temperature and top_p; the last
                two to the source's own prediction. Asking for the logits costs their memory.
            return_trace: keep tokens, log-probabilities and entropies of every step.
            on_trace: called as (step, number of steps, `StepTrace`) after each step, with the state
                of all rows: for a live view.
            use_cache: False reads the source in every step: the same text, slower.
            output_type: "text", or "seq" to leave out decoding.
            return_dict: False gives the tuple (sequences, texts, nfe).
            strict: a source that is too long is an error, not a warning and a cut.

        Raises:
            UserError: an argument that cannot be meant, in one sentence.
            ValueError: the same, from the scheduler.
        """
        if output_type not in ("text", "seq"):
            raise UserError(f"output_type must be 'text' or 'seq', got {output_type!r}")
        options = (options or SamplerOptions()).replace(changes, ARGUMENTS)
        if options.needs_scorer:
            raise UserError("choose_by='ar' needs scorer, a causal model of the same tokenizer")
        request = Request(
            num_inference_steps=num_inference_steps, gen_length=gen_length,
            top_p=top_p, temperature=temperature,
        )
        writer = self._writer(
            options,
            request,
            timesteps,
            on_step=(callback_on_step_end, callback_on_step_end_tensor_inputs),
            on_trace=on_trace,
            keep_trace=return_trace,
        )
        rows = self._sources(prompt, input_ids, strict)
        keys = self._keys(rows, keys, generator)
        written, lengths = self._write(
            writer, rows, keys, request, options, fixed_tokens, use_cache
        )
        self.maybe_free_model_hooks()
        return self._output(written, lengths, rows, options, output_type, return_dict)

    def _writer(
        self,
        options: SamplerOptions,
        request: Request,
        timesteps: Sequence[float] | None = None,
        on_step: tuple[StepCallback | None, Sequence[str] | None] = (None, None),
        **watched: Any,
    ) -> Writer:
        """What writes as this call asks; the scheduler has its timesteps."""
        config, device = self.denoiser.config, self._execution_device
        scheduler = options.replace_scheduler(self.scheduler)
        check_scheduler(scheduler, config)  # the pipeline's own may have been replaced
        steps = request.num_inference_steps
        if timesteps is not None and steps is not None:
            raise UserError("pass at most one of num_inference_steps and timesteps")
        if timesteps is None and steps is None:
            steps = self.default_num_inference_steps
        self._warn_of_guidance(options)
        scheduler.set_timesteps(steps, device=device, timesteps=timesteps)
        self._num_timesteps = len(scheduler.timesteps)
        if options.no_repeat_ngram is not None and self._num_timesteps == 1:
            raise UserError(
                "no_repeat_ngram does nothing in one step, as it looks at the step before; ask for "
                "at least two"
            )
        self._interrupt = False
        return Writer(
            denoiser=self.denoiser,
            scheduler=scheduler,
            bos_token_id=self.tokenizer.bos_token_id,
            eos_token_id=end_tokens(self.tokenizer),
            pad_token_id=self.tokenizer.pad_token_id,
            device=device,
            settings=SamplingSettings.of(
                options, request, self.tokenizer, self._never_written(device)
            ),
            progress=self.progress_bar,
            on_step=self._hook(scheduler, *on_step),
            interrupted=lambda: self.interrupt,
            **watched,
        )

    def _never_written(self, device: torch.device) -> list[SuppressTokensLogitsProcessor]:
        """Keeps out the rows of the embedding that are no token."""
        surplus = surplus_ids(self.tokenizer, self.denoiser.config.vocab_size)
        return [SuppressTokensLogitsProcessor(surplus, device=device)] if surplus else []

    def _warn_of_guidance(self, options: SamplerOptions) -> None:
        """Once: guidance that a model has not learned."""
        learned = self.denoiser.config.source_drop_probability
        if options.guidance_scale > 1 and not learned and not self._warned:
            self._warned = True
            said = "does not say that it was" if learned is None else "was not"
            logger.warning(
                "guidance_scale %g compares with the empty source, and this model %s trained on "
                "it (--source_drop_probability above 0)", options.guidance_scale, said,
            )

    def _hook(
        self,
        scheduler: SimplexScheduler,
        callback: StepCallback | None,
        names: Sequence[str] | None,
    ) -> StepHook | None:
        names = getattr(callback, "tensor_inputs", names)  # a `PipelineCallback` has its own
        names = check_shown(names, self._callback_tensor_inputs)
        if callback is None:
            return None
        return step_hook(
            partial(callback, self),
            names,
            logits=self.denoiser.logits,
            reads=scheduler.reads,
            self_conditioning=self.denoiser.config.self_conditioning,
        )

    def _sources(
        self,
        prompt: str | list[str] | None,
        input_ids: Tensor | Sequence[Sequence[int]] | None,
        strict: bool,
    ) -> list[list[int]]:
        """The sources as rows of ids, no longer than the model takes."""
        if (prompt is None) == (input_ids is None):
            raise UserError("pass exactly one of prompt and input_ids")
        longest = self.denoiser.config.max_source_length
        if prompt is not None:
            prompts = [prompt] if isinstance(prompt, str) else list(prompt)
            if strange := [item for item in prompts if not isinstance(item, str)]:
                raise UserError(
                    f"prompt must be a string or a list of strings, got {type(strange[0]).__name__}"
                )
            rows = encode_sources(self.tokenizer, prompts, longest, strict)
            warn_of_strange_texts(self.tokenizer, prompts)
        else:
            rows = id_rows(input_ids, self.tokenizer, self.denoiser.config.vocab_size)
            rows = cut_sources(rows, longest, strict)
        if not rows:
            raise UserError("expected at least one prompt, got none")
        return rows

    def _keys(
        self,
        rows: list[list[int]],
        keys: Tensor | None,
        generator: torch.Generator | Sequence[torch.Generator] | None,
    ) -> Tensor:
        """[B] int64, the random key of each source."""
        if keys is None:
            if generator is None or isinstance(generator, torch.Generator):
                return example_keys(rows, draw_seed(generator))
            if len(generator) != len(rows):
                raise UserError(
                    f"generator must be one or a list of {len(rows)}, one per source, got "
                    f"{len(generator)}"
                )
            return torch.cat(
                [example_keys([row], draw_seed(own)) for row, own in zip(rows, generator)]
            )
        if keys.shape != (len(rows),):
            raise UserError(f"keys must be [{len(rows)}], one per source, got {list(keys.shape)}")
        return keys

    def _write(
        self,
        writer: Writer,
        rows: list[list[int]],
        keys: Tensor,
        request: Request,
        options: SamplerOptions,
        fixed_tokens: Tensor | None,
        use_cache: bool,
    ) -> tuple[Denoised, list[int]]:
        """All candidates of all sources, and the canvas of each."""
        count = options.num_candidates
        every = torch.arange(len(rows)).repeat_interleave(count)
        check_batch(len(every))
        if options.block_length is not None:
            if fixed_tokens is not None:
                raise UserError("fixed_tokens belongs to one canvas; leave out block_length")
            blocks = Blocks(writer, options.block_length, request.gen_length)
        context, log_probs = writer.read(rows, with_lengths=request.gen_length is None)
        context = context.select(every.to(writer.device))
        keys = derived_keys(keys, count, "candidate")
        if options.block_length is not None:
            repeated = [rows[row] for row in every.tolist()]
            return blocks.write(context, repeated, keys, use_cache), [blocks.total] * len(every)
        config = self.denoiser.config
        lengths = request.lengths(len(rows))
        if lengths is None and fixed_tokens is None:
            lengths = target_lengths(config, rows, log_probs)
        if fixed_tokens is not None:
            fixed_tokens, lengths = fixed_canvas(
                fixed_tokens, lengths, len(rows), config.vocab_size
            )
            fixed_tokens = fixed_tokens[every]
        check_canvas(config, lengths)
        lengths = [length for length in lengths for _ in range(count)]
        if not use_cache:
            context = context.without_cache()
        return writer.write(context, lengths, keys, fixed_tokens), lengths

    def _output(
        self,
        written: Denoised,
        lengths: list[int],
        rows: list[list[int]],
        options: SamplerOptions,
        output_type: str,
        return_dict: bool,
    ) -> TessPipelineOutput | tuple[Tensor, list[str] | None, list[int]]:
        """The chosen texts, without what follows their ends."""
        inside = text_mask(written.token_ids, right_mask(lengths), end_tokens(self.tokenizer))
        sequences = written.token_ids.masked_fill(~inside, self.tokenizer.pad_token_id)
        candidates, nfe, count = None, written.nfe, options.num_candidates
        if count > 1:
            candidates = choose_candidates(
                sequences, inside, written.log_probs, nfe, rows, count,
                choose_by=options.choose_by, scorer=options.scorer, tokenizer=self.tokenizer,
            )
            sequences = sequences[candidates.chosen_rows()]
            nfe = [sum(each) for each in candidates.nfe]
            lengths = lengths[::count]
        texts = None
        if output_type == "text":
            texts = [decode(self.tokenizer, row) for row in sequences.tolist()]
        if not return_dict:
            return sequences, texts, nfe
        return TessPipelineOutput(
            sequences=sequences,
            texts=texts,
            nfe=nfe,
            lengths=lengths,
            candidates=candidates,
            trace=written.trace,
        )


ARGUMENTS = tuple(signature(TextDiffusion.__call__).parameters)[1:-1]
"""What a call takes by name beside the options."""


def check_scheduler(scheduler: SimplexScheduler, config: TessConfig) -> None:
    """Refuse a scheduler that a denoiser of this config cannot work with.

    Raises:
        UserError: another simplex, or order statistics where the whole simplex is needed.
    """
    for name in ("simplex_value", "vocab_size"):
        theirs, ours = getattr(scheduler.config, name), getattr(config, name)
        if theirs != ours:
            raise UserError(f"{name} mismatch: the scheduler has {theirs} and the model {ours}")
    if config.needs_whole_simplex and scheduler.config.noise != "dense":
        raise UserError(
            f"self_conditioning={config.self_conditioning!r} mixed at the "
            f"{config.self_conditioning_mix} needs the whole simplex: make the scheduler with "
            f'noise="dense" (--noise dense), it has {scheduler.config.noise!r}'
        )
