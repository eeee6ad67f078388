"""The causal convolution with SiLU by oneDNN, for CPUs, with its gradient.

oneDNN convolves [batch, channels, 1, length] in the layout "channels last", which is what
projections give without a transpose: ten times faster than a sum over shifted copies. Its gradient
by the input is as fast (again a convolution); that by the weight is not, and is summed here.

Letters: B batch, L length, D channels, K taps.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

DTYPES = (torch.float32, torch.bfloat16)
ONEDNN = torch.backends.mkldnn.is_available()


def takes(x_BLD: Tensor) -> bool:
    """Whether oneDNN has this convolution for a tensor like x."""
    return ONEDNN and x_BLD.device.type == "cpu" and x_BLD.dtype in DTYPES


def causal_conv1d_silu(
    x_BLD: Tensor, weight_DK: Tensor, bias_D: Tensor | None, window_BKD: Tensor | None
) -> Tensor:
    """As `kernels/conv.py:causal_conv1d`; all tensors have one dtype of `DTYPES`."""
    tensors = (x_BLD, weight_DK, bias_D, window_BKD)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return _ConvSiLU.apply(*tensors)
    return F.silu(_convolve(*tensors), inplace=True)


def _convolve(
    x_BLD: Tensor, weight_DK: Tensor, bias_D: Tensor | None, window_BKD: Tensor | None
) -> Tensor:
    if window_BKD is None:
        return _correlate(x_BLD, weight_DK, bias_D, weight_DK.shape[1] - 1)[:, : x_BLD.shape[1]]
    return _correlate(torch.cat([window_BKD, x_BLD], dim=1), weight_DK, bias_D, 0)


def _correlate(x_BLD: Tensor, weight_DK: Tensor, bias_D: Tensor | None, padding: int) -> Tensor:
    """sum_k weight[:, k] x[t + k] over x with `padding` zeros at both ends."""
    planes = x_BLD.transpose(1, 2)[:, :, None]
    out = F.conv2d(
        planes, weight_DK[:, None, None], bias_D, padding=(0, padding), groups=x_BLD.shape[2]
    )
    return out[:, :, 0].transpose(1, 2)


class _ConvSiLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BLD, weight_DK, bias_D, window_BKD):
        z_BLD = _convolve(x_BLD, weight_DK, bias_D, window_BKD)
        ctx.save_for_backward(x_BLD, weight_DK, bias_D, window_BKD, z_BLD)
        return F.silu(z_BLD)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy_BLD):
        x_BLD, weight_DK, bias_D, window_BKD, z_BLD = ctx.saved_tensors
        taps, length = weight_DK.shape[1], x_BLD.shape[1]
        with torch.autocast(x_BLD.device.type, enabled=False):
            dz_BLD = torch.ops.aten.silu_backward(dy_BLD, z_BLD)
            # the input takes part in this and the K - 1 positions after it
            djoined = _correlate(dz_BLD, weight_DK.flip(1), None, taps - 1)
            before = torch.zeros_like(djoined[:, : taps - 1]) if window_BKD is None else window_BKD
            joined = torch.cat([before, x_BLD], dim=1)
            wide = torch.float32
            by_tap = [
                (dz_BLD * joined[:, k : k + length]).sum((0, 1), dtype=wide) for k in range(taps)
            ]
            return (
                djoined[:, taps - 1 :],
                torch.stack(by_tap, dim=1).to(weight_DK.dtype),
                None if bias_D is None else dz_BLD.sum((0, 1), dtype=wide).to(bias_D.dtype),
                None if window_BKD is None else djoined[:, : taps - 1],
            )
