"""Random words and normals of the kernels, against those of kernels/random.py."""

import math

import pytest
import torch

pytest.importorskip("triton", reason="the Triton kernels need the package triton")

import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from tess.kernels import random  # noqa: E402
from tess.kernels.triton import random as kernels  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KEYS = torch.tensor([0, 1, -1, 2**62 + 12345, -(2**63)], device=DEVICE)
POSITIONS = torch.tensor([0, 3, 7, 100_000, 2**31 - 1], device=DEVICE)


@triton.jit
def _cos_sin(angle_ptr, x_ptr, y_ptr, count, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x, y = kernels.cos_sin(tl.load(angle_ptr + i, mask=i < count, other=0.0), WIDE)
    tl.store(x_ptr + i, x, i < count)
    tl.store(y_ptr + i, y, i < count)


@triton.jit
def _box_muller(words_ptr, z_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    first, second = tl.load(words_ptr + i), tl.load(words_ptr + BLOCK + i)
    z0, z1 = kernels._box_muller(first.to(tl.uint32), second.to(tl.uint32))
    tl.store(z_ptr + i, z0)
    tl.store(z_ptr + BLOCK + i, z1)


@pytest.mark.parametrize("draw", [0, 1, 16, 2**31, 2**32 - 1])
@pytest.mark.parametrize("start, blocks, stream", [(0, 1, 0), (5, 33, 2), (1 << 20, 130, 4)])
def test_words_are_those_of_the_tensor_generator(draw, start, blocks, stream):
    want = random.words_at(KEYS, POSITIONS, draw, start, blocks, stream)
    assert torch.equal(kernels.words_at(KEYS, POSITIONS, draw, start, blocks, stream), want)


@pytest.mark.parametrize("start, width", [(0, 1), (128, 63), (64, 700), (0, 513)])
def test_normals_are_those_of_the_tensor_generator(start, width):
    for stream in (random.NORMAL_STREAM, random.BULK_STREAM):
        want = random.normal_at(KEYS, POSITIONS, 9, start, width, stream)
        got = kernels.normal_at(KEYS, POSITIONS, 9, start, width, stream)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    half = kernels.normal_at(KEYS, POSITIONS, 9, start, width, stream, torch.float16)
    assert torch.equal(half, got.half())


@pytest.mark.parametrize("config", kernels.NORMALS.candidates(), ids=str)
def test_every_configuration_gives_the_same_bits_in_every_batch(config, monkeypatch):
    want = kernels.normal_at(KEYS, POSITIONS, 3, 0, 300, 4)
    monkeypatch.setattr(kernels.NORMALS, "config", lambda like: config)
    assert torch.equal(kernels.normal_at(KEYS, POSITIONS, 3, 0, 300, 4), want)
    assert torch.equal(kernels.normal_at(KEYS[2:3], POSITIONS[2:3], 3, 0, 200, 4), want[2:3, :200])


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 2e-7), (torch.float64, 4e-16)])
def test_cosine_and_sine_are_right_over_a_whole_turn(dtype, bound):
    angle = torch.linspace(0, 2 * math.pi, 20_001, dtype=torch.float64).to(DEVICE, dtype)
    angle[1:6] = torch.tensor([0.25, 0.5, 0.75, 1.0, 1.75], device=DEVICE) * math.pi  # borders
    x, y = torch.empty_like(angle), torch.empty_like(angle)
    wide = tl.float64 if dtype == torch.float64 else tl.float32
    _cos_sin[(triton.cdiv(len(angle), 4096),)](angle, x, y, len(angle), BLOCK=4096, WIDE=wide)
    assert (x.double() - angle.double().cos()).abs().max() < bound
    assert (y.double() - angle.double().sin()).abs().max() < bound


def test_the_smallest_and_the_largest_words_give_finite_normals():
    extreme = [0, 1, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1]
    words = torch.cartesian_prod(*(torch.tensor(extreme),) * 2).T.contiguous().to(DEVICE)
    words = torch.cat([words, words[:, :28]], dim=1).contiguous()  # 64 pairs
    z = torch.empty(2, 64, device=DEVICE)
    _box_muller[(1,)](words, z, BLOCK=64)
    want = torch.empty(64, 4, device=DEVICE)
    random._box_muller((*words, *words), want)
    assert z.isfinite().all()
    torch.testing.assert_close(z, want[:, :2].T, rtol=1e-6, atol=2e-6)
    assert (z[:, (words[0] == 2**32 - 1)] == 0).all()


def test_no_rows_give_no_numbers():
    none = KEYS[:0]
    assert kernels.words_at(none, none, 1, 0, 3, 2).shape == (0, 12)
    assert kernels.normal_at(none, none, 1, 0, 3, 2).shape == (0, 3)
