"""The autoregressive decoder by beam search: transformers' own, over the hybrid cache."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor

from tess.backbones.causal_lm import HybridForCausalLM
from tess.decoders.autoregressive import ArDecoder
from tess.decoders.base import Description, Generation
from tess.errors import UserError
from tess.options import check_count
from tess.sampling.request import Request
from tess.storage.parts import Parts

MOST_BEAMS = 2**10

LENGTH_PENALTY = 1.0
"""Of a search that is not told one."""


class BeamDecoder(ArDecoder):
    """`ar`, keeping the `num_beams` likeliest prefixes of every text instead of one.

    A finished text scores log p / n^length_penalty, where n is the number of its tokens, `</s>`
    included. In every step the candidates are the continuations of all beams by every token, the
    likeliest first. Of the first `num_beams` of them those that end are finished texts, of which
    the best `num_beams` are kept; the best that do not end are the next beams. The search of a text
    is over once no beam, at its score of now, could take a place among the kept ones, or at the
    longest length; the best finished text is the result.

    `Generation.nfe` counts the steps of the text's own search, that of the source included,
    whatever its batch goes on to do. Each is `num_beams` rows wide.

    Args:
        num_beams: at least 2; with 1 this is greedy search.
        length_penalty: 1.0 unless given; above 0 favours longer texts, 0 compares log p itself.

    Raises:
        UserError: an argument out of range; in `generate` also top_p, which is for sampling.
    """

    def __init__(
        self,
        parts: Parts,
        num_beams: int,
        length_penalty: float | None = None,
        *,
        chat: bool = False,
    ) -> None:
        super().__init__(parts, chat=chat)
        length_penalty = LENGTH_PENALTY if length_penalty is None else length_penalty
        if num_beams < 2:
            raise UserError(f"num_beams must be at least 2 for a beam search, got {num_beams}")
        if not math.isfinite(length_penalty):
            raise UserError(f"length_penalty must be a finite number, got {length_penalty}")
        self.num_beams, self.length_penalty = num_beams, length_penalty

    def describe(self) -> Description:
        described = super().describe()
        return replace(described, num_beams=self.num_beams, length_penalty=self.length_penalty)

    def _flops(self, source_length: int, text: Generation) -> float:
        return self.num_beams * super()._flops(source_length, text)

    def _batch(
        self, rows: list[list[int]], keys: Tensor, request: Request
    ) -> list[Generation]:
        if request.top_p is not None:
            raise UserError(
                f"top_p samples and num_beams {self.num_beams} searches for the likeliest text; "
                "give one of them"
            )
        return super()._batch(rows, keys, request)

    def _write(self, width: int, **options: Any) -> list[Generation]:
        with _search_steps(self.model) as steps:
            sequences = self.model.generate(
                num_beams=self.num_beams,
                length_penalty=self.length_penalty,
                early_stopping=False,
                **options,
            )
        written = zip(self._new_tokens(sequences, width), sum(steps).tolist(), strict=True)
        return [self._generation(ids, nfe) for ids, nfe in written]


@contextmanager
def _search_steps(model: HybridForCausalLM) -> Iterator[list[Tensor]]:
    """A list that gets [B] for each step of a beam search: 1 where a text's own search is not over.

    transformers goes on with all rows until the last one is done and keeps the number of steps to
    itself; the check that it makes after each is handed what says which rows were still searching.
    """
    check, steps = model._check_early_stop_heuristic, []

    def counting(*, is_early_stop_heuristic_unsatisfied: Tensor, **state: Any) -> Tensor:
        steps.append(is_early_stop_heuristic_unsatisfied[:, 0].long())
        return check(
            is_early_stop_heuristic_unsatisfied=is_early_stop_heuristic_unsatisfied, **state
        )

    model._check_early_stop_heuristic = counting
    try:
        yield steps
    finally:
        del model._check_early_stop_heuristic


def wants_beams(name: str, num_beams: int | None, length_penalty: float | None) -> bool:
    """Whether the decoder called `name` is to search with several beams.

    Raises:
        UserError: beams for another decoder than ar, fewer than one, or a length penalty for one.
    """
    for option, value in (("num_beams", num_beams), ("length_penalty", length_penalty)):
        if value is not None and name != ArDecoder.name:
            raise UserError(f"{option} belongs to the ar decoder, and this one is {name}")
    if num_beams is not None:
        check_count("num_beams", num_beams, MOST_BEAMS)
    several = num_beams is not None and num_beams > 1
    if length_penalty is not None and not several:
        raise UserError(
            f"length_penalty {length_penalty} does nothing without several beams; give num_beams "
            "of 2 or more too"
        )
    return several
