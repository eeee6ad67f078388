"""The Triton embedding of a noised simplex against the PyTorch path, number by number.

That the PyTorch path has the right law is tested in test_simplex_law.py. Without a GPU the kernels
run in Triton's interpreter, where bfloat16 arithmetic is broken; float16 stands for narrow types.
"""

# B examples, L positions, R rows of both, V vocabulary, H width, K top tokens, J = K + 1

import pytest
import torch

pytest.importorskip("triton", reason="the Triton kernels need the package triton")

import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from tess.kernels import random, reference  # noqa: E402
from tess.kernels import simplex_embedding as public  # noqa: E402
from tess.kernels.dispatch import BackendError  # noqa: E402
from tess.kernels.order_statistics import EmbeddingMoments, embedding_moments  # noqa: E402
from tess.kernels.simplex_embedding import simplex_embedding  # noqa: E402
from tess.kernels.triton import order_statistics as drawing  # noqa: E402
from tess.kernels.triton import simplex_embedding as kernels  # noqa: E402
from tess.kernels.triton import simplex_embedding_gradient as gradients  # noqa: E402
from tess.kernels.triton.launch import ARCHITECTURES, as_architecture  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NOISES = ("order_statistics", "dense")
BOUND = {torch.float64: 2e-7, torch.float32: 2e-6, torch.float16: 1e-3}
INTERPRETED = DEVICE == "cpu"


def relative(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def inputs(batch=2, length=5, vocabulary=300, width=6, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    alpha = torch.rand(batch, length, generator=generator)
    alpha[:1, :1] = 1.0  # no noise
    arguments = {
        "token_ids_BL": torch.randint(vocabulary, (batch, length), generator=generator),
        "signal_BL": 5 * alpha.sqrt(),
        "noise_BL": 5 * (1 - alpha).sqrt(),
        "weight_VH": torch.randn(vocabulary, width, generator=generator).to(dtype),
        "keys_B": torch.arange(batch) * 7919 - 3,
    }
    return {name: x.to(DEVICE) for name, x in arguments.items()} | {"counter": 4}


def value_and_gradient(arguments, **options):
    weight = arguments["weight_VH"].detach().clone().requires_grad_()
    x = simplex_embedding(**{**arguments, "weight_VH": weight}, **options)
    direction = torch.linspace(-1, 2, x.numel(), device=DEVICE).view(x.shape).to(x.dtype).cos()
    (x * direction).sum().backward()
    return x.detach(), weight.grad


# ---- functions ----


@triton.jit
def _apply(x_ptr, y_ptr, count, FUNCTION: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < count, other=0.25)
    tl.store(y_ptr + i, FUNCTION(x), i < count)


def applied(function, x):
    x = x.to(DEVICE)
    y = torch.empty_like(x)
    _apply[(triton.cdiv(len(x), 4096),)](x, y, len(x), FUNCTION=function, BLOCK=4096)
    return y.cpu()


def worst(got, want):
    error = ((got - want) / want).abs()
    return torch.where(got == want, 0.0, error).max().item()


def powers(low, high, count=4_000):
    return 10 ** torch.linspace(low, high, count, dtype=torch.float64)


def test_the_inverse_normal_distribution_function_is_exact_deep_into_the_tail():
    p = torch.cat([0.5 * powers(-306, -1), torch.linspace(1e-3, 0.5, 4_001, dtype=torch.float64)])
    borders = torch.tensor([0.075, 1.3887943864964021e-11], dtype=torch.float64)
    p = torch.cat([p, borders * (1 - 1e-12), borders, borders * (1 + 1e-12)])
    assert worst(applied(drawing.lower_quantile, p), torch.special.ndtri(p)) < 1e-14


def test_the_logarithm_of_the_normal_distribution_function_is_exact_in_both_tails():
    middle = torch.linspace(-40, 12, 20_001, dtype=torch.float64)
    borders = torch.tensor([0.67187, 0.67188, 5.65624, 5.65626], dtype=torch.float64)
    x = torch.cat([middle, borders, -borders, -powers(0, 100), powers(-300, -2), -powers(-300, -2)])
    assert worst(applied(drawing.log_normal_cdf, x), torch.special.log_ndtr(x)) < 1e-12


def test_functions_near_one_keep_the_digits_of_their_distance_from_it():
    x = torch.cat([powers(-300, 2.5), -powers(-300, 4), torch.zeros(1, dtype=torch.float64)])
    assert worst(applied(drawing.expm1, x), torch.expm1(x)) < 1e-14
    x = torch.cat([powers(-300, 300), -powers(-300, -1e-9)])
    assert worst(applied(drawing.log1p, x), torch.log1p(x)) < 1e-14


# ---- the draw ----


def rows_of(tokens, vocabulary, gap, sigma, key=11, draw=4):
    tokens, gap, sigma = tokens[None], gap[None].float(), sigma[None].float()
    keys = torch.tensor([key])
    return public.Rows(*(x.to(DEVICE) for x in (tokens, gap, sigma, keys)), draw)


def both_draws(rows, vocabulary, num_top):
    fields = (rows.keys_R, rows.positions_R, rows.ids_R, rows.gap_R, rows.sigma_R)
    got = drawing.draw_tokens(*fields, rows.counter, vocabulary, num_top)
    return got, public.draw_tokens(rows, vocabulary, num_top)


@pytest.mark.parametrize(
    "vocabulary, num_top, rows, draw",
    [
        (131_072, 32, 12, 4), (131_072, 64, 3, 2**31), (50_257, 16, 5, 1), (200, 32, 12, 4),
        (65, 16, 8, 2**32 - 1), (257, 64, 4, 0), (2_001, 33, 3, 16), (5, 1, 6, 7), (21, 5, 6, 7),
    ],
)
def test_tokens_and_weights_are_those_of_the_tensor_path(vocabulary, num_top, rows, draw):
    tokens = torch.arange(rows) * (vocabulary - 1) // max(1, rows - 1)  # the first and the last too
    sigma, gap = torch.linspace(0.2, 5, rows), torch.linspace(9, 0, rows)
    rows = rows_of(tokens, vocabulary, gap, sigma, draw=draw)
    (ids, *got), (want_ids, want) = both_draws(rows, vocabulary, num_top)
    assert ids.dtype == torch.int32 and torch.equal(ids.long(), want_ids)
    assert (ids.sort(dim=1).values.diff(dim=1) > 0).all()
    for one, other in zip(got, want):
        assert one.dtype == torch.float64
        torch.testing.assert_close(one, other, rtol=1e-9, atol=0)


def test_duplicates_occur_and_are_drawn_again_with_the_same_words():
    """40 ids of 160 are never all different at first, and mostly not after the next draw either."""
    rows = rows_of(torch.zeros(6).long(), 161, torch.zeros(6), torch.ones(6), key=-(2**63))
    place = (rows.keys_R, rows.positions_R, rows.counter)
    words = random.words_at(*place, 1 + 10, 10, random.LARGEST_STREAM)
    assert all(len(row.unique()) < 40 for row in words * 160 >> 32)
    (ids, *_), (want, _) = both_draws(rows, 161, 40)
    assert torch.equal(ids.long(), want)


def test_words_that_would_favour_an_id_are_refused_as_on_the_tensor_path():
    """Of a count of 3 * 2^29 every fourth word is refused."""
    vocabulary = (3 << 29) + 1
    rows = rows_of(torch.zeros(2).long(), vocabulary, torch.zeros(2), torch.ones(2))
    place = (rows.keys_R, rows.positions_R, rows.counter)
    words = random.words_at(*place, 1 + 4, 4, random.LARGEST_STREAM)
    assert (random.WORD & (words * (vocabulary - 1)) < 1 << 30).any(dim=1).all()
    (ids, *_), (want, _) = both_draws(rows, vocabulary, 16)
    assert torch.equal(ids.long(), want)


def test_extreme_scales_give_the_same_finite_weights():
    gap, sigma = torch.meshgrid(
        torch.tensor([0.0, 20.0, 300.0]), torch.tensor([0.0, 1e-4, 1.0, 10.0, 60.0]), indexing="ij"
    )
    gap, sigma = gap.flatten(), sigma.flatten()
    rows = rows_of(torch.full((len(gap),), 7), 300, gap, sigma)
    (_, *got), (_, want) = both_draws(rows, 300, 16)
    assert all(x.isfinite().all() and (x >= 0).all() for x in got)
    # variances of order sigma^2 are what is left of numbers of order 1
    fine = (sigma == 0) | (sigma >= 1)
    for one, other in zip(got, want):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-300)
        torch.testing.assert_close(one[fine], other[fine], rtol=1e-9, atol=1e-300)


def test_a_row_draws_the_same_bits_in_every_batch():
    rows = rows_of(torch.arange(5), 1_000, torch.ones(5), torch.linspace(1, 5, 5))
    fields = (rows.keys_R, rows.positions_R, rows.ids_R, rows.gap_R, rows.sigma_R)
    together = drawing.draw_tokens(*fields, 4, 1_000, 8)
    alone = drawing.draw_tokens(*(x[3:4] for x in fields), 4, 1_000, 8)
    assert all(torch.equal(one[0], other[3]) for one, other in zip(alone, together))


# ---- the embedding ----


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize(
    "batch, length, vocabulary, width, num_top",
    [(1, 1, 150, 5, 16), (2, 4, 200, 70, 32), (1, 3, 70, 600, 69), (2, 1, 131, 192, 3)],
)
def test_values_and_gradients_are_those_of_the_tensor_path(
    noise, dtype, batch, length, vocabulary, width, num_top
):
    if dtype == torch.float64 and not INTERPRETED:
        pytest.skip("float64 runs in the interpreter only")
    arguments = inputs(batch, length, vocabulary, width, dtype)
    arguments["num_top"] = num_top
    exact = {**arguments, "weight_VH": arguments["weight_VH"].double()}
    want = value_and_gradient(exact, noise=noise, backend="torch")
    usual = value_and_gradient(arguments, noise=noise, backend="torch")
    got = value_and_gradient(arguments, noise=noise, backend="triton")
    for one, other, target in zip(got, usual, want):
        assert one.dtype == dtype and one.shape == other.shape
        assert relative(one, target) < max(BOUND[dtype], 2 * relative(other, target))


def test_noise_of_which_much_is_left_over_is_right_in_narrow_types():
    """At a small scale the Gaussian part is nearly all that differs from the mean."""
    arguments = inputs(1, 4, 2_000, 130, torch.float16)
    arguments |= {"signal_BL": torch.zeros(1, 1), "noise_BL": torch.full((1, 1), 1.5), "num_top": 1}
    arguments = {k: v.to(DEVICE) if torch.is_tensor(v) else v for k, v in arguments.items()}
    exact = {**arguments, "weight_VH": arguments["weight_VH"].double()}
    want = simplex_embedding(**exact, backend="torch")
    error = [
        relative(simplex_embedding(**arguments, backend=path), want) for path in ("triton", "torch")
    ]
    assert error[0] < max(1e-3, 2 * error[1])


@pytest.mark.parametrize("scale", [1e-3, 300.0])
def test_no_size_of_the_embedding_overflows_a_narrow_type(scale):
    arguments = inputs(1, 3, 5_000, 20, torch.float16)
    arguments["weight_VH"] = (arguments["weight_VH"] * scale).half()
    exact = {**arguments, "weight_VH": arguments["weight_VH"].double()}
    want = simplex_embedding(**exact, backend="torch")
    got = simplex_embedding(**arguments, backend="triton")
    assert relative(got, want) < 2e-3


def test_dense_noise_gives_the_softmax_of_the_reference():
    arguments = inputs(2, 3, 4_500, 7)
    arguments["token_ids_BL"][:, ::2] = 4_400  # in the second tile of the vocabulary
    normals = random.normal(arguments["keys_B"], 4, 3, 4_500).double()
    ids, signal, noise = (arguments[x] for x in ("token_ids_BL", "signal_BL", "noise_BL"))
    weight = arguments["weight_VH"].double()
    want = reference.simplex_embedding(ids, signal.double(), noise.double(), weight, normals)
    got = simplex_embedding(**arguments, noise="dense", backend="triton")
    assert relative(got, want) < 3e-6


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("width", [9, 530])
def test_an_example_has_the_same_bits_in_every_batch_and_at_every_length(noise, width):
    if noise == "dense" and not INTERPRETED:
        pytest.skip("the products of the dense path are the GPU library's")
    arguments = inputs(3, 6, 150, width)
    options = {"noise": noise, "backend": "triton", "counter": arguments.pop("counter")}
    options |= {"weight_VH": arguments.pop("weight_VH"), "num_top": 4}
    options["moments"] = embedding_moments(options["weight_VH"])
    together = simplex_embedding(**arguments, **options)
    for row, length in ((0, 1), (2, 4)):
        cut = {k: v[row : row + 1, :length] if v.ndim == 2 else v[row : row + 1]
               for k, v in arguments.items()}
        assert torch.equal(simplex_embedding(**cut, **options)[0], together[row, :length])


def test_rows_of_a_slab_do_not_depend_on_the_slab(monkeypatch):
    arguments = inputs(1, 7, 60, 9)
    want = simplex_embedding(**arguments, num_top=4, backend="triton")
    monkeypatch.setattr(kernels, "_slabs", lambda *_: (slice(0, 3), slice(3, 4), slice(4, 7)))
    assert torch.equal(simplex_embedding(**arguments, num_top=4, backend="triton"), want)
    monkeypatch.undo()
    slabs = list(kernels._slabs(5_000, 2688, torch.bfloat16))
    assert slabs == [slice(0, 4096), slice(4096, 5000)]
    assert list(kernels._slabs(300, 1 << 20, torch.float32))[0] == slice(0, 128)


def test_layout_of_the_embedding_and_of_the_gradient_do_not_matter():
    arguments = inputs(2, 3, 90, 12)
    options = {"num_top": 6, "moments": embedding_moments(arguments["weight_VH"])}
    leaf = arguments.pop("weight_VH").requires_grad_()
    x = simplex_embedding(**arguments, weight_VH=leaf, **options, backend="triton")
    for view in (
        torch.zeros(90, 40, device=DEVICE)[:, 8:20],  # rows lie apart
        torch.zeros(12, 180, device=DEVICE).T[::2],  # columns do
    ):
        view.copy_(leaf.detach())
        y = simplex_embedding(
            **arguments, weight_VH=view.requires_grad_(), **options, backend="triton"
        )
        assert torch.equal(x, y)
        for dx in (
            torch.randn(2, 3, 30, device=DEVICE)[..., 3:15],
            torch.randn(12, 3, 2, device=DEVICE).permute(2, 1, 0),
            torch.randn(1, 1, 1, device=DEVICE).expand(2, 3, 12),
        ):
            want = torch.autograd.grad(x, leaf, dx.contiguous(), retain_graph=True)[0]
            assert torch.equal(torch.autograd.grad(y, view, dx, retain_graph=True)[0], want)


def test_only_the_lower_triangle_of_the_factor_is_read():
    z, factor = torch.randn(5, 150, device=DEVICE), torch.randn(150, 150, device=DEVICE).tril()
    want = z.double() @ factor.double().T
    assert relative(kernels.bulk_product(z, factor), want) < 1e-6
    factor[10, 140] = torch.nan  # right of the tiles of row 10
    assert relative(kernels.bulk_product(z, factor), want) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("rows, width", [(1, 17), (130, 200)])
def test_every_configuration_of_the_product_is_right(rows, width, dtype, monkeypatch):
    z = torch.randn(rows, width, device=DEVICE).to(dtype)
    factor = torch.randn(width, width, device=DEVICE).tril().to(dtype)
    want = z.double() @ factor.double().T
    for architecture in ARCHITECTURES:
        with as_architecture(architecture):
            assert relative(kernels.bulk_product(z, factor), want) < 1e-5
    for config in kernels.PRODUCT.candidates():
        if dtype == torch.float32 and not INTERPRETED and config.blocks["BLOCK_N"] > 64:
            continue  # float32 has smaller blocks
        monkeypatch.setattr(kernels.PRODUCT, "config", lambda like: config)
        assert relative(kernels.bulk_product(z, factor), want) < 1e-5


@pytest.mark.parametrize("width", [100, 1_100])
def test_every_configuration_of_the_gather_is_right(width, monkeypatch):
    weight, ids, excess, share, spread, sums, *_ = operation_inputs(3, 40, width, 10)
    noise, x = torch.rand(3, width, device=DEVICE), torch.empty(2, 3, width, device=DEVICE)
    inputs = (weight.detach(), ids, excess, share, spread, sums, noise)
    kernels.weighted_rows(*inputs, x[0])
    want = (excess.double()[..., None] * weight.double()[ids.long()]).sum(1)
    want += share[:, None] * sums + spread[:, None] * noise
    assert relative(x[0], want) < 1e-6
    table = kernels.GATHER if width > kernels.NARROW else kernels.GATHER_NARROW
    for config in table.candidates():
        monkeypatch.setattr(table, "config", lambda like: config)
        kernels.weighted_rows(*inputs, x[1])
        assert relative(x[1], want) < 1e-6


def test_an_example_of_nothing_has_nothing():
    arguments = inputs(2, 0)
    assert simplex_embedding(**arguments, backend="triton").shape == (2, 0, 6)


# ---- the gradient ----


def pairs_of(ids, width=5, dtype=torch.float32):
    generator = torch.Generator().manual_seed(ids.numel())
    make = lambda *shape: torch.randn(*shape, generator=generator).to(DEVICE)  # noqa: E731
    rows = len(ids)
    return make(rows, width).to(dtype), ids.int().to(DEVICE), make(*ids.shape), make(rows)


def plain_gradient(dx, ids, excess, share, vocabulary):
    dx, excess = dx.double(), excess.double()
    gradient = (share.double() @ dx).repeat(vocabulary, 1)
    pairs = (excess[..., None] * dx[:, None]).flatten(0, 1)
    return gradient.index_add_(0, ids.flatten().long(), pairs)


@pytest.mark.parametrize("chunk", [16, 256])
@pytest.mark.parametrize(
    "ids, vocabulary",
    [
        (torch.zeros(700, 1), 2), (torch.full((700, 1), 4), 5), (torch.arange(700)[:, None] % 3, 4),
        (torch.arange(64).view(16, 4), 64), (torch.arange(64).view(16, 4) // 16, 4),
        (torch.tensor([[2]]), 3), (torch.arange(260).view(130, 2) // 129, 7),
    ],
    ids=["one token", "the last token", "long runs", "no run", "whole chunks", "one row", "two"],
)
def test_runs_of_every_length_are_added_up(ids, vocabulary, chunk, monkeypatch):
    monkeypatch.setattr(gradients, "CHUNK", chunk)
    inputs = pairs_of(ids)
    got = gradients.embedding_gradient(*inputs, vocabulary)
    assert relative(got, plain_gradient(*inputs, vocabulary)) < 2e-6
    assert torch.equal(gradients.embedding_gradient(*inputs, vocabulary), got)


@pytest.mark.parametrize("width", [1, 256, 300, 1100])
def test_widths_of_one_and_of_many_tiles_are_added_up(width):
    inputs = pairs_of(torch.arange(40).view(10, 4) % 7, width, torch.float16)
    got = gradients.embedding_gradient(*inputs, 8)
    assert got.dtype == torch.float16
    assert relative(got, plain_gradient(*inputs, 8)) < 4e-4


def test_numbers_beside_the_rows_are_not_read():
    """Memory around a slice holds NaN, and so do sums of chunks that nobody wrote."""
    dx, *others = pairs_of(torch.arange(60).view(20, 3) % 5, 7)
    poisoned = torch.full((22, 30), torch.nan, device=DEVICE)
    poisoned[1:21, 4:11] = dx
    want = gradients.embedding_gradient(dx, *others, 6)
    assert torch.equal(gradients.embedding_gradient(poisoned[1:21, 4:11], *others, 6), want)


def test_backward_is_the_derivative():
    if not INTERPRETED:
        pytest.skip("float64 runs in the interpreter only")
    arguments = inputs(1, 3, 12, 4, torch.float64)
    weight = arguments.pop("weight_VH").requires_grad_()
    factor = embedding_moments(weight).factor

    def embedding(weight):
        moments = EmbeddingMoments(weight.detach().sum(0), factor)
        return simplex_embedding(
            **arguments, weight_VH=weight, num_top=2, moments=moments, backend="triton"
        )

    assert torch.autograd.gradcheck(embedding, weight, fast_mode=True)


# ---- operations ----


def operation_inputs(rows=4, vocabulary=40, width=6, top=3):
    make = lambda *shape: torch.rand(*shape, device=DEVICE)  # noqa: E731
    ids = torch.randint(vocabulary, (rows, top + 1), device=DEVICE).int()
    keys = torch.arange(rows, device=DEVICE)
    weight = make(vocabulary, width).requires_grad_()
    factor = make(width, width).tril()
    tokens = (ids, make(rows, top + 1), make(rows), make(rows))
    return weight, *tokens, make(width), factor, keys, keys, 5


def test_operations_meet_the_rules_of_the_library():
    arguments = operation_inputs()
    torch.library.opcheck(kernels._forward_op, arguments)
    dx = torch.rand(4, 6, device=DEVICE)
    torch.library.opcheck(kernels._backward_op, (dx, *arguments[1:4], 40))
    keys, scale = arguments[7], torch.rand(4, device=DEVICE)
    torch.library.opcheck(drawing.draw_tokens, (keys, keys, keys, scale, scale, 5, 40, 3))
    fields = (keys, keys, keys, scale, scale, 5, 64, 30, torch.float32)
    torch.library.opcheck(kernels.tile_logits, fields)


def test_operations_compile_into_one_graph():
    """The public function looks at its ids and scales, so its operations are compiled here."""
    weight, *others = operation_inputs()

    def embed(weight):
        keys, scale = others[6], others[2]
        ids, weights, share, spread = drawing.draw_tokens(keys, keys, keys, scale, scale, 5, 40, 3)
        numbers = (x.float() for x in (weights - share[:, None], share, spread))
        return kernels._forward_op(weight, ids, *numbers, *others[4:]).square().sum()

    compiled = torch.compile(embed, fullgraph=True, backend="aot_eager")
    want, got = embed(weight), compiled(weight)
    assert torch.equal(want, got)
    gradient = [torch.autograd.grad(x, weight)[0] for x in (want, got)]
    assert torch.equal(*gradient)


def test_scales_and_moments_get_no_gradient():
    arguments = inputs(1, 2)
    arguments["signal_BL"].requires_grad_()
    moments = EmbeddingMoments(torch.ones(6, device=DEVICE), torch.eye(6, device=DEVICE))
    x = simplex_embedding(**arguments, num_top=4, moments=moments, backend="triton")
    assert not x.requires_grad


def test_a_backend_that_cannot_run_is_an_error(monkeypatch):
    arguments = inputs(1, 2)
    with pytest.raises(BackendError, match="backend must be one of auto, torch, triton"):
        simplex_embedding(**arguments, backend="cuda")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    arguments["weight_VH"] = arguments["weight_VH"].double()
    with pytest.raises(BackendError, match="it takes float32, bfloat16 and float16, got float64"):
        simplex_embedding(**arguments, backend="triton")
