"""Grouped-query attention without any positional encoding, over [cached keys; block].

Letters: B batch, L positions of the block, H hidden.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tess.backbones.cache import KeyValues
from tess.backbones.config import HybridConfig
from tess.backbones.context import BlockContext
from tess.kernels.attention import causal_attention


class Attention(nn.Module):
    """Softmax attention; order reaches the model through the Mamba layers only."""

    def __init__(self, config: HybridConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.head_dim, self.dropout = config.head_dim, config.attention_dropout
        hidden, bias = config.hidden_size, config.attention_bias
        self.q_proj = nn.Linear(hidden, config.num_attention_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden, config.num_key_value_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden, config.num_key_value_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * self.head_dim, hidden, bias=bias)

    def forward(self, hidden_BLH: Tensor, context: BlockContext) -> Tensor:
        """Attend from the block [B, L, hidden] to the cached positions and the block itself."""
        query, key, value = (
            projection(hidden_BLH).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if context.record is not None:
            context.record[self.layer_idx] = KeyValues(key, value)
        cached = context.incoming.get(self.layer_idx)
        if cached is not None:
            key = torch.cat([cached.keys.to(key.dtype), key], dim=2)
            value = torch.cat([cached.values.to(value.dtype), value], dim=2)
        if context.update_cache:
            context.outgoing.by_layer[self.layer_idx] = KeyValues(key, value)
        dropout = self.dropout if self.training else 0.0
        if context.is_causal:
            out = causal_attention(query, key, value, dropout)
        else:
            out = F.scaled_dot_product_attention(
                query, key, value,
                attn_mask=context.attention_mask,
                dropout_p=dropout,
                enable_gqa=key.shape[1] != query.shape[1],
            )
        return self.o_proj(out.transpose(1, 2).flatten(2))
