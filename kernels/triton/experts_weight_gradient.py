"""Gradients by the experts' matrices: for each expert a sum of outer products over its rows.

One program has a tile of one expert's matrix and goes through all rows of that expert, so that
nothing is added up in memory. An expert without rows gets zeros.

Letters: T tokens, S top-k, N = T S sorted pairs (token, slot), E experts, I rows and J columns of a
matrix.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tess.kernels.triton.experts_grouped_matmul import dense_rows, grouped_config, key, place
from tess.kernels.triton.experts_token_sort import SortedPairs
from tess.kernels.triton.launch import Config, Table, dot_precision, launch, wide_type

# more stages for as much in flight: the rows to gather have to be there before the loads start
WEIGHT_GRADIENT = Table(
    "expert_weight_gradient",
    {"sm_80": grouped_config(128, 128, 32, 8, 7), "sm_90": grouped_config(128, 128, 64, 8, 5)},
)
WEIGHT_GRADIENT_WIDE = Table(
    "expert_weight_gradient_wide", {"sm_80": grouped_config(64, 64, 32, 4, 5)}
)


@triton.jit
def _weight_gradient(
    left_ptr, right_ptr, order_ptr, ends_ptr, out_ptr, left_stride, right_stride, tall, wide,
    TOP_K: tl.constexpr, GATHER_LEFT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, GROUP: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):
    """left^T right over the rows of one expert; one of the two is gathered by token."""
    expert = tl.program_id(1).to(tl.int64)
    row_tile, column_tile = place(tl.cdiv(tall, BLOCK_M), tl.cdiv(wide, BLOCK_N), GROUP)
    row = row_tile.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = column_tile.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    begin = tl.load(ends_ptr + expert - 1, mask=expert > 0, other=0)
    end = tl.load(ends_ptr + expert)
    total = tl.zeros((BLOCK_M, BLOCK_N), WIDE)
    for start in range(begin, end, BLOCK_K):
        position = start + tl.arange(0, BLOCK_K)
        valid = position < end
        token = (tl.load(order_ptr + position, mask=valid, other=0) // TOP_K).to(tl.int64)
        from_left = token if GATHER_LEFT else position.to(tl.int64)
        from_right = position.to(tl.int64) if GATHER_LEFT else token
        left = tl.load(
            left_ptr + row[:, None] + from_left[None, :] * left_stride,
            mask=(row < tall)[:, None] & valid[None, :], other=0.0,
        )
        right = tl.load(
            right_ptr + from_right[:, None] * right_stride + column[None, :],
            mask=valid[:, None] & (column < wide)[None, :], other=0.0,
        )
        total = tl.dot(left, right, total, input_precision=PRECISION, out_dtype=WIDE)
    inside = (row < tall)[:, None] & (column < wide)[None, :]
    out = out_ptr + expert * tall * wide + row[:, None] * wide + column[None, :]
    tl.store(out, total.to(out_ptr.dtype.element_ty), inside)


def weight_gradient(
    left: Tensor, right: Tensor, pairs: SortedPairs, *, gather_left: bool
) -> Tensor:
    """Per expert the sum over its pairs of left right^T [E, I, J]; no pairs, zeros.

    One of the two has a row per token and is gathered, the other a row per sorted pair.
    """
    tall, wide, experts = left.shape[1], right.shape[1], len(pairs.ends_E)
    out_EIJ = torch.empty((experts, tall, wide), dtype=left.dtype, device=left.device)
    left, right = dense_rows(left), dense_rows(right)
    constants = {
        "TOP_K": pairs.top_k, "GATHER_LEFT": gather_left, "WIDE": wide_type(left),
        "PRECISION": dot_precision(left),
    }

    def run(config: Config) -> None:
        blocks = config.blocks
        tiles = triton.cdiv(tall, blocks["BLOCK_M"]) * triton.cdiv(wide, blocks["BLOCK_N"])
        launch(
            _weight_gradient, (tiles, experts), left, right, pairs.order_N, pairs.ends_E, out_EIJ,
            left.stride(0), right.stride(0), tall, wide, config=config, **constants,
        )

    chosen = WEIGHT_GRADIENT if left.element_size() == 2 else WEIGHT_GRADIENT_WIDE
    chosen.run(left, key(pairs, out_EIJ), run)
    return out_EIJ
