"""The fast paths of kernels/ against the float64 references."""

import math

import pytest
import torch

from tess.kernels import conv, experts, norms, reference, ssd

CHUNK = 16


def relative(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def scan_inputs(length, batch=2, heads=4, width=3, groups=2, states=5, dtype=torch.float64):
    torch.manual_seed(length)
    make = lambda *shape: torch.randn(*shape, dtype=dtype)  # noqa: E731
    dt = torch.nn.functional.softplus(make(batch, length, heads))
    a = -torch.rand(heads, dtype=dtype) * 2
    x, b, c = (
        make(batch, length, heads, width),
        make(batch, length, groups, states),
        make(batch, length, groups, states),
    )
    return [x, dt, a, b, c]


@pytest.mark.parametrize("initial", [False, True], ids=["empty", "seeded"])
@pytest.mark.parametrize("direction", ["forward", "bidirectional"])
@pytest.mark.parametrize("length", [1, 7, 15, 16, 17, 50])
def test_chunked_scan_equals_the_recurrence(length, direction, initial):
    inputs = [tensor.requires_grad_() for tensor in scan_inputs(length)]
    state = torch.randn(2, 4, 3, 5, dtype=torch.float64) if initial else None
    scale = torch.randn(4, dtype=torch.float64) if direction == "bidirectional" else None
    options = {"direction": direction, "reverse_scale_H": scale, "initial_state_BHPN": state}
    want, want_state = reference.ssd_scan(*inputs, **options)
    got = ssd.ssd_scan(*inputs, chunk_size=CHUNK, return_final_state=True, **options)
    assert relative(got.y, want) < 1e-12
    assert relative(got.final_state, want_state) < 1e-12

    weight = torch.randn_like(want)
    expected = torch.autograd.grad((want * weight).sum(), inputs)
    actual = torch.autograd.grad((got.y * weight).sum(), inputs)
    for one, other in zip(actual, expected):
        assert (one - other).norm() <= 1e-11 * (1 + other.norm())


def test_chunked_scan_in_float32_stays_close_for_extreme_steps():
    inputs = scan_inputs(100)
    for scale in (1e-4, 30.0):  # nearly no decay, and exp(-60) per step
        scaled = [inputs[0], inputs[1] * scale, *inputs[2:]]
        want, _ = reference.ssd_scan(*scaled, direction="bidirectional")
        low = [tensor.float() for tensor in scaled]
        got = ssd.ssd_scan(*low, chunk_size=CHUNK, direction="bidirectional")
        assert relative(got.y, want) < 1e-5


def test_scan_in_blocks_equals_one_scan():
    x, dt, a, b, c = scan_inputs(41)
    want = ssd.ssd_scan(x, dt, a, b, c, chunk_size=CHUNK, return_final_state=True)
    state, parts = None, []
    for start, stop in ((0, 1), (1, 8), (8, 41)):
        piece = slice(start, stop)
        out = ssd.ssd_scan(
            x[:, piece], dt[:, piece], a, b[:, piece], c[:, piece],
            chunk_size=CHUNK, initial_state_BHPN=state, return_final_state=True,
        )  # fmt: skip
        state = out.final_state
        parts.append(out.y)
    assert relative(torch.cat(parts, 1), want.y) < 1e-12
    assert relative(state, want.final_state) < 1e-12


def test_single_step_equals_the_scan():
    x, dt, a, b, c = scan_inputs(9)
    want = ssd.ssd_scan(x, dt, a, b, c, return_final_state=True)
    state = torch.zeros(2, 4, 3, 5, dtype=torch.float64)
    for t in range(9):
        y, state = ssd.ssd_step(x[:, t], dt[:, t], a, b[:, t], c[:, t], state)
        assert relative(y, want.y[:, t]) < 1e-12
    assert relative(state, want.final_state) < 1e-12


def test_zero_step_skips_a_position():
    x, dt, a, b, c = scan_inputs(12)
    keep = torch.tensor([i not in (3, 4, 11) for i in range(12)])
    masked = ssd.ssd_scan(x, dt * keep[:, None], a, b, c, direction="bidirectional")
    short = ssd.ssd_scan(
        x[:, keep], dt[:, keep], a, b[:, keep], c[:, keep], direction="bidirectional"
    )
    assert relative(masked.y[:, keep], short.y) < 1e-12


def test_scan_accepts_slices_of_a_wider_tensor():
    x, dt, a, b, c = scan_inputs(20)
    wide = torch.cat([x.flatten(2), b.flatten(2), c.flatten(2)], -1)
    xs, bs, cs = wide.split([12, 10, 10], -1)
    got = ssd.ssd_scan(
        xs.unflatten(-1, (4, 3)), dt, a, bs.unflatten(-1, (2, 5)), cs.unflatten(-1, (2, 5))
    )
    assert torch.equal(got.y, ssd.ssd_scan(x, dt, a, b, c).y)


def test_scan_refuses_what_it_cannot_do():
    x, dt, a, b, c = scan_inputs(4)
    with pytest.raises(ValueError, match="direction must be one of"):
        ssd.ssd_scan(x, dt, a, b, c, direction="backward")
    with pytest.raises(ValueError, match="length 0"):
        ssd.ssd_scan(x[:, :0], dt[:, :0], a, b[:, :0], c[:, :0])
    with pytest.raises(ValueError, match="3 groups do not divide 4 heads"):
        ssd.ssd_scan(x, dt, a, b[:, :, :1].expand(-1, -1, 3, -1), c)
    with pytest.raises(ValueError, match="direction is 'forward'"):
        ssd.ssd_scan(x, dt, a, b, c, reverse_scale_H=a)


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


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_norms_match_their_formulas(groups):
    torch.manual_seed(0)
    x, gate, weight = torch.randn(3, 5, 16), torch.randn(3, 5, 16), torch.randn(16)
    doubles = [t.double() for t in (x, gate, weight)]
    want = reference.gated_group_rms_norm(*doubles, groups, 1e-5)
    assert relative(norms.gated_group_rms_norm(x, gate, weight, groups, 1e-5), want) < 1e-6
    want = reference.rms_norm(doubles[0], doubles[2], 1e-5)
    assert relative(norms.rms_norm(x, weight, 1e-5), want) < 1e-6


@pytest.mark.parametrize(("groups", "top_groups"), [(1, 1), (4, 2), (4, 1)])
@pytest.mark.parametrize("normalize", [True, False])
def test_routing_matches_the_loops(groups, top_groups, normalize):
    torch.manual_seed(0)
    logits, bias = torch.randn(40, 8), torch.randn(8)
    options = {
        "num_groups": groups, "top_groups": top_groups, "normalize": normalize, "scaling": 2.5,
    }  # fmt: skip
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


def test_reference_scan_has_the_closed_form_for_one_channel():
    # x = b = c = 1, dt = d, a = -1: y_t = d (1 + e^-d + ... + e^-td), a geometric series
    d, steps = 0.3, 6
    ones = torch.ones(1, steps, 1, 1, dtype=torch.float64)
    y, _ = reference.ssd_scan(
        ones, torch.full((1, steps, 1), d).double(), -torch.ones(1).double(), ones, ones
    )
    for t in range(steps):
        want = d * (1 - math.exp(-d * (t + 1))) / (1 - math.exp(-d))
        assert y[0, t, 0, 0].item() == pytest.approx(want, rel=1e-6)
