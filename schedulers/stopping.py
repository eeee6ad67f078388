"""When a text is done before the last step: its tokens no longer change and the model is sure."""

# B examples, L positions

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Integral

import torch
from torch import Tensor


@dataclass(frozen=True)
class StoppingRule:
    """Stop an example whose tokens were the same in `patience` comparisons of one step with the
    step before, and whose mean entropy is at most `max_entropy`.

    The criterion of arXiv 2508.19982 (answers settle long before the last step) in its simplest
    form. `start` gives the state of a batch, whose `update` is called after every step.

    Args:
        patience: m, at least 1; an example needs m + 1 evaluations at least.
        max_entropy: bound of the mean entropy over the text's positions, in nats; infinite: none.
            What a model's entropies are like depends on its training, so there is no good default;
            samplers with one noise settle where their texts are best (docs/sampling.md).

    Raises ValueError for values out of range.
    """

    patience: int = 2
    max_entropy: float = math.inf

    def __post_init__(self) -> None:
        if not isinstance(self.patience, Integral) or self.patience < 1:
            raise ValueError(f"patience must be an integer of at least 1, got {self.patience!r}")
        if not self.max_entropy >= 0:
            raise ValueError(f"max_entropy must be at least 0, got {self.max_entropy}")

    def start(self) -> "StoppingState":
        """Before the first step of a batch."""
        return StoppingState(self)


@dataclass(frozen=True, eq=False)
class StoppingState:
    """What the rule remembers of a batch; `update` gives the next state."""

    rule: StoppingRule

    text_ids: Tensor | None = None
    """[B, L], the last step's tokens, -1 outside the text."""

    repeats: Tensor | None = None
    """[B] int64, how many steps in a row left the text as it was."""

    def update(
        self,
        token_ids: Tensor,
        entropies: Tensor,
        text_mask: Tensor,
        written_mask: Tensor | None = None,
    ) -> tuple["StoppingState", Tensor]:
        """The state after a step, and which examples are done, [B] bool.

        token_ids, entropies: [B, L]. text_mask: [B, L], true at the text's positions (`text_mask`):
        what follows the end says nothing of the text and does not count. written_mask: [B, L], the
        positions whose entropy counts, where some tokens were given.
        """
        inside_BL = text_mask.bool()
        text_BL = token_ids.masked_fill(~inside_BL, -1)
        if self.text_ids is None:
            repeats_B = torch.zeros(len(text_BL), dtype=torch.int64, device=text_BL.device)
        else:
            same_B = (text_BL == self.text_ids).all(dim=1)
            repeats_B = torch.where(same_B, self.repeats + 1, 0)
        # in double, so that the columns a batch adds by padding cannot round it otherwise
        counts_BL = inside_BL if written_mask is None else inside_BL & written_mask.bool()
        total_B = entropies.double().masked_fill(~counts_BL, 0).sum(dim=1)
        sure_B = total_B <= self.rule.max_entropy * counts_BL.sum(dim=1).clamp(min=1)
        done_B = (repeats_B >= self.rule.patience) & sure_B
        return replace(self, text_ids=text_BL, repeats=repeats_B), done_B

    def select(self, rows: Tensor) -> "StoppingState":
        """The state of the examples `rows`, in that order."""
        if self.text_ids is None:
            return self
        return replace(self, text_ids=self.text_ids[rows], repeats=self.repeats[rows])


def text_mask(
    token_ids: Tensor, target_mask: Tensor, eos_token_id: int | Sequence[int] | None
) -> Tensor:
    """[B, L] bool: positions of the canvas up to the first end token, which is one of them."""
    inside_BL = target_mask.bool()
    if eos_token_id is None:
        return inside_BL
    is_end_BL = torch.isin(token_ids, token_ids.new_tensor(eos_token_id)) & inside_BL
    return inside_BL & (is_end_BL.cumsum(dim=1) - is_end_BL.long() == 0)
