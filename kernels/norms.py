"""Root-mean-square norms, computed in float32 whatever the input's dtype (float64 stays)."""

import torch
from torch import Tensor
from torch.nn import functional as F


def wide_dtype(x: Tensor) -> torch.dtype:
    """float32 for all that is narrower; float64 stays, so a whole model can serve as reference."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis; weight applied before casting back."""
    wide = wide_dtype(x)
    return F.rms_norm(x.to(wide), (x.shape[-1],), weight.to(wide), eps).to(x.dtype)


def gated_group_rms_norm(
    x: Tensor, gate: Tensor, weight: Tensor, num_groups: int, eps: float
) -> Tensor:
    """Mamba-2's output norm: x SiLU(gate) first, then an RMS norm per group of channels.

    Normalising over all channels at once, or before the gate, is the usual porting mistake.
    """
    wide = wide_dtype(x)
    gated = x.to(wide) * F.silu(gate.to(wide))
    grouped = gated.unflatten(-1, (num_groups, -1))
    normed = F.rms_norm(grouped, (grouped.shape[-1],), None, eps).flatten(-2)
    return (normed * weight.to(wide)).to(x.dtype)
