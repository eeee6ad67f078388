"""Collators: token rows, corrupted, to a batch.

B examples, L canvas (target) positions, S source positions. A batch is a dict of

    source_ids, source_mask  [B, S]  long, left padded; absent when there is no source
    target_ids, target_mask  [B, L]  long, right padded; mask 1 = the position is in the canvas
    noise_mask               [B, L]  long; 1 = noised and predicted, 0 = clean context or padding
    loss_weights             [B, L]  float32

A row is `{"source": ids or None, "target": ids, "seed": int}`, ids without special tokens, and may
have a "batch_seed" of what is drawn once for its batch (without it: the first row's seed). All
randomness comes from the rows' seeds (see `tess.data.token_rows`), so a batch is the same after a
restart and with any number of loader workers. One corruption is drawn per batch (not per example):
batches with and without a source never mix.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tess.errors import UserError
from tess.text.padding import pad_left
from tess.text.tokenization import source_layout, target_layout

Row = dict[str, Any]

# UL2's denoisers as TESS draws them: (share of noised positions, mean span length in tokens).
T5_SPANS = ((0.15, 3.0), (0.15, 8.0))
AGGRESSIVE_SPANS = ((0.5, 3.0), (0.5, 8.0), (0.5, 48.0))
INFILLING_SPANS = (0.15, 3.0)
TEXT_INFILLING_RATIO = (0.0, 0.5)
"""Range of the share of source tokens that `text_infilling` hides; 0 makes the example a copy."""
TEXT_INFILLING_SPAN = 3.0


@dataclass
class Drawn:
    """One example before padding; `context` marks target positions that stay clean.

    whole_canvas: padding up to the maximum target length, as a block has in generation.
    """

    target: list[int]
    source: list[int] | None = None
    context: list[bool] | None = None
    whole_canvas: bool = False


@dataclass(frozen=True, kw_only=True)
class Canvas:
    """How long the canvas of an example is, and what its padding weighs in the loss."""

    pad_loss_weight: float = 0.0
    """0: the canvas ends at `</s>`. Above 0: it goes on over pads of that weight."""
    extent: Literal["batch", "rule"] = "batch"
    """Where a canvas with pads ends: with the batch's longest, or by generation's length rule."""
    length_ratio: float | None = None
    """Canvas tokens per source token in the rule."""
    length_margin: int = 0
    """Canvas tokens that the rule adds."""

    def __post_init__(self) -> None:
        if self.pad_loss_weight < 0:
            raise UserError(f"pad_loss_weight must not be negative, got {self.pad_loss_weight}")
        if self.extent not in ("batch", "rule"):
            raise UserError(f"canvas must be batch or rule, got {self.extent!r}")

    def length(self, example: Drawn, longest: int, limit: int) -> int:
        """Canvas length of `example` in a batch whose longest target has `longest` tokens."""
        own = len(example.target)
        if self.pad_loss_weight == 0 or example.context is not None:
            return own
        if example.whole_canvas:
            return limit
        if self.extent == "batch" or example.source is None or self.length_ratio is None:
            return longest
        rule = math.ceil(self.length_ratio * len(example.source)) + self.length_margin
        return max(own, min(rule, limit))


def span_mask(length: int, ratio: float, mean_span: float, rng: random.Random) -> list[bool]:
    """T5's noise mask: `ratio * length` positions in spans of `mean_span` on average.

    The first position is clean. At least one is noised and, from two on, at least one is clean.
    """
    if length < 2:
        return [True] * length
    noised = min(max(round(length * ratio), 1), length - 1)
    spans = min(max(round(noised / mean_span), 1), noised, length - noised)
    mask: list[bool] = []
    for clean, noisy in zip(
        _parts(length - noised, spans, rng), _parts(noised, spans, rng), strict=True
    ):
        mask += [False] * clean + [True] * noisy
    return mask


def _parts(total: int, count: int, rng: random.Random) -> list[int]:
    """A uniformly drawn ordered partition of `total` into `count` positive parts."""
    cuts = [0, *sorted(rng.sample(range(1, total), count - 1)), total]
    return [end - start for start, end in zip(cuts, cuts[1:], strict=False)]


class Collator:
    """Makes batches of one corruption, or of several with equal shares.

    Corruptions of texts (all but those of `NEED_SOURCE`) read a row's target, or for a pair either
    side with equal chance.

    Args:
        tokenizer: gives the special ids.
        corruptions: of `tess.data.settings.CORRUPTIONS`.
        max_source_length, max_target_length: in tokens, special tokens included.
        canvas: the policy for padding.

    Raises:
        UserError: for one that needs a `<mask>` that the tokenizer lacks.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        corruptions: Sequence[str] = ("seq2seq",),
        *,
        max_source_length: int,
        max_target_length: int,
        canvas: Canvas | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.corruptions = tuple(corruptions)
        if "text_infilling" in self.corruptions and tokenizer.mask_token_id is None:
            raise UserError(
                "text_infilling needs a tokenizer with a mask_token, and this one has none"
            )
        self.max_source_length = max_source_length
        self.max_target_length = max_target_length
        self.canvas = canvas or Canvas()

    def __call__(self, rows: Sequence[Row], corruption: str | None = None) -> dict[str, Tensor]:
        """Collate `rows` with `corruption`, or with one drawn from the mixture."""
        # A stream of its own, under the name that runs began with: the first row's example must not
        # depend on which corruption was drawn.
        seed = rows[0].get("batch_seed", rows[0]["seed"])
        batch_rng = random.Random(f"objective {seed}")
        draw = DRAWS[corruption or batch_rng.choice(self.corruptions)](self, batch_rng)
        return self._pad([draw(row, random.Random(row["seed"])) for row in rows])

    # Each method draws what holds for the whole batch and returns the function that draws one
    # example.

    def _seq2seq(self, batch_rng: random.Random) -> Callable[[Row, random.Random], Drawn]:
        def draw(row: Row, rng: random.Random) -> Drawn:
            _need_source("seq2seq", row)
            return Drawn(
                target=target_layout(self.tokenizer, row["target"], self.max_target_length),
                source=source_layout(self.tokenizer, row["source"], self.max_source_length),
            )

        return draw

    def _block(self, batch_rng: random.Random) -> Callable[[Row, random.Random], Drawn]:
        def draw(row: Row, rng: random.Random) -> Drawn:
            _need_source("block", row)
            source = source_layout(self.tokenizer, row["source"], self.max_source_length)
            text = target_layout(self.tokenizer, row["target"])
            room = self.max_source_length - len(source)
            # Without room for what was written before, the middle of a text cannot be asked for.
            starts = range(0, len(text) if room else 1, self.max_target_length)
            start = rng.choice(starts)
            return Drawn(
                target=text[start : start + self.max_target_length],
                source=source + text[max(0, start - room) : start],
                whole_canvas=True,
            )

        return draw

    def _unconditional(self, batch_rng: random.Random) -> Callable[[Row, random.Random], Drawn]:
        return lambda row, rng: Drawn(target=self._window(row, self.max_target_length, rng))

    def _spans(self, ratio: float, mean_span: float) -> Callable[[Row, random.Random], Drawn]:
        def draw(row: Row, rng: random.Random) -> Drawn:
            target = self._window(row, self.max_target_length, rng)
            noised = span_mask(len(target), ratio, mean_span, rng)
            return Drawn(target=target, context=[not noisy for noisy in noised])

        return draw

    def _span_infilling(self, batch_rng: random.Random) -> Callable[[Row, random.Random], Drawn]:
        return self._spans(*INFILLING_SPANS)

    def _prefix_lm(self, batch_rng: random.Random) -> Callable[[Row, random.Random], Drawn]:
        def draw(row: Row, rng: random.Random) -> Drawn:
            # The prefix is the source, without `</s>`: source and target together are the running
            # text.
            room = self.max_source_length - (self.tokenizer.bos_token_id is not None)
            text = self._window(row, room + self.max_target_length, rng)
            cut = rng.randint(1, max(1, min((len(text) - 1) // 2, room)))
            if len(text) == 1:
                cut = 0
            source = source_layout(self.tokenizer, text[:cut], with_eos=False)
            return Drawn(target=text[cut:][: self.max_target_length], source=source or text[:1])

        return draw

    def _ul2(self, batch_rng: random.Random) -> Callable[[Row, random.Random], Drawn]:
        third = batch_rng.randrange(3)
        if third == 0:
            return self._spans(*batch_rng.choice(T5_SPANS))
        if third == 1:
            return self._spans(*batch_rng.choice(AGGRESSIVE_SPANS))
        return self._prefix_lm(batch_rng)

    def _ul2_with_unconditional(
        self, batch_rng: random.Random
    ) -> Callable[[Row, random.Random], Drawn]:
        return self._unconditional(batch_rng) if batch_rng.random() < 0.25 else self._ul2(batch_rng)

    def _text_infilling(self, batch_rng: random.Random) -> Callable[[Row, random.Random], Drawn]:
        # The source keeps most of the text, so the encoder and the copying out of it are trained.
        room = min(self.max_source_length - 2, self.max_target_length - 1)

        def draw(row: Row, rng: random.Random) -> Drawn:
            text = _side(row, rng)
            start = rng.randint(0, max(0, len(text) - room))
            text = list(text[start : start + room])
            ratio = rng.uniform(*TEXT_INFILLING_RATIO)
            hidden = [False] * len(text)
            if round(ratio * len(text)) > 0:
                hidden = span_mask(len(text), ratio, TEXT_INFILLING_SPAN, rng)
            source: list[int] = []
            for position, token in enumerate(text):
                if not hidden[position]:
                    source.append(token)
                elif position == 0 or not hidden[position - 1]:
                    source.append(self.tokenizer.mask_token_id)
            return Drawn(
                target=target_layout(self.tokenizer, text),
                source=source_layout(self.tokenizer, source),
            )

        return draw

    def _window(self, row: Row, length: int, rng: random.Random) -> list[int]:
        """A text and its `</s>`; of a longer one, `length` tokens from a random place on."""
        text = target_layout(self.tokenizer, _side(row, rng))
        start = rng.randint(0, max(0, len(text) - length))
        return text[start : start + length]

    def _pad(self, examples: list[Drawn]) -> dict[str, Tensor]:
        pad_id = self.tokenizer.pad_token_id
        longest = max(len(example.target) for example in examples)
        canvases = [
            self.canvas.length(example, longest, self.max_target_length) for example in examples
        ]
        width = max(canvases)
        target_ids_BL = torch.full((len(examples), width), pad_id)
        target_mask_BL = torch.zeros_like(target_ids_BL)
        noise_mask_BL = torch.zeros_like(target_ids_BL)
        loss_weights_BL = torch.zeros(target_ids_BL.shape)
        for i, (example, canvas) in enumerate(zip(examples, canvases, strict=True)):
            own = len(example.target)
            target_ids_BL[i, :own] = torch.tensor(example.target)
            target_mask_BL[i, :canvas] = 1
            noise_mask_BL[i, :canvas] = 1
            if example.context is not None:
                noise_mask_BL[i, :own] = 1 - torch.tensor(example.context, dtype=torch.long)
            loss_weights_BL[i, :own] = noise_mask_BL[i, :own].float()
            loss_weights_BL[i, own:canvas] = self.canvas.pad_loss_weight
        batch = {
            "target_ids": target_ids_BL,
            "target_mask": target_mask_BL,
            "noise_mask": noise_mask_BL,
            "loss_weights": loss_weights_BL,
        }
        if examples[0].source is not None:
            batch |= pad_left([example.source for example in examples], pad_id)
        return batch


def _need_source(corruption: str, row: Row) -> None:
    if row["source"] is None:
        raise UserError(f"{corruption} needs rows with a source, got raw text")


def _side(row: Row, rng: random.Random) -> Sequence[int]:
    if row["source"] is not None and rng.random() < 0.5:
        return row["source"]
    return row["target"]


DRAWS: dict[str, Callable[[Collator, random.Random], Callable[[Row, random.Random], Drawn]]] = {
    "seq2seq": Collator._seq2seq,
    "block": Collator._block,
    "prefix_lm": Collator._prefix_lm,
    "span_infilling": Collator._span_infilling,
    "ul2": Collator._ul2,
    "unconditional": Collator._unconditional,
    "ul2_with_unconditional": Collator._ul2_with_unconditional,
    "text_infilling": Collator._text_infilling,
}
"""The function of each of `tess.data.settings.CORRUPTIONS`."""
