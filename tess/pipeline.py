"""Text in, text out: the TESS sampler as a diffusers pipeline."""

# B examples, S source positions, L target positions, V vocabulary

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.utils import BaseOutput
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tess.config import TessConfig
from tess.denoiser import TessDenoiser
from tess.errors import UserError
from tess.schedulers.renoising import RenoisingScheduler
from tess.self_conditioning import Prediction
from tess.tokenization import check_tokenizer, cut_sources, decode, encode_sources

DEFAULT_INFERENCE_STEPS = 16
"""Or the scheduler's training steps, where these are fewer."""

StepCallback = Callable[["TessPipeline", int, Tensor, dict[str, Tensor]], dict[str, Tensor] | None]


@dataclass
class TessPipelineOutput(BaseOutput):
    """What a pipeline call gives back.

    sequences: [B, L] token ids, on the CPU: the text, `</s>` if there was one, then padding.
    texts: B strings, cut at the first `</s>`; None with output_type="seq".
    nfe: network evaluations spent on each example (two a step under guidance).
    """

    sequences: Tensor
    texts: list[str] | None
    nfe: list[int]


class TessPipeline(DiffusionPipeline):
    """Generates text for a source by denoising a noised simplex (TESS, arXiv 2305.08379).

    The source is encoded once; every step predicts all target tokens and re-noises them less. An
    example's noise depends on the generator's seed, its source and how many equal sources stand
    before it in the batch, so its text depends neither on the batch nor on the order.

    Save with `save_pretrained`, load with `TessPipeline.from_pretrained`.

    Raises:
        UserError: when tokenizer, denoiser and scheduler do not fit each other.
    """

    model_cpu_offload_seq = "denoiser"
    _callback_tensor_inputs = ["token_ids", "log_probs", "entropies", "hidden_state", "logits"]

    def __init__(
        self,
        denoiser: TessDenoiser,
        scheduler: RenoisingScheduler,
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        super().__init__()
        check_tokenizer(tokenizer, denoiser.config.vocab_size)
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
        gen_length: int | None = None,
        num_inference_steps: int | None = None,
        top_p: float | None = None,
        temperature: float = 1.0,
        guidance_scale: float = 1.0,
        generator: torch.Generator | None = None,
        keys: Tensor | None = None,
        callback_on_step_end: StepCallback
        | PipelineCallback
        | MultiPipelineCallbacks
        | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("token_ids",),
        output_type: Literal["text", "seq"] = "text",
        return_dict: bool = True,
        strict: bool = False,
    ) -> TessPipelineOutput | tuple[Tensor, list[str] | None, list[int]]:
        """Generate one text for every source.

        Args:
            prompt: the source texts; or
            input_ids: sources as token ids, bos and eos included: rows of any length, or [B, S]
                with padding at either end. `[[bos, eos]]` is the empty source.
            gen_length: canvas length in tokens, `</s>` included. None: by the model's length rule,
                for every example its own.
            num_inference_steps: from 1 to the scheduler's num_train_timesteps; None: 16, or that
                number where it is less.
            top_p: None for the arg-max; otherwise the mass of the nucleus to sample from.
            temperature: divides the logits; only with top_p.
            guidance_scale: g >= 1; above 1, log p = u + g (c - u) with the source's prediction c
                and the empty source's u (classifier-free guidance, arXiv 2207.12598). The head is
                linear, so that is the prediction of the state u + g (c - u).
            generator: gives the seed; None takes torch's global generator.
            keys: [B] int64, the examples' own random keys (`example_keys`), in place of a seed: for
                a batch that is part of a larger set.
            callback_on_step_end: called as (pipeline, step, timestep, tensors) after each step. It
                may return other "token_ids", with which the next step goes on, and other "logits",
                which the next step's self-conditioning reads.
            callback_on_step_end_tensor_inputs: which of "token_ids", "log_probs" and "entropies"
                [B, L], "hidden_state" [B, L, H] and "logits" [B, L, V] the callback gets. The
                first three belong to the distribution that tokens are chosen from, guided if there
                is guidance, before temperature and top_p; the last two to the source's own
                prediction. Asking for the logits costs their memory.
            output_type: "text", or "seq" to leave out decoding.
            return_dict: False gives the tuple (sequences, texts, nfe).
            strict: a source that is too long is an error, not a warning and a cut.

        Raises:
            UserError: an argument that cannot be meant, in one sentence.
            ValueError: the same, from the scheduler.
        """
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        self._check_arguments(guidance_scale, output_type, callback_on_step_end_tensor_inputs)
        check_sampling(top_p, temperature)
        sources = self._sources(prompt, input_ids, strict)
        lengths = self.target_lengths(sources, gen_length)
        if num_inference_steps is None:
            num_inference_steps = self.default_num_inference_steps
        device = self._execution_device
        self.scheduler.set_timesteps(num_inference_steps, device=device)

        target_mask = _right_mask(lengths).to(device)
        if keys is None:
            keys = example_keys(sources, draw_seed(generator))
        keys_B = keys.to(device)
        context = self._context(sources, device)
        empty = self._empty_context(len(sources), device) if guidance_scale > 1 else None

        sample = self.scheduler.initial(tuple(target_mask.shape), keys_B)
        previous = None
        with self.progress_bar(total=num_inference_steps) as progress:
            for index, timestep in enumerate(self.scheduler.timesteps):
                inputs = {
                    "sample": self.scheduler.scale_model_input(sample, timestep),
                    "timesteps": timestep.expand(len(sources)),
                    "previous": previous,
                    "target_mask": target_mask,
                }
                hidden_BLH = self.denoiser(**inputs, **context).last_hidden_state
                guided_BLH = None
                if empty is not None:
                    other_BLH = self.denoiser(**inputs, **empty).last_hidden_state
                    guided_BLH = other_BLH + guidance_scale * (hidden_BLH - other_BLH)
                # Self-conditioning is on the source's own prediction, as in TESS.
                previous = self.denoiser.predict(
                    hidden_BLH,
                    top_p=top_p,
                    temperature=temperature,
                    uniforms=None if top_p is None else sample.uniforms(),
                    choice_BLH=guided_BLH,
                )
                sample = self.scheduler.step(previous.token_ids, timestep, sample).prev_sample
                if callback_on_step_end is not None:
                    tensors = self._tensors(
                        callback_on_step_end_tensor_inputs, previous, hidden_BLH
                    )
                    changed = callback_on_step_end(self, index, timestep, tensors) or {}
                    previous = self._replaced(previous, changed)
                    sample = replace(sample, token_ids=previous.token_ids)
                progress.update()
        self.maybe_free_model_hooks()

        sequences = self._cut(previous.token_ids.cpu(), lengths)
        texts = None
        if output_type == "text":
            texts = [decode(self.tokenizer, row) for row in sequences.tolist()]
        evaluations = num_inference_steps * (1 if empty is None else 2)
        nfe = [evaluations] * len(sources)
        if not return_dict:
            return sequences, texts, nfe
        return TessPipelineOutput(sequences=sequences, texts=texts, nfe=nfe)

    def _tensors(
        self, names: Sequence[str], prediction: Prediction, hidden_BLH: Tensor
    ) -> dict[str, Tensor]:
        """What a callback asks for."""
        made = {
            "hidden_state": lambda: hidden_BLH,
            "logits": lambda: self.denoiser.logits(hidden_BLH),
        }
        return {name: made[name]() if name in made else getattr(prediction, name) for name in names}

    def _replaced(self, prediction: Prediction, changed: dict[str, Tensor]) -> Prediction:
        """The prediction with what a callback returned; logits replace its soft part."""
        if unknown := sorted(set(changed) - {"token_ids", "logits"}):
            raise UserError(
                f"callback_on_step_end may return token_ids and logits, got {', '.join(unknown)}"
            )
        token_ids = changed.get("token_ids", prediction.token_ids)
        if "logits" not in changed:
            return replace(prediction, token_ids=token_ids)
        kind = self.denoiser.config.self_conditioning
        if kind is None or "projection" in kind:
            raise UserError(
                f"callback_on_step_end returned logits, which self_conditioning={kind!r} does not "
                "read"
            )
        return Prediction(token_ids=token_ids, logits=changed["logits"])

    def _check_arguments(
        self, guidance_scale: float, output_type: str, tensor_inputs: Sequence[str]
    ) -> None:
        if not guidance_scale >= 1:
            raise UserError(f"guidance_scale must be at least 1 (1 is off), got {guidance_scale}")
        if output_type not in ("text", "seq"):
            raise UserError(f"output_type must be 'text' or 'seq', got {output_type!r}")
        if unknown := sorted(set(tensor_inputs) - set(self._callback_tensor_inputs)):
            raise UserError(
                f"callback_on_step_end_tensor_inputs may name "
                f"{', '.join(self._callback_tensor_inputs)}, got {', '.join(unknown)}"
            )

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
            rows = cut_sources(self._id_rows(input_ids), longest, strict)
        if not rows:
            raise UserError("expected at least one prompt, got none")
        return rows

    def _id_rows(self, input_ids: Tensor | Sequence[Sequence[int]]) -> list[list[int]]:
        if isinstance(input_ids, Tensor):
            if input_ids.dim() != 2:
                raise UserError(f"input_ids must be [batch, length], got {list(input_ids.shape)}")
            padding = {self.tokenizer.pad_token_id} - {self.tokenizer.eos_token_id}
            rows = [_strip(row, padding) for row in input_ids.tolist()]
        else:
            rows = [list(row) for row in input_ids]
        size = self.denoiser.config.vocab_size
        for index, row in enumerate(rows):
            if not row:
                raise UserError(f"row {index} of input_ids is empty")
            if min(row) < 0 or max(row) >= size:
                strange = max(row) if max(row) >= size else min(row)
                raise UserError(f"token id {strange} is outside the vocabulary of {size}")
        return rows

    def target_lengths(self, sources: list[list[int]], gen_length: int | None) -> list[int]:
        """Each example's canvas in tokens: `gen_length`, or by the model's length rule."""
        config = self.denoiser.config
        if gen_length is None:
            if config.target_length_ratio is None:
                return [config.max_target_length] * len(sources)
            ratio, margin = config.target_length_ratio, config.target_length_margin
            wanted = [math.ceil(ratio * len(row)) + margin for row in sources]
            return [max(1, min(length, config.max_target_length)) for length in wanted]
        if gen_length <= 0:
            raise UserError(f"gen_length must be above 0, got {gen_length}")
        if 0 < config.num_target_positions < gen_length:
            raise UserError(
                f"gen_length must be at most {config.num_target_positions}, the model's learned "
                f"target positions, got {gen_length}"
            )
        return [gen_length] * len(sources)

    def _context(self, sources: list[list[int]], device: torch.device) -> dict[str, Any]:
        """The source as the denoiser's forward takes it: ids, and their cache if there is one."""
        source_mask = _right_mask([len(row) for row in sources]).flip(1)
        source_ids = torch.full_like(source_mask, self.tokenizer.pad_token_id)
        source_ids[source_mask.bool()] = torch.tensor([token for row in sources for token in row])
        source_ids, source_mask = source_ids.to(device), source_mask.to(device)
        cache = self.denoiser.encode_source(source_ids, source_mask)
        return {"source_ids": source_ids, "source_mask": source_mask, "cache": cache}

    def _empty_context(self, batch: int, device: torch.device) -> dict[str, Any]:
        ids = [self.tokenizer.bos_token_id, self.tokenizer.eos_token_id]
        context = self._context([[token for token in ids if token is not None]], device)
        cache = context.pop("cache")
        repeated = {name: tensor.repeat(batch, 1) for name, tensor in context.items()}
        return repeated | {"cache": None if cache is None else cache.repeat(batch)}

    def _cut(self, token_ids: Tensor, lengths: list[int]) -> Tensor:
        """Padding after the first `</s>` and outside the canvas."""
        is_end = token_ids == self.tokenizer.eos_token_id
        after_end = is_end.cumsum(dim=1) - is_end.long() > 0
        outside = _right_mask(lengths) == 0
        return token_ids.masked_fill(after_end | outside, self.tokenizer.pad_token_id)


def check_scheduler(scheduler: RenoisingScheduler, config: TessConfig) -> None:
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


def example_keys(sources: list[list[int]], seed: int) -> Tensor:
    """Random keys [B] int64: a hash of the seed, the source and its number among equal sources."""
    seen: Counter[tuple[int, ...]] = Counter()
    keys = []
    for row in map(tuple, sources):
        text = f"{seed}:{seen[row]}:{','.join(map(str, row))}"
        seen[row] += 1
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        keys.append(int.from_bytes(digest, "little", signed=True))
    return torch.tensor(keys, dtype=torch.long)


def check_sampling(top_p: float | None, temperature: float) -> None:
    """Refuse a nucleus or a temperature that cannot be meant.

    Raises:
        UserError: out of range, or a temperature where nothing is sampled.
    """
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"top_p must be above 0 and at most 1, got {top_p}")
    if not temperature > 0:
        raise UserError(f"temperature must be above 0, got {temperature}")
    if top_p is None and temperature != 1:
        raise UserError(f"temperature {temperature} does nothing without top_p; give top_p too")


def draw_seed(generator: torch.Generator | None) -> int:
    """A seed for `example_keys`; None takes torch's global generator."""
    device = None if generator is None else generator.device
    return int(torch.randint(2**63 - 1, (), generator=generator, device=device))


def _right_mask(lengths: list[int]) -> Tensor:
    """[B, max] int64, 1 at the first lengths[b] positions of row b."""
    positions = torch.arange(max(lengths))
    return (positions < torch.tensor(lengths)[:, None]).long()


def _strip(row: list[int], padding: set[int]) -> list[int]:
    kept = [index for index, token in enumerate(row) if token not in padding]
    return row[kept[0] : kept[-1] + 1] if kept else []
