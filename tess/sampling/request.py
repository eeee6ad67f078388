"""What is asked of every decoder, whichever way it writes: steps, length, and how to draw."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Real

from tess.errors import UserError
from tess.options import check_count

LONGEST_TEXT = 2**20
"""Tokens of one text, at most: more than any backbone here has positions for."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """Steps, length and draw of a batch of texts.

    num_inference_steps: of the diffusion, whose scheduler knows the most; None: the default.
    gen_length: most new tokens, `</s>` included, one for all or one for each source; None: as the
        decoder finds.
    top_p: None takes the likeliest token; else the mass of the nucleus to draw from.
    temperature: divides the logits; only with top_p.

    Raises:
        UserError: a value out of range.
    """

    num_inference_steps: int | None = None
    gen_length: int | Sequence[int] | None = None
    top_p: float | None = None
    temperature: float = 1.0

    def __post_init__(self) -> None:
        given = self.gen_length
        if isinstance(given, (Real, str)):
            check_count("gen_length", given, LONGEST_TEXT)
        elif given is not None:
            for length in given:
                check_count("gen_length", length, LONGEST_TEXT)
        for name in ("top_p", "temperature"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, Real) and math.isfinite(value)):
                raise UserError(f"{name} must be a finite number, got {value!r}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if not self.temperature > 0:
            raise UserError(f"temperature must be above 0, got {self.temperature}")
        if self.top_p is None and self.temperature != 1:
            raise UserError(
                f"temperature {self.temperature} does nothing without top_p; give top_p too"
            )

    def lengths(self, batch: int) -> list[int] | None:
        """`gen_length` for each of `batch` sources; None where none is asked for.

        Raises:
            UserError: another number of lengths than of sources.
        """
        if self.gen_length is None:
            return None
        if isinstance(self.gen_length, Real):
            return [int(self.gen_length)] * batch
        if len(self.gen_length) != batch:
            raise UserError(f"gen_length must be one number or {batch}, got {len(self.gen_length)}")
        return [int(length) for length in self.gen_length]

    def select(self, rows: Sequence[int]) -> "Request":
        """The request for the sources `rows` of these, in that order."""
        if self.gen_length is None or isinstance(self.gen_length, Real):
            return self
        return replace(self, gen_length=[self.gen_length[row] for row in rows])
