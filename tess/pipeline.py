"""Text in, text out: simplex diffusion as a diffusers pipeline."""

# B examples, N candidates of each, S source positions, L target positions, V vocabulary, H hidden

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.utils import BaseOutput
from torch import Tensor
from transformers import PreTrainedTokenizerBase, SuppressTokensLogitsProcessor

from tess.backbones.causal_lm import HybridForCausalLM
from tess.config import TessConfig
from tess.denoiser import TessDenoiser
from tess.errors import UserError
from tess.length import quantile_lengths
from tess.sampling.blocks import Blocks
from tess.sampling.callbacks import SHOWN, StepCallback, check_shown, step_hook
from tess.sampling.candidates import Candidates, check_choice, choose_candidates
from tess.sampling.control import FREE, TokenProcessor, fixed_canvas
from tess.sampling.guidance import Guidance, Reward
from tess.sampling.loop import Batch, Denoised, SamplingSettings, StepHook, TraceHook, denoise
from tess.sampling.sources import Context, derived_keys, draw_seed, example_keys, id_rows, pad_left
from tess.sampling.steps import StepTrace
from tess.schedulers import family  # noqa: F401  diffusers loads components from imported modules
from tess.schedulers.base import SimplexScheduler
from tess.schedulers.stopping import StoppingRule, text_mask
from tess.text.end_tokens import end_tokens
from tess.text.padding import right_mask
from tess.text.tokenization import (
    cut_sources,
    decode,
    encode_sources,
    fit_tokenizer,
    surplus_ids,
)

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


class TessPipeline(DiffusionPipeline):
    """Generates text for a source by denoising a noised simplex (TESS, arXiv 2305.08379).

    The source is encoded once, for all steps and candidates; every step predicts all target tokens
    and noises them less. An example's noise depends on the generator's seed, its source and how
    many equal sources stand before it in the batch, so its text depends neither on the batch nor on
    the order.

    Any `SimplexScheduler` of the model's simplex serves:
    `pipe.scheduler = SimplexDDIMScheduler.from_config(pipe.scheduler.config)`.

    Save with `save_pretrained`, load with `TessPipeline.from_pretrained`.

    Raises:
        UserError: when tokenizer, denoiser and scheduler do not fit each other.
    """

    model_cpu_offload_seq = "denoiser"
    _callback_tensor_inputs = list(SHOWN)  # where diffusers looks for it

    def __init__(
        self,
        denoiser: TessDenoiser,
        scheduler: SimplexScheduler,
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        super().__init__()
        fit_tokenizer(tokenizer, denoiser.config.backbone_config)
        check_scheduler(scheduler, denoiser.config)
        self.register_modules(denoiser=denoiser, scheduler=scheduler, tokenizer=tokenizer)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> "TessPipeline":
        """`DiffusionPipeline.from_pretrained`, in float32 unless `dtype` (`torch_dtype`) is given.

        In float32 a text does not depend on its batch, whatever type the folder's weights have.
        """
        if kwargs.get("dtype") is None and kwargs.get("torch_dtype") is None:
            kwargs["dtype"] = torch.float32
        return super().from_pretrained(*args, **kwargs)

    @property
    def default_num_inference_steps(self) -> int:
        """The steps of a call that names none: 16, or all training steps where these are fewer."""
        return min(DEFAULT_INFERENCE_STEPS, self.scheduler.config.num_train_timesteps)

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
        guidance_scale: float = 1.0,
        guidance_form: Literal["logits", "probabilities"] = "logits",
        reward: Reward | None = None,
        reward_scale: float = 1.0,
        reward_steps: int = 1,
        stopping: StoppingRule | None = None,
        confidence_threshold: float | None = None,
        fixed_tokens: Tensor | None = None,
        logits_processor: Sequence[TokenProcessor] = (),
        num_candidates: int = 1,
        choose_by: str = "confidence",
        scorer: HybridForCausalLM | None = None,
        block_length: int | None = None,
        generator: torch.Generator | None = None,
        keys: Tensor | None = None,
        callback_on_step_end: StepCallback
        | PipelineCallback
        | MultiPipelineCallbacks
        | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("token_ids",),
        return_trace: bool = False,
        on_trace: TraceHook | None = None,
        use_cache: bool = True,
        output_type: Literal["text", "seq"] = "text",
        return_dict: bool = True,
        strict: bool = False,
    ) -> TessPipelineOutput | tuple[Tensor, list[str] | None, list[int]]:
        """Generate one text for every source.

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
            guidance_scale, guidance_form, reward, reward_scale, reward_steps: see
                `tess.sampling.guidance.Guidance`.
            stopping: when an example is done before the last step; None: never.
            confidence_threshold: see `tess.sampling.loop.SamplingSettings`.
            fixed_tokens: [B, L] int64, tokens that are given as clean context, -1 where the model
                writes: prefixes, infilling (`tess.sampling.control.template_tokens`). Without
                gen_length L is the canvas.
            logits_processor: transformers' logits processors, or functions like them; see
                `tess.sampling.control.token_processors`.
            num_candidates, choose_by, scorer: write N texts for every source and give the best by
                "confidence", "mbr_bleu", "mbr_chrf" or "ar", the last with the causal model
                `scorer`. The first candidate is the text that N = 1 gives.
            block_length: write blocks of so many tokens one after the other, each with the source
                and all blocks before it as its context, up to gen_length tokens in all: for texts
                longer than the canvas the model was trained on (objective "block").
            generator: gives the seed; None takes torch's global generator.
            keys: [B] int64, the examples' own random keys (`example_keys`), in place of a seed: for
                a batch that is part of a larger set.
            callback_on_step_end: called as (pipeline, step, timestep, tensors) in each step, with
                the examples that are not done. It may return other "token_ids", with which the step
                goes on, and other "logits", which the next step's self-conditioning reads.
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
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        check_shown(callback_on_step_end_tensor_inputs)
        if output_type not in ("text", "seq"):
            raise UserError(f"output_type must be 'text' or 'seq', got {output_type!r}")
        settings = SamplingSettings(
            top_p=top_p, temperature=temperature, stopping=stopping,
            confidence_threshold=confidence_threshold,
            logits_processor=[*self._never_written(), *logits_processor],
            guidance=Guidance(
                scale=guidance_scale, form=guidance_form, reward=reward,
                reward_scale=reward_scale, reward_steps=reward_steps,
            ),
        )
        if num_candidates < 1:
            raise UserError(f"num_candidates must be at least 1, got {num_candidates}")
        check_choice(choose_by, num_candidates, scorer)
        check_scheduler(self.scheduler, self.denoiser.config)  # it may have been replaced
        self._set_timesteps(num_inference_steps, timesteps)
        rows = self._sources(prompt, input_ids, strict)
        if keys is None:
            keys = example_keys(rows, draw_seed(generator))
        if keys.shape != (len(rows),):
            raise UserError(f"keys must be [{len(rows)}], one per source, got {list(keys.shape)}")
        keys = derived_keys(keys, num_candidates, "candidate")
        hook = None
        if callback_on_step_end is not None:
            hook = step_hook(self, callback_on_step_end, callback_on_step_end_tensor_inputs)
        options = {
            "settings": settings,
            "hook": hook,
            "keep_trace": return_trace,
            "on_trace": on_trace,
        }

        context, log_probs = self._read(rows, with_lengths=gen_length is None)
        if block_length is None:
            lengths = None
            if gen_length is not None or fixed_tokens is None:
                lengths = self.target_lengths(rows, gen_length, log_probs)
            fixed, lengths = self._fixed(fixed_tokens, lengths, len(rows))
            every = torch.arange(len(rows)).repeat_interleave(num_candidates)
            context = context.select(every.to(context.source_ids.device))
            if fixed is not None:
                fixed = fixed[every]
            lengths = [length for length in lengths for _ in range(num_candidates)]
            if not use_cache:
                context = context.without_cache()
            written = self._denoise(context, lengths, keys, fixed_tokens=fixed, **options)
        else:
            blocks = Blocks.of(self, block_length, gen_length, fixed_tokens, return_trace)
            written, lengths = blocks.write(context, rows, keys, num_candidates, use_cache, options)
        self.maybe_free_model_hooks()
        return self._output(
            written, lengths, rows, num_candidates, choose_by, scorer, output_type, return_dict
        )

    def _denoise(
        self,
        context: Context,
        lengths: Sequence[int],
        keys: Tensor,
        *,
        settings: SamplingSettings,
        hook: StepHook | None,
        on_trace: TraceHook | None,
        keep_trace: bool,
        fixed_tokens: Tensor | None = None,
    ) -> Denoised:
        """One canvas for every row of the context."""
        device = context.source_ids.device
        target_mask = right_mask(lengths).to(device)
        batch = Batch(
            index=torch.arange(len(lengths)),
            sample=self.scheduler.initial(tuple(target_mask.shape), keys.to(device)),
            target_mask=target_mask,
            context=context,
            empty=self._empty(len(lengths), context) if settings.guidance.contrasts else None,
            fixed_ids=None if fixed_tokens is None else fixed_tokens.to(device),
            held_ids=None
            if settings.confidence_threshold is None
            else torch.full_like(target_mask, FREE),
            left_ids=self._left_ids(target_mask, fixed_tokens),
        )
        with self.progress_bar(total=len(self.scheduler.timesteps)) as progress:
            return denoise(
                self.denoiser,
                self.scheduler,
                batch,
                settings,
                eos_token_id=end_tokens(self.tokenizer),
                pad_token_id=self.tokenizer.pad_token_id,
                on_step=hook,
                on_trace=on_trace,
                after_step=progress.update,
                keep_trace=keep_trace,
            )

    def _never_written(self) -> list[TokenProcessor]:
        """Keeps out the rows of the embedding that are no token."""
        surplus = surplus_ids(self.tokenizer, self.denoiser.config.vocab_size)
        device = self._execution_device
        return [SuppressTokensLogitsProcessor(surplus, device=device)] if surplus else []

    def _left_ids(self, target_mask: Tensor, fixed_tokens: Tensor | None) -> Tensor:
        """What stands on the canvas before the first step."""
        pad = self.tokenizer.pad_token_id
        if fixed_tokens is None:
            return torch.full_like(target_mask, pad)
        fixed_tokens = fixed_tokens.to(target_mask.device)
        return fixed_tokens.masked_fill(fixed_tokens == FREE, pad)

    def _set_timesteps(self, steps: int | None, timesteps: Sequence[float] | None) -> None:
        device = self._execution_device
        if timesteps is None:
            steps = self.default_num_inference_steps if steps is None else steps
            self.scheduler.set_timesteps(steps, device=device)
        elif steps is None:
            self.scheduler.set_timesteps(timesteps=timesteps, device=device)
        else:
            raise UserError("pass at most one of num_inference_steps and timesteps")

    def _sources(
        self,
        prompt: str | list[str] | None,
        input_ids: Tensor | Sequence[Sequence[int]] | None,
        strict: bool,
    ) -> list[list[int]]:
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
        else:
            rows = id_rows(input_ids, self.tokenizer, self.denoiser.config.vocab_size)
            rows = cut_sources(rows, longest, strict)
        if not rows:
            raise UserError("expected at least one prompt, got none")
        return rows

    def _read(
        self, rows: Sequence[Sequence[int]], with_lengths: bool = False
    ) -> tuple[Context, Tensor | None]:
        """The sources' encoding and, with a length head, log-probabilities of target lengths."""
        context = pad_left(rows, self.tokenizer.pad_token_id, self._execution_device)
        reading = self.denoiser.read_source(context.source_ids, context.source_mask)
        log_probs = None
        if with_lengths and self.denoiser.config.length_head:
            lengths_B = context.source_mask.sum(dim=1)
            log_probs = self.denoiser.length_log_probs(reading.last_state, lengths_B)
        return replace(context, cache=reading.cache), log_probs

    def _empty(self, batch: int, like: Context) -> Context:
        """The empty source for every row, encoded once where the sources are."""
        ids = [self.tokenizer.bos_token_id, self.tokenizer.eos_token_id]
        row = [token for token in ids if token is not None]
        if like.cache is None:
            context = pad_left([row], self.tokenizer.pad_token_id, like.source_ids.device)
        else:
            context, _ = self._read([row])
        return context.select(torch.zeros(batch, dtype=torch.long, device=like.source_ids.device))

    def target_lengths(
        self,
        sources: Sequence[Sequence[int]],
        gen_length: int | Sequence[int] | None,
        log_probs: Tensor | None = None,
    ) -> list[int]:
        """Each example's canvas in tokens: `gen_length`, else by length head, else by the rule.

        log_probs: [B, N] of the lengths 1 .. N, where the model has a length head.
        """
        config = self.denoiser.config
        if gen_length is not None:
            return self._given_lengths(gen_length, len(sources))
        margin, longest = config.target_length_margin, config.max_target_length
        if log_probs is not None:
            wanted = quantile_lengths(log_probs, config.target_length_quantile).tolist()
            return [max(1, min(length + margin, longest)) for length in wanted]
        if config.target_length_ratio is None:
            return [longest] * len(sources)
        wanted = [math.ceil(config.target_length_ratio * len(row)) + margin for row in sources]
        return [max(1, min(length, longest)) for length in wanted]

    def _given_lengths(self, gen_length: int | Sequence[int], batch: int) -> list[int]:
        if isinstance(gen_length, (float, str)):
            raise UserError(f"gen_length must be an integer or one per example, got {gen_length!r}")
        one = isinstance(gen_length, Integral)
        lengths = [int(gen_length)] * batch if one else [int(length) for length in gen_length]
        if len(lengths) != batch:
            raise UserError(f"gen_length must be one number or {batch}, got {len(lengths)}")
        if min(lengths) <= 0:
            raise UserError(f"gen_length must be above 0, got {min(lengths)}")
        positions = self.denoiser.config.num_target_positions
        if 0 < positions < max(lengths):
            raise UserError(
                f"gen_length must be at most {positions}, the model's learned target positions, "
                f"got {max(lengths)}"
            )
        return lengths

    def _fixed(
        self, fixed_tokens: Tensor | None, lengths: list[int] | None, batch: int
    ) -> tuple[Tensor | None, list[int]]:
        if fixed_tokens is None:
            return None, lengths
        size = self.denoiser.config.vocab_size
        fixed, lengths = fixed_canvas(fixed_tokens, lengths, batch, size)
        return fixed, self._given_lengths(lengths, batch)

    def _output(
        self,
        written: Denoised,
        lengths: list[int],
        rows: list[list[int]],
        num_candidates: int,
        choose_by: str,
        scorer: HybridForCausalLM | None,
        output_type: str,
        return_dict: bool,
    ) -> TessPipelineOutput | tuple[Tensor, list[str] | None, list[int]]:
        inside = text_mask(written.token_ids, right_mask(lengths), end_tokens(self.tokenizer))
        sequences = written.token_ids.masked_fill(~inside, self.tokenizer.pad_token_id)
        candidates, nfe = None, written.nfe
        if num_candidates > 1:
            candidates = choose_candidates(
                sequences, inside, written.log_probs, nfe, rows, num_candidates,
                choose_by=choose_by, scorer=scorer, tokenizer=self.tokenizer,
            )
            sequences = sequences[candidates.chosen_rows()]
            nfe = [sum(each) for each in candidates.nfe]
            lengths = lengths[::num_candidates]
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
