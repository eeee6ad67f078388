"""The router and the sort by expert in Triton: choice, weights, order and gradients."""

import pytest
import torch

pytest.importorskip("triton")

from tess.kernels import experts, reference  # noqa: E402
from tess.kernels.dispatch import BackendError, is_interpreted  # noqa: E402
from tess.kernels.triton import experts_token_sort as token_sort  # noqa: E402
from tess.kernels.triton.launch import ARCHITECTURES, as_architecture  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# experts, top-k, groups, groups kept, normalised
SHAPES = [
    (8, 2, 1, 1, True),
    (128, 6, 1, 1, True),
    (512, 22, 1, 1, True),
    (40, 5, 4, 2, True),
    (12, 3, 6, 3, False),
    (9, 9, 1, 1, True),
    (9, 4, 9, 5, False),
    (1, 1, 1, 1, True),
]


# exp(120) is infinite on purpose, and its reciprocal is the score; numpy reports it
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered")


def relative(got, want):
    return ((got.double() - want).norm() / want.norm()).item()


def make(*shape, dtype=torch.float32):
    return torch.randn(*shape, device=DEVICE).to(dtype)


def route(logits, bias, top_k, groups=1, kept=1, normalize=True, scaling=2.5, backend="triton"):
    return experts.route_tokens(
        logits, bias, top_k, num_groups=groups, top_groups=kept, normalize=normalize,
        scaling=scaling, backend=backend,
    )


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("count, top_k, groups, kept, normalize", SHAPES)
def test_router_matches_the_loops_with_gradients(
    tokens, count, top_k, groups, kept, normalize, poisoned
):
    logits, bias = make(tokens, count).requires_grad_(), make(count) / 5
    ids, weights = route(logits, bias, top_k, groups, kept, normalize)
    double = logits.detach().double().requires_grad_()
    want_ids, want = reference.route_tokens(
        double, bias.double(), top_k, num_groups=groups, top_groups=kept, normalize=normalize,
        scaling=2.5,
    )
    assert ids.dtype == torch.int64 and torch.equal(ids, want_ids)
    assert weights.dtype == torch.float32 and relative(weights, want) < 1e-5
    upstream = make(tokens, top_k)
    (gradient,) = torch.autograd.grad(weights, logits, upstream)
    (want_gradient,) = torch.autograd.grad(want, double, upstream.double())
    if normalize and top_k == 1:  # the weight is constant
        assert gradient.abs().max() < 1e-6
    else:
        assert relative(gradient, want_gradient) < 1e-5


def test_equal_scores_are_taken_by_lowest_id():
    ids, _ = route(torch.zeros(3, 10, device=DEVICE), torch.zeros(10, device=DEVICE), 4)
    assert ids.tolist() == [[0, 1, 2, 3]] * 3
    # of equal groups the lower one too; the best of all is in the last
    logits = torch.zeros(1, 12, device=DEVICE)
    logits[0, 11] = 1.0
    ids, _ = route(logits, torch.zeros(12, device=DEVICE), 4, groups=4, kept=2)
    assert ids.tolist() == [[11, 0, 1, 2]]


def test_saturated_scores_leave_the_choice_to_the_bias():
    logits = torch.tensor([[200.0, 90.0, 300.0, -200.0]], device=DEVICE).requires_grad_()
    bias = torch.tensor([0.1, 0.3, 0.2, 0.0], device=DEVICE)
    ids, weights = route(logits, bias, 4)
    assert ids.tolist() == [[1, 2, 0, 3]]
    torch.testing.assert_close(weights, torch.tensor([[1.0, 1, 1, 0]], device=DEVICE) * 2.5 / 3)
    (gradient,) = torch.autograd.grad(weights, logits, make(1, 4))
    assert gradient.isfinite().all()


def test_scores_that_all_vanish_give_finite_weights_and_gradients():
    logits = torch.full((2, 6), -120.0, device=DEVICE).requires_grad_()
    ids, weights = route(logits, torch.zeros(6, device=DEVICE), 3)
    assert torch.equal(weights, torch.zeros_like(weights))
    (gradient,) = torch.autograd.grad(weights, logits, make(2, 3))
    assert gradient.isfinite().all()


@pytest.mark.parametrize("groups, kept", [(1, 1), (3, 2)])
def test_ids_stay_distinct_and_in_range_whatever_the_scores(groups, kept):
    logits, bias = make(4, 6), torch.zeros(6, device=DEVICE)
    logits[1] = torch.nan
    logits[2, 1:] = torch.nan
    bias[2:5] = -torch.inf
    bias[5] = torch.inf
    ids, weights = route(logits, bias, 4, groups, kept)
    assert all(len(set(row)) == 4 and set(row) <= set(range(6)) for row in ids.tolist())
    assert weights[1].isnan().all()  # not hidden
    assert weights[[0, 3]].isfinite().all()


def test_a_token_routes_alone_as_in_a_batch():
    logits, bias = make(7, 40), make(40) / 5
    ids, weights = route(logits, bias, 5, 4, 2)
    for t in range(7):
        alone_ids, alone = route(logits[t : t + 1], bias, 5, 4, 2)
        assert torch.equal(alone_ids[0], ids[t]) and torch.equal(alone[0], weights[t])


@pytest.mark.parametrize("layout", ["slice", "transposed", "expanded"])
def test_logits_and_gradients_may_lie_anywhere(layout):
    logits, bias, upstream = make(5, 12), make(12), make(5, 3)
    if layout == "expanded":
        logits, upstream = logits[:1].expand(5, 12), upstream[:1, :1].expand(5, 3)
    want_leaf = logits.clone().requires_grad_()
    want = route(want_leaf, bias, 3)
    want[1].backward(upstream.clone(memory_format=torch.contiguous_format))
    if layout == "slice":
        wide = torch.full((5, 20), torch.nan, device=DEVICE)
        wide[:, 4:16] = logits
        logits = wide[:, 4:16]
        upstream = torch.cat([upstream, upstream], 1)[:, :3]
    elif layout == "transposed":
        logits, upstream = logits.T.contiguous().T, upstream.T.contiguous().T
    logits = logits.detach().requires_grad_()
    got = route(logits, bias, 3)
    (gradient,) = torch.autograd.grad(got[1], logits, upstream)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    assert torch.equal(gradient, want_leaf.grad)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_no_tokens_give_no_choice(backend):
    logits = make(0, 8).requires_grad_()
    ids, weights = route(logits, make(8), 2, backend=backend)
    assert ids.shape == weights.shape == (0, 2)
    weights.sum().backward()
    assert logits.grad.shape == (0, 8)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_router_is_the_same_on_every_architecture(architecture):
    logits, bias = make(5, 40), make(40)
    want = route(logits, bias, 6, backend="torch")
    with as_architecture(architecture):
        ids, weights = route(logits, bias, 6)
    assert torch.equal(ids, want[0])
    assert relative(weights, want[1].double()) < 1e-5


def test_router_refuses_what_it_cannot_do():
    for backend in ("torch", "triton"):
        with pytest.raises(ValueError, match="float32 or float64, got torch.float16"):
            route(make(2, 8, dtype=torch.float16), make(8), 2, backend=backend)
        with pytest.raises(ValueError, match="5 of 8 experts cannot be chosen in 1 of 2 groups"):
            route(make(2, 8), make(8), 5, groups=2, kept=1, backend=backend)
        with pytest.raises(ValueError, match="3 of 3 groups"):
            route(make(2, 8), make(8), 2, groups=3, kept=3, backend=backend)
    with pytest.raises(BackendError, match="up to 1024 experts, got 1025"):
        route(make(2, 1025), make(1025), 2)


@pytest.mark.skipif(not is_interpreted(), reason="kernels take float64 in the interpreter only")
@pytest.mark.parametrize("normalize", [True, False])
def test_router_gradient_is_the_derivative(normalize):
    logits, bias = make(3, 8, dtype=torch.float64).requires_grad_(), make(8, dtype=torch.float64)

    def weights(logits):
        return route(logits, bias, 3, 2, 2, normalize)[1]

    assert torch.autograd.gradcheck(weights, (logits,), fast_mode=True)


def test_router_is_a_well_formed_operation():
    logits, bias = make(3, 8).requires_grad_(), make(8)
    torch.library.opcheck(torch.ops.tess.route_tokens, (logits, bias, 2, 2, 1, True, 2.5))
    ids, weights = route(logits.detach(), bias, 2)
    torch.library.opcheck(
        torch.ops.tess.route_tokens_backward, (logits.detach(), ids, weights, True, 2.5)
    )


def test_router_compiles_without_graph_breaks():
    compiled = torch.compile(route, fullgraph=True, backend="aot_eager")
    logits, bias = make(3, 8).requires_grad_(), make(8)
    ids, weights = compiled(logits, bias, 2)
    want = route(logits, bias, 2)
    assert torch.equal(ids, want[0]) and torch.equal(weights, want[1])
    upstream = make(3, 2)
    gradients = [torch.autograd.grad(w, logits, upstream)[0] for w in (weights, want[1])]
    assert torch.equal(*gradients)


# ---- the sort ----


def ids_of(kind, pairs, count):
    if kind == "one expert":
        return torch.full((pairs,), count - 1, device=DEVICE)
    if kind == "falling":
        return torch.arange(pairs, device=DEVICE).flip(0) * count // max(pairs, 1)
    used = count if kind == "even" else max(1, count // 3)  # "few": most have none
    return torch.randint(0, used, (pairs,), device=DEVICE)


@pytest.mark.parametrize("kind", ["even", "few", "one expert", "falling"])
@pytest.mark.parametrize("pairs", [0, 1, 16, 17, 75, 160])
@pytest.mark.parametrize("block", [16, 256])
def test_sort_is_the_stable_sort(kind, pairs, block, monkeypatch, poisoned):
    monkeypatch.setattr(token_sort, "PAIRS_PER_BLOCK", block)
    ids = ids_of(kind, pairs, 7)
    order, ends = token_sort.sort_by_expert(ids, 7)
    assert order.dtype == ends.dtype == torch.int32
    assert torch.equal(order.long(), ids.argsort(stable=True))
    assert torch.equal(ends.long(), torch.bincount(ids, minlength=7).cumsum(0))


@pytest.mark.parametrize("count", [1, 8, 33])
def test_sort_in_blocks_of_the_shipped_size(count):
    ids = torch.randint(0, count, (2 * token_sort.PAIRS_PER_BLOCK + 3,), device=DEVICE)
    for given in (ids, ids.int()):
        order, ends = token_sort.sort_by_expert(given, count)
        assert torch.equal(order.long(), ids.argsort(stable=True))
        assert torch.equal(ends.long(), torch.bincount(ids, minlength=count).cumsum(0))


def test_counts_are_summed_over_more_blocks_than_one_step_takes(monkeypatch):
    monkeypatch.setattr(token_sort, "PAIRS_PER_BLOCK", 16)
    config = next(iter(token_sort.SCAN.fixed.values()))
    monkeypatch.setattr(token_sort.SCAN, "fixed", {"sm_80": config._replace(blocks={"BLOCK": 2})})
    ids = torch.randint(0, 3, (100,), device=DEVICE)
    assert torch.equal(token_sort.sort_by_expert(ids, 3)[0].long(), ids.argsort(stable=True))


@pytest.mark.parametrize("counts", [[0, 5, 16, 0, 17], [40, 0], [0, 0, 1], [1] * 9, [700, 3]])
def test_row_tiles_cover_each_experts_rows_once(counts, poisoned):
    ends = torch.tensor(counts, device=DEVICE).cumsum(0).int()
    tiles = token_sort.row_tiles(ends, sum(counts), 16).T.tolist()
    want, begin = [], 0
    for expert, end in enumerate(ends.tolist()):
        want += [[expert, row, end] for row in range(begin, end, 16)]
        begin = end
    assert tiles[: len(want)] == want
    assert all(tile[0] == len(counts) for tile in tiles[len(want) :])


def test_tile_bound_is_reached_and_never_passed():
    for block in (2, 3, 4):
        for pairs in range(9):
            splits = [(a, b, pairs - a - b) for a in range(pairs + 1) for b in range(pairs + 1 - a)]
            needed = max(sum(-(-count // block) for count in split) for split in splits)
            assert needed == token_sort.tile_bound(pairs, 3, block)
