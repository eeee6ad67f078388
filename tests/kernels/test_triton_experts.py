"""The expert layer in Triton: gathered and scattered products, activation and weights fused in."""

import pytest
import torch

pytest.importorskip("triton")

from tess.backbones.config import HybridConfig  # noqa: E402
from tess.backbones.feedforward import MixtureOfExperts  # noqa: E402
from tess.kernels import experts, reference  # noqa: E402
from tess.kernels.dispatch import BackendError, is_interpreted  # noqa: E402
from tess.kernels.triton import experts_grouped_matmul as grouped_matmul  # noqa: E402
from tess.kernels.triton import experts_weight_gradient as weight_gradient  # noqa: E402
from tess.kernels.triton.experts_token_sort import SortedPairs  # noqa: E402
from tess.kernels.triton.launch import ARCHITECTURES, as_architecture  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.float64: 1e-12}


def relative(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def inputs(tokens, count, top_k, width, inner, dtype=torch.float32, used=None):
    """x, weights, up, down (leaves) and ids, each token's experts distinct."""
    shapes = ((tokens, width), (tokens, top_k), (count, inner, width), (count, width, inner))
    leaves = [(torch.randn(s, device=DEVICE) / 2).to(dtype).requires_grad_() for s in shapes]
    scores = torch.rand(tokens, used or count, device=DEVICE)
    return leaves, scores.topk(top_k, dim=-1).indices


def run(leaves, ids, upstream, backend="triton"):
    """Output and the gradients by x, weights, up and down."""
    x, weights, up, down = leaves
    if backend == "reference":
        out = reference.experts(x, ids, weights, up, down)
    else:
        out = experts.experts(x, ids, weights, up, down, backend=backend)
    return [out, *torch.autograd.grad(out, leaves, upstream)]


def check(leaves, ids, upstream=None):
    """Hold output and gradients against the loop in float64, and against the PyTorch path."""
    dtype = leaves[0].dtype
    upstream = torch.randn_like(leaves[0]) if upstream is None else upstream
    doubles = [leaf.detach().double().requires_grad_() for leaf in leaves]
    want = run(doubles, ids, upstream.double(), "reference")
    got = run(leaves, ids, upstream)
    plain = run(leaves, ids, upstream, "torch")
    for one, other, true, leaf in zip(got, plain, want, (leaves[0], *leaves)):
        assert one.dtype == leaf.dtype and one.shape == leaf.shape
        assert relative(one, true) < TOLERANCE[dtype]
        if dtype == torch.float16:
            assert relative(one, true) < max(1e-3, 2 * relative(other, true))
    return got


@pytest.fixture
def only(monkeypatch):
    """Make every grouped product use one regime."""
    return lambda name: monkeypatch.setattr(grouped_matmul, "REGIMES", {name: None})


# tokens, experts, top-k, width, inner: a released router's shape is 128 experts, top 6
SHAPES = [
    (1, 8, 2, 33, 16),
    (1, 1, 1, 16, 16),
    (17, 4, 2, 9, 7),  # no size that fills a block
    (40, 6, 3, 80, 24),
    (11, 3, 3, 24, 80),  # every expert for every token
    (70, 2, 1, 16, 48),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_experts_match_the_loop_with_gradients(shape, dtype, poisoned):
    check(*inputs(*shape, dtype=dtype))


@pytest.mark.parametrize("regime", ["few", "some", "many"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_every_regime_matches_the_loop(regime, dtype, only, poisoned):
    if dtype == torch.float32 and regime not in grouped_matmul.GROUPED_WIDE:
        pytest.skip("16-bit only")
    only(regime)
    for shape in ((3, 4, 2, 40, 24), (50, 3, 2, 136, 72)):
        check(*inputs(*shape, dtype=dtype, used=max(2, shape[1] - 1)))


def tables():
    for dtype, grouped in (
        (torch.float16, grouped_matmul.GROUPED),
        (torch.float32, grouped_matmul.GROUPED_WIDE),
    ):
        for regime, table in grouped.items():
            for config in table.candidates():
                yield dtype, regime, table, config
    for dtype, table in (
        (torch.float16, weight_gradient.WEIGHT_GRADIENT),
        (torch.float32, weight_gradient.WEIGHT_GRADIENT_WIDE),
    ):
        for config in table.candidates():
            yield dtype, "many", table, config


@pytest.mark.parametrize("dtype, regime, table, config", list(tables()))
def test_every_configuration_gives_the_same_layer(dtype, regime, table, config, monkeypatch, only):
    only(regime)
    monkeypatch.setattr(table, "fixed", {"sm_80": config})
    leaves, ids = inputs(37, 3, 2, 72, 40, dtype=dtype)
    upstream = torch.randn_like(leaves[0])
    first = check(leaves, ids, upstream)
    again = run(leaves, ids, upstream)
    assert all(torch.equal(a, b) for a, b in zip(first, again))  # bit by bit


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_layer_is_right_on_every_architecture(architecture):
    with as_architecture(architecture):
        check(*inputs(30, 2, 1, 40, 24, dtype=torch.float16))


def test_regime_follows_pairs_per_expert():
    def chosen(pairs, count, dtype):
        order = torch.empty(pairs, dtype=torch.int32, device="meta")
        ends = torch.empty(count, dtype=torch.int32, device="meta")
        x = torch.empty(1, dtype=dtype, device="meta")
        return grouped_matmul.table(x, SortedPairs(order, ends, 6)).name.split("_")[-1]

    for dtype in (torch.float16, torch.bfloat16):
        assert [chosen(n, 128, dtype) for n in (6, 2048, 2049, 8192, 8193)] == [
            "few", "few", "some", "some", "many",
        ]
    assert [chosen(n, 128, torch.float32) for n in (6, 2048, 2049)] == ["few", "few", "wide"]


def test_experts_without_tokens_have_zero_gradients_and_are_not_read(poisoned):
    leaves, ids = inputs(9, 6, 2, 24, 16, used=3)
    with torch.no_grad():
        for matrix in leaves[2:]:
            matrix[3:] = torch.nan
    out, dx, dweights, dup, ddown = run(leaves, ids, torch.randn(9, 24, device=DEVICE))
    assert out.isfinite().all() and dx.isfinite().all() and dweights.isfinite().all()
    for gradient in (dup, ddown):
        assert torch.equal(gradient[3:], torch.zeros_like(gradient[3:]))
        assert gradient[:3].isfinite().all()


@pytest.mark.parametrize("regime", ["few", "many"])
def test_all_tokens_may_choose_one_expert(regime, only):
    only(regime)
    leaves, _ = inputs(45, 4, 1, 24, 16)
    check(leaves, torch.full((45, 1), 2, device=DEVICE))


def test_a_token_may_choose_an_expert_twice():
    leaves, _ = inputs(5, 4, 3, 24, 16)
    check(leaves, torch.tensor([[1, 1, 3]] * 5, device=DEVICE))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_no_tokens_give_no_rows_and_zero_gradients(backend):
    leaves, ids = inputs(0, 4, 2, 32, 16)
    out, dx, dweights, dup, ddown = run(leaves, ids, torch.ones(0, 32, device=DEVICE), backend)
    assert out.shape == dx.shape == (0, 32) and dweights.shape == (0, 2)
    assert dup.abs().max() == ddown.abs().max() == 0


def test_shapes_of_a_latent_mixture():
    # many experts, many of them per token, width below inner width (LatentMoE)
    check(*inputs(5, 32, 11, 16, 40, dtype=torch.float16))


def test_negative_products_are_cut_off_and_nan_is_not():
    leaves, ids = inputs(6, 3, 1, 16, 24)
    with torch.no_grad():
        leaves[2].copy_(-leaves[2].abs())
        leaves[0].copy_(leaves[0].abs())
        leaves[0][4, 3] = torch.nan
    out, dx, *_ = run(leaves, ids, torch.ones(6, 16, device=DEVICE))
    others = [0, 1, 2, 3, 5]
    assert torch.equal(out[others], torch.zeros_like(out[others]))
    assert torch.equal(dx[others], torch.zeros_like(dx[others]))
    assert out[4].isnan().all()  # not hidden, and only in its own row


def test_a_token_alone_is_as_in_a_batch_on_a_gpu_to_the_bit(only):
    """In the interpreter products are numpy's, whose last bit may depend on a row's place."""

    def same(one, other):
        if is_interpreted():
            return relative(one, other) < TOLERANCE[torch.float32]
        return torch.equal(one, other)

    only("few")
    leaves, ids = inputs(20, 3, 2, 40, 24)
    upstream = torch.randn_like(leaves[0])
    out, dx, dweights, *_ = run(leaves, ids, upstream)
    for t in (0, 7, 19):
        row = slice(t, t + 1)
        alone = [leaves[0][row], leaves[1][row], *leaves[2:]]
        got = run([leaf.detach().requires_grad_() for leaf in alone], ids[row], upstream[row])
        assert same(got[0], out[row])
        assert same(got[1], dx[row]) and same(got[2], dweights[row])


def test_inputs_and_gradients_may_lie_anywhere():
    leaves, ids = inputs(21, 4, 2, 24, 16)
    upstream = torch.randn_like(leaves[0])
    want = run(leaves, ids, upstream)

    def inside(tensor):  # columns of a wider tensor, NaN around them
        wide = torch.full((len(tensor), 60), torch.nan, device=DEVICE)
        wide[:, 5 : 5 + tensor.shape[1]] = tensor
        return wide[:, 5 : 5 + tensor.shape[1]]

    def transposed(tensor):
        return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)

    x, weights, up, down = (leaf.detach() for leaf in leaves)
    layouts = (
        (inside(x), inside(weights), transposed(up), down, ids.T.contiguous().T, inside(upstream)),
        (transposed(x), transposed(weights), up, transposed(down), ids, transposed(upstream)),
    )
    for x, weights, up, down, laid_ids, laid_upstream in layouts:
        moved = [leaf.detach().requires_grad_() for leaf in (x, weights, up, down)]
        got = run(moved, laid_ids, laid_upstream)
        assert all(torch.equal(a, b) for a, b in zip(got, want))


@pytest.mark.parametrize("shape", [(1, 24), (21, 1), (1, 1)])
def test_upstream_gradients_may_be_expanded(shape):
    leaves, ids = inputs(21, 4, 2, 24, 16)
    upstream = torch.randn(*shape, device=DEVICE).expand(21, 24)
    want = run(leaves, ids, upstream.clone(memory_format=torch.contiguous_format))
    assert all(torch.equal(a, b) for a, b in zip(run(leaves, ids, upstream), want))


def test_extreme_inputs_stay_finite():
    leaves, ids = inputs(12, 3, 2, 24, 16)
    with torch.no_grad():
        leaves[0][:4] *= 1e8
        leaves[0][4:8] *= 1e-25  # squared below what float32 holds
        leaves[1][::2] = 0
    for tensor in run(leaves, ids, torch.randn_like(leaves[0])):
        assert tensor.isfinite().all()


def test_matrices_of_another_dtype_are_cast_and_get_gradients_of_their_own():
    leaves, ids = inputs(9, 3, 2, 24, 16)
    masters = [leaf.detach().half().float().requires_grad_() for leaf in leaves]
    upstream = torch.randn(9, 24, device=DEVICE).half()
    got = run([masters[0].detach().half().requires_grad_(), *masters[1:]], ids, upstream)
    want = run([m.detach().double().requires_grad_() for m in masters], ids, upstream.double())
    assert [g.dtype for g in got] == [torch.float16] * 2 + [torch.float32] * 3
    assert all(relative(g, w) < 2e-3 for g, w in zip(got, want))


PRODUCTS = [  # of a forward and a backward pass, by what is trained
    ("x", ["rows_to_slots", "rows_to_slots"]),
    ("weights", ["rows_to_slots"]),
    ("up", ["rows_to_slots", "weight_gradient"]),
    ("down", ["rows_to_slots", "weight_gradient"]),
]


@pytest.mark.parametrize("wanted", range(4), ids=[name for name, _ in PRODUCTS])
def test_only_what_is_trained_gets_a_gradient(wanted, monkeypatch):
    leaves, ids = inputs(9, 3, 2, 24, 16)
    upstream = torch.randn_like(leaves[0])
    want = run(leaves, ids, upstream)[1 + wanted]
    made = []
    for module, name in ((weight_gradient, "weight_gradient"), (grouped_matmul, "rows_to_slots")):

        def counted(*args, name=name, launcher=getattr(module, name), **kwargs):
            made.append(name)
            return launcher(*args, **kwargs)

        monkeypatch.setattr(f"tess.kernels.triton.experts.{name}", counted)
    for i, leaf in enumerate(leaves):
        leaf.requires_grad_(i == wanted)
    x, weights, up, down = leaves
    experts.experts(x, ids, weights, up, down, backend="triton").backward(upstream)
    assert torch.equal(leaves[wanted].grad, want)
    assert made == PRODUCTS[wanted][1]


@pytest.mark.skipif(not is_interpreted(), reason="kernels take float64 in the interpreter only")
def test_gradients_are_the_derivatives():
    leaves, ids = inputs(4, 3, 2, 9, 7, dtype=torch.float64)
    check(leaves, ids)

    def layer(x, weights, up, down):
        return experts.experts(x, ids, weights, up, down, backend="triton")

    assert torch.autograd.gradcheck(layer, leaves, fast_mode=True)


def test_operations_are_well_formed():
    (x, weights, up, down), ids = inputs(4, 3, 2, 16, 24)
    ops = torch.ops.tess
    torch.library.opcheck(ops.experts, (x, ids, weights, up, down))
    x, weights, up, down = (leaf.detach() for leaf in (x, weights, up, down))
    _, hidden, order, ends = ops.experts(x, ids, weights, up, down)
    torch.library.opcheck(
        ops.experts_hidden_gradient, (torch.randn_like(x), weights, down, hidden, order, ends)
    )
    torch.library.opcheck(ops.experts_input_gradient, (hidden, up, order, ends, 2))
    torch.library.opcheck(ops.experts_weight_gradient, (hidden, x, order, ends, 2, False))
    torch.library.opcheck(ops.experts_weight_gradient, (x, hidden, order, ends, 2, True))


def test_layer_compiles_without_graph_breaks():
    leaves, ids = inputs(5, 3, 2, 16, 24)

    def layer(x, weights, up, down):
        return experts.experts(x, ids, weights, up, down, backend="triton")

    upstream = torch.randn_like(leaves[0])
    out = torch.compile(layer, fullgraph=True, backend="aot_eager")(*leaves)
    want = run(leaves, ids, upstream)
    assert torch.equal(out, want[0])
    gradients = torch.autograd.grad(out, leaves, upstream)
    assert all(torch.equal(a, b) for a, b in zip(gradients, want[1:]))


def test_a_backend_that_cannot_run_is_an_error():
    leaves, ids = inputs(4, 3, 2, 16, 24)
    x, weights, up, down = (leaf.detach().int() for leaf in leaves)
    with pytest.raises(BackendError, match="float32, bfloat16 and float16, got int32"):
        experts.experts(x, ids, weights, up, down, backend="triton")


@pytest.mark.parametrize("latent", [None, 16])
def test_mixture_of_experts_is_the_same_on_both_paths(latent, monkeypatch):
    config = HybridConfig(
        hidden_size=24, n_routed_experts=6, num_experts_per_tok=2, n_group=3, topk_group=2,
        moe_intermediate_size=20, moe_shared_expert_intermediate_size=32, moe_latent_size=latent,
    )
    mixture = MixtureOfExperts(config).to(DEVICE)
    with torch.no_grad():
        for parameter in mixture.parameters():
            parameter.normal_(std=0.3)
    hidden = torch.randn(2, 9, 24, device=DEVICE)
    outputs = []
    for backend in ("torch", "triton"):
        monkeypatch.setenv("TESS_KERNELS", backend)
        mixture.zero_grad()
        leaf = hidden.clone().requires_grad_()
        out = mixture(leaf)
        out.square().sum().backward()
        outputs.append([out, leaf.grad, *(p.grad for p in mixture.parameters())])
    assert all(relative(got, want) < 1e-5 for want, got in zip(*outputs))
