"""One layer of the stack, and how a row of layers reads a block of positions.

Letters: B batch, L positions of the block, H hidden.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from tess.backbones.attention import Attention
from tess.backbones.cache import HybridCache
from tess.backbones.config import HybridConfig
from tess.backbones.context import BlockContext, make_context
from tess.backbones.feedforward import MLP, MixtureOfExperts
from tess.backbones.mamba import Mamba2Mixer
from tess.kernels.allocator import keep_freed_memory
from tess.kernels.norms import rms_norm

keep_freed_memory()


class RMSNorm(nn.Module):
    """RMS norm in float32 with a learned weight."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis."""
        return rms_norm(x, self.weight, self.eps)


def _build_mixer(config: HybridConfig, letter: str, layer_idx: int) -> nn.Module:
    if letter == "M":
        return Mamba2Mixer(config, layer_idx)
    if letter == "*":
        return Attention(config, layer_idx)
    if letter == "E":
        return MixtureOfExperts(config)
    return MLP(config, config.intermediate_size)


class HybridBlock(GradientCheckpointingLayer):
    """x + mixer(norm(x)): one mixer per layer, of the kind that its pattern letter names."""

    def __init__(self, config: HybridConfig, letter: str, layer_idx: int) -> None:
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.mixer = _build_mixer(config, letter, layer_idx)

    def forward(self, hidden_BLH: Tensor, context: BlockContext) -> Tensor:
        """One residual step."""
        return hidden_BLH + self.mixer(self.norm(hidden_BLH), context)


def run_layers(
    layers: Iterable[nn.Module],
    hidden_BLH: Tensor,
    attention_mask: Tensor | None,
    cache: HybridCache | None,
    mode: str,
) -> tuple[Tensor, BlockContext]:
    """Send a block through the layers and, where the mode writes, move the cache past it.

    Returns the residual stream after the last layer [B, L, H], and the context that was used.
    """
    context = make_context(mode, hidden_BLH, attention_mask, cache)
    for layer in layers:
        hidden_BLH = layer(hidden_BLH, context)
    if context.update_cache:
        cache.layers = dict(context.outgoing.by_layer)
        batch, length = hidden_BLH.shape[:2]
        cache.extend_mask(context.position_mask, batch, length, hidden_BLH.device)
    return hidden_BLH, context
