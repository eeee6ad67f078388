"""The cache of an embedding's moments: they are always those of the matrix as it is."""

import pytest
import torch

from tess.kernels import order_statistics as module
from tess.kernels.order_statistics import MomentsCache, embedding_moments, embedding_sums


def equal(one, other):
    return torch.equal(one.sums, other.sums) and torch.equal(one.factor, other.factor)


@pytest.fixture
def computed(monkeypatch):
    """How often the second moment was computed."""
    calls = []

    def counted(weight):
        calls.append(weight)
        return embedding_moments(weight)

    monkeypatch.setattr(module, "embedding_moments", counted)
    return calls


def test_an_unchanged_matrix_is_read_once(computed):
    cache, weight = MomentsCache(), torch.randn(5_000, 7)
    first = cache.of(weight)
    assert equal(first, embedding_moments(weight))
    assert cache.of(weight) is first and cache.of(weight.clone()) is first
    assert len(computed) == 1


CHANGES = ["one element", "in place behind autograd", "step", "sign", "with the same sums"]


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen(computed, change):
    cache, weight = MomentsCache(), torch.nn.Parameter(torch.randn(5_000, 7))
    before = cache.of(weight)
    if change == "one element":
        with torch.no_grad():
            weight[4_321, 3] += 1e-2
    elif change == "in place behind autograd":
        weight.data.mul_(1.001)
    elif change == "sign":
        weight.data.neg_()
    elif change == "with the same sums":
        weight.data.round_()
        before = cache.of(weight)
        computed.pop()
        weight.data[:2] += torch.tensor([[1.0], [-1.0]])
        assert torch.equal(embedding_sums(weight), before.sums.double())
    else:
        weight.grad = torch.randn_like(weight)
        torch.optim.AdamW([weight], lr=1e-4).step()
    after = cache.of(weight)
    assert len(computed) == 2 and equal(after, embedding_moments(weight))
    assert not torch.equal(after.factor, before.factor) or change == "sign"


def test_another_precision_has_its_own_moments(computed):
    cache, weight = MomentsCache(), torch.randn(500, 7)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        moments = cache.of(weight.to(dtype))
        assert equal(moments, embedding_moments(weight.to(dtype)))
    assert moments.factor.dtype == torch.float32


def test_a_matrix_that_is_not_finite_is_refused_also_when_it_was():
    cache, weight = MomentsCache(), torch.randn(50, 7)
    cache.of(weight)
    weight[3, 2] = float("nan")
    for _ in range(2):
        with pytest.raises(ValueError, match="the embedding must be finite"):
            cache.of(weight)


def test_sums_are_those_of_all_tiles():
    weight = torch.randn(9_001, 5)
    torch.testing.assert_close(embedding_sums(weight), weight.double().sum(0), rtol=1e-5, atol=1e-4)
    assert embedding_sums(weight.double()).sub(weight.double().sum(0)).abs().max() < 1e-11
