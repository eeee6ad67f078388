"""Ways to write with a checkpoint, behind one call.

`tess` writes all tokens at once, `ar` token by token, and `ar+mtp` the same as `ar`, several tokens
at a time: a multi-token predictor drafts them and the model checks them. `tess+ar` writes the same
as `ar` too, from whole drafts by `tess`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tess.costs.decoding import DecodingCost
from tess.options import check_count
from tess.sampling.request import Request
from tess.sampling.sources import seeded_keys
from tess.storage.parts import Parts
from tess.text.alphabet import warn_of_strange_texts
from tess.text.end_tokens import end_tokens, through_end
from tess.text.tokenization import cut_sources, decode, encode_sources, padding_ids


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
    generation_config: of ar: what of the folder's own settings is "honoured" and what "ignored".
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
    generation_config: Mapping[str, Mapping[str, Any]] | None = None


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
        seed: int = 0,
        batch_size: int = 8,
        strict: bool = False,
        on_batch: OnBatch | None = None,
        finished: Mapping[int, Generation] | None = None,
        **request: Any,
    ) -> list[Generation]:
        """Write one text for every source.

        Args:
            texts: sources; a too long one is cut with a warning, or refused with `strict`.
            seed: the same seed gives the same texts, in any batch size and order; equal sources get
                texts of their own, in the order they come.
            batch_size: texts at once.
            on_batch: called after each batch.
            finished: texts of an earlier, equal call by the number of their source; a batch of
                which all are there is not written again.
            request: num_inference_steps, gen_length, top_p, temperature: the fields of
                `tess.sampling.request.Request`. Steps and a length for each source are for tess.

        Raises:
            UserError: an empty text, or an argument out of range.
        """
        return self.generate_ids(
            self.encode(texts, strict).rows,
            seed=seed,
            batch_size=batch_size,
            on_batch=on_batch,
            finished=finished,
            **request,
        )

    def encode(self, texts: Sequence[str], strict: bool = False, warn: bool = True) -> Sources:
        """The texts as ids for `generate_ids`, the ends of too long ones cut off.

        Raises:
            UserError: an empty text, and with `strict` one that is too long.
        """
        longest = self.max_source_length
        rows = self._lay_out(texts)
        if warn:
            warn_of_strange_texts(self.tokenizer, texts)
        num_cut = 0 if longest is None else sum(len(row) > longest for row in rows)
        return Sources(cut_sources(rows, longest, strict, warn, self.closes_sources), num_cut)

    @property
    def closes_sources(self) -> bool:
        """Whether an end token stands between the source and what is written."""
        return True

    def _lay_out(self, texts: Sequence[str]) -> list[list[int]]:
        return encode_sources(self.tokenizer, texts)

    @torch.no_grad()
    def generate_ids(
        self,
        rows: Sequence[Sequence[int]],
        *,
        seed: int = 0,
        batch_size: int = 8,
        on_batch: OnBatch | None = None,
        finished: Mapping[int, Generation] | None = None,
        **request: Any,
    ) -> list[Generation]:
        """As `generate`, for sources as laid-out token ids."""
        asked = Request(**request)
        asked.lengths(len(rows))  # as many as there are sources
        check_count("batch_size", batch_size)
        self.model.eval()
        # One key per source over all rows, so that its noise does not depend on the batches.
        keys = seeded_keys(rows, seed)
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        results = dict(finished or {})
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            if all(i in results for i in chosen):
                continue
            batch = [list(rows[i]) for i in chosen]
            written = self._batch(batch, keys[chosen], asked.select(chosen))
            done = dict(zip(chosen, written, strict=True))
            results |= done
            if on_batch is not None:
                on_batch(done)
        return [results[i] for i in range(len(rows))]

    def _generation(self, ids: list[int], nfe: int | None = None, **drafts: int) -> Generation:
        written = through_end(ids, end_tokens(self.tokenizer))
        padding = padding_ids(self.tokenizer)
        kept = [token for token in written if token not in padding]
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
        self, rows: list[list[int]], keys: Tensor, request: Request
    ) -> list[Generation]:
        """Write one text for every row, in one batch."""
