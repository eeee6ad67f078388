"""The fast paths of kernels/ against the float64 references."""

import pytest
import torch

from tess.kernels import conv, experts, norms, reference
from tess.kernels.activation import squared_relu
from tess.kernels.attention import causal_attention


def relative(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("length", [1, 2, 9])
def test_convolution_matches_the_sum_and_continues_from_its_window(length, bias):
    torch.manual_seed(0)
    x, weight = torch.randn(2, length, 6).double(), torch.randn(6, 4).double()
    bias = torch.randn(6).double() if bias else None
    before = torch.randn(2, 5, 6).double()
    window = conv.next_window(before, 4)
    want = reference.causal_conv1d(torch.cat([before, x], 1), weight, bias)[:, 5:]
    assert relative(conv.causal_conv1d(x, weight, bias, window), want) < 1e-12
    assert relative(reference.causal_conv1d(x, weight, bias, window), want) < 1e-12
    joined = torch.cat([before, x], 1)[:, -3:]
    assert torch.equal(conv.next_window(x, 4, window), joined)


def test_convolution_matches_torch_conv1d():
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 11, 6), torch.randn(6, 4), torch.randn(6)
    want = torch.nn.functional.conv1d(x.transpose(1, 2), weight[:, None], bias, padding=3, groups=6)
    want = torch.nn.functional.silu(want[..., :11]).transpose(1, 2)
    assert relative(conv.causal_conv1d(x, weight, bias), want) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("length", [1, 3, 33])
def test_convolution_and_its_gradients_match_the_sum(length, bias, window, dtype):
    torch.manual_seed(length)
    wide = torch.randn(2, length, 20).to(dtype)
    leaves = [wide[..., 3:17], torch.randn(14, 4).to(dtype)]
    leaves += [torch.randn(14).to(dtype) if bias else None]
    leaves += [torch.randn(2, 3, 14).to(dtype) if window else None]
    leaves = [None if leaf is None else leaf.requires_grad_() for leaf in leaves]
    doubles = [None if t is None else t.detach().double().requires_grad_() for t in leaves]
    got, want = conv.causal_conv1d(*leaves), reference.causal_conv1d(*doubles)
    bound = 1e-6 if dtype == torch.float32 else 1e-2
    assert got.dtype == dtype
    assert relative(got, want) < bound
    mix = torch.randn(got.shape).to(dtype)
    actual = torch.autograd.grad((got * mix).sum(), [t for t in leaves if t is not None])
    expected = torch.autograd.grad((want * mix).sum(), [t for t in doubles if t is not None])
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == dtype
        assert relative(one, other) < bound


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_norms_match_their_formulas(groups):
    torch.manual_seed(0)
    x, gate, weight = torch.randn(3, 5, 16), torch.randn(3, 5, 16), torch.randn(16)
    doubles = [t.double() for t in (x, gate, weight)]
    want = reference.gated_group_rms_norm(*doubles, groups, 1e-5)
    assert relative(norms.gated_group_rms_norm(x, gate, weight, groups, 1e-5), want) < 1e-6
    want = reference.rms_norm(doubles[0], doubles[2], 1e-5)
    assert relative(norms.rms_norm(x, weight, 1e-5), want) < 1e-6


CASES = {
    "rms": (
        lambda x, weight: norms.rms_norm(x, weight, 1e-5),
        lambda x, weight: reference.rms_norm(x, weight, 1e-5),
        lambda wide: [wide[..., 3:19], torch.randn(16)],
    ),
    "gated": (
        lambda x, gate, weight: norms.gated_group_rms_norm(x, gate, weight, 2, 1e-5),
        lambda x, gate, weight: reference.gated_group_rms_norm(x, gate, weight, 2, 1e-5),
        lambda wide: [wide[..., 20:36], wide[..., 3:19], torch.randn(16)],
    ),
    "squared relu": (
        squared_relu,
        lambda x: x.clamp(min=0) ** 2,
        lambda wide: [wide[..., 3:19]],
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_norms_and_squared_relu_have_the_gradients_of_their_formulas(dtype, case):
    function, formula, make = CASES[case]
    leaves = [leaf.requires_grad_() for leaf in make(torch.randn(3, 5, 48).to(dtype))]
    doubles = [leaf.detach().double().requires_grad_() for leaf in leaves]
    bound = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1e-2}[dtype]
    got, want = function(*leaves), formula(*doubles)
    assert got.dtype == dtype
    assert relative(got, want) < bound
    with torch.no_grad():
        assert torch.equal(function(*leaves), got)
    mix = torch.randn(3, 5, 16)
    expected = torch.autograd.grad((want * mix).sum(), doubles)
    for leaf, one, other in zip(
        leaves, torch.autograd.grad((got * mix).sum(), leaves), expected, strict=True
    ):
        assert one.dtype == leaf.dtype
        assert relative(one, other) < max(bound, 1e-6 if leaf.dtype != dtype else 0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [1, 64, 130, 200])
def test_causal_attention_in_blocks_equals_the_masked_softmax(length, dtype):
    shapes = ((2, 4, length, 8), (2, 2, length, 8), (2, 2, length, 8))
    leaves = [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]
    query, key, value = (leaf.detach().double().requires_grad_() for leaf in leaves)
    scores = query @ key.repeat_interleave(2, 1).mT / 8**0.5
    above = torch.ones(length, length, dtype=torch.bool).triu(1)
    want = scores.masked_fill(above, -torch.inf).softmax(-1) @ value.repeat_interleave(2, 1)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        got = causal_attention(*leaves)
    bound = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    assert got.dtype == dtype
    assert relative(got, want) < bound
    mix = torch.randn_like(want)
    expected = torch.autograd.grad((want * mix).sum(), (query, key, value))
    for one, other in zip(torch.autograd.grad((got * mix).sum(), leaves), expected):
        assert (one - other).norm() <= bound * (1 + other.norm())


@pytest.mark.parametrize(("groups", "top_groups"), [(1, 1), (4, 2), (4, 1)])
@pytest.mark.parametrize("normalize", [True, False])
def test_routing_matches_the_loops(groups, top_groups, normalize):
    torch.manual_seed(0)
    logits, bias = torch.randn(40, 8), torch.randn(8)
    options = {
        "num_groups": groups, "top_groups": top_groups, "normalize": normalize, "scaling": 2.5,
    }
    ids, weights = experts.route_tokens(logits, bias, 2, **options)
    want_ids, want_weights = reference.route_tokens(logits, bias, 2, **options)
    assert torch.equal(ids, want_ids)
    torch.testing.assert_close(weights, want_weights)


def test_routing_refuses_bfloat16():
    with pytest.raises(ValueError, match="float32 or float64"):
        experts.route_tokens(torch.randn(2, 4).bfloat16(), torch.zeros(4), 2)


@pytest.mark.parametrize("tokens", [1, 3, 50])
def test_experts_match_the_loop_with_gradients(tokens):
    torch.manual_seed(tokens)  # with one token six of the eight experts stay empty
    x, up, down = torch.randn(tokens, 16), torch.randn(8, 24, 16), torch.randn(8, 16, 24)
    ids, weights = experts.route_tokens(torch.randn(tokens, 8), torch.zeros(8), 2)
    leaves = [t.requires_grad_() for t in (x, up, down, weights.detach())]
    got = experts.experts(leaves[0], ids, leaves[3], leaves[1], leaves[2])
    doubles = [t.detach().double().requires_grad_() for t in leaves]
    want = reference.experts(doubles[0], ids, doubles[3], doubles[1], doubles[2])
    assert relative(got, want) < 1e-5
    mix = torch.randn_like(got)
    actual = torch.autograd.grad((got * mix).sum(), leaves)
    expected = torch.autograd.grad((want * mix).sum(), doubles)
    for one, other in zip(actual, expected):
        assert relative(one, other) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("width", "inner"), [(12, 16), (16, 12), (9, 7), (8, 18)])
def test_experts_of_any_width_match_the_loop(dtype, width, inner):
    x, up, down = torch.randn(5, width), torch.randn(3, inner, width), torch.randn(3, width, inner)
    ids, weights = torch.randint(0, 3, (5, 2)), torch.rand(5, 2)
    x, up, down = (tensor.to(dtype).requires_grad_() for tensor in (x, up, down))
    got = experts.experts(x, ids, weights, up, down)
    want = reference.experts(x.double(), ids, weights, up.double(), down.double())
    assert (got.double() - want).norm() / want.norm() < (1e-5 if dtype == torch.float32 else 2e-2)
    got.square().sum().backward()
    assert all(tensor.grad.isfinite().all() for tensor in (x, up, down))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("routing", ["even", "uneven", "one", "none of some"])
def test_experts_of_any_load_match_the_loop_with_gradients(routing, dtype):
    ids = {  # the first two are padded in bfloat16, the others are not
        "even": torch.tensor([[0, 1], [2, 3], [1, 0], [3, 2]]),
        "uneven": torch.tensor([[0, 1], [2, 3], [1, 2], [3, 1]]),
        "one": torch.tensor([[0, 0]] * 9),
        "none of some": torch.tensor([[3, 1], [3, 1], [1, 3]]),
    }[routing]
    leaves = [torch.randn(len(ids), 16), torch.rand(ids.shape), *torch.randn(2, 4, 16, 16)]
    leaves = [leaf.to(dtype).requires_grad_() for leaf in leaves]
    doubles = [leaf.detach().double().requires_grad_() for leaf in leaves]
    got = experts.experts(leaves[0], ids, *leaves[1:])
    want = reference.experts(doubles[0], ids, *doubles[1:])
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    assert relative(got, want) < bound
    mix = torch.randn_like(want)
    expected = torch.autograd.grad((want * mix).sum(), doubles)
    actual = torch.autograd.grad((got * mix.to(dtype)).sum(), leaves)
    for one, other in zip(actual, expected):
        assert (one.double() - other).norm() <= bound * (1 + other.norm())


def test_experts_in_float64_match_the_loop_to_its_precision():
    torch.manual_seed(0)
    x, up, down = (torch.randn(*s).double() for s in ((9, 16), (8, 24, 16), (8, 16, 24)))
    ids, weights = experts.route_tokens(torch.randn(9, 8).double(), torch.zeros(8).double(), 2)
    got = experts.experts(x, ids, weights, up, down)
    assert relative(got, reference.experts(x, ids, weights, up, down)) < 1e-13


def test_expert_products_follow_the_token_not_the_batch():
    torch.manual_seed(0)
    x, up, down = torch.randn(30, 16), torch.randn(8, 24, 16), torch.randn(8, 16, 24)
    ids, weights = experts.route_tokens(torch.randn(30, 8), torch.zeros(8), 2)
    whole = experts.experts(x, ids, weights, up, down)
    for t in (0, 13, 29):
        alone = experts.experts(x[t : t + 1], ids[t : t + 1], weights[t : t + 1], up, down)
        assert relative(alone[0], whole[t]) < 1e-6
