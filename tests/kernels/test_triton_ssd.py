"""The Triton scan against the float64 recurrence: outputs, states and every gradient.

Without a GPU the kernels run in Triton's interpreter, where bfloat16 arithmetic is broken; float16
stands for narrow types there.
"""

import itertools
import math

import pytest
import torch

pytest.importorskip("triton", reason="the Triton kernels need the package triton")

from tess.kernels import reference  # noqa: E402
from tess.kernels import ssd as public  # noqa: E402
from tess.kernels.dispatch import BackendError  # noqa: E402
from tess.kernels.triton import (  # noqa: E402
    ssd,
    ssd_backward,
    ssd_forward,
    ssd_gradients,
    ssd_states,
    ssd_step,
)
from tess.kernels.triton.launch import ARCHITECTURES, as_architecture  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DIRECTIONS = ("forward", "reverse", "bidirectional")
NAMES = ("x", "dt", "a", "b", "c", "d", "bias", "initial", "scale")
BOUND = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 4e-3}


def relative(got, want):
    got, want = got.double(), want.double()
    return ((got - want).norm() / want.norm().clamp(min=1e-30)).item()


def scan_inputs(length, dtype=torch.float64, batch=1, heads=4, width=24, groups=2, states=20):
    """All that can be given, as leaves in float64 values that the dtype holds exactly."""
    generator = torch.Generator().manual_seed(length)
    make = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    tensors = {
        "x": make(batch, length, heads, width), "dt": make(batch, length, heads),
        "a": -2 * torch.rand(heads, generator=generator, dtype=torch.float64),
        "b": make(batch, length, groups, states), "c": make(batch, length, groups, states),
        "d": make(heads), "bias": make(heads), "initial": make(batch, heads, width, states),
        "scale": make(heads),
    }
    for name in ("x", "dt", "b", "c"):
        tensors[name] = tensors[name].to(dtype)
    return {name: tensor.to(DEVICE).requires_grad_() for name, tensor in tensors.items()}


def run_kernels(t, direction, mask=None, sequence=None, softplus=True, limits=(0.0, math.inf)):
    return ssd.ssd_scan(
        t["x"], t["dt"], t["a"], t["b"], t["c"], d_H=t["d"], dt_bias_H=t["bias"],
        dt_softplus=softplus, dt_limits=limits, mask_BL=mask, sequence_ids_BL=sequence,
        direction=direction, reverse_scale_H=t["scale"] if direction == "bidirectional" else None,
        initial_state_BHPN=t["initial"], return_final_state=True,
    )


def run_reference(t, direction, mask=None, lengths=None):
    """The recurrence on float64 copies, each packed sequence by itself."""
    dt = torch.nn.functional.softplus(t["dt"] + t["bias"])
    if mask is not None:
        dt = dt * mask[..., None]
    options = {"direction": direction}
    if direction == "bidirectional":
        options["reverse_scale_H"] = t["scale"]
    lengths = lengths or [t["x"].shape[1]]
    borders = list(itertools.accumulate(lengths, initial=0))
    seeded = len(lengths) - 1 if direction == "reverse" else 0
    outputs, states = [], []
    for i, (start, stop) in enumerate(itertools.pairwise(borders)):
        part = slice(start, stop)
        y, state = reference.ssd_scan(
            t["x"][:, part], dt[:, part], t["a"], t["b"][:, part], t["c"][:, part],
            initial_state_BHPN=t["initial"] if i == seeded else None, **options,
        )
        outputs.append(y)
        states.append(state)
    y = torch.cat(outputs, dim=1) + t["d"][:, None] * t["x"]
    return y, states[0 if direction == "reverse" else -1]


def compare(t, direction, dtype, mask=None, lengths=None, bound=None):
    """Outputs and gradients under random gradients from above, by norm ratio."""
    bound = BOUND[dtype] if bound is None else bound
    sequence = None
    if lengths is not None:
        ids = [torch.full((n,), i) for i, n in enumerate(lengths)]
        sequence = torch.cat(ids).expand(len(t["x"]), -1).to(DEVICE)
    wide = {name: tensor.detach().double().requires_grad_() for name, tensor in t.items()}
    want = run_reference(wide, direction, mask, lengths)
    got = run_kernels(t, direction, mask, sequence)
    weights = [torch.randn_like(tensor) for tensor in want]
    names = [n for n in NAMES if n != "scale" or direction == "bidirectional"]
    losses = [
        sum((out.double() * weight).sum() for out, weight in zip(outs, weights))
        for outs in (got, want)
    ]
    actual = torch.autograd.grad(losses[0], [t[name] for name in names])
    expected = torch.autograd.grad(
        losses[1], [wide[name] for name in names], allow_unused=True, materialize_grads=True
    )
    for one, other in zip(got, want):
        assert one.isfinite().all() and relative(one, other) < bound
    for name, one, other in zip(names, actual, expected):
        assert one.isfinite().all(), name
        if other.norm() < 1e-10:  # one position alone has no reverse part
            assert one.norm() < 1e-10, name
        else:
            # sums of terms of both signs lose some digits more
            assert relative(one, other) < bound * (10 if name in ("a", "bias") else 1), name


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("length", [1, 64, 65, 130])
def test_scan_equals_the_recurrence_with_all_gradients(length, direction):
    compare(scan_inputs(length), direction, torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_scan_is_close_in_narrow_types(dtype, direction):
    compare(scan_inputs(70, dtype), direction, dtype)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_float16_is_as_exact_as_the_pytorch_path(direction):
    t = {name: tensor.detach() for name, tensor in scan_inputs(100, torch.float16).items()}
    wide = {name: tensor.double() for name, tensor in t.items()}
    want, _ = run_reference(wide, direction)
    scale = {"reverse_scale_H": t["scale"]} if direction == "bidirectional" else {}
    plain = public.ssd_scan(
        t["x"], t["dt"], t["a"], t["b"], t["c"], d_H=t["d"], dt_bias_H=t["bias"],
        dt_softplus=True, direction=direction, initial_state_BHPN=t["initial"], backend="torch",
        **scale,
    )
    got, _ = run_kernels(t, direction)
    assert relative(got, want) <= max(1e-3, 2 * relative(plain.y, want))


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("lengths", [(3, 60, 1, 40, 26), (64, 6), (1, 1, 1)])
def test_packed_sequences_do_not_see_each_other(lengths, direction):
    compare(scan_inputs(sum(lengths)), direction, torch.float64, lengths=lengths)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_skipped_in_values_and_gradients(side, direction):
    mask = torch.ones(2, 80, dtype=torch.bool, device=DEVICE)
    mask[0, :70 if side == "left" else 0] = False
    mask[1, 75:] = side != "right"
    t = scan_inputs(80, batch=2)
    compare(t, direction, torch.float64, mask=mask)
    y, state = run_kernels(t, direction, mask)
    real = mask[0]
    alone = {
        name: tensor[:1, real] if name in ("x", "dt", "b", "c") else tensor[:1]
        if name == "initial" else tensor for name, tensor in t.items()
    }
    want_y, want_state = run_kernels(alone, direction)
    assert relative(y[:1, real], want_y) < 1e-12 and relative(state[:1], want_state) < 1e-12


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_has_its_configuration_and_it_is_right(architecture):
    with as_architecture(architecture):
        compare(scan_inputs(70), "bidirectional", torch.float64)


TABLES = (
    ssd_forward.STEPS, ssd_forward.PRODUCTS, ssd_forward.SWEEP, ssd_states.STATES,
    ssd_gradients.HEADS, ssd_gradients.MAPS, ssd_backward.STEPS_BACKWARD,
)


@pytest.mark.parametrize(
    ("table", "number"),
    [(t, i) for t in TABLES for i in range(len(t.candidates()))],
    ids=lambda value: getattr(value, "name", value),
)
def test_every_candidate_configuration_is_right(table, number, monkeypatch):
    monkeypatch.setattr(table, "fixed", {"sm_80": table.candidates()[number]})
    monkeypatch.setattr(table, "float32", {})
    t = scan_inputs(70, torch.float32, batch=1, width=40, states=70)
    compare(t, "bidirectional", torch.float32)


def test_groups_of_one_head_and_one_group_for_all_heads():
    for groups in (1, 4):
        compare(scan_inputs(66, groups=groups), "bidirectional", torch.float64)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_extreme_steps_leave_no_nan(direction):
    t = {name: tensor.detach() for name, tensor in scan_inputs(70, torch.float32).items()}
    for factor in (1e-4, 60.0):  # nearly no decay, and e^-100 a step
        given = {**t, "dt": factor * t["dt"].abs(), "bias": 0 * t["bias"]}
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in given.items()}
        compare(leaves, direction, torch.float32, bound=1e-4)


def test_rows_do_not_depend_on_the_batch_and_runs_are_repeated_bit_for_bit():
    t = {name: tensor.detach() for name, tensor in scan_inputs(70, torch.float32, batch=3).items()}

    def gradients(rows):
        part = {
            name: (v[rows] if name in ("x", "dt", "b", "c", "initial") else v).clone()
            for name, v in t.items()
        }
        leaves = {name: tensor.requires_grad_() for name, tensor in part.items()}
        y, state = run_kernels(leaves, "bidirectional")
        names = ("x", "dt", "b", "c", "initial")
        grads = torch.autograd.grad(y.square().sum() + state.sum(), [leaves[n] for n in names])
        return y, state, *grads

    whole, again, alone = (gradients(rows) for rows in (slice(0, 3), slice(0, 3), slice(1, 2)))
    for first, second, one in zip(whole, again, alone):
        assert torch.equal(first, second) and torch.equal(first[1:2], one)


def test_backward_in_parts_of_the_batch_is_the_same(monkeypatch):
    t = scan_inputs(70, torch.float32, batch=3)
    names = [name for name in NAMES if name != "scale"]

    def gradients():
        y, state = run_kernels(t, "forward")
        return torch.autograd.grad(y.square().sum() + state.sum(), [t[n] for n in names])

    whole = gradients()
    monkeypatch.setattr(ssd_backward, "STATE_BYTES", 1)
    for one, other in zip(gradients(), whole):
        assert torch.equal(one, other)


def test_slices_of_the_input_projection_and_odd_gradients():
    t = scan_inputs(37, torch.float32, batch=2)
    flat = [t[name].detach().flatten(2) for name in ("x", "b", "c", "dt")]
    widths = [tensor.shape[2] for tensor in flat]
    wide = torch.cat([torch.full_like(flat[0][..., :3], math.nan), *flat], dim=-1).requires_grad_()
    x, b, c, dt = wide[..., 3:].split(widths, dim=-1)
    parts = {
        **t, "x": x.unflatten(-1, (4, 24)), "b": b.unflatten(-1, (2, 20)),
        "c": c.unflatten(-1, (2, 20)), "dt": dt,
    }
    got, _ = run_kernels(parts, "bidirectional")
    want, _ = run_kernels(t, "bidirectional")
    assert torch.equal(got, want)
    transposed = torch.randn(2, 4, 24, 37, device=DEVICE).permute(0, 3, 1, 2)
    expanded = torch.randn(1, 1, 4, 1, device=DEVICE).expand_as(want)
    for upstream in (transposed, expanded):
        actual = torch.autograd.grad(got, wide, upstream, retain_graph=True)[0]
        expected = torch.autograd.grad(
            want, [t[name] for name in ("x", "b", "c", "dt")], upstream.contiguous(),
            retain_graph=True,
        )
        assert torch.equal(actual[..., 3:], torch.cat([g.flatten(2) for g in expected], dim=-1))


def test_offsets_beyond_32_bits_are_not_cut():
    # rows and heads of one small tensor, far apart: 2 x 2^31 elements in between, never touched
    if DEVICE == "cpu":
        storage = torch.empty(2**31 + 2**20, dtype=torch.float16)  # pages come when written
    else:
        storage = torch.empty(2**31 + 2**20, dtype=torch.float16, device=DEVICE)
    t = {name: tensor.detach() for name, tensor in scan_inputs(20, torch.float16, batch=2).items()}
    far = storage.as_strided((2, 20, 4, 24), (2**31, 96, 24, 1))
    far.copy_(t["x"])
    got, _ = run_kernels({**t, "x": far}, "forward")
    want, _ = run_kernels(t, "forward")
    assert torch.equal(got, want)


def test_steps_without_softplus_and_with_limits():
    t = scan_inputs(30)
    with torch.no_grad():
        t["dt"].abs_()
        t["bias"].zero_()
    plain, _ = run_kernels(t, "forward", softplus=False)
    options = {"d_H": t["d"], "initial_state_BHPN": t["initial"], "backend": "torch"}
    arguments = [t[name] for name in ("x", "dt", "a", "b", "c")]
    assert relative(plain, public.ssd_scan(*arguments, **options).y) < 1e-12
    limits = (0.5, 1.0)
    clamped, _ = run_kernels(t, "forward", softplus=False, limits=limits)
    want = public.ssd_scan(*arguments, dt_limits=limits, **options).y
    assert relative(clamped, want) < 1e-12
    upstream = torch.randn_like(want)
    actual, expected = (torch.autograd.grad(y, t["dt"], upstream)[0] for y in (clamped, want))
    assert relative(actual, expected) < 1e-12 and (actual == 0).any()


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_gradcheck(direction):
    t = scan_inputs(3, batch=1, heads=2, width=2, groups=1, states=2)
    names = [name for name in NAMES if name != "scale" or direction == "bidirectional"]

    def function(*leaves):
        return run_kernels(dict(zip(names, leaves)) | ({} if len(leaves) == 9 else {"scale": None}),
                           direction)

    assert torch.autograd.gradcheck(function, [t[name] for name in names], fast_mode=True)


def test_opcheck():
    t = scan_inputs(5, torch.float32, batch=1)
    arguments = (
        t["x"], t["dt"], t["a"], t["b"], t["c"], t["d"], t["bias"], None, None, t["scale"],
        t["initial"], "bidirectional", True, 0.0, math.inf, True,
    )
    torch.library.opcheck(torch.ops.tess.ssd_scan.default, arguments)
    with torch.no_grad():
        y, final, *saved = torch.ops.tess.ssd_scan(*arguments)
    plain = [v.detach() if isinstance(v, torch.Tensor) else v for v in arguments]
    backward = (*plain[:11], *saved, y, final, *plain[11:15])
    torch.library.opcheck(torch.ops.tess.ssd_scan_backward.default, backward)
    state = plain[10]
    step = (plain[0][:, 0], plain[1][:, 0], plain[2], plain[3][:, 0], plain[4][:, 0], state,
            plain[5], plain[6], None, True, 0.0, math.inf)
    torch.library.opcheck(torch.ops.tess.ssd_step.default, step)


def test_scan_compiles_as_one_graph():
    t = scan_inputs(9, torch.float32)

    def function(x, dt, b, c):
        return public.ssd_scan(
            x, dt, t["a"], b, c, d_H=t["d"], dt_bias_H=t["bias"], dt_softplus=True,
            direction="bidirectional", backend="triton",
        ).y

    arguments = [t[name] for name in ("x", "dt", "b", "c")]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    want, got = function(*arguments), compiled(*arguments)
    assert torch.equal(got, want)
    upstream = torch.randn_like(want)
    for one, other in zip(*(torch.autograd.grad(y, arguments, upstream) for y in (got, want))):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_single_step_equals_the_recurrence(dtype):
    t = {name: tensor.detach() for name, tensor in scan_inputs(3, dtype, batch=2).items()}
    state, wide = t["initial"], {name: tensor.double() for name, tensor in t.items()}
    if dtype != torch.float64:
        state = state.float()
    want, want_state = run_reference(wide, "forward")
    for i in range(3):
        y, state = ssd_step.ssd_step(
            t["x"][:, i], t["dt"][:, i], t["a"], t["b"][:, i], t["c"][:, i], state,
            d_H=t["d"], dt_bias_H=t["bias"], dt_softplus=True,
        )
        assert relative(y, want[:, i]) < BOUND[dtype]
    assert relative(state, want_state) < BOUND[dtype]
    keep = torch.tensor([True, False], device=DEVICE)
    _, masked = ssd_step.ssd_step(
        t["x"][:, 0], t["dt"][:, 0], t["a"], t["b"][:, 0], t["c"][:, 0], state, mask_B=keep
    )
    assert torch.equal(masked[1], state[1]) and not torch.equal(masked[0], state[0])


def test_what_the_kernels_cannot_do_is_an_error_when_forced():
    t = scan_inputs(4, torch.float32, width=130)
    arguments = [t[name] for name in ("x", "dt", "a", "b", "c")]
    with pytest.raises(BackendError, match="heads of up to 128 channels and 256 states, got 130"):
        public.ssd_scan(*arguments, backend="triton")
    assert public.ssd_scan(*arguments, backend="auto").y.isfinite().all()
