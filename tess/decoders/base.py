"""Ways to write with a checkpoint, behind one call.

`tess` writes all tokens at once, `ar` token by token, and `ar+mtp` the same as `ar`, several tokens
at a time: a multi-token predictor drafts them and the model checks them. `tess+ar` writes the same
as `ar` too, from whole drafts by `tess`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging as transformers_logging

from tess.costs.decoding import DecodingCost
from tess.errors import UserError
from tess.sampling.request import Request
from tess.sampling.sources import draw_seed, example_keys
from tess.storage.parts import Parts
from tess.text.tokenization import cut_sources, decode, encode_sources

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
    num_drafted, num_accepted: where there are drafts: their tokens, and those of them that are in
        the text.
    num_first_accepted: of tess+ar: those of the first draft.
    num_verifications: checks of a draft, evaluations of the causal model without the source's.
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


@dataclass(frozen=True, kw_only=True)
class Description:
    """How a decoder writes, as plain data under the keys of reports; None: it does not so.

    scheduler: a key of `tess.schedulers.family.SAMPLERS`.
    stopping: `patience`, and `max_entropy` in nats or None.
    length: of the canvas unless told: "predicted", "rule" or "fixed".
    sampler: the options that differ from their defaults.
    num_candidates, choose_by: texts per source, and one of `tess.sampling.candidates.CHOICES`,
        None where there is no choice.
    num_draft_tokens: drafted at a time. num_beams, length_penalty: of a search.
    """

    scheduler: str | None = None
    timestep_spacing: str | None = None
    stopping: Mapping[str, float | None] | None = None
    length: str | None = None
    sampler: Mapping[str, Any] | None = None
    num_candidates: int = 1
    choose_by: str | None = None
    num_draft_tokens: int | None = None
    num_beams: int = 1
    length_penalty: float | None = None


@dataclass(frozen=True)
class Sources:
    """Laid-out token ids of texts, none too long, and how many lost their end for it."""

    rows: list[list[int]]
    num_cut: int


OnBatch = Callable[[Mapping[int, Generation]], Any]
"""Told the texts of each batch as it is done, by the number of their source."""


class Decoder(ABC):
    """A checkpoint and a way to write with it: texts are checked, encoded and batched by length.

    default_num_inference_steps, max_target_length (of a canvas, in tokens): None: it has no such
    thing.
    """

    name: str
    default_num_inference_steps: int | None = None
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
        on_batch: OnBatch | None = None,
        finished: Mapping[int, Generation] | None = None,
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
            on_batch: called after each batch.
            finished: texts of an earlier, equal call by the number of their source; a batch of
                which all are there is not written again.

        Raises:
            UserError: an empty text, or an argument out of range.
        """
        return self.generate_ids(
            self.encode(texts, strict).rows,
            num_inference_steps=num_inference_steps,
            gen_length=gen_length,
            seed=seed,
            batch_size=batch_size,
            top_p=top_p,
            temperature=temperature,
            progress=progress,
            on_batch=on_batch,
            finished=finished,
        )

    def encode(self, texts: Sequence[str], strict: bool = False, warn: bool = True) -> Sources:
        """The texts as ids for `generate_ids`, the ends of too long ones cut off.

        Raises:
            UserError: an empty text, and with `strict` one that is too long.
        """
        longest = self.max_source_length
        rows = encode_sources(self.tokenizer, texts)
        num_cut = 0 if longest is None else sum(len(row) > longest for row in rows)
        return Sources(cut_sources(rows, longest, strict, warn), num_cut)

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
        on_batch: OnBatch | None = None,
        finished: Mapping[int, Generation] | None = None,
    ) -> list[Generation]:
        """As `generate`, for sources as laid-out token ids."""
        check_request(gen_length, len(rows), batch_size, top_p, temperature)
        self.model.eval()
        # One key per source over all rows, so that its noise does not depend on the batches.
        keys = example_keys(rows, draw_seed(torch.Generator().manual_seed(seed)))
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        results = dict(finished or {})
        bar = (
            transformers_logging.tqdm(total=len(rows), desc=self.name, leave=False)
            if progress
            else nullcontext()
        )
        with bar:
            for start in range(0, len(order), batch_size):
                chosen = order[start : start + batch_size]
                if all(i in results for i in chosen):
                    continue
                batch = [list(rows[i]) for i in chosen]
                lengths = gen_length
                if gen_length is not None and not isinstance(gen_length, int):
                    lengths = [gen_length[i] for i in chosen]
                written = self._batch(
                    batch, keys[chosen], num_inference_steps, lengths, top_p, temperature
                )
                done = dict(zip(chosen, written, strict=True))
                results |= done
                if on_batch is not None:
                    on_batch(done)
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

    def cost(self, source_lengths: Sequence[int], texts: Sequence[Generation]) -> DecodingCost:
        """Floating-point operations of texts that this decoder gave for sources of these lengths.

        Raises:
            UserError: a way of writing whose cost is not known.
        """
        pairs = zip(source_lengths, texts, strict=True)
        total = float(sum(self._flops(length, text) for length, text in pairs))
        new_tokens = sum(text.num_new_tokens for text in texts)
        return DecodingCost(total, total / new_tokens if new_tokens else None)

    @property
    @abstractmethod
    def max_source_length(self) -> int | None:
        """Tokens of the longest source the checkpoint takes; None: any."""

    @abstractmethod
    def describe(self) -> Description:
        """How it writes."""

    @abstractmethod
    def _flops(self, source_length: int, text: Generation) -> float:
        """Operations of one text."""

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


def check_request(
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
    Request(top_p=top_p, temperature=temperature)
