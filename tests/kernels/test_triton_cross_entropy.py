"""The Triton cross-entropy of a linear head against whole logits in float64.

Without a GPU the kernels run in Triton's interpreter, where bfloat16 arithmetic is broken; float16
stands for narrow types.
"""

import math

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="the Triton kernels need the package triton")

from tess.kernels import head  # noqa: E402
from tess.kernels.cross_entropy import linear_cross_entropy  # noqa: E402
from tess.kernels.dispatch import BackendError  # noqa: E402
from tess.kernels.triton import cross_entropy as kernels  # noqa: E402
from tess.kernels.triton.launch import ARCHITECTURES, Config, as_architecture  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = DEVICE == "cpu"
DTYPES = (torch.float64, torch.float32, torch.float16) if INTERPRETED else (
    torch.float32, torch.float16, torch.bfloat16,
)
BOUND = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}
# several tiles of few logits each
SMALL = Config({"LANES": 4, "EACH": 2}, num_warps=1, num_stages=1)


def relative(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-30)).item()


def head_inputs(tokens=11, vocabulary=37, width=6, dtype=torch.float32):
    generator = torch.Generator().manual_seed(tokens)
    make = lambda *shape: torch.randn(*shape, generator=generator).to(DEVICE, dtype)  # noqa: E731
    hidden, weight = (2 * make(tokens, width)).requires_grad_(), make(vocabulary, width)
    ids = torch.randint(vocabulary, (tokens,), generator=generator)
    ids[1::5] = -100
    weights = torch.rand(tokens, generator=generator) * (torch.arange(tokens) % 3 != 2)
    return hidden, weight.requires_grad_(), ids.to(DEVICE), weights.to(DEVICE)


def plain_cross_entropy(hidden, weight, ids, weights=None, smoothing=0.0, reduction="mean"):
    """The loss on whole logits, by torch's own function."""
    losses = F.cross_entropy(hidden @ weight.T, ids, reduction="none", label_smoothing=smoothing)
    weights = torch.ones_like(losses) if weights is None else weights
    losses = losses * weights
    if reduction == "none":
        return losses
    return losses.sum() / (weights[ids != -100].sum() if reduction == "mean" else 1)


def run(hidden, weight, ids, rows=3, **options):
    slab_bytes = rows * len(weight) * hidden.element_size()
    return linear_cross_entropy(
        hidden, weight, ids, slab_bytes=slab_bytes, backend="triton", **options
    )


# ---- the kernel ----


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("width", [1, 2, 7, 8, 9, 33])
def test_a_row_of_logits_becomes_its_gradient_whatever_its_tiles(width, smoothing, monkeypatch):
    monkeypatch.setattr(kernels.LOSSES, "config", lambda like: SMALL)
    parent = torch.full((7, width + 12), math.nan, device=DEVICE)  # what lies beside is not read
    parent[1:6, 5 : 5 + width] = 3 * torch.randn(5, width, device=DEVICE)
    logits, ids = parent[1:6, 5 : 5 + width], torch.arange(5, device=DEVICE) % width
    leaf = logits.double().requires_grad_()
    want = F.cross_entropy(leaf, ids, reduction="none", label_smoothing=smoothing)
    gradient = torch.autograd.grad(want.sum(), leaf)[0]
    same = logits.clone()
    losses = kernels.row_losses(same, ids, smoothing, False)
    assert torch.equal(same, logits) and (losses - want).abs().max() < 3e-6
    assert torch.equal(kernels.row_losses(logits, ids, smoothing, True), losses)
    assert (logits - gradient).abs().max() < 1e-6
    assert int(parent.isnan().sum()) == parent.numel() - logits.numel()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_configuration_gives_the_same_losses_alone_and_together(architecture):
    logits, ids = torch.randn(3, 9_001, device=DEVICE).half(), torch.tensor([0, 9_000, 77])
    ids = ids.to(DEVICE)
    leaf = logits.double().requires_grad_()
    want = F.cross_entropy(leaf, ids, reduction="none")
    with as_architecture(architecture):
        alone = logits[1:2].clone()
        loss = kernels.row_losses(alone, ids[1:2], 0.0, True)
        losses = kernels.row_losses(logits, ids, 0.0, True)
    assert torch.equal(losses[1:2], loss) and torch.equal(logits[1:2], alone)
    assert relative(losses, want) < 1e-6
    assert relative(logits, torch.autograd.grad(want.sum(), leaf)[0]) < 1e-3


def test_extreme_rows_have_the_losses_of_the_tensor_path():
    rows = torch.zeros(6, 40, device=DEVICE)
    rows[0, 3], rows[1, 3], rows[2] = 6e4, -6e4, -6e4
    rows[3, 3], rows[4, 3], rows[5, 3:] = math.inf, math.nan, -math.inf
    ids = torch.tensor([4, 3, 3, 3, 3, 0], device=DEVICE)
    want = torch.nn.functional.cross_entropy(rows.double(), ids, reduction="none").float()
    got = kernels.row_losses(rows, ids, 0.0, True)
    torch.testing.assert_close(got, want, equal_nan=True)
    assert rows[[0, 1, 2, 5]].isfinite().all() and rows[0, 3] == 1 and rows[0, 4] == -1


# ---- the loss ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_loss_and_gradients_are_those_of_whole_logits(reduction, weighted, smoothing, dtype):
    hidden, weight, ids, weights = head_inputs(dtype=dtype)
    options = {"label_smoothing": smoothing, "reduction": reduction}
    weights = weights if weighted else None
    doubles = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    want = plain_cross_entropy(*doubles, ids, weights, smoothing, reduction)
    upstream = torch.rand_like(want)  # one number a row where the losses are not summed
    expected = torch.autograd.grad(want, doubles, upstream)
    got = run(hidden, weight, ids, weights_T=weights, **options)
    usual = linear_cross_entropy(hidden, weight, ids, weights_T=weights, **options, backend="torch")
    assert got.dtype == usual.dtype and got.shape == want.shape
    assert relative(got, want) < max(BOUND[dtype], 2 * relative(usual, want))
    upstream = upstream.to(got.dtype)
    paths = [torch.autograd.grad(x, (hidden, weight), upstream) for x in (got, usual)]
    for one, other, target in zip(*paths, expected):
        assert one.dtype == dtype
        assert relative(one, target) < max(BOUND[dtype], 2 * relative(other, target))


@pytest.mark.parametrize("tokens, vocabulary, width, rows", [(1, 1, 1, 1), (1, 8_193, 3, 5)])
def test_one_row_and_a_vocabulary_just_above_a_tile_are_right(tokens, vocabulary, width, rows):
    hidden, weight, ids, _ = head_inputs(tokens, vocabulary, width)
    want = plain_cross_entropy(hidden, weight, ids)
    got = run(hidden, weight, ids, rows)
    assert relative(got, want) < 1e-6
    for one, other in zip(
        torch.autograd.grad(got, (hidden, weight)), torch.autograd.grad(want, (hidden, weight))
    ):
        assert (one - other).norm() <= 1e-6 * other.norm()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradients_are_those_of_finite_differences(reduction):
    if not INTERPRETED:
        pytest.skip("float64 runs in the interpreter only")
    hidden, weight, ids, weights = head_inputs(5, 7, 3, torch.float64)
    assert torch.autograd.gradcheck(
        lambda hidden, weight: run(
            hidden, weight, ids, 2, weights_T=weights, label_smoothing=0.2, reduction=reduction
        ),
        (hidden, weight),
        fast_mode=True,
    )


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("case", ["no rows", "all ignored", "no weight"])
def test_the_loss_of_nothing_is_zero_with_gradients_of_zeros(case, reduction):
    hidden, weight, ids, _ = head_inputs(0 if case == "no rows" else 4)
    ids = torch.full_like(ids, -100) if case == "all ignored" else ids.clamp(min=0)
    weights = torch.zeros(len(ids), device=DEVICE) if case == "no weight" else None
    got = run(hidden, weight, ids, weights_T=weights, reduction=reduction)
    assert (got == 0).all() and got.shape == ((len(ids),) if reduction == "none" else ())
    got.sum().backward()
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_rows_that_do_not_count_are_not_computed():
    hidden, weight, ids, _ = head_inputs()
    poisoned = hidden.detach().clone()
    poisoned[ids == -100] = math.nan
    poisoned.requires_grad_()
    want, got = run(hidden, weight, ids), run(poisoned, weight, ids)
    assert torch.equal(got, want)
    grads = [torch.autograd.grad(x, (h, weight)) for x, h in ((got, poisoned), (want, hidden))]
    assert all(torch.equal(one, other) for one, other in zip(*grads))


def test_slices_and_transposes_serve_as_inputs_and_gradients():
    hidden, weight, ids, _ = head_inputs()
    wide = torch.cat([hidden, hidden], 1).detach()[:, ::2].requires_grad_()
    turned = weight.detach().T.contiguous().T.requires_grad_()
    want = plain_cross_entropy(wide, turned, ids, reduction="none")
    got = run(wide, turned, ids, reduction="none")
    upstream = torch.ones(1, device=DEVICE).expand(11)  # stride 0
    expected = torch.autograd.grad(want, (wide, turned), upstream)
    actual = torch.autograd.grad(got, (wide, turned), upstream)
    assert relative(got, want) < 1e-6
    assert all(relative(one, other) < 2e-6 for one, other in zip(actual, expected))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_only_gradients_that_are_needed_are_computed(reduction, monkeypatch):
    hidden, weight, ids, _ = head_inputs()
    seen, sweep = [], kernels.sweep
    note = lambda *a: seen.append(a[7:]) or sweep(*a)  # noqa: E731
    monkeypatch.setattr(kernels, "sweep", note)
    for needs in ((True, True), (True, False), (False, True)):
        parts = [x.detach().requires_grad_(need) for x, need in zip((hidden, weight), needs)]
        run(*parts, ids, reduction=reduction).sum().backward()
        assert [x.grad is not None for x in parts] == list(needs)
        if reduction == "mean":
            assert seen[-1] == needs
    with torch.no_grad():
        run(hidden, weight, ids, reduction=reduction)
    assert seen[-1] == (False, False)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_kept_graph_gives_the_same_gradients_again_and_no_second_derivative(reduction):
    hidden, weight, ids, _ = head_inputs()
    for power in (1, 2):
        loss = run(hidden, weight, ids, reduction=reduction).pow(power).sum()
        first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
        second = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
        assert all(torch.equal(one, other) for one, other in zip(first, second))
        twice = torch.autograd.grad(loss, hidden, create_graph=True)[0]
        with pytest.raises(RuntimeError, match="autograd|does not require grad"):
            torch.autograd.grad(twice.sum(), hidden)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_token_losses_come_beside_the_loss_without_gradient(reduction):
    hidden, weight, ids, weights = head_inputs()
    options = {"weights_T": weights, "reduction": reduction}
    loss, each = run(hidden, weight, ids, return_token_losses=True, **options)
    want = run(hidden, weight, ids, weights_T=weights, reduction="none")
    assert torch.equal(each, want) and not each.requires_grad
    assert torch.equal(loss, run(hidden, weight, ids, **options))
    torch.autograd.grad(loss.sum(), (hidden, weight))


def test_autocast_decides_the_dtype_of_the_products():
    hidden, weight, ids, _ = head_inputs(20, 300, 64)
    narrow = torch.float16
    low = run(hidden.to(narrow), weight.to(narrow), ids)
    expected = torch.autograd.grad(low, (hidden, weight))
    for reduction in ("mean", "none"):
        with torch.autocast(DEVICE, narrow):
            got = run(hidden, weight, ids, reduction=reduction)
        loss = got if reduction == "mean" else got.sum() / (ids != -100).sum()
        assert got.dtype == torch.float32 and abs(loss - low) < 1e-5
        for one, other in zip(torch.autograd.grad(loss, (hidden, weight)), expected):
            assert one.dtype == torch.float32 and relative(one, other) < 4e-3


def test_the_weight_s_gradient_does_not_lose_precision_with_the_number_of_slabs():
    hidden, weight, ids, _ = head_inputs(256, 60, 16, torch.float16)
    doubles = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    want = torch.autograd.grad(plain_cross_entropy(*doubles, ids), doubles[1])[0]

    def error(rows):
        return relative(torch.autograd.grad(run(hidden, weight, ids, rows), weight)[0], want)

    assert error(1) < 1.5 * error(256)


def test_slabs_are_of_one_size_on_the_cpu_and_larger_on_a_gpu():
    like = torch.empty(1, device="meta")
    assert head.choose_slab_bytes(7, like, True) == 7
    assert head.choose_slab_bytes(None, like, True) == head.SLAB_BYTES
    if torch.cuda.is_available():
        like = torch.empty(1, device="cuda")
        assert head.choose_slab_bytes(None, like, True) == head.DEVICE_SLAB_BYTES
        assert head.choose_slab_bytes(None, like, False) == head.SLAB_BYTES


# ---- operations ----


def operation_inputs():
    hidden, weight, ids, _ = head_inputs(5, 7, 3)
    factors = torch.rand(5, device=DEVICE)
    return hidden, weight, ids.clamp(min=0), factors, torch.float32, 0.1, 60


def test_operations_meet_the_rules_of_the_library():
    arguments = operation_inputs()
    torch.library.opcheck(kernels._each_op, arguments)
    torch.library.opcheck(kernels._sum_op, (*arguments, True, True))
    detached = [x.detach() if torch.is_tensor(x) else x for x in arguments]
    for needs in ((True, True), (False, True), (False, False)):
        torch.library.opcheck(kernels._sweep_op, (*detached, *needs))
        torch.library.opcheck(kernels._sum_op, (*detached, *needs))
    gradient, scale = torch.rand(5, 3, device=DEVICE), torch.tensor(0.5, device=DEVICE)
    torch.library.opcheck(kernels._scale_op, (gradient, scale, torch.float16))


@pytest.mark.parametrize("function", [kernels.summed_loss, kernels.each_loss])
def test_operations_compile_into_one_graph(function):
    """The public function looks which rows count, so what it calls then is compiled here."""
    hidden, weight, *others = operation_inputs()

    def loss(hidden, weight):
        out = function(hidden, weight, *others)
        return out[0] if isinstance(out, tuple) else (out * others[1]).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    want, got = loss(hidden, weight), compiled(hidden, weight)
    assert torch.equal(want, got)
    grads = [torch.autograd.grad(x, (hidden, weight)) for x in (want, got)]
    assert all(torch.equal(one, other) for one, other in zip(*grads))


def test_a_backend_that_cannot_run_is_an_error(monkeypatch):
    hidden, weight, ids, _ = head_inputs()
    with pytest.raises(BackendError, match="backend must be one of auto, torch, triton"):
        linear_cross_entropy(hidden, weight, ids, backend="cuda")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(BackendError, match="it takes float32, bfloat16 and float16, got float64"):
        run(hidden.double(), weight, ids)
