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


# Streams of kernels/order_statistics.py and kernels/simplex_embedding.py, apart from those above.
LARGEST_STREAM = 2
DISTINCT_STREAM = 3
BULK_STREAM = 4
# Of kernels/carried_embedding.py.
LISTED_STREAM = 5


def words_at(
    keys_R: Tensor, positions_R: Tensor, draw: int, start: int, blocks: int, stream: int
) -> Tensor:
    """Random words [R, 4 * blocks], int64 in [0, 2^32): blocks start, start + 1, ... of each row.

    A row is an example's key and a position, so rows of many examples go into one call.
    """
    block_1N = torch.arange(start, start + blocks, device=keys_R.device)[None]
    words = _words(keys_R[:, None], block_1N, positions_R[:, None], draw, stream)
    return torch.stack(words, dim=-1).flatten(1)


def words_of(
    keys_R: Tensor, positions_R: Tensor, draw: int, blocks_RW: Tensor, stream: int
) -> Tensor:
    """The first random word [R, W], int64 in [0, 2^32), of the blocks named: `words_at`, anywhere.

    blocks_RW: int64 in [0, 2^32), token ids for example.
    """
    return _words(keys_R[:, None], blocks_RW, positions_R[:, None], draw, stream)[0]


def normal_at(
    keys_R: Tensor,
    positions_R: Tensor,
    draw: int,
    start: int,
    width: int,
    stream: int = NORMAL_STREAM,
) -> Tensor:
    """Standard normals [R, width], float32: in each row, tokens start, start + 1, ... of `normal`.

    keys_R, positions_R: int64, one per row. start: a multiple of 64. width: at most 65 536. The
    values are those of `normal(keys, draw, ...)[example, position, start : start + width]`.
    """
    group = 4 * BLOCKS_PER_GROUP
    if start % group or not 0 < width <= 4 * CPU_TILE:
        raise ValueError(
            f"start must be a multiple of {group} and width in 1..{4 * CPU_TILE}, "
            f"got {start} and {width}"
        )
    blocks = -(-width // group) * BLOCKS_PER_GROUP
    block_1N = torch.arange(start // 4, start // 4 + blocks, device=keys_R.device)[None]
    values_RN4 = torch.empty(len(keys_R), blocks, 4, dtype=torch.float32, device=keys_R.device)
    step = max(1, (CPU_TILE if keys_R.device.type == "cpu" else DEVICE_TILE) // blocks)
    for first in range(0, len(keys_R), step):
        rows = slice(first, first + step)
        words = _words(keys_R[rows, None], block_1N, positions_R[rows, None], draw, stream)
        _box_muller(tuple(word.flatten() for word in words), values_RN4[rows].view(-1, 4))
    return values_RN4.flatten(1)[:, :width]
