"""The Triton norms against their float64 formulas, with all gradients.

Without a GPU the kernels run in Triton's interpreter, where bfloat16 arithmetic is broken; float16
stands for narrow types there.
"""

import pytest
import torch

pytest.importorskip("triton", reason="the Triton kernels need the package triton")

from tess.kernels import norms as public  # noqa: E402
from tess.kernels import reference  # noqa: E402
from tess.kernels.dispatch import BackendError, is_interpreted  # noqa: E402
from tess.kernels.triton import norms  # noqa: E402
from tess.kernels.triton.launch import ARCHITECTURES, Config, as_architecture  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BOUND = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4e-3}
# the kernels take float64 in the interpreter only
EXACT = torch.float64 if is_interpreted() else torch.float32
EPS = 1e-2  # large enough to be seen if it were missing

# exp(200) is infinite on purpose, and its reciprocal the sigmoid; numpy reports it
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered")


def relative(got, want):
    got, want = got.double(), want.double()
    return ((got - want).norm() / want.norm().clamp(min=1e-30)).item()


def leaves(rows, width, dtype=EXACT, weight_dtype=None):
    make = lambda *shape: torch.randn(*shape, device=DEVICE)  # noqa: E731
    given = [make(rows, width).to(dtype), make(rows, width).to(dtype)]
    given.append(make(width).to(weight_dtype or dtype))
    return [tensor.requires_grad_() for tensor in given]


def gated(x, gate, weight, groups, backend="triton"):
    return public.gated_group_rms_norm(x, gate, weight, groups, EPS, backend=backend)


def plain(x, weight, backend="triton"):
    return public.rms_norm(x, weight, EPS, backend=backend)


def below(bound, errors):
    """Whether all are; NaN is not, which `max` would lose."""
    return all(error < bound for error in errors)


def errors(function, formula, given):
    """Relative errors of the result and of each gradient."""
    wide = [tensor.detach().double().requires_grad_() for tensor in given]
    got, want = function(*given), formula(*wide)
    assert got.dtype == given[0].dtype and got.shape == given[0].shape
    upstream = torch.randn_like(want).to(got.dtype)
    actual = torch.autograd.grad(got, given, upstream)
    expected = torch.autograd.grad(want, wide, upstream.double())
    assert [g.dtype for g in actual] == [tensor.dtype for tensor in given]
    return [relative(one, other) for one, other in zip((got, *actual), (want, *expected))]


def errors_of_both(given, groups, backend="triton"):
    x, gate, weight = given
    return errors(
        lambda *given: plain(*given, backend=backend),
        lambda *given: reference.rms_norm(*given, EPS), [x, weight],
    ) + errors(
        lambda *given: gated(*given, groups, backend=backend),
        lambda *given: reference.gated_group_rms_norm(*given, groups, EPS), given,
    )


@pytest.mark.parametrize("rows", [1, 3, 70])
@pytest.mark.parametrize(("width", "groups"), [(17, 1), (64, 4), (300, 3), (8, 8), (1, 1)])
def test_norms_equal_their_formulas_with_all_gradients(rows, width, groups, poisoned):
    assert below(BOUND[EXACT], errors_of_both(leaves(rows, width), groups))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("weight_dtype", [None, torch.float32])
def test_norms_are_close_in_narrow_types(dtype, weight_dtype, poisoned):
    assert below(BOUND[dtype], errors_of_both(leaves(9, 96, dtype, weight_dtype), 2))


def test_float16_is_as_exact_as_the_pytorch_path():
    given = leaves(20, 96, torch.float16)
    ours, theirs = (errors_of_both(given, 2, backend) for backend in ("triton", "torch"))
    assert all(one <= max(1e-3, 2 * other) for one, other in zip(ours, theirs))


def test_gate_may_have_another_dtype():
    x, gate, weight = leaves(5, 24, torch.float16)
    gate = gate.detach().float().requires_grad_()
    assert below(BOUND[torch.float16], errors_of_both([x, gate, weight], 3))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_configuration_is_right(architecture, monkeypatch):
    with as_architecture(architecture):
        assert below(1e-5, errors_of_both(leaves(5, 40, torch.float32), 2))
    for table in (norms.FORWARD, norms.BACKWARD, norms.GATED_BACKWARD):
        for config in table.candidates():
            monkeypatch.setattr(table, "fixed", {"sm_80": config})
            assert below(1e-5, errors_of_both(leaves(5, 40, torch.float32), 2))


@pytest.mark.parametrize("tile", [1, 16, 64])
@pytest.mark.parametrize("programs", [1, 3, 100])
def test_any_tile_and_run_of_rows_gives_the_same(tile, programs, monkeypatch, poisoned):
    given = leaves(23, 24, torch.float32)
    upstream = torch.randn_like(given[0])
    want = gated(*given, 2)
    want_gradients = torch.autograd.grad(want, given[:2], upstream)
    monkeypatch.setattr(norms, "BACKWARD_PROGRAMS", programs)
    for table in (norms.FORWARD, norms.BACKWARD, norms.GATED_BACKWARD):
        monkeypatch.setattr(table, "fixed", {"sm_80": Config({"TILE": tile}, 4, 1)})
    assert below(1e-5, errors_of_both(given, 2))
    got = gated(*given, 2)
    gradients = torch.autograd.grad(got, given[:2], upstream)
    assert below(1e-6, map(relative, (got, *gradients), (want, *want_gradients)))


@pytest.mark.parametrize("width", [1, 17, 192, 512, 2688, 4096, 4097, 16384])
def test_a_tile_is_filled_with_rows_and_a_wide_row_with_warps(width):
    for table in (norms.FORWARD, norms.BACKWARD, norms.GATED_BACKWARD):
        for config in table.candidates():
            shaped = norms._shaped(config, width)
            rows, block = shaped.blocks["ROWS"], shaped.blocks["BLOCK"]
            assert width <= block < 2 * max(width, 1)
            assert rows == 1 or rows * block == config.blocks["TILE"]
            per_thread = rows * block / shaped.num_warps
            assert (
                per_thread <= config.blocks["TILE"] / config.num_warps
                or shaped.num_warps == norms.MOST_WARPS
            )


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_no_rows_give_no_rows_and_zero_gradients(backend):
    x, gate, weight = leaves(0, 12, torch.float32)
    for y in (gated(x, gate, weight, 3, backend), plain(x, weight, backend)):
        assert y.shape == (0, 12)
        gradients = torch.autograd.grad(y.sum(), (x, weight))
        assert torch.equal(gradients[0], x) and torch.equal(gradients[1], torch.zeros_like(weight))


@pytest.mark.parametrize(("width", "margin"), [(32, 8), (32, 3), (22, 8)])
def test_slices_of_a_wider_tensor_and_odd_gradients(width, margin):
    x, gate, weight = leaves(6, width, torch.float32)
    nan = torch.full((6, margin), torch.nan, device=DEVICE)
    wide = torch.cat([nan, x.detach(), nan, gate.detach(), nan], dim=-1).requires_grad_()
    places = [slice(margin, margin + width), slice(width + 2 * margin, 2 * (width + margin))]
    parts = [wide[:, place] for place in places]
    upstreams = [
        torch.randn(width, 6, device=DEVICE).T,
        torch.randn(1, width, device=DEVICE).expand(6, -1),
        torch.randn(6, 1, device=DEVICE).expand(-1, width),
        torch.randn(6, width + 5, device=DEVICE)[:, 3 : 3 + width],
        torch.randn(12, width, device=DEVICE)[::2],
    ]
    got, want = gated(*parts, weight, 2), gated(x, gate, weight, 2)
    got_plain, want_plain = plain(parts[0], weight), plain(x, weight)
    assert torch.equal(got, want) and torch.equal(got_plain, want_plain)
    for upstream in upstreams:
        dense = upstream.contiguous()
        (actual,) = torch.autograd.grad(got, wide, upstream, retain_graph=True)
        expected = torch.autograd.grad(want, (x, gate), dense, retain_graph=True)
        assert all(torch.equal(actual[:, p], g) for p, g in zip(places, expected))
        actual = torch.autograd.grad(got_plain, (wide, weight), upstream, retain_graph=True)
        expected = torch.autograd.grad(want_plain, (x, weight), dense, retain_graph=True)
        assert torch.equal(actual[0][:, places[0]], expected[0])
        assert torch.equal(actual[1], expected[1])


def test_leading_axes_may_be_any_and_need_not_be_dense():
    x, gate, weight = leaves(24, 20, torch.float32)
    want = gated(x, gate, weight, 2)
    for shape in ((2, 3, 4, 20), (4, 6, 20)):
        assert torch.equal(gated(x.view(shape), gate.view(shape), weight, 2), want.view(shape))
    x_apart = torch.stack([x.detach().view(4, 6, 20)] * 2, dim=2)[:, :, 0]
    x_turned = x.detach().view(4, 6, 20).transpose(0, 1)
    turned = want.view(4, 6, 20).transpose(0, 1)
    gate_turned = gate.view(4, 6, 20).transpose(0, 1)
    assert torch.equal(gated(x_apart, gate.view(4, 6, 20), weight, 2), want.view(4, 6, 20))
    assert torch.equal(gated(x_turned, gate_turned, weight, 2), turned)
    by_columns = x.detach().T.contiguous().T
    assert torch.equal(gated(by_columns, gate, weight, 2), want)
    assert torch.equal(plain(x[0], weight), plain(x, weight)[0])


def test_offsets_beyond_32_bits_are_not_cut():
    # rows of one small tensor, far apart: 2^31 elements in between that are never touched
    storage = torch.empty(2**31 + 2**20, dtype=torch.float16, device=DEVICE)
    x, gate, weight = (tensor.detach() for tensor in leaves(2, 16, torch.float16))
    far = storage.as_strided((2, 16), (2**31, 1))
    far.copy_(x)
    assert torch.equal(plain(far, weight), plain(x, weight))
    far.copy_(gate)
    assert torch.equal(gated(x, far, weight, 2), gated(x, gate, weight, 2))


def test_a_row_is_the_same_in_every_batch_and_every_time():
    x, gate, weight = leaves(37, 20, torch.float32)
    whole, upstream = gated(x, gate, weight, 2), torch.randn(37, 20, device=DEVICE)
    gradients = torch.autograd.grad(whole, (x, gate, weight), upstream, retain_graph=True)
    again = torch.autograd.grad(whole, (x, gate, weight), upstream)
    assert all(map(torch.equal, gradients, again))
    row = [x.detach()[5:6].requires_grad_(), gate.detach()[5:6].requires_grad_()]
    alone = gated(*row, weight, 2)
    assert torch.equal(whole[5:6], alone)
    alone_gradients = torch.autograd.grad(alone, row, upstream[5:6])
    assert all(torch.equal(g[5:6], one) for g, one in zip(gradients, alone_gradients))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_extremes_stay_finite(dtype):
    x, gate, weight = (tensor.detach() for tensor in leaves(5, 20, dtype))
    gate[0], gate[1], x[2], x[3] = -200.0, 200.0, 0.0, 6e4 * x[3].sign()
    given = [tensor.requires_grad_() for tensor in (x, gate, weight)]
    for y in (gated(*given, 2), plain(x, weight)):
        gradients = torch.autograd.grad(y, given, torch.randn_like(y), allow_unused=True)
        assert y.isfinite().all()
        assert all(g.isfinite().all() for g in gradients if g is not None)
    assert not gated(*given, 2)[0].any()  # the gate is shut


@pytest.mark.skipif(not is_interpreted(), reason="kernels take float64 in the interpreter only")
def test_gradients_are_the_derivatives():
    x, gate, weight = leaves(3, 6)
    assert torch.autograd.gradcheck(
        lambda *given: gated(*given, 2), (x, gate, weight), fast_mode=True
    )
    assert torch.autograd.gradcheck(plain, (x, weight), fast_mode=True)


def test_norms_are_well_formed_operations():
    x, gate, weight = leaves(2, 6, torch.float32)
    for given, groups in ((gate, 2), (None, 1)):
        arguments = (x, given, weight, groups, EPS)
        torch.library.opcheck(torch.ops.tess.group_rms_norm.default, arguments)
        plain = [None if v is None else v.detach() for v in (x, given, weight)]
        scale = torch.rand(2, groups, device=DEVICE)
        arguments = (*plain, scale, torch.randn_like(x), groups)
        torch.library.opcheck(torch.ops.tess.group_rms_norm_backward.default, arguments)


def test_norms_compile_as_one_graph():
    given = leaves(3, 16, torch.float32)

    def function(x, gate, weight):
        return plain(gated(x, gate, weight, 2), weight)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    got, want = compiled(*given), function(*given)
    assert torch.equal(got, want)
    upstream = torch.randn_like(want)
    gradients = (torch.autograd.grad(y, given, upstream) for y in (got, want))
    assert all(torch.equal(one, other) for one, other in zip(*gradients))


def test_what_cannot_be_done_is_one_sentence():
    x, gate, weight = leaves(2, 16, torch.float32)
    for backend in ("torch", "triton"):
        with pytest.raises(ValueError, match="3 groups do not divide 16 channels"):
            gated(x, gate, weight, 3, backend)
        with pytest.raises(ValueError, match=r"shape of x \[2, 16\], got \[1, 16\]"):
            gated(x, gate[:1], weight, 2, backend)
        with pytest.raises(ValueError, match=r"weight must have shape \[16\], got \[15\]"):
            plain(x, weight[:15], backend)
    wide = torch.zeros(1, 16385, device=DEVICE)
    with pytest.raises(BackendError, match="1 to 16384 columns of a group, got 16385"):
        plain(wide, wide[0])
    assert plain(wide, wide[0], "auto").shape == wide.shape
