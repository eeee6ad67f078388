"""Root-mean-square norms, computed in float32 whatever the input's dtype (float64 stays)."""

import torch
from torch import Tensor

from tess.kernels import norm_gradients
from tess.kernels.dispatch import use_triton

WIDEST = 16384  # columns of a group that the Triton kernels take: a program holds whole rows


def wide_dtype(x: Tensor) -> torch.dtype:
    """float32 for all that is narrower; float64 stays, so a whole model can serve as reference."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, backend: str | None = None) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis; weight applied before casting back.

    Args:
        x: [..., D]; may be a slice of a wider tensor.
        weight: [D], in any floating dtype.
        eps: added to the mean square.
        backend: "torch", "triton" or "auto" (`kernels/dispatch.py`).

    Returns [..., D] in the dtype of x.

    Raises:
        ValueError: the weight has another number of values than x has columns.
    """
    _check_weight(x, weight)
    if use_triton(x, backend, unsupported=_too_wide(x.shape[-1])):
        from tess.kernels.triton.norms import rms_norm as run

        return run(x, weight, eps)
    return norm_gradients.rms_norm(x, weight.to(wide_dtype(x)), eps, wide_dtype(x))


def gated_group_rms_norm(
    x: Tensor,
    gate: Tensor,
    weight: Tensor,
    num_groups: int,
    eps: float,
    *,
    backend: str | None = None,
) -> Tensor:
    """Mamba-2's output norm: x SiLU(gate) first, then an RMS norm per group of channels.

    Normalising over all channels at once, or before the gate, is the usual porting mistake.

    Args:
        x: [..., D]; may be a slice of a wider tensor, as may the gate.
        gate: [..., D], the shape of x.
        weight: [D], in any floating dtype; applied after the norm, before casting back.
        num_groups: runs of D / num_groups neighbouring channels with an RMS of their own.
        eps: added to the mean square.
        backend: "torch", "triton" or "auto" (`kernels/dispatch.py`).

    Returns [..., D] in the dtype of x.

    Raises:
        ValueError: x, gate and weight do not fit together, or the groups do not divide D.
    """
    _check_weight(x, weight)
    if gate.shape != x.shape:
        raise ValueError(f"gate must have the shape of x {list(x.shape)}, got {list(gate.shape)}")
    if num_groups < 1 or x.shape[-1] % num_groups:
        raise ValueError(f"{num_groups} groups do not divide {x.shape[-1]} channels")
    if use_triton(x, backend, unsupported=_too_wide(x.shape[-1] // num_groups)):
        from tess.kernels.triton.norms import gated_group_rms_norm as run

        return run(x, gate, weight, num_groups, eps)
    wide = wide_dtype(x)
    return norm_gradients.gated_group_rms_norm(x, gate, weight.to(wide), num_groups, eps, wide)


def _check_weight(x: Tensor, weight: Tensor) -> None:
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight must have shape {list(x.shape[-1:])}, got {list(weight.shape)}")


def _too_wide(width: int) -> str | None:
    if 1 <= width <= WIDEST:
        return None
    return f"the norm kernels take 1 to {WIDEST} columns of a group, got {width}"
