"""Drafts by the diffusion decoder, for the autoregressive model to verify (`verified.py`)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tess.decoders.diffusion import TessDecoder
from tess.sampling.control import FREE

REDRAFTS = ("suffix", "diffusion")
"""How the rest is drafted after a token of the causal model's own; see `DiffusionDrafts`."""

WINDOW = 16
"""Tokens of a draft to either side in which the causal model's own token is looked for."""


def aligned_rest(draft: Sequence[int], text: Sequence[int], window: int = WINDOW) -> list[int]:
    """What a draft has left after a text that went its own ways in between.

    Both are read from the start. A token of the text that is not the draft's next one is looked for
    up to `window` tokens ahead (the draft has words too many) or back (it lacks some), the nearest
    first; one that is nowhere there stands in place of the draft's next.
    """
    place = 0
    for token in text:
        near = sorted(
            range(max(0, place - window), min(len(draft), place + window + 1)),
            key=lambda index: (abs(index - place), index < place),
        )
        place = next((index for index in near if draft[index] == token), place) + 1
    return list(draft[place:])


class DiffusionDrafts:
    """Drafts of one batch by the diffusion decoder.

    The first draft is its text as it stands, or what is left of it (`aligned_rest`) after the
    causal model's first token. Then, by `redraft`:
        "suffix": what is left of that same text: a wrong word seldom spoils what follows.
        "diffusion": the text written anew in every round, the certain prefix fixed.

    A text that outgrows its draft, or its diffusion canvas, goes on without.

    nfe: [B] diffusion evaluations so far.
    """

    def __init__(
        self,
        writer: TessDecoder,
        sources: list[list[int]],
        keys: Tensor,
        num_inference_steps: int,
        redraft: str,
    ) -> None:
        self.writer, self.sources, self.keys = writer, sources, keys
        self.num_inference_steps, self.redraft = num_inference_steps, redraft
        self.nfe = [0] * len(sources)
        self.lengths = [0] * len(sources)
        self.texts: dict[int, list[int]] = {}

    def __call__(
        self, rows: list[int], prefixes: list[list[int]], budgets: list[int]
    ) -> list[list[int]]:
        """See `tess.decoders.verified.Drafter`."""
        if not self.texts:
            self.texts = self._write(rows)
        elif self.redraft == "diffusion":
            return self._continue(rows, prefixes)
        return [
            aligned_rest(self.texts[row], prefix)
            for row, prefix in zip(rows, prefixes, strict=True)
        ]

    def _continue(self, rows: list[int], prefixes: list[list[int]]) -> list[list[int]]:
        texts = dict(zip(rows, prefixes, strict=True))
        free = [row for row in rows if len(texts[row]) < self.lengths[row]]
        if free:
            canvases = [self.lengths[row] for row in free]
            fixed = torch.full((len(free), max(canvases)), FREE)
            for place, row in enumerate(free):
                fixed[place, : len(texts[row])] = torch.tensor(texts[row])
            texts |= self._write(free, gen_length=canvases, fixed_tokens=fixed)
        return [texts[row][len(prefix) :] for row, prefix in zip(rows, prefixes, strict=True)]

    def _write(self, rows: list[int], **canvas: Any) -> dict[int, list[int]]:
        """The diffusion texts of some rows, at most as long as their canvases."""
        writer = self.writer
        out = writer.pipeline(
            input_ids=[self.sources[row] for row in rows],
            keys=self.keys[rows],
            num_inference_steps=self.num_inference_steps,
            output_type="seq",
            options=writer.options,
            **canvas,
        )
        for row, evaluations, length in zip(rows, out.nfe, out.lengths, strict=True):
            self.nfe[row] += evaluations
            self.lengths[row] = length
        return {
            row: ids[:length]
            for row, ids, length in zip(rows, out.sequences.tolist(), out.lengths, strict=True)
        }
