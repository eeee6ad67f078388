"""Self-conditioning: how the previous prediction of the clean text joins the noised simplex.

The kinds are those of TESS (arXiv 2305.08379). With a = softmax(x), b = softmax(previous) and W the
word embedding: `logits` projects [aW; bW], `logits_addition` is aW + bW, `logits_mean` their mean,
`logits_max` and `logits_multiply` the elementwise maximum and product. Names with `projection` take
b = softmax(S(token)) of the predicted token instead.
"""

# B examples, L positions, V vocabulary, H hidden

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tess.config import CONCATENATING, TessConfig
from tess.schedulers.simplex import Simplex


class SelfConditioning(nn.Module):
    """Turns the noised simplex and the previous prediction into embeddings [B, L, H].

    Without a previous prediction its logits are zeros, that is, a uniform distribution; with
    `zeros_after_softmax` its probabilities are zeros.
    """

    def __init__(self, config: TessConfig) -> None:
        super().__init__()
        self.kind = config.self_conditioning
        self.mix_point = config.self_conditioning_mix
        self.zeros_after_softmax = config.self_conditioning_zeros_after_softmax
        self.simplex_value = config.simplex_value
        self.deepmind = config.deepmind_conditional
        self.concatenates = self.kind in CONCATENATING and not self.deepmind
        inputs = 4 if self.deepmind else 2
        if self.deepmind or self.concatenates:
            self.projection = _projection(
                inputs * config.hidden_size, config.hidden_size, config.self_conditioning_mlp
            )

    def forward(
        self,
        simplex: Simplex,
        previous: Tensor | None,
        weight_VH: Tensor,
        clean_BLH: Tensor | None = None,
        noised_BL: Tensor | None = None,
    ) -> Tensor:
        """Embeddings of the noised positions (of all positions with `deepmind_conditional`).

        simplex: the noised target [B, L, V]. previous: logits [B, L, V], or for the projection
        kinds also the chosen tokens [B, L] int64; it receives no gradient.
        clean_BLH, noised_BL: embeddings of the clean tokens and which positions are noised (bool);
        only `deepmind_conditional` reads them, None standing for "all noised".
        """
        if self.kind is None:
            return simplex.embedding(weight_VH)
        if self.mix_point == "logits":
            return self._mix_logits(simplex.logits(), previous, weight_VH)
        if self.mix_point == "probabilities":
            if previous is None and self.kind in ("logits_addition", "logits_mean"):
                # Linear kinds: a uniform distribution embeds to the mean row, without V-sized work.
                return self._mix(simplex.embedding(weight_VH), self._absent(weight_VH))
            probs_BLV = simplex.probabilities()
            if previous is None:
                fill = 0.0 if self.zeros_after_softmax else 1.0 / probs_BLV.shape[-1]
                other_BLV = torch.full_like(probs_BLV, fill)
            else:
                other_BLV = self._logits(previous, probs_BLV.shape[-1]).softmax(dim=-1)
            return embed(self._mix(probs_BLV, other_BLV), weight_VH)
        noised_BLH = simplex.embedding(weight_VH)
        if previous is None:
            other_BLH = self._absent(weight_VH).expand_as(noised_BLH)
        else:
            other_BLV = self._logits(previous, len(weight_VH)).softmax(dim=-1)
            other_BLH = embed(other_BLV, weight_VH)
        if self.deepmind:
            return self.join(noised_BLH, other_BLH, clean_BLH, noised_BL)
        if self.concatenates:
            return self.projection(torch.cat([noised_BLH, other_BLH], dim=-1))
        return self._mix(noised_BLH, other_BLH)

    def join(
        self,
        noised_BLH: Tensor,
        predicted_BLH: Tensor,
        clean_BLH: Tensor | None,
        noised_BL: Tensor | None,
    ) -> Tensor:
        """Project [noised; clean; predicted; mask], each part zero where it does not apply."""
        if noised_BL is None or clean_BLH is None:
            noised_BL = noised_BLH.new_ones(noised_BLH.shape[:2], dtype=torch.bool)
            clean_BLH = torch.zeros_like(noised_BLH)
        mask_BLH = noised_BL.unsqueeze(-1).to(noised_BLH.dtype).expand_as(noised_BLH)
        parts = (
            noised_BLH * mask_BLH,
            clean_BLH * (1 - mask_BLH),
            predicted_BLH * mask_BLH,
            mask_BLH,
        )
        return self.projection(torch.cat(parts, dim=-1))

    def _mix(self, first: Tensor, second: Tensor) -> Tensor:
        if self.kind in ("logits_addition", "logits_with_projection_addition"):
            return first + second
        if self.kind == "logits_mean":
            return (first + second) * 0.5
        if self.kind == "logits_max":
            return torch.maximum(first, second)
        return first * second

    def _mix_logits(
        self, simplex_BLV: Tensor, previous: Tensor | None, weight_VH: Tensor
    ) -> Tensor:
        if previous is None:
            other_BLV = torch.zeros_like(simplex_BLV)
        else:
            other_BLV = self._logits(previous, simplex_BLV.shape[-1])
        return embed(self._mix(simplex_BLV, other_BLV).softmax(dim=-1), weight_VH)

    def _logits(self, previous: Tensor, vocab_size: int) -> Tensor:
        previous = previous.detach()
        if "projection" in self.kind:
            ids_BL = previous.argmax(dim=-1) if previous.is_floating_point() else previous
            one_hot_BLV = F.one_hot(ids_BL, vocab_size).float()
            return self.simplex_value * (2 * one_hot_BLV - 1)
        return previous.float()

    def _absent(self, weight_VH: Tensor) -> Tensor:
        """The embedding of a missing prediction, [H]."""
        if self.zeros_after_softmax:
            return weight_VH.new_zeros(weight_VH.shape[-1])
        return weight_VH.mean(dim=0)


def embed(probs_BLV: Tensor, weight_VH: Tensor) -> Tensor:
    """Expected embedding pW in W's dtype."""
    return probs_BLV.to(weight_VH.dtype) @ weight_VH


def _projection(inputs: int, outputs: int, mlp: bool) -> nn.Module:
    first = nn.Linear(inputs, outputs, bias=False)
    if not mlp:
        return first
    return nn.Sequential(first, nn.GELU(), nn.Linear(outputs, outputs, bias=False))
