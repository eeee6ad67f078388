"""Cross-entropy of the linear head in slabs, against whole logits."""

import math

import pytest
import torch
import torch.nn.functional as F

from tess.kernels.cross_entropy import linear_cross_entropy


def relative(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def slab_of(rows, width, item=4):
    return rows * width * item


TOKENS, VOCAB, WIDTH = 11, 37, 6


def plain_cross_entropy(hidden, weight, ids, weights=None, smoothing=0.0, reduction="mean"):
    """The loss on whole logits, by torch's own function."""
    losses = F.cross_entropy(
        hidden @ weight.T, ids, reduction="none", ignore_index=-100, label_smoothing=smoothing
    )
    weights = torch.ones_like(losses) if weights is None else weights
    losses = losses * weights
    if reduction == "none":
        return losses
    total = losses.sum()
    return total / weights[ids != -100].sum() if reduction == "mean" else total


def head_inputs(tokens=TOKENS, vocab=VOCAB, width=WIDTH, dtype=torch.float64):
    torch.manual_seed(tokens)
    hidden = (2 * torch.randn(tokens, width)).to(dtype).requires_grad_()
    weight = torch.randn(vocab, width).to(dtype).requires_grad_()
    ids = torch.randint(vocab, (tokens,))
    ids[1::5] = -100
    weights = torch.rand(tokens) * (torch.arange(tokens) % 3 != 2)
    return hidden, weight, ids, weights


@pytest.mark.parametrize("slab_rows", [1, 3, 1000])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_loss_and_gradients_are_those_of_whole_logits(reduction, weighted, smoothing, slab_rows):
    hidden, weight, ids, weights = head_inputs()
    weights = weights.double() if weighted else None
    want = plain_cross_entropy(hidden, weight, ids, weights, smoothing, reduction)
    got = linear_cross_entropy(
        hidden, weight, ids, weights_T=weights, label_smoothing=smoothing, reduction=reduction,
        slab_bytes=slab_of(slab_rows, VOCAB, 8),
    )
    assert got.dtype == torch.float64 and got.shape == want.shape
    assert relative(got, want) < 1e-13
    upstream = torch.randn_like(want)  # one number a row where the losses are not summed
    expected = torch.autograd.grad(want, (hidden, weight), upstream)
    actual = torch.autograd.grad(got, (hidden, weight), upstream)
    for one, other in zip(actual, expected):
        assert relative(one, other) < 1e-12


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradients_are_those_of_finite_differences(reduction):
    hidden, weight, ids, weights = head_inputs(5, 7, 3)

    def loss(hidden, weight):
        return linear_cross_entropy(
            hidden, weight, ids, weights_T=weights, label_smoothing=0.2, reduction=reduction,
            slab_bytes=slab_of(2, 7, 8),
        )

    assert torch.autograd.gradcheck(loss, (hidden, weight))


def test_without_options_the_loss_is_torch_s():
    hidden, weight, ids, _ = head_inputs()
    want = F.cross_entropy(F.linear(hidden, weight), ids)
    assert relative(linear_cross_entropy(hidden, weight, ids), want) < 1e-14


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("case", ["no rows", "all ignored", "no weight"])
def test_the_loss_of_nothing_is_zero_with_gradients_of_zeros(case, reduction):
    hidden, weight, ids, _ = head_inputs(0 if case == "no rows" else 4)
    ids = torch.full_like(ids, -100) if case == "all ignored" else ids.clamp(min=0)
    weights = torch.zeros(len(ids)) if case == "no weight" else None
    got = linear_cross_entropy(hidden, weight, ids, weights_T=weights, reduction=reduction)
    assert (got == 0).all() and got.shape == ((len(ids),) if reduction == "none" else ())
    got.sum().backward()
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_rows_that_do_not_count_are_not_computed():
    hidden, weight, ids, _ = head_inputs()
    weights = torch.ones(TOKENS)
    weights[3] = 0
    poisoned = hidden.detach().clone()
    poisoned[ids == -100] = math.nan
    poisoned[3] = math.nan
    poisoned.requires_grad_()
    want = linear_cross_entropy(hidden, weight, ids, weights_T=weights)
    got = linear_cross_entropy(poisoned, weight, ids, weights_T=weights)
    assert torch.equal(got, want)
    got.backward()
    want_grads = torch.autograd.grad(want, (hidden, weight))
    assert torch.equal(poisoned.grad, want_grads[0]) and torch.equal(weight.grad, want_grads[1])
    assert (poisoned.grad[3] == 0).all()


def test_another_ignored_id_and_other_integers_serve():
    hidden, weight, ids, _ = head_inputs()
    want = linear_cross_entropy(hidden, weight, ids)
    other = torch.where(ids == -100, 255, ids)
    for dtype in (torch.int64, torch.int32, torch.uint8):
        got = linear_cross_entropy(hidden, weight, other.to(dtype), ignore_index=255)
        assert torch.equal(got, want)


def test_slices_and_transposes_serve_as_inputs_and_gradients():
    hidden, weight, ids, _ = head_inputs()
    wide = torch.cat([hidden, hidden], 1).detach()[:, ::2].requires_grad_()
    turned = weight.detach().T.contiguous().T.requires_grad_()
    assert not wide.is_contiguous() and not turned.is_contiguous()
    got = linear_cross_entropy(wide, turned, ids, reduction="none", slab_bytes=1)
    want = plain_cross_entropy(wide, turned, ids, reduction="none")
    upstream = torch.ones(1).double().expand(TOKENS)  # stride 0
    expected = torch.autograd.grad(want, (wide, turned), upstream)
    actual = torch.autograd.grad(got, (wide, turned), upstream)
    assert relative(got, want) < 1e-13
    assert all(relative(one, other) < 1e-12 for one, other in zip(actual, expected))


def test_a_tied_weight_gets_both_of_its_gradients():
    _, weight, ids, _ = head_inputs()
    tokens = torch.randint(VOCAB, (TOKENS,))
    for reduction in ("mean", "none"):
        want = plain_cross_entropy(F.embedding(tokens, weight), weight, ids, reduction=reduction)
        got = linear_cross_entropy(F.embedding(tokens, weight), weight, ids, reduction=reduction)
        expected = torch.autograd.grad(want.sum(), weight)[0]
        assert relative(torch.autograd.grad(got.sum(), weight)[0], expected) < 1e-12


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_tensor_has_the_size_of_the_logits(reduction, watching):
    tokens, vocab, width, rows = 90, 2000, 5, 6
    hidden, weight, ids, _ = head_inputs(tokens, vocab, width, torch.float32)
    bound = 4 * max(rows * vocab, vocab * width)
    with watching() as ours:
        loss = linear_cross_entropy(
            hidden, weight, ids, reduction=reduction, label_smoothing=0.1,
            slab_bytes=slab_of(rows, vocab),
        )
        loss.sum().backward()
    assert 4 * vocab <= ours.largest <= bound
    with watching() as plain:
        plain_cross_entropy(hidden, weight, ids).backward()
    assert plain.largest == 4 * tokens * vocab


@pytest.mark.parametrize("reduction, recomputed", [("mean", 0), ("sum", 0), ("none", 1)])
def test_products_that_no_gradient_needs_are_not_computed(reduction, recomputed, watching):
    hidden, weight, ids, _ = head_inputs()

    def products(hidden, weight):
        hidden.grad = weight.grad = None
        with watching() as watch:
            loss = linear_cross_entropy(hidden, weight, ids, reduction=reduction).sum()
            if loss.requires_grad:
                loss.backward()
        return watch.products

    frozen = hidden.detach(), weight.detach()
    assert products(hidden, weight) == 3 + recomputed
    assert products(hidden, frozen[1]) == 2 + recomputed and hidden.grad is not None
    assert products(frozen[0], weight) == 2 + recomputed and weight.grad is not None
    assert products(*frozen) == 1
    with torch.no_grad():
        assert products(hidden, weight) == 1


def test_gradients_survive_float16():
    """A mean's gradients by row are below what float16 can hold; a scaled loss lifts them."""
    hidden, weight, ids, _ = head_inputs(3000, 50, 16, torch.float16)
    scale = 2.0**14
    doubles = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    want = torch.autograd.grad(scale * plain_cross_entropy(*doubles, ids), doubles)
    got = scale * linear_cross_entropy(hidden, weight, ids, slab_bytes=slab_of(100, 50))
    for one, other in zip(torch.autograd.grad(got, (hidden, weight)), want):
        assert relative(one, other) < 3e-3


def test_a_kept_graph_gives_the_same_gradients_again_and_no_second_derivative():
    hidden, weight, ids, _ = head_inputs()
    for reduction in ("mean", "none"):
        loss = linear_cross_entropy(hidden, weight, ids, reduction=reduction).square().sum()
        first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
        second = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
        assert all(torch.equal(one, other) for one, other in zip(first, second))
        twice = torch.autograd.grad(loss, hidden, create_graph=True)[0]
        with pytest.raises(RuntimeError, match="once_differentiable"):
            twice.sum().backward()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_token_losses_come_beside_the_loss(reduction):
    hidden, weight, ids, weights = head_inputs()
    options = {"weights_T": weights, "slab_bytes": slab_of(5, VOCAB)}
    loss, each = linear_cross_entropy(
        hidden, weight, ids, reduction=reduction, return_token_losses=True, **options
    )
    assert torch.equal(each, linear_cross_entropy(hidden, weight, ids, reduction="none", **options))
    assert torch.equal(
        loss, linear_cross_entropy(hidden, weight, ids, reduction=reduction, **options)
    )
    assert not each.requires_grad and each.shape == ids.shape
    assert (each[ids == -100] == 0).all() and (each[weights == 0] == 0).all()
    torch.autograd.grad(loss.sum(), (hidden, weight))


@pytest.mark.parametrize("dtype, least", [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_errors_are_no_larger_than_those_of_whole_logits(dtype, least, reduction):
    hidden, weight, ids, weights = head_inputs(60, 500, 32, dtype)
    got = linear_cross_entropy(
        hidden, weight, ids, weights_T=weights, reduction=reduction, slab_bytes=slab_of(7, 500)
    )
    assert got.dtype == torch.float32
    doubles = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    exact = plain_cross_entropy(*doubles, ids, weights.double(), reduction=reduction)
    expected = torch.autograd.grad(exact.sum(), doubles)
    actual = torch.autograd.grad(got.sum(), (hidden, weight))
    losses = F.cross_entropy((hidden @ weight.T).float(), ids, reduction="none") * weights
    plain = losses.sum() / (weights[ids != -100].sum() if reduction == "mean" else 1)
    usual = torch.autograd.grad(plain, (hidden, weight))
    assert relative(got, exact) < least
    for ours, theirs, want in zip(actual, usual, expected):
        assert ours.dtype == dtype
        assert relative(ours, want) < max(2 * relative(theirs, want), 1e-7) < 2 * least


def test_the_weight_s_gradient_does_not_lose_precision_with_the_number_of_slabs():
    hidden, weight, ids, _ = head_inputs(512, 60, 16, torch.bfloat16)
    doubles = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    want = torch.autograd.grad(plain_cross_entropy(*doubles, ids), doubles[1])[0]

    def error(rows):
        loss = linear_cross_entropy(hidden, weight, ids, slab_bytes=slab_of(rows, 60))
        return relative(torch.autograd.grad(loss, weight)[0], want)

    assert error(1) < 1.5 * error(512)


def test_autocast_decides_the_dtype_of_the_products():
    hidden, weight, ids, _ = head_inputs(20, 300, 64, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = linear_cross_entropy(hidden, weight, ids, slab_bytes=slab_of(6, 300))
        plain = F.cross_entropy(F.linear(hidden, weight).float(), ids)
    low = linear_cross_entropy(hidden.bfloat16(), weight.bfloat16(), ids)
    full = linear_cross_entropy(hidden, weight, ids)
    assert got.dtype == torch.float32
    assert abs(got - low) < 1e-5 and abs(got - plain) < 1e-5 and abs(got - full) > 1e-5
    actual = torch.autograd.grad(got, (hidden, weight))
    expected = torch.autograd.grad(plain, (hidden, weight))
    for one, other in zip(actual, expected):
        assert one.dtype == torch.float32 and relative(one, other) < 2e-2
    doubles = hidden.double(), weight.double()
    with torch.autocast("cpu", torch.bfloat16):
        assert linear_cross_entropy(*doubles, ids).dtype == torch.float64


def test_large_logits_and_hopeless_targets_stay_finite():
    hidden = torch.full((2, 1), 1e4, requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0], [0.5]], requires_grad=True)
    losses = linear_cross_entropy(hidden, weight, torch.tensor([1, 0]), reduction="none")
    assert losses.tolist() == [2e4, 0.0]
    losses.sum().backward()
    assert weight.grad.isfinite().all() and hidden.grad[0].item() == 2.0


def test_mistakes_in_the_loss_are_named():
    hidden, weight, ids, weights = head_inputs()
    wrong = {
        "expected hidden": (hidden[:, :5], weight, ids, {}),
        "ids_T must be": (hidden, weight, ids[:3], {}),
        r"ids must be in \[0, 37\) or -100": (hidden, weight, ids + 30 * (ids != -100), {}),
        r"weights_T must be \[11\]": (hidden, weight, ids, {"weights_T": weights[:2]}),
        "weights_T must be at least 0": (hidden, weight, ids, {"weights_T": weights - 1}),
        "gets no gradient": (hidden, weight, ids, {"weights_T": weights.requires_grad_()}),
        "reduction must be one of": (hidden, weight, ids, {"reduction": "average"}),
        "label_smoothing must be": (hidden, weight, ids, {"label_smoothing": 1.5}),
    }
    for message, (*arguments, options) in wrong.items():
        with pytest.raises(ValueError, match=message):
            linear_cross_entropy(*arguments, **options)
