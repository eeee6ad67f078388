"""Ways to write with a checkpoint, behind one call.

`tess` writes all tokens at once, `ar` token by token, and `ar+mtp` the same as `ar`, several tokens
at a time: a multi-token predictor drafts them and the model checks them. `tess+ar` writes the same
as `ar` too, from whole drafts by `tess`.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.utils import logging as transformers_logging

from tess.backbones.causal_lm import DRAFT_TOKENS
from tess.collators import pad_sources
from tess.errors import UserError
from tess.kernels import random
from tess.pipeline import TessPipeline, TessPipelineOutput
from tess.sampler_options import SamplerOptions
from tess.sampling import TraceHook, check_sampling
from tess.saving import Parts, kind_of, load_parts
from tess.schedulers.family import name_of
from tess.schedulers.renoising import sample_nucleus
from tess.schedulers.stopping import StoppingRule
from tess.sources import draw_seed, example_keys
from tess.tokenization import decode, encode_sources

DECODERS = ("tess", "ar", "ar+mtp", "tess+ar")


@dataclass(frozen=True)
class Generation:
    """One generated text.

    text: without special tokens, up to `</s>`.
    token_ids: up to and including `</s>` if there is one; padding, also amid the text, is left out.
    num_new_tokens: their number.
    nfe: network evaluations over the target spent on this text (reading the source is not counted
        for tess; it gives the first token for ar and ar+mtp, and is their first evaluation). The
        predictor's own, smaller evaluations are not in it. Of tess+ar: those of both models.
    num_drafted, num_accepted: of ar+mtp and tess+ar: tokens drafted, and those of them that are in
        the text.
    num_first_accepted: of tess+ar: those of the first draft.
    num_verifications: of tess+ar: evaluations of the causal model, without that of the source.
    first: where there were several candidates, the first: what a single one would have been.
    canvas_length: of tess and of the drafts of tess+ar: positions it was denoised on.
    """

    text: str
    token_ids: list[int]
    num_new_tokens: int
    nfe: int
    num_drafted: int = 0
    num_accepted: int = 0
    num_first_accepted: int = 0
    num_verifications: int = 0
    first: "Generation | None" = None
    canvas_length: int | None = None


class Decoder(ABC):
    """A checkpoint and a way to write with it: texts are checked, encoded and batched by length."""

    name: str
    default_num_inference_steps: int | None = None
    num_draft_tokens: int | None = None
    num_beams: int = 1
    length_penalty: float | None = None
    # of the sampler, for reports; see `tess.evaluation.Decoder`
    scheduler_name: str | None = None
    timestep_spacing: str | None = None
    stopping: StoppingRule | None = None
    num_candidates: int = 1
    choose_by: str | None = None
    length_source: str | None = None
    sampler: dict[str, Any] | None = None
    max_target_length: int | None = None

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.model = parts.model.eval()
        self.tokenizer = parts.tokenizer
        self.num_parameters = sum(p.numel() for p in parts.model.parameters())

    def generate(
        self,
        texts: list[str],
        *,
        num_inference_steps: int | None = None,
        gen_length: int | Sequence[int] | None = None,
        seed: int = 0,
        batch_size: int = 8,
        top_p: float | None = None,
        temperature: float = 1.0,
        progress: bool = False,
        strict: bool = False,
    ) -> list[Generation]:
        """Write one text for every source.

        Args:
            texts: sources; a too long one is cut with a warning, or refused with `strict`.
            num_inference_steps: of tess; default 16, or all training steps where they are fewer.
            gen_length: most new tokens, `</s>` included, for tess also one number per source;
                default: by the checkpoint's length head or rule.
            seed: the same seed gives the same texts, in any batch size and order; equal sources get
                texts of their own, in the order they come.
            batch_size: texts at once.
            top_p: None takes the likeliest token; else the mass of the nucleus to sample from.
            temperature: divides the logits; only with top_p.
            progress: show a bar.

        Raises:
            UserError: an empty text, or an argument out of range.
        """
        rows = encode_sources(self.tokenizer, texts, self._max_source_length(), strict)
        return self.generate_ids(
            rows,
            num_inference_steps=num_inference_steps,
            gen_length=gen_length,
            seed=seed,
            batch_size=batch_size,
            top_p=top_p,
            temperature=temperature,
            progress=progress,
        )

    @torch.no_grad()
    def generate_ids(
        self,
        rows: Sequence[Sequence[int]],
        *,
        num_inference_steps: int | None = None,
        gen_length: int | Sequence[int] | None = None,
        seed: int = 0,
        batch_size: int = 8,
        top_p: float | None = None,
        temperature: float = 1.0,
        progress: bool = False,
    ) -> list[Generation]:
        """As `generate`, for sources as laid-out token ids."""
        _check(gen_length, len(rows), batch_size, top_p, temperature)
        self.model.eval()
        # One key per source over all rows, so that its noise does not depend on the batches.
        keys = example_keys(rows, draw_seed(torch.Generator().manual_seed(seed)))
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        results: dict[int, Generation] = {}
        bar = (
            transformers_logging.tqdm(total=len(rows), desc=self.name, leave=False)
            if progress
            else nullcontext()
        )
        with bar:
            for start in range(0, len(order), batch_size):
                chosen = order[start : start + batch_size]
                batch = [list(rows[i]) for i in chosen]
                lengths = gen_length
                if gen_length is not None and not isinstance(gen_length, int):
                    lengths = [gen_length[i] for i in chosen]
                written = self._batch(
                    batch, keys[chosen], num_inference_steps, lengths, top_p, temperature
                )
                results |= dict(zip(chosen, written, strict=True))
                if progress:
                    bar.update(len(chosen))
        return [results[i] for i in range(len(rows))]

    def _generation(self, ids: list[int], nfe: int | None = None, **drafts: int) -> Generation:
        eos, pad = self.tokenizer.eos_token_id, self.tokenizer.pad_token_id
        written = ids[: ids.index(eos) + 1] if eos in ids else ids
        kept = [token for token in written if token != pad or token == eos]
        evaluations = len(written) if nfe is None else nfe
        text = decode(self.tokenizer, kept)
        return Generation(text, kept, len(kept), evaluations, **drafts)

    @abstractmethod
    def _max_source_length(self) -> int | None:
        """Tokens of the longest source the checkpoint takes; None: any."""

    @abstractmethod
    def _batch(
        self,
        rows: list[list[int]],
        keys: Tensor,
        num_inference_steps: int | None,
        gen_length: int | Sequence[int] | None,
        top_p: float | None,
        temperature: float,
    ) -> list[Generation]:
        """Write one text for every row, in one batch."""


class TessDecoder(Decoder):
    """All target positions at once, in a few network evaluations.

    options: scheduler, stopping, guidance, candidates and the like.
    """

    name = "tess"

    def __init__(self, parts: Parts, options: SamplerOptions | None = None) -> None:
        super().__init__(parts)
        self.options = SamplerOptions() if options is None else options
        self.pipeline = TessPipeline(
            denoiser=parts.model,
            scheduler=self.options.replace_scheduler(parts.scheduler),
            tokenizer=parts.tokenizer,
        )
        self.pipeline.set_progress_bar_config(disable=True)
        self.default_num_inference_steps = self.pipeline.default_num_inference_steps
        scheduler, config = self.pipeline.scheduler, self.model.config
        self.scheduler_name = name_of(scheduler)
        self.timestep_spacing = scheduler.config.timestep_spacing
        self.stopping = self.options.stopping
        self.num_candidates = self.options.num_candidates
        self.choose_by = self.options.choose_by if self.num_candidates > 1 else None
        by_rule = "fixed" if config.target_length_ratio is None else "rule"
        self.length_source = "predicted" if config.length_head else by_rule
        self.max_target_length = config.max_target_length
        self.sampler = self.options.changed()

    def trace(
        self,
        texts: list[str],
        *,
        num_inference_steps: int | None = None,
        gen_length: int | None = None,
        seed: int = 0,
        top_p: float | None = None,
        temperature: float = 1.0,
        strict: bool = False,
        fixed_tokens: Tensor | None = None,
        on_trace: TraceHook | None = None,
    ) -> tuple[list[Generation], TessPipelineOutput]:
        """As `generate`, in one batch, beside what the pipeline gave, its trace included.

        The trace has a row for every candidate, N in a row for each source. fixed_tokens, on_trace:
        see `TessPipeline`.
        """
        rows = encode_sources(self.tokenizer, texts, self._max_source_length(), strict)
        _check(gen_length, len(rows), 1, top_p, temperature)
        self.model.eval()
        keys = example_keys(rows, draw_seed(torch.Generator().manual_seed(seed)))
        out = self._run(
            rows, keys, num_inference_steps, gen_length, top_p, temperature,
            fixed_tokens=fixed_tokens, return_trace=True, on_trace=on_trace,
        )  # fmt: skip
        return self._generations(out), out

    def _max_source_length(self) -> int:
        return self.model.config.max_source_length

    def _batch(
        self, rows, keys, num_inference_steps, gen_length, top_p, temperature
    ) -> list[Generation]:
        out = self._run(rows, keys, num_inference_steps, gen_length, top_p, temperature)
        return self._generations(out)

    def _run(
        self, rows, keys, num_inference_steps, gen_length, top_p, temperature, **more: Any
    ) -> TessPipelineOutput:
        return self.pipeline(
            input_ids=rows,
            gen_length=gen_length,
            num_inference_steps=num_inference_steps,
            top_p=top_p,
            temperature=temperature,
            keys=keys,
            output_type="seq",
            **self.options.call_arguments(self.tokenizer),
            **more,
        )

    def _generations(self, out: TessPipelineOutput) -> list[Generation]:
        # Cut to the canvas: what follows it is padding, which may be spelled as `</s>` is.
        firsts: list[Generation | None] = [None] * len(out.lengths)
        if (several := out.candidates) is not None:
            firsts = [
                self._generation(ids[:length], nfe[0])
                for ids, length, nfe in zip(
                    several.sequences[:, 0].tolist(), out.lengths, several.nfe, strict=True
                )
            ]
        return [
            replace(self._generation(ids[:length], nfe), first=first, canvas_length=length)
            for ids, length, nfe, first in zip(
                out.sequences.tolist(), out.lengths, out.nfe, firsts, strict=True
            )
        ]


class _KeyedNucleus(LogitsProcessor):
    """Leaves only the token that an example's own random number draws from the nucleus.

    Greedy search then takes it, so that a text does not depend on the rest of its batch.
    """

    def __init__(self, keys: Tensor, width: int, top_p: float, temperature: float) -> None:
        self.keys, self.width = keys, width
        self.top_p, self.temperature = top_p, temperature

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        step = input_ids.shape[1] - self.width
        draw_B1 = random.uniform(self.keys, step, 1)
        token_B1 = sample_nucleus(scores.unsqueeze(1), draw_B1, self.top_p, self.temperature)
        return torch.full_like(scores, -torch.inf).scatter_(1, token_B1, 0.0)


class ArDecoder(Decoder):
    """One token per network evaluation, through the cache: greedy, or sampled with `top_p`."""

    name = "ar"

    def _max_source_length(self) -> int | None:
        # transformers writes a huge number for "no limit".
        longest = self.tokenizer.model_max_length
        return None if longest > 10**6 else longest

    def _batch(
        self, rows, keys, num_inference_steps, gen_length, top_p, temperature
    ) -> list[Generation]:
        if gen_length is not None and not isinstance(gen_length, int):
            raise UserError(
                "decoders that go token by token take one gen_length for all sources, got one each"
            )
        if num_inference_steps is not None:
            raise UserError(
                "num_inference_steps belongs to the tess decoder; ar takes one evaluation per "
                "token, and ar+mtp fewer"
            )
        source = pad_sources(rows, self.tokenizer.pad_token_id)
        device = self.model.device
        width = source["source_ids"].shape[1]
        choice = LogitsProcessorList()
        if top_p is not None:
            choice.append(_KeyedNucleus(keys.to(device), width, top_p, temperature))
        return self._write(
            width,
            input_ids=source["source_ids"].to(device),
            attention_mask=source["source_mask"].to(device),
            max_new_tokens=gen_length or self.model.generation_config.max_new_tokens or 128,
            pad_token_id=self.tokenizer.pad_token_id,
            eos_token_id=self.tokenizer.eos_token_id,
            do_sample=False,
            logits_processor=choice,
        )

    def _write(self, width: int, **options: Any) -> list[Generation]:
        """Call the model's `generate`; `width` tokens of every row are the source."""
        sequences = self.model.generate(**options)
        return [self._generation(ids) for ids in sequences[:, width:].tolist()]


class ArMtpDecoder(ArDecoder):
    """The same texts as `ar`, sampled ones too, in fewer evaluations.

    The choice of a token, greedy or by the example's own random number, is a function of the
    tokens before it, so a draft can be held against it.
    """

    name = "ar+mtp"

    def __init__(self, parts: Parts, num_draft_tokens: int = DRAFT_TOKENS) -> None:
        super().__init__(parts)
        if self.model.mtp is None:
            raise UserError(
                "ar+mtp needs a checkpoint with a multi-token predictor, and this one has none "
                "(num_nextn_predict_layers is 0 in its config.json)"
            )
        if num_draft_tokens < 1:
            raise UserError(f"num_draft_tokens must be at least 1, got {num_draft_tokens}")
        self.num_draft_tokens = num_draft_tokens

    def _write(self, width: int, **options: Any) -> list[Generation]:
        out = self.model.generate(
            use_mtp=True,
            num_assistant_tokens=self.num_draft_tokens,
            return_dict_in_generate=True,
            **options,
        )
        return [
            self._generation(ids, nfe, num_drafted=drafted, num_accepted=accepted)
            for ids, nfe, drafted, accepted in zip(
                out.sequences[:, width:].tolist(),
                out.num_forwards.tolist(),
                out.num_drafted.tolist(),
                out.num_accepted.tolist(),
                strict=True,
            )
        ]


def make_decoder(parts: Parts, options: SamplerOptions | None = None) -> TessDecoder | ArDecoder:
    """The decoder of a loaded (or just trained) checkpoint: `tess`, or else `ar`."""
    if parts.scheduler is not None:
        return TessDecoder(parts, options)
    _refuse_options(options, ArDecoder.name)
    return ArDecoder(parts)


def _refuse_options(options: SamplerOptions | None, name: str) -> None:
    if options is not None and (given := options.changed()):
        raise UserError(f"{', '.join(given)} belongs to the tess decoder, and this one is {name}")


def load_decoder(
    checkpoint: str | Path,
    decoder: str | None = None,
    dtype: torch.dtype = torch.float32,
    num_draft_tokens: int | None = None,
    options: SamplerOptions | None = None,
    num_beams: int | None = None,
    length_penalty: float | None = None,
) -> Decoder:
    """Load the decoder called `decoder` from a checkpoint.

    Args:
        checkpoint: a pipeline folder (tess), a causal model's folder (ar), a folder that holds such
            ones as `tess/` and `ar/`, or a training's output folder with `final/`.
        decoder: "tess", "ar", "ar+mtp" or "tess+ar"; None takes tess where there is one, else ar.
        dtype: of the weights in memory; with float32 a text does not depend on its batch.
        num_draft_tokens: of ar+mtp, drafted at a time (3 unless given); changes speed alone.
        options: of tess: scheduler, stopping, guidance, candidates and the like. To choose by "ar"
            without a scorer takes the folder's own causal model.
        num_beams, length_penalty: of ar, see `tess.beam_search`; 1 beam unless given, and 1.0.

    Raises:
        UserError: no such folder, no such decoder in it, or a checkpoint that cannot be used.
    """
    if decoder is not None and decoder not in DECODERS:
        raise UserError(f"unknown decoder {decoder!r}; known are {', '.join(DECODERS)}")
    if num_draft_tokens is not None and decoder != ArMtpDecoder.name:
        raise UserError("num_draft_tokens belongs to the ar+mtp decoder")
    folder = Path(checkpoint)
    if not folder.is_dir():
        raise UserError(f"there is no folder {str(checkpoint)!r}")
    found = _find(folder)
    if not found:
        raise UserError(
            f"{folder} is not a checkpoint: expected model_index.json (tess), a hybrid causal "
            "model's config.json (ar), or folders tess/ or ar/"
        )
    name = decoder or next(name for name in DECODERS if name in found)
    kind, *verifier = name.removesuffix("+mtp").split("+")
    if not {kind, *verifier} <= set(found):
        raise UserError(f"{folder} has no decoder {name!r}; it has {', '.join(found)}")
    from tess.beam_search import BeamDecoder, wants_beams  # made of the decoders here

    beams = wants_beams(name, num_beams, length_penalty)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if options is not None and options.needs_scorer:
        if "ar" not in found:
            raise UserError(f"choose_by 'ar' needs a causal model beside the denoiser in {folder}")
        options = replace(options, scorer=load_parts(found["ar"], dtype, device).model.eval())
    parts = load_parts(found[kind], dtype, device)
    if name == ArMtpDecoder.name:
        _refuse_options(options, name)
        return ArMtpDecoder(parts, DRAFT_TOKENS if num_draft_tokens is None else num_draft_tokens)
    if verifier:
        from tess.draft_verify import DraftVerifyDecoder

        return DraftVerifyDecoder(parts, load_parts(found["ar"], dtype, device), options=options)
    if beams:
        _refuse_options(options, name)
        return BeamDecoder(parts, num_beams, length_penalty)
    return make_decoder(parts, options)


def _find(folder: Path) -> dict[str, Path]:
    """The checkpoints at or below `folder`, by decoder."""
    if kind := kind_of(folder):
        return {kind: folder}
    if kind := kind_of(folder / "final"):
        return {kind: folder / "final"}
    return {name: folder / name for name in ("tess", "ar") if kind_of(folder / name) == name}


def _check(
    gen_length: int | Sequence[int] | None,
    rows: int,
    batch_size: int,
    top_p: float | None,
    temperature: float,
) -> None:
    lengths = [gen_length] if isinstance(gen_length, int) else list(gen_length or [1])
    if min(lengths) < 1:
        raise UserError(f"gen_length must be at least 1, got {min(lengths)}")
    if gen_length is not None and not isinstance(gen_length, int) and len(lengths) != rows:
        raise UserError(f"gen_length must be one number or {rows}, got {len(lengths)}")
    if batch_size < 1:
        raise UserError(f"batch_size must be at least 1, got {batch_size}")
    check_sampling(top_p, temperature)
