"""Guidance: the source against an empty one (classifier-free), and the gradient of a reward."""

# B examples, L positions, R rows of the flattened [B, L], V vocabulary, H hidden

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from tess.errors import UserError
from tess.kernels.head import Processors

Reward = Callable[[Tensor, Tensor], Tensor]
"""(probabilities [B, L, V] float32, target_mask [B, L]) -> scores [B], differentiable."""


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """How predictions are steered.

    scale: g >= 1 of classifier-free guidance (arXiv 2207.12598); 1 is off.
    form: "logits" for log p = u + g (c - u) up to a constant, with the source's logits c and the
        empty source's u; "probabilities" for p = u + g (c - u) of the two softmaxes, cut at 0 (what
        TESS's code does by default).
    reward, reward_scale, reward_steps: the logits climb the reward of their softmax by that many
        gradient steps of that size (TESS-2, arXiv 2502.13917, section 3.4). This needs the logits
        of all positions at once, [B, L, V].
    """

    scale: float = 1.0
    form: str = "logits"
    reward: Reward | None = None
    reward_scale: float = 1.0
    reward_steps: int = 1

    @property
    def contrasts(self) -> bool:
        """Whether the empty source is evaluated too."""
        return self.scale > 1

    def guided_hidden(self, hidden_BLH: Tensor, other_BLH: Tensor | None) -> Tensor | None:
        """The state whose logits are the guided ones: the head is linear; None: no such state."""
        if other_BLH is None or self.form == "probabilities":
            return None
        return other_BLH + self.scale * (hidden_BLH - other_BLH)

    def mixed_probabilities(self, other_BLH: Tensor | None, head_VH: Tensor) -> Processors | None:
        """The "probabilities" form for rows of the source's logits."""
        if other_BLH is None or self.form == "logits":
            return None
        other_TH = other_BLH.flatten(0, 1)

        def run(start: int, logits_RV: Tensor) -> Tensor:
            rows = other_TH[start : start + len(logits_RV)]
            empty_RV = F.linear(rows, head_VH).float().softmax(dim=-1)
            mixed_RV = empty_RV + self.scale * (logits_RV.softmax(dim=-1) - empty_RV)
            # not 0: processors may leave only tokens that the mix has cut
            return mixed_RV.clamp_(min=torch.finfo(torch.float32).tiny).log()

        return run

    def reward_processor(self, logits_BLV: Tensor, target_mask: Tensor) -> Processors:
        """Adds what the logits gain on the way up the reward."""
        climbed_BLV = self._climb(logits_BLV, target_mask)
        gain_TV = (climbed_BLV - logits_BLV).flatten(0, 1)
        return lambda start, logits_RV: logits_RV.add_(gain_TV[start : start + len(logits_RV)])

    @torch.enable_grad()
    def _climb(self, logits_BLV: Tensor, target_mask: Tensor) -> Tensor:
        at_BLV = logits_BLV.detach()
        for _ in range(self.reward_steps):
            at_BLV.requires_grad_(True)
            score_B = self.reward(at_BLV.softmax(dim=-1), target_mask)
            if score_B.shape != (len(at_BLV),) or not score_B.requires_grad:
                raise UserError(
                    f"reward must give differentiable scores [{len(at_BLV)}], one per example, got "
                    f"{list(score_B.shape)}"
                    + ("" if score_B.requires_grad else " without a gradient")
                )
            (slope_BLV,) = torch.autograd.grad(score_B.sum(), at_BLV)
            at_BLV = (at_BLV + self.reward_scale * slope_BLV).detach()
        return at_BLV
