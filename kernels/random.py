"""Counter-based random numbers: a value follows from (key, draw, position, token) alone.

The generator is Philox4x32 with 10 rounds (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as
easy as 1, 2, 3", SC 2011). One call turns a counter of four 32-bit words and a key of two into four
random words. Words are kept in int64 tensors, because torch has no multiply-high for uint32.
"""

# B batch, L positions, V values per position, N blocks of four words in one tile

import math

import torch
from torch import Tensor

WORD = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10

NORMAL_STREAM = 0
UNIFORM_STREAM = 1

# Rows are padded to whole groups of this many blocks, and a CPU tile stays below torch's grain for
# threads: vectorised log, cos and sin may differ from their scalar tails in the last bit, and then
# a value would depend on where in the batch its element lies.
BLOCKS_PER_GROUP = 16
CPU_TILE = 16_384
DEVICE_TILE = 1 << 20


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10: four random words in [0, 2^32) for every counter.

    counter: four int64 tensors of words in [0, 2^32), broadcastable. key: two of the same kind.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        # The int64 product wraps modulo 2^64, and its bits are those of the unsigned product.
        product0, product1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        high0, high1 = (product0 >> 32) & WORD, (product1 >> 32) & WORD
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, product1 & WORD, high0 ^ c3 ^ k1, product0 & WORD
        k0, k1 = (k0 + KEY_STEPS[0]) & WORD, (k1 + KEY_STEPS[1]) & WORD
    return c0, c1, c2, c3


def normal(keys_B: Tensor, draw: int, length: int, width: int) -> Tensor:
    """Standard normals [B, L, V] in float32 by Box-Muller, on the device of the keys.

    keys_B: int64, one per example. draw: which of the examples' draws this is, in [0, 2^32).
    The value at (example, position, token) is the same in every batch, at every length and width.
    """
    device = keys_B.device
    group = 4 * BLOCKS_PER_GROUP
    blocks = -(-width // group) * BLOCKS_PER_GROUP
    count = keys_B.numel() * length * blocks
    tile = CPU_TILE if device.type == "cpu" else DEVICE_TILE
    values_N4 = torch.empty(count, 4, dtype=torch.float32, device=device)
    for start in range(0, count, tile):
        index_N = torch.arange(start, min(start + tile, count), device=device)
        row_N = index_N // blocks
        block_N = index_N - row_N * blocks
        example_N = row_N // length
        position_N = row_N - example_N * length
        words = _words(keys_B[example_N], block_N, position_N, draw, NORMAL_STREAM)
        _box_muller(words, values_N4[start : start + tile])
    values_BLV = values_N4.view(keys_B.numel(), length, 4 * blocks)
    return values_BLV[..., :width].contiguous()


def uniform(keys_B: Tensor, draw: int, length: int) -> Tensor:
    """Uniforms [B, L] in [0, 1), float32 with 24 random bits; a stream apart from `normal`."""
    position_L = torch.arange(length, device=keys_B.device)
    zero_L = torch.zeros_like(position_L)
    word_BL, *_ = _words(keys_B[:, None], zero_L, position_L, draw, UNIFORM_STREAM)
    return (word_BL >> 8).float() * 2.0**-24


def _words(
    key: Tensor, block: Tensor, position: Tensor, draw: int, stream: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if not 0 <= draw <= WORD:
        raise ValueError(f"draw must be in [0, 2^32), got {draw}")
    counter = (block, position, torch.full_like(block, draw), torch.full_like(block, stream))
    return philox4x32(counter, (key & WORD, (key >> 32) & WORD))


def _box_muller(words: tuple[Tensor, ...], out_N4: Tensor) -> None:
    """z = sqrt(-2 ln u) (cos a, sin a), with u in (0, 1] and a in [0, 2 pi)."""
    for first in (0, 2):
        radius_N = ((words[first] + 1).float() * 2.0**-32).log_().mul_(-2.0).sqrt_()
        angle_N = words[first + 1].float() * (2.0 * math.pi * 2.0**-32)
        torch.mul(radius_N, angle_N.cos(), out=out_N4[:, first])
        torch.mul(radius_N, angle_N.sin(), out=out_N4[:, first + 1])
