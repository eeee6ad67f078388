"""The Triton sweep over the vocabulary against the PyTorch path and whole logits in float64.

Without a GPU the kernels run in Triton's interpreter, where bfloat16 arithmetic is broken; float16
stands for narrow types.
"""

import math

import pytest
import torch

pytest.importorskip("triton", reason="the Triton kernels need the package triton")

from tess.kernels.dispatch import BackendError  # noqa: E402
from tess.kernels.head import draw_in_order, vocabulary_sweep  # noqa: E402
from tess.kernels.triton import head as kernels  # noqa: E402
from tess.kernels.triton import launch  # noqa: E402
from tess.kernels.triton.launch import ARCHITECTURES, Config, as_architecture  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = DEVICE == "cpu"
DTYPES = (torch.float64, torch.float32, torch.float16) if INTERPRETED else (
    torch.float32, torch.float16, torch.bfloat16,
)
# several tiles of few logits each
SMALL = Config({"LANES": 4, "EACH": 2}, num_warps=1, num_stages=1)


def relative(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-9)).item()


def plain_sweep(logits, tokens):
    """Log-probability, entropy, log-sum-exp and probabilities, in float64."""
    log_probs = logits.double().log_softmax(dim=-1)
    probs = log_probs.exp()
    numbers = (log_probs.gather(1, tokens[:, None])[:, 0], -(probs * log_probs).sum(dim=-1))
    return *numbers, logits.double().logsumexp(dim=-1), probs


def both(hidden, weight, slab_rows=5, **options):
    slab_bytes = slab_rows * len(weight) * hidden.element_size()
    return [
        vocabulary_sweep(hidden, weight, slab_bytes=slab_bytes, backend=backend, **options)
        for backend in ("triton", "torch")
    ]


# ---- the kernel ----


@pytest.mark.parametrize("width", [1, 2, 7, 8, 9, 33])
@pytest.mark.parametrize("choice", kernels.CHOICES)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_a_row_is_measured_whatever_its_tiles(width, choice, temperature, monkeypatch):
    monkeypatch.setattr(kernels.ROWS, "config", lambda like: SMALL)
    parent = torch.full((12, width + 12), math.nan, device=DEVICE)  # what lies beside is not read
    parent[1:11, 5 : 5 + width] = 3 * torch.randn(10, width, device=DEVICE)
    logits, uniform = parent[1:11, 5 : 5 + width], torch.rand(10, device=DEVICE)
    given = torch.arange(10, device=DEVICE) % width
    want = {
        "argmax": logits.argmax(dim=-1), "given": given,
        "sample": draw_in_order((logits.double() / temperature).softmax(dim=-1), uniform),
    }[choice]
    *numbers, probs = plain_sweep(logits, want)
    arguments = (logits, uniform, given, temperature, choice)
    tokens, *plain = kernels.sweep_rows(*arguments, False)
    again, *filled = kernels.sweep_rows(*arguments, True)
    assert torch.equal(tokens, want) and torch.equal(again, want)
    for one, other, number in zip(plain, filled, numbers):
        assert one.dtype == torch.float32 and torch.equal(one, other)
        assert (one - number).abs().max() < 3e-6
    assert (logits - probs).abs().max() < 1e-6
    assert int(parent.isnan().sum()) == parent.numel() - logits.numel()


@pytest.mark.parametrize("small", [False, True])
def test_ties_go_to_the_lowest_token_whatever_tile_it_is_in(small, monkeypatch):
    if small:
        monkeypatch.setattr(kernels.ROWS, "config", lambda like: SMALL)
    places = ([0, 1], [7, 8], [3, 39], [9, 17, 25], [39], [15, 16], list(range(40)))
    logits = torch.full((len(places), 40), -2.0, device=DEVICE)
    for row, where in zip(logits, places):
        row[where] = 1.0
    tokens = kernels.sweep_rows(logits, None, None, 1.0, "argmax", False)[0]
    assert tokens.tolist() == [where[0] for where in places]


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-24])
@pytest.mark.parametrize("small", [False, True])
def test_no_token_without_weight_is_drawn_at_either_end(uniform, small, monkeypatch):
    if small:
        monkeypatch.setattr(kernels.ROWS, "config", lambda like: SMALL)
    logits = torch.randn(9, 60, device=DEVICE)
    logits[:, :20], logits[:, 41:] = -math.inf, -3e4
    logits[3:6] += torch.linspace(0, 30, 60, device=DEVICE)
    uniform = torch.full((9,), uniform, device=DEVICE)
    tokens = kernels.sweep_rows(logits, uniform, None, 1.0, "sample", False)[0]
    assert torch.equal(tokens, draw_in_order(logits.softmax(dim=-1), uniform))
    assert (tokens == (20 if uniform[0] == 0 else 40)).all()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_configuration_gives_the_same_bits_alone_and_together(architecture):
    logits, uniform = (3 * torch.randn(3, 9_001)).half().to(DEVICE), torch.rand(3).to(DEVICE)
    want = draw_in_order(logits.double().softmax(dim=-1), uniform)
    *_, probs = plain_sweep(logits, want)
    with as_architecture(architecture):
        alone = logits[1:2].clone()
        one = kernels.sweep_rows(alone, uniform[1:2], None, 1.0, "sample", True)
        together = kernels.sweep_rows(logits, uniform, None, 1.0, "sample", True)
    assert torch.equal(together[0], want) and torch.equal(logits[1:2], alone)
    assert all(torch.equal(x, y[1:2]) for x, y in zip(one, together))
    assert relative(logits, probs) < 1e-3


def test_what_is_overwritten_is_never_timed(monkeypatch):
    """Autotuning would run the kernel on its own output."""
    monkeypatch.setenv("TESS_AUTOTUNE", "1")
    monkeypatch.setattr(launch, "is_interpreted", lambda: False)
    logits = torch.randn(2, 30, device=DEVICE)
    want = logits.softmax(dim=-1)
    kernels.sweep_rows(logits, None, None, 1.0, "argmax", True)
    torch.testing.assert_close(logits, want)


# ---- the sweep ----


OPTIONS = (
    {}, {"choose": "sample"}, {"choose": "sample", "temperature": 0.7},
    {"choose": "sample", "top_p": 0.8}, {"choose": "sample", "top_k": 3, "temperature": 1.6},
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("rows, vocabulary", [(1, 2), (11, 513), (6, 8_200)])
def test_the_sweep_gives_what_the_tensor_path_gives(rows, vocabulary, options, dtype):
    hidden = (2 * torch.randn(rows, 8)).to(DEVICE, dtype)
    weight = torch.randn(vocabulary, 8).to(DEVICE, dtype)
    options = {**options, "uniform_T": torch.rand(rows, device=DEVICE)}
    got, want = both(hidden, weight, expected_embedding_of=weight, **options)
    assert torch.equal(got.tokens_T, want.tokens_T)
    *numbers, probs = plain_sweep(hidden @ weight.T, want.tokens_T)
    for one, other, number in zip(got[1:4], want[1:4], numbers):
        assert one.dtype == other.dtype == torch.float32
        assert relative(one, number) < max(1e-5, 2 * relative(other, number))
    embedding = probs @ weight.double()
    error = [relative(x.embedding_TH, embedding) for x in (got, want)]
    assert got.embedding_TH.dtype == dtype and error[0] < max(1e-5, 2 * error[1])
    assert both(hidden, weight, **options)[0].embedding_TH is None


def test_tables_of_another_dtype_and_width_are_embedded():
    hidden, weight = torch.randn(5, 8, device=DEVICE), torch.randn(70, 8, device=DEVICE)
    table = torch.randn(70, 3, device=DEVICE).half()
    got, want = both(hidden, weight, expected_embedding_of=table)
    assert got.embedding_TH.dtype == torch.float16
    assert relative(got.embedding_TH, want.embedding_TH) < 1e-3


@pytest.mark.parametrize("options", [{}, *OPTIONS[1:]], ids=str)
def test_processors_steer_the_choice_and_nothing_else(options):
    hidden, weight = torch.randn(10, 8, device=DEVICE), torch.randn(600, 8, device=DEVICE)
    options = {**options, "uniform_T": torch.rand(10, device=DEVICE)}
    options["expected_embedding_of"] = weight
    seen = []

    def ban_even_tokens(first_row, logits):
        seen.append((first_row, len(logits), logits.dtype))
        logits[:, ::2] = -torch.inf  # in place, as some do
        return logits

    plain = both(hidden, weight, 4, **options)[0]
    got, want = both(hidden, weight, 4, processors=ban_even_tokens, **options)
    assert seen == 2 * [(0, 4, torch.float32), (4, 4, torch.float32), (8, 2, torch.float32)]
    assert torch.equal(got.tokens_T, want.tokens_T) and (got.tokens_T % 2 == 1).all()
    for name in ("entropy_T", "log_sum_exp_T", "embedding_TH"):
        assert torch.equal(getattr(got, name), getattr(plain, name))
    torch.testing.assert_close(got.log_prob_T, want.log_prob_T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"choose": "sample", "temperature": 0.7, "top_k": 3}])
@pytest.mark.parametrize("embed", [False, True])
@pytest.mark.parametrize("banned", [0, 50])
def test_the_likeliest_tokens_are_those_of_the_tensor_path(dtype, options, embed, banned):
    """Before the logits become probabilities in place, and of what processors leave."""
    hidden = torch.randn(7, 8, device=DEVICE).to(dtype)
    weight = torch.randn(70, 8, device=DEVICE).to(dtype)
    options = {**options, "uniform_T": torch.rand(7, device=DEVICE), "num_likeliest": 9}
    if embed:
        options["expected_embedding_of"] = weight

    def ban(_, logits):
        logits[:, :banned] = -torch.inf
        return logits

    if banned:
        options["processors"] = ban
    got, want = both(hidden, weight, 4, **options)
    assert got.likeliest_probs_TM.dtype == torch.float32
    torch.testing.assert_close(
        got.likeliest_probs_TM, want.likeliest_probs_TM, rtol=1e-5, atol=1e-7
    )
    logits = (hidden @ weight.T).float()
    logits[:, :banned] = -torch.inf
    found = logits.softmax(dim=-1).gather(1, got.likeliest_ids_TM)  # ties in any order
    torch.testing.assert_close(found, got.likeliest_probs_TM, rtol=1e-5, atol=1e-7)
    assert all(len(set(ids.tolist())) == 9 for ids in got.likeliest_ids_TM)


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="rests on MKL's products")
@pytest.mark.skipif(not INTERPRETED, reason="the products are the GPU library's")
def test_a_row_has_the_same_bits_in_every_batch():
    hidden, weight, uniform = torch.randn(9, 33), torch.randn(700, 33), torch.rand(9)

    def sweep(rows, slab_rows):
        return vocabulary_sweep(
            hidden[rows], weight, choose="sample", temperature=0.8, uniform_T=uniform[rows],
            expected_embedding_of=weight, slab_bytes=4 * slab_rows * 700, backend="triton",
            num_likeliest=4,
        )

    together = sweep(slice(None), 1000)
    for rows, slab_rows in ((slice(0, 1), 4), (slice(8, 9), 5), (slice(3, 8), 4)):
        assert all(torch.equal(x, y[rows]) for x, y in zip(sweep(rows, slab_rows), together))


def test_entropy_is_exact_for_uniform_and_for_certain_rows():
    weight = torch.randn(3000, 4, device=DEVICE)
    flat = vocabulary_sweep(torch.zeros(2, 4, device=DEVICE), weight, backend="triton")
    assert torch.allclose(flat.entropy_T, torch.tensor(3000.0).log().to(DEVICE), rtol=1e-6)
    assert torch.allclose(flat.log_prob_T, -torch.tensor(3000.0).log().to(DEVICE), rtol=1e-6)
    sure = vocabulary_sweep(3000 * weight[:3], weight, backend="triton")  # logits of thousands
    assert (sure.entropy_T >= 0).all() and (sure.entropy_T < 1e-6).all()
    assert (sure.log_prob_T == 0).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("options", [{}, {"choose": "sample"}, {"choose": "sample", "top_p": 0.5}])
def test_hidden_states_that_are_no_numbers_are_named(bad, options):
    hidden, weight = torch.randn(5, 8, device=DEVICE), torch.randn(3000, 8, device=DEVICE)
    hidden[3, 2] = bad
    uniform = torch.rand(5, device=DEVICE)
    with pytest.raises(ValueError, match="logits must be finite; 1 of 5 rows have NaN or inf"):
        vocabulary_sweep(
            hidden, weight, uniform_T=uniform, expected_embedding_of=weight, backend="triton",
            **options,
        )


def test_no_rows_give_no_outputs_and_no_gradient_is_recorded():
    weight = torch.randn(9, 4, device=DEVICE, requires_grad=True)
    none = torch.empty(0, 4, device=DEVICE)
    options = {"expected_embedding_of": weight, "num_likeliest": 2, "backend": "triton"}
    got = vocabulary_sweep(none, weight, **options)
    shapes = [(0,), (0,), (0,), (0,), (0, 4), (0, 2), (0, 2)]
    assert [tuple(column.shape) for column in got] == shapes
    hidden = torch.randn(6, 8, device=DEVICE, requires_grad=True)[:, ::2]
    got = vocabulary_sweep(hidden, weight, **options)
    assert not any(column.requires_grad for column in got)


def test_autocast_decides_the_dtype_of_the_sweep_s_products():
    hidden, weight = torch.randn(9, 32, device=DEVICE), torch.randn(900, 32, device=DEVICE)
    low, options = (hidden.half(), weight.half()), {"num_likeliest": 3, "backend": "triton"}
    with torch.autocast(DEVICE, torch.float16):
        got = vocabulary_sweep(hidden, weight, expected_embedding_of=weight, **options)
    want = vocabulary_sweep(*low, expected_embedding_of=low[1], **options)
    assert got.embedding_TH.dtype == torch.float16
    assert all(torch.equal(one, other) for one, other in zip(got, want))


# ---- the operation ----


def test_the_operation_meets_the_rules_of_the_library():
    logits, uniform = torch.randn(3, 20, device=DEVICE), torch.rand(3, device=DEVICE)
    given = torch.tensor([0, 19, 5], device=DEVICE)
    for arguments in (
        (None, None, 1.0, "argmax", True), (uniform, None, 0.5, "sample", False),
        (None, given, 1.0, "given", True),
    ):
        torch.library.opcheck(kernels.sweep_rows, (logits.clone(), *arguments))
    with pytest.raises(ValueError, match="choice must be one of argmax, sample, given"):
        kernels.sweep_rows(logits, None, None, 1.0, "best", False)


def test_the_operation_compiles_into_one_graph():
    """The public function looks whether its uniforms and logits are right, so this is not it."""
    logits, uniform = torch.randn(3, 20, device=DEVICE), torch.rand(3, device=DEVICE)

    def sweep(logits, uniform):
        logits = logits * 2
        return *kernels.sweep_rows(logits, uniform, None, 0.7, "sample", True), logits

    compiled = torch.compile(sweep, fullgraph=True, backend="aot_eager")
    want, got = sweep(logits, uniform), compiled(logits, uniform)
    assert all(torch.equal(one, other) for one, other in zip(got, want))
    torch.testing.assert_close(got[-1], (2 * logits).softmax(dim=-1))


def test_a_backend_that_cannot_run_is_an_error(monkeypatch):
    hidden, weight = torch.randn(2, 4, device=DEVICE), torch.randn(9, 4, device=DEVICE)
    with pytest.raises(BackendError, match="backend must be one of auto, torch, triton"):
        vocabulary_sweep(hidden, weight, backend="cuda")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(BackendError, match="it takes float32, bfloat16 and float16, got float64"):
        vocabulary_sweep(hidden.double(), weight, backend="triton")
