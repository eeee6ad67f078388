"""Philox words and standard normals in kernels: the words of `tess.kernels.random`, bit for bit.

Letters: R rows (a key and a position each), N blocks of four words, W words or values of a row.
"""

import math
from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from tess.kernels import random
from tess.kernels.triton.launch import Config, Table, launch

MULTIPLIER_0, MULTIPLIER_1 = (tl.constexpr(m) for m in random.MULTIPLIERS)
KEY_STEP_0, KEY_STEP_1 = (tl.constexpr(s) for s in random.KEY_STEPS)
ROUNDS = tl.constexpr(random.ROUNDS)
TURN = tl.constexpr(2.0 * math.pi * 2.0**-32)

# pi/2 in two parts, the first short enough that small multiples of it are exact
HALF_PI_32 = tl.constexpr((1.5703125, math.pi / 2 - 1.5703125))
HALF_PI_64 = tl.constexpr((1.57079632673412561417e00, 6.07710050650619224932e-11))
SINE = tl.constexpr(tuple((-1.0) ** n / math.factorial(2 * n + 1) for n in range(9, -1, -1)))
COSINE = tl.constexpr(tuple((-1.0) ** n / math.factorial(2 * n) for n in range(9, -1, -1)))

WORDS = Table("random_words", {"sm_80": Config({"BLOCK": 128}, num_warps=2, num_stages=1)})
NORMALS = Table(
    "random_normals",
    {"sm_80": Config({"BLOCK": 128}, num_warps=2, num_stages=1)},
    (Config({"BLOCK": 256}, num_warps=4, num_stages=1),),
)


# ---- for other kernels ----


@triton.jit
def polynomial(x, coefficients: tl.constexpr, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """Horner's rule, the highest power first, over coefficients FIRST .. COUNT - 1."""
    value = tl.full(x.shape, coefficients[FIRST], x.dtype)
    for i in tl.static_range(FIRST + 1, COUNT):
        value = value * x + coefficients[i]
    return value


@triton.jit
def philox_words(block, position, key, draw, stream):
    """Four words, uint32, of `random._words`: integer blocks and positions, int64 keys."""
    c0, c1 = block.to(tl.uint32), position.to(tl.uint32)
    c2, c3 = tl.full(c0.shape, draw, tl.uint32), tl.full(c0.shape, stream, tl.uint32)
    k0, k1 = key.to(tl.uint32), (key >> 32).to(tl.uint32)
    for _ in tl.static_range(0, ROUNDS):
        high0, low0 = tl.umulhi(c0, MULTIPLIER_0), c0 * MULTIPLIER_0
        high1, low1 = tl.umulhi(c2, MULTIPLIER_1), c2 * MULTIPLIER_1
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + KEY_STEP_0, k1 + KEY_STEP_1
    return c0, c1, c2, c3


@triton.jit
def cos_sin(angle, WIDE: tl.constexpr):
    """Cosine and sine of an angle in [0, 2 pi].

    By quarter turns and the two power series, which end below a rounding at pi/4. The compiler's
    own functions hold a branch for huge angles, and its table takes local memory.
    """
    quarter = (angle * (2.0 / math.pi) + 0.5).to(tl.int32)
    turns = quarter.to(WIDE)
    if WIDE == tl.float64:
        rest = (angle - turns * HALF_PI_64[0]) - turns * HALF_PI_64[1]
        first: tl.constexpr = 0
    else:
        rest = (angle - turns * HALF_PI_32[0]) - turns * HALF_PI_32[1]
        first: tl.constexpr = 4
    square = rest * rest
    sine = rest * polynomial(square, SINE, first, 10)
    cosine = polynomial(square, COSINE, first, 10)
    odd = (quarter & 1) == 1
    x, y = tl.where(odd, sine, cosine), tl.where(odd, cosine, sine)
    x = tl.where(((quarter + 1) & 2) == 2, -x, x)
    return x, tl.where((quarter & 2) == 2, -y, y)


@triton.jit
def _box_muller(first, second):
    """Two normals from two words: sqrt(-2 ln u) (cos a, sin a), u in (0, 1], a in [0, 2 pi)."""
    above = first + 1  # 0 stands for 2^32
    u = tl.where(above == 0, 1.0, above.to(tl.float32) * 2.0**-32)
    radius = tl.sqrt(-2.0 * tl.log(u))
    x, y = cos_sin(second.to(tl.float32) * TURN, tl.float32)
    return radius * x, radius * y


@triton.jit
def normal_tile(first_block, position, key, draw, STREAM: tl.constexpr, BLOCK: tl.constexpr):
    """Normals [4 * BLOCK] of one row in the order of `random.normal_at`, float32."""
    block = first_block + tl.arange(0, BLOCK)
    w0, w1, w2, w3 = philox_words(block, position, key, draw, STREAM)
    z0, z1 = _box_muller(w0, w1)
    z2, z3 = _box_muller(w2, w3)
    return tl.interleave(tl.interleave(z0, z2), tl.interleave(z1, z3))


# ---- kernels ----


@triton.jit
def _words(
    keys_ptr, positions_ptr, out_ptr, draw, start, blocks, STREAM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = n < blocks
    key, position = tl.load(keys_ptr + row), tl.load(positions_ptr + row)
    words = philox_words(start + n, position, key, draw, STREAM)
    for i in tl.static_range(0, 4):
        tl.store(out_ptr + (row * blocks + n) * 4 + i, words[i].to(tl.int64), inside)


@triton.jit
def _normals(
    keys_ptr, positions_ptr, out_ptr, draw, start, width, STREAM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK
    column = 4 * first + tl.arange(0, 4 * BLOCK)
    key, position = tl.load(keys_ptr + row), tl.load(positions_ptr + row)
    z = normal_tile(start + first, position, key, draw, STREAM, BLOCK)
    out = out_ptr + row * width + column
    tl.store(out, z.to(out_ptr.dtype.element_ty), column < width)


# ---- launches ----


def words_at(
    keys_R: Tensor, positions_R: Tensor, draw: int, start: int, blocks: int, stream: int
) -> Tensor:
    """As `tess.kernels.random.words_at`."""
    words_RW = torch.empty((len(keys_R), 4 * blocks), dtype=torch.int64, device=keys_R.device)

    def run(config: Config) -> None:
        launch(
            _words, (len(keys_R), triton.cdiv(blocks, config.blocks["BLOCK"])), keys_R,
            positions_R, words_RW, draw, start, blocks, config=config, STREAM=stream,
        )

    WORDS.run(words_RW, blocks, run)
    return words_RW


def normal_at(
    keys_R: Tensor, positions_R: Tensor, draw: int, start: int, width: int, stream: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """As `tess.kernels.random.normal_at`: the same words, float32 maths, stored in a dtype."""
    values_RW = torch.empty((len(keys_R), width), dtype=dtype, device=keys_R.device)

    def run(config: Config) -> None:
        launch(
            _normals, (len(keys_R), triton.cdiv(width, 4 * config.blocks["BLOCK"])), keys_R,
            positions_R, values_RW, draw, start // 4, width, config=config, STREAM=stream,
        )

    NORMALS.run(values_RW, width, run)
    return values_RW


# ---- what is compiled ahead of time ----


def cases(make: Callable[..., Tensor]) -> Iterator[tuple[str, bool, Callable[[], object]]]:
    """(name, hot, call) at shipped shapes; `make(*shape, dtype=...)`: a tensor without data."""
    keys = make(64, dtype=torch.int64)
    for dtype, hot in ((torch.bfloat16, True), (torch.float32, True)):
        yield (
            f"normals {dtype}".replace("torch.", ""), hot,
            lambda dtype=dtype: normal_at(keys, keys, 3, 0, 2688, random.BULK_STREAM, dtype),
        )
    yield "words", False, lambda: words_at(keys, keys, 3, 0, 17, random.LARGEST_STREAM)
