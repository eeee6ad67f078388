"""Causal softmax attention; on a CPU by blocks of queries.

Letters: B batch, H query heads, G key heads, L positions, D head width.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tess.kernels.norms import wide_dtype

BLOCK = 64  # queries
MOST = 1024  # positions; PyTorch's CPU kernel skips keys by 512, so blocks gain little beyond


def causal_attention(
    query_BHLD: Tensor, key_BGLD: Tensor, value_BGLD: Tensor, dropout: float = 0.0
) -> Tensor:
    """softmax(q k^T / sqrt(D)) v, where position i sees those up to i -> [B, H, L, D].

    Query head h reads key head h // (H / G); `dropout` is the share of probabilities set to zero.

    PyTorch's CPU kernel computes the whole square up to 512 keys, where half of it would do. Each
    block of queries is therefore given no more keys than its last one may see. In float32, because
    that kernel is no faster in bfloat16, and its gradient slower.
    """
    options = {"dropout_p": dropout, "enable_gqa": key_BGLD.shape[1] != query_BHLD.shape[1]}
    length, dtype = query_BHLD.shape[2], query_BHLD.dtype
    if query_BHLD.device.type != "cpu" or not 2 * BLOCK < length <= MOST:
        return F.scaled_dot_product_attention(
            query_BHLD, key_BGLD, value_BGLD, is_causal=True, **options
        )
    wide = wide_dtype(query_BHLD)
    with torch.autocast("cpu", enabled=False):
        out_BHLD = _in_blocks(*(t.to(wide) for t in (query_BHLD, key_BGLD, value_BGLD)), options)
    return out_BHLD.to(dtype)


def _in_blocks(
    query_BHLD: Tensor, key_BGLD: Tensor, value_BGLD: Tensor, options: dict[str, Any]
) -> Tensor:
    length = query_BHLD.shape[2]
    above = torch.full((BLOCK, BLOCK), -math.inf, dtype=query_BHLD.dtype).triu(1)
    mask = F.pad(above, (length, 0))  # of any block, once shifted to where it starts
    parts = []
    for start in range(0, length, BLOCK):
        stop = min(start + BLOCK, length)
        part_BHQD = F.scaled_dot_product_attention(
            query_BHLD[:, :, start:stop], key_BGLD[:, :, :stop], value_BGLD[:, :, :stop],
            attn_mask=mask[: stop - start, length - start : length - start + stop], **options,
        )
        parts.append(part_BHQD.transpose(1, 2))
    return torch.cat(parts, dim=1).transpose(1, 2)  # the layout that projections read and write
