"""Laws of the counter-based generator: the published vectors, and no dependence on the batch."""

import math

import pytest
import torch

from tess.kernels.random import normal, philox4x32, uniform

# Known-answer vectors of Random123 (tests/kat_vectors, "philox4x32 10"): counter, key, result.
KNOWN_ANSWERS = [
    ("00000000 " * 4, "00000000 " * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff " * 4, "ffffffff " * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        "243f6a88 85a308d3 13198a2e 03707344",
        "a4093822 299f31d0",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]
KEYS = torch.tensor([0, 1, -1, 2**62 + 12345, -(2**63)])


def words(text: str) -> tuple[torch.Tensor, ...]:
    return tuple(torch.tensor([int(word, 16)]) for word in text.split())


@pytest.mark.parametrize("counter, key, expected", KNOWN_ANSWERS)
def test_philox_gives_the_published_words(counter, key, expected):
    got = philox4x32(words(counter), words(key))
    assert " ".join(f"{int(word):08x}" for word in got) == expected


@pytest.mark.parametrize("width", [1, 63, 64, 65, 500, 20_000])
def test_an_example_has_the_same_noise_in_every_batch_and_at_every_length(width):
    together = normal(KEYS, 7, 9, width)
    assert together.shape == (5, 9, width)
    for row, key in enumerate(KEYS):
        assert torch.equal(normal(key[None], 7, 4, width)[0], together[row, :4])
    order = torch.tensor([3, 0, 4, 2, 1])
    assert torch.equal(normal(KEYS[order], 7, 9, width), together[order])


def test_a_wider_vocabulary_keeps_the_values_of_the_first_tokens():
    assert torch.equal(normal(KEYS, 2, 3, 5_000)[..., :301], normal(KEYS, 2, 3, 301))


def test_normals_have_the_moments_and_the_tail_of_a_normal():
    values = normal(torch.arange(8), 0, 16, 8_192).double().flatten()
    count = values.numel()
    assert abs(values.mean()) < 5 / math.sqrt(count)
    assert abs(values.var() - 1) < 5 * math.sqrt(2 / count)
    assert abs((values**3).mean()) < 5 * math.sqrt(15 / count)
    assert abs((values**4).mean() - 3) < 5 * math.sqrt(96 / count)
    tail = 0.5 * math.erfc(3 / math.sqrt(2))
    assert abs((values > 3).double().mean() - tail) < 5 * math.sqrt(tail / count)


def test_normals_of_neighbours_keys_draws_and_positions_are_uncorrelated():
    base = normal(torch.tensor([5]), 3, 2, 65_536)[0].double()
    others = [
        normal(torch.tensor([6]), 3, 1, 65_536)[0, 0],
        normal(torch.tensor([5]), 4, 1, 65_536)[0, 0],
        base[1],
        base[0].roll(1),
        base[0].roll(2),
    ]
    for other in others:
        assert abs((base[0] * other.double()).mean()) < 5 / math.sqrt(65_536)


def test_normals_follow_box_muller_in_float64():
    key = torch.tensor([0x0123456789ABCDEF])
    counter = tuple(torch.tensor([word]) for word in (11, 2, 9, 0))  # block, position, draw, stream
    w = [int(word) for word in philox4x32(counter, (key & 0xFFFFFFFF, key >> 32))]
    expected = []
    for first in (0, 2):
        radius = math.sqrt(-2 * math.log((w[first] + 1) / 2**32))
        angle = 2 * math.pi * w[first + 1] / 2**32
        expected += [radius * math.cos(angle), radius * math.sin(angle)]
    got = normal(key, 9, 3, 64)[0, 2, 44:48].double()
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=2e-6)


def test_uniforms_are_uniform_and_depend_only_on_key_draw_and_position():
    values = uniform(torch.arange(64), 5, 1_000)
    assert values.dtype == torch.float32 and 0 <= values.min() and values.max() < 1
    assert abs(values.double().mean() - 0.5) < 5 * math.sqrt(1 / 12 / 64_000)
    assert torch.equal(uniform(torch.tensor([17]), 5, 10)[0], values[17, :10])
    assert not torch.equal(uniform(torch.tensor([17]), 6, 10)[0], values[17, :10])


def test_a_draw_outside_32_bits_is_refused():
    with pytest.raises(ValueError, match="draw must be in"):
        normal(KEYS, 2**32, 1, 4)
