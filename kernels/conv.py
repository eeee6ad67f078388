"""Depthwise causal convolution with SiLU, over [batch, length, channels] as projections give it.

Letters: B batch, L length, D channels, K taps.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from tess.kernels import depthwise
from tess.kernels.dispatch import use_triton

FEWEST_TAPS, MOST_TAPS = 2, 4  # of the Triton kernels


def causal_conv1d(
    x_BLD: Tensor,
    weight_DK: Tensor,
    bias_D: Tensor | None,
    window_BKD: Tensor | None = None,
    *,
    sequence_ids_BL: Tensor | None = None,
    mask_BL: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """SiLU(bias + sum_k weight[:, k] x[t - (K-1) + k]) for every position t.

    Args:
        x_BLD: inputs of the block; may be a slice of a wider tensor.
        weight_DK: taps; the last one multiplies the current position.
        bias_D: one value per channel, or None.
        window_BKD: the K-1 inputs just before the block [B, K-1, D]; zeros when None.
        sequence_ids_BL: int32 or int64, never falling along L, for rows that pack several
            sequences: no tap reads across a change. The window belongs to the row's first sequence.
        mask_BL: bool, False where the input counts as zero, whatever it holds.
        backend: "torch", "triton" or "auto" (`kernels/dispatch.py`).

    Weights, bias and window may have another floating dtype than x.

    Returns [B, L, D] in the dtype of x.

    Raises:
        ValueError: shapes that do not fit together, ids that are no integers, a mask that is not
            bool.
    """
    _check(x_BLD, weight_DK, bias_D, window_BKD, sequence_ids_BL, mask_BL)
    if use_triton(x_BLD, backend, unsupported=_wrong_taps(weight_DK)):
        from tess.kernels.triton.conv import causal_conv1d as run

        return run(x_BLD, weight_DK, bias_D, window_BKD, sequence_ids_BL, mask_BL)
    if mask_BL is not None:
        x_BLD = x_BLD.masked_fill(~mask_BL[..., None], 0.0)
    others = (weight_DK, bias_D, window_BKD)
    others = (None if tensor is None else tensor.to(x_BLD.dtype) for tensor in others)
    with torch.autocast(x_BLD.device.type, enabled=False):
        if sequence_ids_BL is None and x_BLD.shape[1] and depthwise.takes(x_BLD):
            return depthwise.causal_conv1d_silu(x_BLD, *others)
        return _shifted_sum(x_BLD, *others, sequence_ids_BL)


def _shifted_sum(
    x_BLD: Tensor,
    weight_DK: Tensor,
    bias_D: Tensor | None,
    window_BKD: Tensor | None,
    ids_BL: Tensor | None,
) -> Tensor:
    """The convolution as a sum over shifted copies; all tensors have the dtype of x."""
    before, length = weight_DK.shape[1] - 1, x_BLD.shape[1]
    if window_BKD is None:
        padded = F.pad(x_BLD, (0, 0, before, 0))
    else:
        padded = torch.cat([window_BKD, x_BLD], dim=1)
    if ids_BL is not None and length:
        ids_BL = torch.cat([ids_BL[:, :1].expand(-1, before), ids_BL], dim=1)
    weight_KD = weight_DK.T
    out = x_BLD * weight_KD[-1]
    if bias_D is not None:
        out = out + bias_D
    for k in range(before):
        shifted = padded[:, k : k + length]
        if ids_BL is not None:
            foreign_BL = ids_BL[:, k : k + length] != ids_BL[:, before:]
            shifted = shifted.masked_fill(foreign_BL[..., None], 0.0)
        out = torch.addcmul(out, shifted, weight_KD[k])
    return F.silu(out)


def _check(
    x_BLD: Tensor,
    weight_DK: Tensor,
    bias_D: Tensor | None,
    window_BKD: Tensor | None,
    ids_BL: Tensor | None,
    mask_BL: Tensor | None,
) -> None:
    if x_BLD.dim() != 3 or weight_DK.dim() != 2:
        got = f"{list(x_BLD.shape)} and {list(weight_DK.shape)}"
        raise ValueError(f"x must be [B, L, D] and the weight [D, K], got {got}")
    (batch, length, width), taps = x_BLD.shape, weight_DK.shape[1]
    for name, tensor, letters, shape in (
        ("weight", weight_DK, "[D, K]", [width, taps]),
        ("bias", bias_D, "[D]", [width]),
        ("window", window_BKD, "[B, K-1, D]", [batch, taps - 1, width]),
        ("sequence_ids", ids_BL, "[B, L]", [batch, length]),
        ("mask", mask_BL, "[B, L]", [batch, length]),
    ):
        if tensor is not None and list(tensor.shape) != shape:
            raise ValueError(f"{name} must be {letters} = {shape}, got {list(tensor.shape)}")
    if ids_BL is not None and ids_BL.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"sequence_ids must be int32 or int64, got {ids_BL.dtype}")
    if mask_BL is not None and mask_BL.dtype != torch.bool:
        raise ValueError(f"mask must be bool, got {mask_BL.dtype}")


def _wrong_taps(weight_DK: Tensor) -> str | None:
    taps = weight_DK.shape[1]
    if FEWEST_TAPS <= taps <= MOST_TAPS:
        return None
    return f"the convolution kernels take {FEWEST_TAPS} to {MOST_TAPS} taps, got {taps}"


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
