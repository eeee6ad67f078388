"""How long a target will be, read off its source: a small head, its loss, its quantiles."""

# B examples, H hidden, N lengths (1 .. N tokens, `</s>` included), K mixture components

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NUM_COMPONENTS = 8
WIDTH = 64
SMALLEST_SCALE = 0.003
"""Of a component, in log tokens: a tenth of a token at a length of 32."""


class LengthHead(nn.Module):
    """Source state and source length to a distribution over target lengths.

    log(target length) is a mixture of K logistic distributions around log(source length), cut into
    whole tokens as in PixelCNN++ (arXiv 1701.05517, equation 2); the first and the last length hold
    the tails, as targets beyond `max_length` are cut to it. No tensor depends on `max_length`.
    Arithmetic is float32 (float64 for float64 states), also under autocast; each row by itself.

    Args:
        hidden_size: H.
        max_length: N, at least 2.
    """

    def __init__(self, hidden_size: int, max_length: int) -> None:
        super().__init__()
        self.max_length = max_length
        self.inner = nn.Linear(hidden_size + 1, WIDTH)
        self.outer = nn.Linear(WIDTH, 3 * NUM_COMPONENTS)

    def forward(self, state_BH: Tensor, source_lengths_B: Tensor) -> Tensor:
        """Log-probabilities [B, N]; index i is the length i + 1.

        state_BH: the source's last hidden state. source_lengths_B: tokens, special ones included.
        """
        dtype = torch.float64 if state_BH.dtype == torch.float64 else torch.float32
        with torch.autocast(state_BH.device.type, enabled=False):
            log_source_B1 = source_lengths_B.to(dtype).clamp(min=1).log()[:, None]
            features = torch.cat([state_BH.to(dtype), log_source_B1], dim=1)
            inner = F.gelu(_linear(features, self.inner))
            weights_BK, shifts_BK, scales_BK = _linear(inner, self.outer).chunk(3, dim=1)
            # components that start alike would stay alike
            spread_K = torch.linspace(-0.5, 0.5, NUM_COMPONENTS).to(features)
            places_BK = log_source_B1 + shifts_BK + spread_K
            # at zero a scale of 0.13, an eighth of the length
            scales_BK = SMALLEST_SCALE + F.softplus(scales_BK - 2.0)
            edges_E = torch.arange(1, self.max_length, device=features.device).to(dtype) + 0.5
            z_BKE = (edges_E.log() - places_BK[..., None]) / scales_BK[..., None]
            log_probs_BKN = _log_bins(z_BKE)
            return (weights_BK.log_softmax(dim=1)[..., None] + log_probs_BKN).logsumexp(dim=1)


def _linear(x: Tensor, layer: nn.Linear) -> Tensor:
    return F.linear(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype))


def _log_bins(z: Tensor) -> Tensor:
    """Log mass of the logistic distribution between neighbouring edges z, and in the two tails.

    s(b) - s(a) = s(b) s(-a) (1 - exp(a - b)), whose logarithm has no cancellation.
    """
    low, high = z[..., :-1], z[..., 1:]
    between = F.logsigmoid(high) + F.logsigmoid(-low) + (-torch.expm1(low - high)).log()
    return torch.cat([F.logsigmoid(z[..., :1]), between, F.logsigmoid(-z[..., -1:])], dim=-1)


def quantile_lengths(log_probs_BN: Tensor, quantile: float) -> Tensor:
    """The smallest length [B] int64 that is not exceeded with a probability of `quantile`.

    Raises:
        ValueError: a quantile that is not between 0 and 1.
    """
    if not 0 < quantile < 1:
        raise ValueError(f"quantile must be above 0 and below 1, got {quantile}")
    # in float64, or the sum of many small terms may miss the quantile at its very end
    cdf_BN = log_probs_BN.double().exp().cumsum(dim=1)
    return (cdf_BN < quantile).sum(dim=1).clamp(max=log_probs_BN.shape[1] - 1) + 1


def median_lengths(log_probs_BN: Tensor) -> Tensor:
    """The median [B] int64: of all guesses the one with the least expected absolute error."""
    return quantile_lengths(log_probs_BN, 0.5)


def length_loss(
    log_probs_BN: Tensor, target_lengths_B: Tensor, included_B: Tensor | None = None
) -> Tensor:
    """Cross-entropy of the true lengths in nats: the mean over the examples that are included.

    target_lengths_B: tokens, `</s>` included; beyond N they count as N, to which targets are cut.
    included_B: bool, which examples have a source to be read and a length to be learnt (None: all);
        where none has, the loss is a zero that can be differentiated.

    Raises:
        ValueError: an included length below 1.
    """
    if included_B is None:
        included_B = torch.ones_like(target_lengths_B, dtype=torch.bool)
    if bool((included_B & (target_lengths_B < 1)).any()):
        raise ValueError(
            f"a target has at least 1 token, its `</s>`; got {int(target_lengths_B.min())}"
        )
    index_B = target_lengths_B.clamp(1, log_probs_BN.shape[1]) - 1
    losses_B = -log_probs_BN.gather(1, index_B[:, None])[:, 0]
    return (losses_B * included_B).sum() / included_B.sum().clamp(min=1)


def text_lengths(
    target_ids_BL: Tensor, eos_token_id: int | Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Tokens [B] up to the first end token, it included, and whether there is one [B] bool.

    A text that goes on beyond the canvas has no known length (0 here).
    """
    ends_BL = torch.isin(target_ids_BL, target_ids_BL.new_tensor(eos_token_id))
    ended_B = ends_BL.any(dim=1)
    return (ends_BL.long().argmax(dim=1) + 1) * ended_B, ended_B
