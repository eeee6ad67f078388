"""Ways to write with a checkpoint, behind one call.

`tess` writes all tokens at once, `ar` token by token, and `ar+mtp` the same as `ar`, several tokens
at a time: a multi-token predictor drafts them and the model checks them. `tess+ar` writes the same
as `ar` too, from whole drafts by `tess`.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging as transformers_logging

from tess.errors import UserError
from tess.sampling.loop import check_sampling
from tess.sampling.sources import draw_seed, example_keys
from tess.schedulers.stopping import StoppingRule
from tess.storage.parts import Parts
from tess.text.end_tokens import end_tokens, through_end
from tess.text.tokenization import decode, encode_sources, padding_ids

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
    # of the sampler, for reports; see `tess.evaluation.run.Decoder`
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
        check_request(gen_length, len(rows), batch_size, top_p, temperature)
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
        written = through_end(ids, end_tokens(self.tokenizer))
        padding = padding_ids(self.tokenizer)
        kept = [token for token in written if token not in padding]
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
    check_sampling(top_p, temperature)
