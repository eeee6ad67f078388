"""Self-conditioning: how the previous prediction of the clean text joins the noised simplex.

The kinds are those of TESS (arXiv 2305.08379). With a = softmax(x), b = softmax(previous logits)
and W the word embedding: `logits` projects [aW; bW], `logits_addition` is aW + bW, `logits_mean`
their mean, `logits_max` and `logits_multiply` the elementwise maximum and product. Names with
`projection` take b = softmax(S(token)) of the predicted token instead.

Sums and means commute with the product by W, so aW and bW are all that most kinds need: neither a
nor b exists then. Only a maximum, a product or a softmax over the vocabulary needs the whole
simplex (`TessConfig.needs_whole_simplex`).
"""

# B examples, L positions, V vocabulary, H hidden

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from tess.config import CONCATENATING, TessConfig
from tess.kernels.order_statistics import EmbeddingMoments
from tess.schedulers.simplex import Simplex, SoftTokens


@dataclass(frozen=True)
class Prediction:
    """What a denoiser predicted, as far as somebody needs it; without gradient.

    token_ids: [B, L] int64, the chosen tokens.
    log_probs: [B, L] float32, log-probability of each chosen token, in nats; of the distribution
        that it was chosen from, before temperature and truncation.
    entropies: [B, L] float32, of the same distributions, in nats.
    log_sum_exp: [B, L] float32, of the logits behind them.
    embedding: [B, L, H], softmax(logits) W.
    logits: [B, L, V], where the whole simplex is needed.
    soft: the likeliest tokens, for schedulers that read them.
    """

    token_ids: Tensor
    log_probs: Tensor | None = None
    entropies: Tensor | None = None
    log_sum_exp: Tensor | None = None
    embedding: Tensor | None = None
    logits: Tensor | None = None
    soft: SoftTokens | None = None

    def select(self, rows: Tensor) -> "Prediction":
        """The predictions of the examples `rows`, in that order."""
        changed = {
            name: value[rows] for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        if self.soft is not None:
            changed["soft"] = SoftTokens(*(part[rows] for part in self.soft))
        return replace(self, **changed)

    @staticmethod
    def from_logits(logits: Tensor) -> "Prediction":
        """Of given logits [B, L, V]; the tokens are their arg-max."""
        return Prediction(token_ids=logits.argmax(dim=-1), logits=logits.detach())


class SelfConditioning(nn.Module):
    """Turns the noised simplex and the previous prediction into embeddings [B, L, H].

    Without a previous prediction its logits are zeros, that is, a uniform distribution; with
    `zeros_after_softmax` its probabilities are zeros.
    """

    def __init__(self, config: TessConfig) -> None:
        super().__init__()
        self.kind = config.self_conditioning
        self.mix_point = config.self_conditioning_mix
        self.needs_whole_simplex = config.needs_whole_simplex
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
        previous: Prediction | None,
        weight_VH: Tensor,
        clean_BLH: Tensor | None = None,
        noised_BL: Tensor | None = None,
        moments: EmbeddingMoments | None = None,
    ) -> Tensor:
        """Embed the noised target.

        simplex: the noised target [B, L, V]. previous: the last prediction, or None; it receives no
        gradient, and W none through its `embedding`. Given logits, the kinds that mix over the
        vocabulary mix there, as TESS does, and W learns through them.
        clean_BLH, noised_BL: embeddings of the clean tokens and which positions are noised (bool);
        only `deepmind_conditional` reads them, None standing for "all noised".
        moments: of W, if they are at hand.

        Raises ValueError for a prediction that lacks what the kind needs, and for a whole simplex
        that is wanted of order statistics.
        """
        if isinstance(previous, Tensor):
            raise ValueError(
                "previous must be a Prediction (TessDenoiser.predict, Prediction.from_logits), got "
                "a tensor"
            )
        if self.kind is None:
            return simplex.embedding(weight_VH, moments)
        if self.needs_whole_simplex or self._is_materialised(simplex, previous):
            return self._embed_mixed(simplex, previous, weight_VH)
        noised_BLH = simplex.embedding(weight_VH, moments)
        predicted_BLH = self._predicted(previous, weight_VH).to(noised_BLH.dtype)
        predicted_BLH = predicted_BLH.expand_as(noised_BLH)
        if self.deepmind:
            return self.join(noised_BLH, predicted_BLH, clean_BLH, noised_BL)
        if self.concatenates:
            return self.projection(torch.cat([noised_BLH, predicted_BLH], dim=-1))
        return self._mix(noised_BLH, predicted_BLH)

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

    def _is_materialised(self, simplex: Simplex, previous: Prediction | None) -> bool:
        """Whether both sides are there over the vocabulary: then one product embeds their mix."""
        given = previous is not None and previous.logits is not None
        joins = self.concatenates or self.deepmind
        return given and not simplex.needs_moments and self.mix_point != "embeddings" and not joins

    # ---- without the vocabulary dimension ----

    def _predicted(self, previous: Prediction | None, weight_VH: Tensor) -> Tensor:
        """bW, [B, L, H], or [H] without a prediction."""
        if previous is None:
            if self.zeros_after_softmax:
                return weight_VH.new_zeros(weight_VH.shape[-1])
            return weight_VH.mean(dim=0)  # of the uniform distribution
        if "projection" in self.kind:
            return self._vertices(previous.token_ids, weight_VH)
        if previous.embedding is not None:
            return previous.embedding.detach()
        if previous.logits is not None:
            return embed(previous.logits.detach().float().softmax(dim=-1), weight_VH)
        raise ValueError(
            f"self_conditioning={self.kind!r} needs the embedding or the logits of the previous "
            "prediction, got neither"
        )

    def _vertices(self, ids_BL: Tensor, weight_VH: Tensor) -> Tensor:
        """softmax(S(ids)) W: the token has e^2k times the weight of each of the others."""
        rest = torch.exp(torch.tensor(-2.0 * self.simplex_value, dtype=torch.float64))
        total = 1 + (len(weight_VH) - 1) * rest
        own_BLH = nn.functional.embedding(ids_BL, weight_VH)
        shares = float((1 - rest) / total), float(rest / total)
        return own_BLH * shares[0] + weight_VH.sum(dim=0) * shares[1]

    # ---- with it ----

    def _embed_mixed(
        self, simplex: Simplex, previous: Prediction | None, weight_VH: Tensor
    ) -> Tensor:
        """Mix logits, or probabilities, over the vocabulary; then embed."""
        if simplex.needs_moments:
            raise ValueError(
                f"self_conditioning={self.kind!r} mixed at the {self.mix_point} needs the whole "
                'simplex, which only noise="dense" has; got noise="order_statistics"'
            )
        x_BLV = simplex.logits()
        if self.mix_point == "logits":
            other_BLV = torch.zeros_like(x_BLV)
            if previous is not None:
                other_BLV = self._logits(previous, x_BLV.shape[-1])
            return embed(self._mix(x_BLV, other_BLV).softmax(dim=-1), weight_VH)
        if previous is None:
            fill = 0.0 if self.zeros_after_softmax else 1.0 / x_BLV.shape[-1]
            other_BLV = torch.full_like(x_BLV, fill)
        else:
            other_BLV = self._logits(previous, x_BLV.shape[-1]).softmax(dim=-1)
        return embed(self._mix(x_BLV.softmax(dim=-1), other_BLV), weight_VH)

    def _logits(self, previous: Prediction, vocab_size: int) -> Tensor:
        if "projection" in self.kind:
            one_hot_BLV = nn.functional.one_hot(previous.token_ids, vocab_size).float()
            return self.simplex_value * (2 * one_hot_BLV - 1)
        if previous.logits is None:
            raise ValueError(
                f"self_conditioning={self.kind!r} mixed at the {self.mix_point} needs the logits "
                "of the previous prediction, got none"
            )
        return previous.logits.detach().float()


def embed(probs_BLV: Tensor, weight_VH: Tensor) -> Tensor:
    """Expected embedding pW in W's dtype."""
    return probs_BLV.to(weight_VH.dtype) @ weight_VH


def _projection(inputs: int, outputs: int, mlp: bool) -> nn.Module:
    first = nn.Linear(inputs, outputs, bias=False)
    if not mlp:
        return first
    return nn.Sequential(first, nn.GELU(), nn.Linear(outputs, outputs, bias=False))
