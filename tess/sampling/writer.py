"""From encoded sources to tokens: what one canvas and a text in blocks have in common."""

# B rows (examples times candidates), L positions, N lengths

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tess.config import TessConfig
from tess.denoiser import TessDenoiser
from tess.errors import UserError
from tess.length import quantile_lengths
from tess.sampling.control import FREE
from tess.sampling.loop import Batch, Denoised, SamplingSettings, StepHook, TraceHook, denoise
from tess.sampling.sources import Context
from tess.schedulers.base import SimplexScheduler
from tess.text.padding import pad_left, right_mask

LARGEST_BATCH = 2**22
"""Positions of all canvases of a batch, at most: a hidden state of 256 numbers has 4 GiB there."""


@dataclass(frozen=True, kw_only=True)
class Writer:
    """A denoiser, its scheduler with timesteps set, and how one call wants them used.

    bos_token_id, pad_token_id: of the tokenizer; it may have no bos.
    eos_token_id: all that end a text, first the one that closes a source.
    device: where sources and canvases go.
    settings: how tokens are chosen.
    progress: called with total=steps, gives a bar as a context.
    on_step, on_trace, keep_trace, interrupted: see `tess.sampling.loop.denoise`.
    """

    denoiser: TessDenoiser
    scheduler: SimplexScheduler
    bos_token_id: int | None
    eos_token_id: Sequence[int]
    pad_token_id: int
    device: torch.device
    settings: SamplingSettings
    progress: Callable[..., AbstractContextManager[Any]]
    on_step: StepHook | None = None
    on_trace: TraceHook | None = None
    keep_trace: bool = False
    interrupted: Callable[[], bool] = lambda: False

    def pad(self, rows: Sequence[Sequence[int]]) -> Context:
        """Sources as one batch, without their encoding."""
        return Context(**pad_left(rows, self.pad_token_id, self.device))

    def read(
        self, rows: Sequence[Sequence[int]], with_lengths: bool = False
    ) -> tuple[Context, Tensor | None]:
        """The sources' encoding and, with a length head, log-probabilities [B, N] of lengths."""
        context = self.pad(rows)
        reading = self.denoiser.read_source(context.source_ids, context.source_mask)
        log_probs = None
        if with_lengths and self.denoiser.config.length_head:
            lengths_B = context.source_mask.sum(dim=1)
            log_probs = self.denoiser.length_log_probs(reading.last_state, lengths_B)
        return replace(context, cache=reading.cache), log_probs

    def empty(self, batch: int, like: Context) -> Context:
        """The empty source for every row, encoded once where the sources are."""
        row = [token for token in (self.bos_token_id, self.eos_token_id[0]) if token is not None]
        context = self.pad([row]) if like.cache is None else self.read([row])[0]
        return context.select(torch.zeros(batch, dtype=torch.long, device=self.device))

    def write(
        self,
        context: Context,
        lengths: Sequence[int],
        keys: Tensor,
        fixed_tokens: Tensor | None = None,
    ) -> Denoised:
        """One canvas for every row of the context.

        lengths: of the canvases. keys: [B] int64. fixed_tokens: [B, L], `FREE` where the model
        writes.

        Raises:
            UserError: more positions than any memory is thought to hold.
        """
        check_batch(len(lengths) * max(lengths))
        target_mask = right_mask(lengths).to(self.device)
        fixed = None if fixed_tokens is None else fixed_tokens.to(self.device)
        guided = self.settings.guidance.contrasts
        holds = self.settings.confidence_threshold is not None
        batch = Batch(
            index=torch.arange(len(lengths)),
            sample=self.scheduler.initial(tuple(target_mask.shape), keys.to(self.device)),
            target_mask=target_mask,
            context=context,
            empty=self.empty(len(lengths), context) if guided else None,
            fixed_ids=fixed,
            held_ids=torch.full_like(target_mask, FREE) if holds else None,
            left_ids=self._left_ids(target_mask, fixed),
        )
        with self.progress(total=len(self.scheduler.timesteps)) as progress:
            return denoise(
                self.denoiser,
                self.scheduler,
                batch,
                self.settings,
                eos_token_id=self.eos_token_id,
                pad_token_id=self.pad_token_id,
                on_step=self.on_step,
                on_trace=self.on_trace,
                after_step=progress.update,
                keep_trace=self.keep_trace,
                interrupted=self.interrupted,
            )

    def _left_ids(self, target_mask: Tensor, fixed_tokens: Tensor | None) -> Tensor:
        """What stands on the canvas before the first step."""
        if fixed_tokens is None:
            return torch.full_like(target_mask, self.pad_token_id)
        return fixed_tokens.masked_fill(fixed_tokens == FREE, self.pad_token_id)


def target_lengths(
    config: TessConfig, sources: Sequence[Sequence[int]], log_probs: Tensor | None = None
) -> list[int]:
    """Each source's canvas in tokens, by the length head's log_probs [B, N], else by the rule."""
    margin, longest = config.target_length_margin, config.max_target_length
    if log_probs is not None:
        wanted = quantile_lengths(log_probs, config.target_length_quantile).tolist()
        return [max(1, min(length + margin, longest)) for length in wanted]
    if config.target_length_ratio is None:
        return [longest] * len(sources)
    wanted = [math.ceil(config.target_length_ratio * len(row)) + margin for row in sources]
    return [max(1, min(length, longest)) for length in wanted]


def check_canvas(config: TessConfig, lengths: Sequence[int]) -> None:
    """Raises UserError for a canvas that is empty, or has no positions in the model."""
    if min(lengths) < 1:
        raise UserError(f"gen_length must be at least 1, got {min(lengths)}")
    positions = config.num_target_positions
    if 0 < positions < max(lengths):
        raise UserError(
            f"gen_length must be at most {positions}, the model's learned target positions, "
            f"got {max(lengths)}"
        )


def check_batch(positions: int) -> None:
    """Raises UserError for more positions than any memory is thought to hold."""
    if positions > LARGEST_BATCH:
        raise UserError(
            f"texts times candidates times tokens must be at most {LARGEST_BATCH:,} at a time, got "
            f"{positions:,}"
        )
