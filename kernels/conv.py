"""Depthwise causal convolution with SiLU, over [batch, length, channels] as projections give it.

Letters: B batch, L length, D channels, K taps.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def causal_conv1d(
    x_BLD: Tensor, weight_DK: Tensor, bias_D: Tensor | None, window_BKD: Tensor | None = None
) -> Tensor:
    """SiLU(bias + sum_k weight[:, k] x[t - (K-1) + k]) for every position t.

    Args:
        x_BLD: inputs of the block.
        weight_DK: taps; the last one multiplies the current position.
        bias_D: one value per channel, or None.
        window_BKD: the K-1 inputs just before the block [B, K-1, D]; zeros when None.

    Returns [B, L, D] in the dtype of x.
    """
    taps = weight_DK.shape[1]
    length = x_BLD.shape[1]
    if window_BKD is None:
        padded = F.pad(x_BLD, (0, 0, taps - 1, 0))
    else:
        padded = torch.cat([window_BKD.to(x_BLD.dtype), x_BLD], dim=1)
    weight_KD = weight_DK.to(x_BLD.dtype).T
    out = x_BLD * weight_KD[-1]
    if bias_D is not None:
        out = out + bias_D.to(x_BLD.dtype)
    for k in range(taps - 1):
        out = torch.addcmul(out, padded[:, k : k + length], weight_KD[k])
    return F.silu(out)


def behind_padding(x_BLD: Tensor, window_BKD: Tensor, real_BL: Tensor) -> tuple[Tensor, Tensor]:
    """Block and window with the window's K-1 inputs just before each row's first real position.

    Where a row begins with padding, what came before the block would else be separated from it.
    x must be zero at padding. Returns (x, window) in the shapes of the arguments.
    """
    before = window_BKD.shape[1]
    padding_B = (real_BL.long().cumsum(dim=1) == 0).sum(dim=1)
    place_BK = padding_B[:, None] + torch.arange(before, device=x_BLD.device)
    joined = torch.cat([torch.zeros_like(window_BKD).to(x_BLD.dtype), x_BLD], dim=1)
    index = place_BK[..., None].expand(-1, -1, x_BLD.shape[2])
    joined = joined.scatter(1, index, window_BKD.to(x_BLD.dtype))
    return joined[:, before:], joined[:, :before]


def next_window(x_BLD: Tensor, taps: int, window_BKD: Tensor | None = None) -> Tensor:
    """The last K-1 inputs seen so far [B, K-1, D], to start the next block from."""
    if window_BKD is None:
        window_BKD = x_BLD.new_zeros(x_BLD.shape[0], taps - 1, x_BLD.shape[2])
    start = max(0, x_BLD.shape[1] - taps + 1)
    joined = torch.cat([window_BKD.to(x_BLD.dtype), x_BLD[:, start:]], dim=1)
    return joined[:, joined.shape[1] - (taps - 1) :]
