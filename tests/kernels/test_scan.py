"""The state-space scan against the recurrence in float64, with all its options and gradients."""

import math

import pytest
import torch

from tess.kernels import reference, ssd, ssd_chunks

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


def sequence_ids(length, batch=2):
    """A boundary here and there, row by row, some of one position; ids may leave gaps."""
    torch.manual_seed(length + 1)
    return ((torch.rand(batch, length) < 0.2) * torch.randint(1, 4, (batch, length))).cumsum(1)


@pytest.fixture(params=[2**18, 2_500, 1], ids=["whole", "pieces", "single"])
def piece(request, monkeypatch):
    """How many pairs are worked on at once: everything, some rows and chunks, or one of each."""
    monkeypatch.setattr(ssd_chunks, "PIECE", request.param)
    monkeypatch.setattr(ssd_chunks, "_threads", lambda: 1)


@pytest.mark.usefixtures("piece")
@pytest.mark.parametrize("packed", [False, True], ids=["one", "packed"])
@pytest.mark.parametrize("raw", [False, True], ids=["final", "raw"])
@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize("length", [1, 16, 40])
def test_scan_with_every_option_equals_the_recurrence(length, direction, raw, packed):
    inputs = scan_inputs(length)
    more = {
        "d_H": torch.randn(4).double(),
        "initial_state_BHPN": torch.randn(2, 4, 3, 5).double(),
    }
    fixed = {"direction": direction, "sequence_ids_BL": sequence_ids(length) if packed else None}
    if raw:
        inputs[1] = torch.randn_like(inputs[1])
        more["dt_bias_H"] = torch.randn(4).double()
        mask = torch.rand(2, length) < 0.8
        fixed |= {"dt_softplus": True, "dt_limits": (0.3, 1.5), "mask_BL": mask}
    if direction == "bidirectional":
        more["reverse_scale_H"] = torch.randn(4).double()
    leaves = [tensor.requires_grad_() for tensor in (*inputs, *more.values())]
    want, want_state = reference.ssd_scan(*inputs, **more, **fixed)
    got = ssd.ssd_scan(*inputs, **more, **fixed, chunk_size=CHUNK, return_final_state=True)
    assert relative(got.y, want) < 1e-12
    assert relative(got.final_state, want_state) < 1e-12

    mix, mix_state = torch.randn_like(want), torch.randn_like(want_state)
    expected = torch.autograd.grad((want * mix).sum() + (want_state * mix_state).sum(), leaves)
    loss = (got.y * mix).sum() + (got.final_state * mix_state).sum()
    for one, other in zip(torch.autograd.grad(loss, leaves), expected, strict=True):
        assert (one - other).norm() <= 1e-11 * (1 + other.norm())


@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
def test_packed_sequences_equal_each_on_its_own(direction):
    x, dt, a, b, c = scan_inputs(45, batch=1)
    ids = torch.tensor([[0] * 1 + [4] * 20 + [5] * 15 + [9] * 9])
    state = torch.randn(1, 4, 3, 5).double()
    options = {"direction": direction, "chunk_size": CHUNK, "return_final_state": True}
    got = ssd.ssd_scan(x, dt, a, b, c, sequence_ids_BL=ids, initial_state_BHPN=state, **options)
    pieces = [slice(0, 1), slice(1, 21), slice(21, 36), slice(36, 45)]
    first, last = (pieces[-1], pieces[0]) if direction == "reverse" else (pieces[0], pieces[-1])
    for piece in pieces:
        alone = ssd.ssd_scan(
            x[:, piece], dt[:, piece], a, b[:, piece], c[:, piece],
            initial_state_BHPN=state if piece is first else None, **options,
        )
        assert relative(got.y[:, piece], alone.y) < 1e-12
        if piece is last:
            assert relative(got.final_state, alone.final_state) < 1e-12


def test_one_sequence_id_changes_nothing():
    inputs = scan_inputs(37)
    ids = torch.full((2, 37), 3)
    for direction in ssd.DIRECTIONS:
        plain = ssd.ssd_scan(*inputs, chunk_size=CHUNK, direction=direction)
        got = ssd.ssd_scan(*inputs, chunk_size=CHUNK, direction=direction, sequence_ids_BL=ids)
        assert relative(got.y, plain.y) < 1e-14


def test_step_sizes_add_the_bias_then_softplus_then_clamp_then_skip_padding():
    raw, bias = torch.tensor([[-3.0, 0.0], [1.0, 30.0]]), torch.tensor([0.5, -0.5])
    mask = torch.tensor([True, False])
    got = ssd.step_sizes(raw, torch.float64, bias, True, (0.1, 2.0), mask)
    want = [math.log1p(math.exp(-2.5)), math.log1p(math.exp(-0.5))]
    assert got.tolist() == [[pytest.approx(max(0.1, step)) for step in want], [0.0, 0.0]]
    assert ssd.step_sizes(raw, torch.float32, bias).tolist() == (raw + bias).tolist()
    assert ssd.step_sizes(raw.bfloat16(), torch.float32, bias).dtype == torch.float32


def test_low_precision_scan_takes_its_steps_in_float32():
    x, _, a, b, c = scan_inputs(33, dtype=torch.float32)
    raw, bias = torch.randn(2, 33, 4), torch.randn(4) - 4
    want, _ = reference.ssd_scan(
        *(t.bfloat16().double() for t in (x, raw)), a.double(),
        *(t.bfloat16().double() for t in (b, c)),
        dt_bias_H=bias.double(), dt_softplus=True,
    )
    low = [t.bfloat16() for t in (x, raw, b, c)]
    got = ssd.ssd_scan(
        low[0], low[1], a, *low[2:], dt_bias_H=bias, dt_softplus=True, return_final_state=True
    )
    assert got.y.dtype == torch.bfloat16
    assert got.final_state.dtype == torch.float32
    assert relative(got.y, want) < 1e-2


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
        )
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


def test_single_step_with_every_option_equals_the_scan():
    x, _, a, b, c = scan_inputs(9)
    raw, bias, skip = (torch.randn(*shape).double() for shape in ((2, 9, 4), (4,), (4,)))
    options = {"d_H": skip, "dt_bias_H": bias, "dt_softplus": True, "dt_limits": (0.3, 1.5)}
    mask = torch.rand(2, 9) < 0.7
    want, want_state = reference.ssd_scan(x, raw, a, b, c, mask_BL=mask, **options)
    state = torch.zeros(2, 4, 3, 5, dtype=torch.float64)
    for t in range(9):
        y, state = ssd.ssd_step(
            x[:, t], raw[:, t], a, b[:, t], c[:, t], state, mask_B=mask[:, t], **options
        )
        assert relative(y, want[:, t]) < 1e-12
    assert relative(state, want_state) < 1e-12


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


def test_scan_of_no_rows_is_empty():
    inputs = [t[:0] if t.dim() > 1 else t for t in scan_inputs(20)]
    for direction in ssd.DIRECTIONS:
        out = ssd.ssd_scan(*inputs, chunk_size=8, direction=direction, return_final_state=True)
        assert out.y.shape == (0, 20, 4, 3)
        assert out.final_state.shape == (0, 4, 3, 5)


def test_scan_refuses_what_it_cannot_do():
    x, dt, a, b, c = scan_inputs(4)
    with pytest.raises(ValueError, match="direction must be one of"):
        ssd.ssd_scan(x, dt, a, b, c, direction="backward")
    with pytest.raises(ValueError, match="length 0"):
        ssd.ssd_scan(x[:, :0], dt[:, :0], a, b[:, :0], c[:, :0])
    with pytest.raises(ValueError, match="3 groups do not divide 4 heads"):
        ssd.ssd_scan(x, dt, a, b[:, :, :1].expand(-1, -1, 3, -1), c)
    for direction in ("forward", "reverse"):
        with pytest.raises(ValueError, match=f"direction is '{direction}'"):
            ssd.ssd_scan(x, dt, a, b, c, direction=direction, reverse_scale_H=a)
    with pytest.raises(ValueError, match="128 channels and 256 states, got 3 and 257"):
        wide = torch.zeros(2, 4, 2, 257).double()
        ssd.ssd_scan(x, dt, a, wide, wide, backend="triton")


@pytest.mark.usefixtures("piece")
@pytest.mark.parametrize("direction", ssd.DIRECTIONS)
def test_gradients_of_the_scan_pass_gradcheck(direction):
    inputs = scan_inputs(7, batch=2, heads=2, width=2, groups=1, states=2)
    inputs += [torch.randn(2).double(), torch.randn(2, 2, 2, 2).double()]
    inputs += [torch.randn(2).double()] if direction == "bidirectional" else []

    def scan(x, dt, a, b, c, d, state, scale=None):
        return ssd.ssd_scan(
            x, dt, a, b, c, d_H=d, initial_state_BHPN=state, reverse_scale_H=scale,
            chunk_size=3, direction=direction, return_final_state=True,
        )

    leaves = [tensor.requires_grad_() for tensor in inputs]
    assert torch.autograd.gradcheck(lambda *tensors: tuple(scan(*tensors)), leaves, fast_mode=True)


@pytest.mark.parametrize("direction", ["forward", "bidirectional"])
def test_gradient_by_a_step_of_zero_is_that_of_the_recurrence(direction):
    x, dt, a, b, c = scan_inputs(40)
    dt[:, ::3] = 0  # no step: the gradient says what a small one would change
    leaves = [tensor.requires_grad_() for tensor in (x, dt, a, b, c)]
    want, _ = reference.ssd_scan(*leaves, direction=direction)
    got = ssd.ssd_scan(*leaves, chunk_size=CHUNK, direction=direction).y
    mix = torch.randn_like(want)
    expected = torch.autograd.grad((want * mix).sum(), leaves)
    for one, other in zip(torch.autograd.grad((got * mix).sum(), leaves), expected):
        assert relative(one, other) < 1e-11


@pytest.mark.parametrize("used", ["y", "final_state"])
def test_gradient_of_one_output_alone_is_that_of_the_recurrence(used):
    leaves = [tensor.requires_grad_() for tensor in scan_inputs(40)]
    want = reference.ssd_scan(*leaves)[("y", "final_state").index(used)]
    got = getattr(ssd.ssd_scan(*leaves, chunk_size=CHUNK, return_final_state=True), used)
    mix = torch.randn_like(want)
    expected = torch.autograd.grad((want * mix).sum(), leaves, allow_unused=True)
    actual = torch.autograd.grad((got * mix).sum(), leaves)
    for one, other in zip(actual, expected):
        assert relative(one, other) < 1e-11 if other is not None else not one.any()


@pytest.mark.parametrize("direction", ["forward", "bidirectional"])
def test_gradients_in_low_precision_stay_close(direction):
    x, _, a, b, c = scan_inputs(100, width=16, states=16)
    raw, d = torch.randn(2, 100, 4).double(), torch.randn(4).double()
    options = {"direction": direction, "dt_softplus": True}
    mix = torch.randn_like(x)
    for dtype, bound in ((torch.float32, 5e-6), (torch.bfloat16, 2e-2)):
        low = [t.to(dtype).requires_grad_() for t in (x, raw, b, c)]
        wide = [t.float().requires_grad_() for t in (a, d)]
        doubles = [t.detach().double().requires_grad_() for t in (*low, *wide)]
        order = lambda x, raw, b, c, a, d: ((x, raw, a, b, c), d)  # noqa: E731
        inputs, skip = order(*doubles)
        want, _ = reference.ssd_scan(*inputs, d_H=skip, **options)
        expected = torch.autograd.grad((want * mix).sum(), doubles)
        inputs, skip = order(*low, *wide)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            got = ssd.ssd_scan(*inputs, d_H=skip, chunk_size=CHUNK, **options).y
            actual = torch.autograd.grad((got * mix.to(dtype)).sum(), [*low, *wide])
        for leaf, one, other in zip((*low, *wide), actual, expected):
            assert one.dtype == leaf.dtype
            assert relative(one, other) < bound


def test_gradients_in_float32_stay_close_for_extreme_steps():
    inputs = scan_inputs(100)
    for scale in (1e-4, 30.0):
        doubles = [t.clone().requires_grad_() for t in (inputs[0], inputs[1] * scale, *inputs[2:])]
        lows = [t.detach().float().requires_grad_() for t in doubles]
        want, _ = reference.ssd_scan(*doubles, direction="bidirectional")
        got = ssd.ssd_scan(*lows, chunk_size=CHUNK, direction="bidirectional").y
        mix = torch.randn_like(want)
        expected = torch.autograd.grad((want * mix).sum(), doubles)
        actual = torch.autograd.grad((got * mix.float()).sum(), lows)
        for one, other in zip(actual, expected):
            assert one.isfinite().all()
            assert relative(one, other) < 1e-4


def test_scan_without_gradients_equals_the_scan_with_them():
    x, dt, a, b, c = scan_inputs(50, dtype=torch.float32)
    with torch.no_grad():
        want = ssd.ssd_scan(x, dt, a, b, c, chunk_size=CHUNK)
    assert torch.equal(ssd.ssd_scan(x.requires_grad_(), dt, a, b, c, chunk_size=CHUNK).y, want.y)


@pytest.mark.parametrize("direction", ["forward", "bidirectional"])
def test_scan_compiles_as_one_graph(direction):
    leaves = [tensor.requires_grad_() for tensor in scan_inputs(20)]
    scan = lambda *tensors: ssd.ssd_scan(*tensors, chunk_size=8, direction=direction).y  # noqa: E731
    got = torch.compile(scan, fullgraph=True, backend="aot_eager")(*leaves)
    want = scan(*leaves)
    assert relative(got, want) < 1e-14
    mix = torch.randn_like(want)
    expected = torch.autograd.grad((want * mix).sum(), leaves)
    for one, other in zip(torch.autograd.grad((got * mix).sum(), leaves), expected):
        assert relative(one, other) < 1e-13


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
