"""Ways to write with a checkpoint, behind one call: `tess` (all at once), `ar` (token by token)."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from tess.collators import pad_sources
from tess.errors import UserError
from tess.pipeline import TessPipeline
from tess.saving import Parts, kind_of, load_parts
from tess.tokenization import decode, encode_source

DECODERS = ("tess", "ar")
DEFAULT_INFERENCE_STEPS = 16


@dataclass(frozen=True)
class Generation:
    """One generated text.

    text: without special tokens, up to `</s>`.
    token_ids: up to and including `</s>` if there is one, without padding.
    num_new_tokens: their number.
    nfe: network evaluations over the target spent on this text (reading the source is not counted
        for tess; it gives the first token for ar, and is its first evaluation).
    """

    text: str
    token_ids: list[int]
    num_new_tokens: int
    nfe: int


class Decoder(Protocol):
    """A checkpoint and a way to write with it."""

    name: str
    tokenizer: PreTrainedTokenizerBase
    num_parameters: int

    def generate(
        self,
        texts: list[str],
        *,
        num_inference_steps: int | None = None,
        gen_length: int | None = None,
        seed: int = 0,
        batch_size: int = 8,
        top_p: float | None = None,
        temperature: float = 1.0,
        progress: bool = False,
        strict: bool = False,
    ) -> list[Generation]: ...


class _BatchedDecoder:
    """Checks and encodes texts and runs them in batches of like lengths."""

    name: str

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
        gen_length: int | None = None,
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
            num_inference_steps: of tess; default 16.
            gen_length: most new tokens, `</s>` included; default: the checkpoint's rule.
            seed: the same seed gives the same texts, in any batch size and order.
            batch_size: texts at once.
            top_p: None takes the likeliest token; else the mass of the nucleus to sample from.
            temperature: divides the logits, when top_p is given.
            progress: show a bar.

        Raises:
            UserError: an empty text, or an argument out of range.
        """
        rows = [
            encode_source(self.tokenizer, text, self._max_source_length(), strict) for text in texts
        ]
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
        gen_length: int | None = None,
        seed: int = 0,
        batch_size: int = 8,
        top_p: float | None = None,
        temperature: float = 1.0,
        progress: bool = False,
    ) -> list[Generation]:
        """As `generate`, for sources as laid-out token ids."""
        _check(gen_length, batch_size, top_p, temperature)
        self.model.eval()
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
                written = self._batch(
                    batch, num_inference_steps, gen_length, seed, top_p, temperature
                )
                results |= dict(zip(chosen, written, strict=True))
                if progress:
                    bar.update(len(chosen))
        return [results[i] for i in range(len(rows))]

    def _generation(self, ids: list[int], nfe: int | None = None) -> Generation:
        eos = self.tokenizer.eos_token_id
        kept = ids[: ids.index(eos) + 1] if eos in ids else ids
        return Generation(
            decode(self.tokenizer, kept), kept, len(kept), len(kept) if nfe is None else nfe
        )

    def _max_source_length(self) -> int | None:
        raise NotImplementedError

    def _batch(
        self,
        rows: list[list[int]],
        num_inference_steps: int | None,
        gen_length: int | None,
        seed: int,
        top_p: float | None,
        temperature: float,
    ) -> list[Generation]:
        raise NotImplementedError


class TessDecoder(_BatchedDecoder):
    """All target positions at once, in a fixed number of network evaluations."""

    name = "tess"

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts)
        self.pipeline = TessPipeline(
            denoiser=parts.model, scheduler=parts.scheduler, tokenizer=parts.tokenizer
        )
        self.pipeline.set_progress_bar_config(disable=True)

    def _max_source_length(self) -> int:
        return self.model.config.max_source_length

    def _batch(
        self, rows, num_inference_steps, gen_length, seed, top_p, temperature
    ) -> list[Generation]:
        steps = DEFAULT_INFERENCE_STEPS if num_inference_steps is None else num_inference_steps
        out = self.pipeline(
            input_ids=rows,
            gen_length=gen_length,
            num_inference_steps=steps,
            top_p=top_p,
            temperature=temperature,
            generator=torch.Generator().manual_seed(seed),
            output_type="seq",
        )
        pad = self.tokenizer.pad_token_id
        return [
            self._generation(_without_tail(ids, pad), nfe)
            for ids, nfe in zip(out.sequences.tolist(), out.nfe, strict=True)
        ]


class ArDecoder(_BatchedDecoder):
    """One token per network evaluation, through the cache: greedy, or sampled with `top_p`."""

    name = "ar"

    def _max_source_length(self) -> int | None:
        # transformers writes a huge number for "no limit".
        longest = self.tokenizer.model_max_length
        return None if longest > 10**6 else longest

    def _batch(
        self, rows, num_inference_steps, gen_length, seed, top_p, temperature
    ) -> list[Generation]:
        if num_inference_steps is not None:
            raise UserError(
                "num_inference_steps belongs to the tess decoder; ar takes one evaluation per token"
            )
        source = pad_sources(rows, self.tokenizer.pad_token_id)
        device = self.model.device
        sampling = {"do_sample": False}
        if top_p is not None:
            sampling = {"do_sample": True, "top_p": top_p, "temperature": temperature, "top_k": 0}
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            sequences = self.model.generate(
                input_ids=source["source_ids"].to(device),
                attention_mask=source["source_mask"].to(device),
                max_new_tokens=gen_length or self.model.generation_config.max_new_tokens or 128,
                pad_token_id=self.tokenizer.pad_token_id,
                eos_token_id=self.tokenizer.eos_token_id,
                **sampling,
            )
        width = source["source_ids"].shape[1]
        return [self._generation(ids) for ids in sequences[:, width:].tolist()]


def make_decoder(parts: Parts) -> TessDecoder | ArDecoder:
    """The decoder of a loaded (or just trained) checkpoint."""
    return ArDecoder(parts) if parts.scheduler is None else TessDecoder(parts)


def load_decoder(
    checkpoint: str | Path, decoder: str | None = None, dtype: torch.dtype = torch.float32
) -> TessDecoder | ArDecoder:
    """Load the decoder called `decoder` from a checkpoint.

    Args:
        checkpoint: a pipeline folder (tess), a causal model's folder (ar), a folder that holds such
            ones as `tess/` and `ar/`, or a training's output folder with `final/`.
        decoder: "tess" or "ar"; None takes the one there is, tess where there are both.
        dtype: of the weights in memory; with float32 a text does not depend on its batch.

    Raises:
        UserError: no such folder, no such decoder in it, or a checkpoint that cannot be used.
    """
    if decoder is not None and decoder not in DECODERS:
        raise UserError(f"unknown decoder {decoder!r}; known are {', '.join(DECODERS)}")
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
    if name not in found:
        raise UserError(f"{folder} has no decoder {name!r}; it has {', '.join(found)}")
    parts = load_parts(found[name], dtype)
    if torch.cuda.is_available():
        parts.model.to("cuda")
    return make_decoder(parts)


def _find(folder: Path) -> dict[str, Path]:
    """The checkpoints at or below `folder`, by decoder."""
    if kind := kind_of(folder):
        return {kind: folder}
    if kind := kind_of(folder / "final"):
        return {kind: folder / "final"}
    return {name: folder / name for name in DECODERS if kind_of(folder / name) == name}


def _check(
    gen_length: int | None, batch_size: int, top_p: float | None, temperature: float
) -> None:
    if gen_length is not None and gen_length < 1:
        raise UserError(f"gen_length must be at least 1, got {gen_length}")
    if batch_size < 1:
        raise UserError(f"batch_size must be at least 1, got {batch_size}")
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"top_p must be above 0 and at most 1, got {top_p}")
    if temperature <= 0:
        raise UserError(f"temperature must be above 0, got {temperature}")


def _without_tail(ids: list[int], pad: int) -> list[int]:
    while ids and ids[-1] == pad:
        ids = ids[:-1]
    return ids
