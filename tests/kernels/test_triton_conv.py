"""The Triton convolution and the PyTorch path against the float64 sum, with all gradients.

Without a GPU the kernels run in Triton's interpreter, where bfloat16 arithmetic is broken; float16
stands for narrow types there.
"""

import itertools

import pytest
import torch

pytest.importorskip("triton", reason="the Triton kernels need the package triton")

from tess.kernels import conv as public  # noqa: E402
from tess.kernels import reference  # noqa: E402
from tess.kernels.dispatch import BackendError, is_interpreted  # noqa: E402
from tess.kernels.triton import conv  # noqa: E402
from tess.kernels.triton.launch import ARCHITECTURES, as_architecture  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BOUND = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4e-3}
# the kernels take float64 in the interpreter only
EXACT = torch.float64 if is_interpreted() else torch.float32
NAMES = ("x", "weight", "bias", "window")

# exp(200) is infinite on purpose, and its reciprocal the sigmoid; numpy reports it
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered")


def relative(got, want):
    got, want = got.double(), want.double()
    return ((got - want).norm() / want.norm().clamp(min=1e-30)).item()


def inputs(length, dtype=EXACT, width=21, taps=4, batch=2):
    shapes = ((batch, length, width), (width, taps), (width,), (batch, taps - 1, width))
    return {
        name: torch.randn(shape, device=DEVICE).to(dtype).requires_grad_()
        for name, shape in zip(NAMES, shapes)
    }


def packed(*rows, dtype=torch.int64):
    """Ids of rows that pack sequences of these lengths; the numbers need not be neighbours."""
    ids = [torch.cat([torch.full((n,), 3 * i - 2) for i, n in enumerate(row)]) for row in rows]
    return torch.stack(ids).to(DEVICE, dtype)


def run(t, backend="triton", **options):
    return public.causal_conv1d(*t.values(), backend=backend, **options)


def compare(t, backend="triton", **options):
    dtype, names = t["x"].dtype, [name for name in NAMES if t[name] is not None]
    wide = {n: None if v is None else v.detach().double().requires_grad_() for n, v in t.items()}
    want = reference.causal_conv1d(*wide.values(), **options)
    got = run(t, backend, **options)
    assert got.dtype == dtype and relative(got, want) < BOUND[dtype]
    upstream = torch.randn_like(want).to(dtype)
    actual = torch.autograd.grad(got, [t[n] for n in names], upstream)
    expected = torch.autograd.grad(
        want, [wide[n] for n in names], upstream.double(),
        allow_unused=True, materialize_grads=True,
    )
    for name, one, other in zip(names, actual, expected):
        assert one.dtype == t[name].dtype and one.shape == t[name].shape, name
        assert one.isfinite().all() and relative(one, other) < BOUND[dtype], name


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("length", [1, 2, 3, 5, 16, 17, 40])
def test_convolution_equals_the_sum_with_all_gradients(length, backend, poisoned):
    compare(inputs(length), backend)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("taps", [2, 3, 4])
def test_convolution_is_close_in_narrow_types(taps, dtype, backend, poisoned):
    compare(inputs(19, dtype, taps=taps), backend)


def test_float16_is_as_exact_as_the_pytorch_path():
    t = inputs(30, torch.float16)
    wide = {name: tensor.detach().double().requires_grad_() for name, tensor in t.items()}
    want = reference.causal_conv1d(*wide.values())
    upstream = torch.randn_like(want).half()
    expected = torch.autograd.grad(want, wide.values(), upstream.double())
    errors = []
    for backend in ("triton", "torch"):
        got = run(t, backend)
        gradients = torch.autograd.grad(got, t.values(), upstream)
        pairs = zip((got, *gradients), (want, *expected))
        errors.append([relative(one, other) for one, other in pairs])
    assert all(ours <= max(1e-3, 2 * plain) for ours, plain in zip(*errors))


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("absent", ["bias", "window"])
def test_bias_and_window_may_be_absent(absent, backend, poisoned):
    compare({**inputs(9), absent: None}, backend)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("taps", [2, 3, 4])
@pytest.mark.parametrize("lengths", [(3, 14, 1, 2), (1, 1, 1), (16, 4), (15, 1, 1, 3), (14, 4)])
def test_packed_sequences_do_not_see_each_other(lengths, taps, backend, poisoned):
    t, ids = inputs(sum(lengths), taps=taps), packed(lengths, lengths[::-1])
    compare(t, backend, sequence_ids_BL=ids)
    whole = run(t, backend, sequence_ids_BL=ids)
    for row, part in enumerate((lengths, lengths[::-1])):
        borders = itertools.pairwise(itertools.accumulate(part, initial=0))
        for i, (start, stop) in enumerate(borders):
            alone = public.causal_conv1d(
                t["x"][row : row + 1, start:stop], t["weight"], t["bias"],
                None if i else t["window"][row : row + 1], backend=backend,
            )
            assert relative(whole[row, start:stop], alone[0]) < BOUND[EXACT]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_ids_that_do_not_change_change_nothing(dtype):
    t = inputs(18, torch.float32)
    ids = torch.full((2, 18), 7, dtype=dtype, device=DEVICE)
    assert torch.equal(run(t, sequence_ids_BL=ids), run(t))
    upstream = torch.randn_like(t["x"])
    outputs = run(t, sequence_ids_BL=ids), run(t)
    gradients = (torch.autograd.grad(y, t.values(), upstream) for y in outputs)
    assert all(torch.equal(one, other) for one, other in zip(*gradients))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_masked_inputs_count_as_zero(backend, poisoned):
    mask = torch.rand(2, 23, device=DEVICE) < 0.6
    compare(inputs(23), backend, mask_BL=mask)
    compare(inputs(23), backend, mask_BL=mask, sequence_ids_BL=packed((10, 13), (22, 1)))
    apart, shared = mask.T.contiguous().T, packed((1, 22)).expand(2, -1)
    compare(inputs(23), backend, mask_BL=apart, sequence_ids_BL=shared)
    compare(inputs(3), backend, mask_BL=torch.zeros(2, 3, dtype=torch.bool, device=DEVICE))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_what_masked_positions_and_other_sequences_hold_is_not_seen(backend):
    t = {name: tensor.detach() for name, tensor in inputs(20, torch.float32).items()}
    mask = torch.ones(2, 20, dtype=torch.bool, device=DEVICE)
    mask[0, :5], mask[1, 9:12] = False, False
    clean = run({**t, "x": t["x"] * mask[..., None]}, backend)
    x = t["x"].masked_fill(~mask[..., None], torch.nan).requires_grad_()
    got = run({**t, "x": x}, backend, mask_BL=mask)
    assert torch.equal(got, clean)
    (gradient,) = torch.autograd.grad(got, x, torch.randn_like(got))
    assert gradient.isfinite().all() and not gradient[~mask].any()

    ids = packed((8, 12), (8, 12))
    clean = run(t, backend, sequence_ids_BL=ids)[:, 8:]
    x = t["x"].clone()
    x[:, :8] = torch.nan
    assert torch.equal(run({**t, "x": x}, backend, sequence_ids_BL=ids)[:, 8:], clean)


@pytest.mark.parametrize(("block", "programs"), [(8, 1), (16, 4)])
def test_any_run_of_positions_and_block_of_channels_gives_the_same(
    block, programs, monkeypatch, poisoned
):
    t = inputs(26, torch.float32)
    options = {
        "sequence_ids_BL": packed((8, 1, 17), (3, 18, 5)),
        "mask_BL": torch.rand(2, 26, device=DEVICE) < 0.8,
    }
    want = run(t, **options)
    upstream = torch.randn_like(want)
    want_dx, want_dwindow = torch.autograd.grad(want, (t["x"], t["window"]), upstream)
    monkeypatch.setattr(conv, "PROGRAMS", programs)
    monkeypatch.setattr(conv, "SHORTEST_RUN", 4 * programs)
    for table in (conv.FORWARD, conv.BACKWARD):
        config = table.fixed["sm_80"]._replace(blocks={"BLOCK": block})
        monkeypatch.setattr(table, "fixed", {"sm_80": config})
    compare(t, **options)
    got = run(t, **options)
    dx, dwindow = torch.autograd.grad(got, (t["x"], t["window"]), upstream)
    assert torch.equal(got, want)
    assert torch.equal(dx, want_dx) and torch.equal(dwindow, want_dwindow)


def test_runs_cover_every_position_once():
    config = conv.FORWARD.fixed["sm_80"]
    for batch, length, width in itertools.product((0, 1, 8), (0, 1, 15, 17, 4096), (1, 512, 6144)):
        shaped, (programs,), (runs, tiles, steps) = conv._divided(config, batch, length, width)
        assert programs == batch * runs * tiles
        assert (runs - 1) * steps * conv.STEP < max(length, 1) <= runs * steps * conv.STEP
        assert (tiles - 1) * shaped.blocks["BLOCK"] < width <= tiles * shaped.blocks["BLOCK"]
        assert steps * conv.STEP >= min(length, conv.SHORTEST_RUN)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_configuration_is_right(architecture, monkeypatch):
    with as_architecture(architecture):
        compare(inputs(11, torch.float32))
    for table in (conv.FORWARD, conv.BACKWARD):
        for config in table.candidates():
            monkeypatch.setattr(table, "fixed", {"sm_80": config})
            compare(inputs(11, torch.float32))


@pytest.mark.parametrize(("width", "margin"), [(16, 8), (16, 3), (21, 8)])
def test_slices_of_a_wider_tensor_and_odd_gradients(width, margin):
    t = inputs(9, torch.float32, width=width)
    nan = torch.full((2, 9, margin), torch.nan, device=DEVICE)
    wide = torch.cat([nan, t["x"].detach(), nan], dim=-1).requires_grad_()
    got, want = run({**t, "x": wide[..., margin:-margin]}), run(t)
    assert torch.equal(got, want)
    upstreams = [
        torch.randn(2, width, 9, device=DEVICE).transpose(1, 2),
        torch.randn(1, 1, width, device=DEVICE).expand_as(want),
        torch.randn(1, 9, 1, device=DEVICE).expand_as(want),
        torch.randn(2, 9, width + 5, device=DEVICE)[..., 3 : 3 + width],
        torch.randn(2, 18, width, device=DEVICE)[:, ::2],
    ]
    for upstream in upstreams:
        actual = torch.autograd.grad(got, [wide, t["weight"]], upstream, retain_graph=True)
        expected = torch.autograd.grad(
            want, [t["x"], t["weight"]], upstream.contiguous(), retain_graph=True
        )
        assert torch.equal(actual[0][..., margin:-margin], expected[0])
        assert torch.equal(actual[1], expected[1])


def test_other_arguments_may_lie_anywhere():
    t = inputs(7, torch.float32, width=12)
    apart = {
        "x": t["x"].detach().transpose(1, 2).contiguous().transpose(1, 2),
        "weight": t["weight"].detach().T.contiguous().T,
        "bias": torch.stack([t["bias"].detach()] * 2, dim=1)[:, 0],
        "window": torch.cat([t["window"].detach()] * 2, dim=-1)[..., :12],
    }
    apart = {name: tensor.requires_grad_() for name, tensor in apart.items()}
    got, want = run(apart), run(t)
    assert torch.equal(got, want)
    upstream = torch.randn_like(want)
    actual = torch.autograd.grad(got, apart.values(), upstream)
    assert all(map(torch.equal, actual, torch.autograd.grad(want, t.values(), upstream)))


def test_offsets_beyond_32_bits_are_not_cut():
    # rows of one small tensor, far apart: 2^31 elements in between that are never touched
    storage = torch.empty(2**31 + 2**20, dtype=torch.float16, device=DEVICE)
    t = {name: tensor.detach() for name, tensor in inputs(6, torch.float16, width=8).items()}
    for strides in ((2**31, 8, 1), (8, 2**31 // 40 * 8 + 8, 1)):  # between rows, between positions
        far = storage.as_strided((2, 6, 8), strides)
        far.copy_(t["x"])
        assert torch.equal(run({**t, "x": far}), run(t))


def test_a_row_is_the_same_in_every_batch_and_every_time():
    t = inputs(21, torch.float32, batch=3)
    whole, upstream = run(t), torch.randn_like(t["x"])
    gradients = torch.autograd.grad(whole, t.values(), upstream, retain_graph=True)
    again = torch.autograd.grad(whole, t.values(), upstream)
    assert all(map(torch.equal, gradients, again))
    row = {n: v.detach()[1:2] if n in ("x", "window") else v.detach() for n, v in t.items()}
    row["x"].requires_grad_()
    alone = run(row)
    assert torch.equal(whole[1:2], alone)
    (dx,) = torch.autograd.grad(alone, row["x"], upstream[1:2])
    assert torch.equal(gradients[0][1:2], dx)


def test_saturated_activations_stay_finite():
    t = inputs(9, torch.float32)
    with torch.no_grad():
        t["bias"][:10], t["bias"][10:] = -200.0, 200.0
        t["x"][0] *= 1000
    y = run(t)
    gradients = torch.autograd.grad(y, t.values(), torch.randn_like(y))
    assert y.isfinite().all() and all(gradient.isfinite().all() for gradient in gradients)


def test_float32_weights_serve_float16_inputs():
    t = inputs(12, torch.float16)
    compare({n: v if n == "x" else v.detach().float().requires_grad_() for n, v in t.items()})


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(("batch", "length"), [(2, 0), (0, 5)])
def test_nothing_gives_nothing_and_zero_gradients(batch, length, backend):
    t = inputs(length, torch.float32, batch=batch)
    y = run(t, backend)
    assert y.shape == (batch, length, 21)
    gradients = torch.autograd.grad(y.sum(), t.values(), materialize_grads=True, allow_unused=True)
    for gradient, tensor in zip(gradients, t.values()):
        assert torch.equal(gradient, torch.zeros_like(tensor))


@pytest.mark.skipif(not is_interpreted(), reason="kernels take float64 in the interpreter only")
@pytest.mark.parametrize("taps", [2, 4])
def test_gradients_are_the_derivatives(taps):
    t = inputs(5, taps=taps, width=3)
    options = {"sequence_ids_BL": packed((1, 4), (3, 2)), "mask_BL": packed((4, 1), (1, 4)) < 0}
    function = lambda *given: public.causal_conv1d(*given, backend="triton", **options)  # noqa: E731
    assert torch.autograd.gradcheck(function, tuple(t.values()), fast_mode=True)


@pytest.mark.parametrize("bare", [False, True])
def test_convolution_is_a_well_formed_operation(bare):
    options = (None, None)
    t = inputs(5, torch.float32, width=3)
    if bare:
        t["bias"] = t["window"] = None
    else:
        mask = torch.rand(2, 5, device=DEVICE) < 0.5
        options = (packed((1, 4), (3, 2)), mask.view(torch.int8))
    arguments = (*t.values(), *options)
    torch.library.opcheck(torch.ops.tess.causal_conv1d.default, arguments)
    plain = [None if v is None else v.detach() for v in arguments]
    backward = (*plain, torch.randn_like(plain[0]))
    torch.library.opcheck(torch.ops.tess.causal_conv1d_backward.default, backward)


def test_convolution_compiles_as_one_graph():
    t, mask = inputs(7, torch.float32), torch.rand(2, 7, device=DEVICE) < 0.5
    ids = packed((2, 5), (6, 1))

    def function(*given):
        return public.causal_conv1d(*given, sequence_ids_BL=ids, mask_BL=mask, backend="triton")

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    got, want = compiled(*t.values()), function(*t.values())
    assert torch.equal(got, want)
    upstream = torch.randn_like(want)
    gradients = (torch.autograd.grad(y, t.values(), upstream) for y in (got, want))
    assert all(torch.equal(one, other) for one, other in zip(*gradients))


def test_what_cannot_be_done_is_one_sentence():
    t = inputs(6, torch.float32)
    ids = torch.zeros(2, 6, dtype=torch.int64, device=DEVICE)
    for backend in ("torch", "triton"):
        for options, message in (
            ({"mask_BL": ids[:, :5] == 0}, r"mask must be \[B, L\] = \[2, 6\], got \[2, 5\]"),
            ({"mask_BL": ids}, "mask must be bool, got torch.int64"),
            ({"sequence_ids_BL": ids[:1]}, r"sequence_ids must be \[B, L\] = \[2, 6\]"),
            ({"sequence_ids_BL": ids.float()}, "must be int32 or int64, got torch.float32"),
        ):
            with pytest.raises(ValueError, match=message):
                run(t, backend, **options)
        for name, message in (
            ("weight", r"weight must be \[D, K\] = \[21, 4\], got \[20, 4\]"),
            ("bias", r"bias must be \[D\] = \[21\], got \[20\]"),
            ("window", r"window must be \[B, K-1, D\] = \[2, 3, 21\], got \[1, 3, 21\]"),
        ):
            with pytest.raises(ValueError, match=message):
                run({**t, name: t[name][:-1]}, backend)
    five = {"x": t["x"], "weight": torch.randn(21, 5, device=DEVICE), "bias": None, "window": None}
    with pytest.raises(BackendError, match="2 to 4 taps, got 5"):
        run(five)
    assert run(five, "auto").isfinite().all()
