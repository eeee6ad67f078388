"""RMS norms in few passes, with their gradients written out by hand.

As graphs of small operations these take three times as long on a CPU as needed, and keep
several wide copies of the input. Everything is computed in float32 (float64 for float64 inputs).

Letters: R rows, G groups, D columns of a group; a `d` before a name is the gradient of the loss.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def rms_norm(x: Tensor, weight_D: Tensor, eps: float, wide: torch.dtype) -> Tensor:
    """As `kernels/norms.py:rms_norm`, computed in `wide`."""
    if torch.is_grad_enabled() and (x.requires_grad or weight_D.requires_grad):
        return _RMSNorm.apply(x, weight_D, eps, wide)
    x_wide = x.to(wide)
    return (x_wide * _inverse_rms(x_wide, eps)).mul_(weight_D).to(x.dtype)


def gated_group_rms_norm(
    x: Tensor, gate: Tensor, weight: Tensor, num_groups: int, eps: float, wide: torch.dtype
) -> Tensor:
    """As `kernels/norms.py:gated_group_rms_norm`, computed in `wide`."""
    needed = x.requires_grad or gate.requires_grad or weight.requires_grad
    if torch.is_grad_enabled() and needed:
        return _GatedNorm.apply(x, gate, weight, num_groups, eps, wide)
    return _gated(x, gate, weight, num_groups, eps, wide)[0]


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return norm.square_().mul_(1 / x.shape[-1]).add_(eps).rsqrt_()


def _gated(
    x: Tensor, gate: Tensor, weight: Tensor, num_groups: int, eps: float, wide: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The norm, and 1 / RMS of every group [..., G, 1]."""
    gated = F.silu(gate.to(wide)).mul_(x)
    groups = gated.unflatten(-1, (num_groups, -1))
    inverse = _inverse_rms(groups, eps)
    groups.mul_(inverse)
    return gated.mul_(weight).to(x.dtype), inverse


def _through_norm(normed: Tensor, inverse: Tensor, dnormed: Tensor) -> Tensor:
    """Gradient by what was normed, in place of dnormed: (dn - n mean(n dn)) / RMS."""
    mean = torch.linalg.vecdot(normed, dnormed)[..., None].mul_(1 / normed.shape[-1])
    return dnormed.addcmul_(normed, mean, value=-1).mul_(inverse)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, weight, eps, wide):
        x_wide = x.to(wide)
        inverse = _inverse_rms(x_wide, eps)
        ctx.save_for_backward(x, weight, inverse)
        return (x_wide * inverse).mul_(weight).to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy):
        x, weight, inverse = ctx.saved_tensors
        normed = x.to(inverse.dtype) * inverse
        dy = dy.to(inverse.dtype)
        dweight = (dy * normed).flatten(0, -2).sum(0)
        dx = _through_norm(normed, inverse, dy * weight)
        return dx.to(x.dtype), dweight.to(weight.dtype), None, None


class _GatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, gate, weight, num_groups, eps, wide):
        y, inverse = _gated(x, gate, weight, num_groups, eps, wide)
        ctx.save_for_backward(x, gate, weight, inverse)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy):
        x, gate, weight, inverse = ctx.saved_tensors
        wide, groups = inverse.dtype, inverse.shape[-2]
        x_wide, gate_wide, dy = x.to(wide), gate.to(wide), dy.to(wide)
        opened = F.silu(gate_wide)
        normed = (x_wide * opened).unflatten(-1, (groups, -1)).mul_(inverse)
        dweight = (dy * normed.flatten(-2)).flatten(0, -2).sum(0)
        dnormed = (dy * weight).unflatten(-1, (groups, -1))
        dgated = _through_norm(normed, inverse, dnormed).flatten(-2)
        dgate = torch.ops.aten.silu_backward(dgated * x_wide, gate_wide)
        dx = dgated.mul_(opened)
        return dx.to(x.dtype), dgate.to(gate.dtype), dweight.to(weight.dtype), None, None, None
