"""The sweep over the vocabulary in slabs: what it measures and draws, against whole logits."""

import itertools
import math

import pytest
import torch

from tess.kernels import head
from tess.kernels.head import draw_by_rank, draw_in_order, first_argmax, vocabulary_sweep
from tess.kernels.speculative import draw_tokens
from tess.schedulers.renoising import sample_nucleus


def relative(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def slab_of(rows, width, item=4):
    return rows * width * item


# --- the sweep: what it measures ---


def plain_sweep(logits, table=None):
    """Every output of an arg-max sweep from whole logits, in float64."""
    log_probs = logits.double().log_softmax(dim=-1)
    tokens = logits.argmax(dim=-1)
    probs = log_probs.exp()
    return (
        tokens,
        log_probs.gather(1, tokens[:, None])[:, 0],
        -(probs * log_probs).sum(dim=-1),
        logits.double().logsumexp(dim=-1),
        None if table is None else probs @ table.double(),
    )


@pytest.mark.parametrize("slab_rows", [1, 5, 1000])
@pytest.mark.parametrize("rows, vocab", [(1, 2), (9, 3), (7, 511), (6, 512), (11, 513), (10, 2000)])
def test_the_sweep_measures_what_whole_logits_say(rows, vocab, slab_rows):
    hidden, weight = torch.randn(rows, 8), torch.randn(vocab, 8)
    table = torch.randn(vocab, 3)
    want = plain_sweep(hidden @ weight.T, table)
    got = vocabulary_sweep(
        hidden, weight, expected_embedding_of=table, slab_bytes=slab_of(slab_rows, vocab)
    )
    assert torch.equal(got.tokens_T, want[0]) and got.tokens_T.dtype == torch.int64
    for one, other in zip(got[1:], want[1:]):
        assert one.dtype == torch.float32 and one.shape == other.shape
        assert relative(one, other) < 1e-5
    assert vocabulary_sweep(hidden, weight).embedding_TH is None


def test_the_head_may_embed_itself():
    hidden, weight = torch.randn(5, 8), torch.randn(700, 8)
    want = (hidden.double() @ weight.double().T).softmax(dim=-1) @ weight.double()
    got = vocabulary_sweep(hidden, weight, expected_embedding_of=weight).embedding_TH
    assert relative(got, want) < 1e-5


def test_entropy_is_exact_for_uniform_and_for_certain_rows():
    weight = torch.randn(3000, 4)
    flat = vocabulary_sweep(torch.zeros(2, 4), weight)
    assert torch.allclose(flat.entropy_T, torch.tensor(3000.0).log(), rtol=1e-6)
    assert torch.allclose(flat.log_prob_T, -torch.tensor(3000.0).log(), rtol=1e-6)
    sure = vocabulary_sweep(3000 * weight[:3], weight)  # logits of thousands
    assert (sure.entropy_T >= 0).all() and (sure.entropy_T < 1e-6).all()
    assert (sure.log_prob_T == 0).all()


def test_ties_go_to_the_lowest_token_whatever_block_it_is_in():
    for places in ([0, 1], [511, 512], [3, 2047], [700, 701, 1500], [1999]):
        row = torch.zeros(1, 2048)
        row[0, places] = 1.0
        assert first_argmax(row).item() == places[0] == row.argmax().item()
    weight = torch.randn(1100, 4)
    weight[[40, 1090]] = weight[600].clone()
    tied = vocabulary_sweep(9 * weight[600:601], weight)
    assert tied.tokens_T.item() == (9 * weight[600:601] @ weight.T).argmax().item()
    bfloat = torch.randn(50, 16).bfloat16(), torch.randn(4000, 16).bfloat16()
    logits = bfloat[0] @ bfloat[1].T  # many equal maxima in 8 bits
    assert torch.equal(vocabulary_sweep(*bfloat).tokens_T, logits.argmax(dim=-1))


def test_low_precision_products_are_measured_in_float32():
    hidden, weight = torch.randn(9, 32).bfloat16(), torch.randn(900, 32).bfloat16()
    got = vocabulary_sweep(hidden, weight, expected_embedding_of=weight)
    want = plain_sweep((hidden @ weight.T).float(), weight)
    assert torch.equal(got.tokens_T, want[0])
    for one, other in zip(got[1:4], want[1:4]):
        assert one.dtype == torch.float32 and relative(one, other) < 1e-5
    assert got.embedding_TH.dtype == torch.bfloat16
    assert relative(got.embedding_TH, want[4]) < 1e-2
    doubled = vocabulary_sweep(hidden.double(), weight.double(), expected_embedding_of=weight)
    assert doubled.entropy_T.dtype == torch.float32
    assert relative(doubled.entropy_T, plain_sweep(hidden.double() @ weight.double().T)[2]) < 1e-5


def test_autocast_decides_the_dtype_of_the_sweep_s_products():
    hidden, weight = torch.randn(9, 32), torch.randn(900, 32)
    with torch.autocast("cpu", torch.bfloat16):
        got = vocabulary_sweep(hidden, weight, expected_embedding_of=weight, num_likeliest=3)
    low = hidden.bfloat16(), weight.bfloat16()
    want = vocabulary_sweep(*low, expected_embedding_of=low[1], num_likeliest=3)
    assert got.embedding_TH.dtype == torch.bfloat16
    assert all(torch.equal(one, other) for one, other in zip(got, want))


@pytest.mark.parametrize("width", [16, 33, 192])
@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="rests on MKL's products")
def test_a_row_has_the_same_bits_in_every_batch(width):
    hidden, weight, uniform = torch.randn(23, width), torch.randn(1500, width), torch.rand(23)

    def sweep(rows, slab_rows):
        return vocabulary_sweep(
            hidden[rows], weight, choose="sample", temperature=0.8, top_p=0.9,
            uniform_T=uniform[rows], expected_embedding_of=weight, num_likeliest=7,
            slab_bytes=slab_of(slab_rows, 1500),
        )

    together = sweep(slice(None), 1000)
    for slab_rows in (1, 4, 5, 9, 22, 1000):
        for rows in (slice(0, 1), slice(22, 23), slice(5, 7), slice(4, 9), slice(3, 20)):
            for one, other in zip(sweep(rows, slab_rows), together):
                assert torch.equal(one, other[rows])


def test_no_rows_give_no_outputs():
    weight = torch.randn(9, 4)
    options = {"expected_embedding_of": weight[:, :3], "num_likeliest": 12}
    got = vocabulary_sweep(torch.empty(0, 4), weight, **options)
    shapes = [(0,), (0,), (0,), (0,), (0, 3), (0, 9), (0, 9)]
    assert [tuple(column.shape) for column in got] == shapes
    assert got.tokens_T.dtype == got.likeliest_ids_TM.dtype == torch.int64
    assert vocabulary_sweep(torch.empty(0, 4), weight).likeliest_ids_TM is None


def test_slices_serve_and_nothing_is_recorded_for_a_gradient():
    hidden = torch.randn(6, 16, requires_grad=True)[:, ::2]
    weight = torch.randn(8, 300, requires_grad=True).T
    got = vocabulary_sweep(hidden, weight, expected_embedding_of=weight, num_likeliest=2)
    assert not any(column.requires_grad for column in got)
    assert relative(got.log_sum_exp_T, plain_sweep((hidden @ weight.T).detach())[3]) < 1e-6


@pytest.mark.parametrize(
    "options",
    [{}, {"top_p": 0.95}, {"top_p": 1.0}, {"top_k": 40}, {"num_likeliest": 32}],
)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_no_tensor_of_the_sweep_is_larger_than_a_slab(options, temperature, watching):
    rows, vocab, width = 8, 4000, 6
    hidden, weight = torch.randn(100, width), torch.randn(vocab, width)
    with watching() as watch:
        vocabulary_sweep(
            hidden, weight, choose="sample", uniform_T=torch.rand(100), temperature=temperature,
            expected_embedding_of=weight, slab_bytes=slab_of(rows, vocab), **options,
        )
    assert watch.largest == 4 * max(rows * vocab, vocab * width)


# --- the sweep: what it chooses ---


def textbook_nucleus(probs, top_k=None, top_p=None, shift=0):
    """Probabilities [V] after exact top-k, then top-p, one token at a time; ties by rising id.

    `shift` keeps so many tokens more than the rule says, to be caught.
    """
    order = sorted(range(len(probs)), key=lambda v: (-probs[v], v))
    total, before, kept = sum(probs[v] for v in order[:top_k]), 0.0, []
    for v in order[:top_k]:
        if kept and top_p is not None and before >= top_p * total:
            break
        kept.append(v)
        before += probs[v]
    kept = order[: max(1, len(kept) + shift)]
    mass = sum(probs[v] for v in kept)
    return torch.tensor([p / mass if v in set(kept) else 0.0 for v, p in enumerate(probs)]).double()


def sampled(logits, uniform, **options):
    """Tokens of a sweep whose logits are given: the head is the identity."""
    width = logits.shape[1]
    return vocabulary_sweep(
        logits, torch.eye(width), choose="sample", uniform_T=uniform, **options
    ).tokens_T


def one_row(vocab, tied):
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(vocab)) * 1.5
    return logits.bfloat16().mul(2).round().div(2).float() if tied else logits


CUTS = [{"top_p": p} for p in (0.1, 0.63, 0.999, 1.0)] + [{"top_k": k} for k in (1, 5, 10_000)]
CUTS += [{"top_k": 12, "top_p": 0.7}, {}]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("vocab", [2, 30])
@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_tokens_have_the_textbook_law(cut, vocab, tied):
    """Evenly spread uniforms visit every kept token as often as its probability says."""
    logits, count, temperature = one_row(vocab, tied), 5000, 0.6
    probs = (logits.double() / temperature).softmax(dim=-1).tolist()
    expected = textbook_nucleus(probs, **cut)
    uniform = (torch.arange(count) + 0.5) / count
    tokens = sampled(logits.expand(count, vocab), uniform, temperature=temperature, **cut)
    seen = torch.bincount(tokens, minlength=vocab) / count
    assert (seen - expected).abs().max() < 1.5 / count
    assert (seen[expected == 0] == 0).all()
    assert (seen[expected > 1.5 / count] > 0).all()


def chi_squared(seen, probs):
    """Statistic over the cells that may be hit, infinite if another was, and its freedom."""
    if seen[probs == 0].sum() > 0:
        return math.inf, 1
    expected = seen.sum() * probs[probs > 0]
    return ((seen[probs > 0] - expected) ** 2 / expected).sum().item(), len(expected) - 1


@pytest.mark.parametrize("cut", [{"top_p": 0.8}, {"top_k": 9}, {"top_k": 12, "top_p": 0.8}, {}])
def test_random_uniforms_give_the_law_and_an_off_by_one_nucleus_is_seen(cut):
    logits, count = one_row(40, False), 40_000
    tokens = sampled(logits.expand(count, 40), torch.rand(count), temperature=1.2, **cut)
    seen = torch.bincount(tokens, minlength=40).double()
    probs = (logits.double() / 1.2).softmax(dim=-1).tolist()

    def passes(law):
        statistic, freedom = chi_squared(seen, law)
        return statistic < freedom + 3.7 * math.sqrt(2 * freedom)

    assert passes(textbook_nucleus(probs, **cut))
    assert not passes((logits.double() / 1.15).softmax(dim=-1))
    if cut:
        assert not passes(textbook_nucleus(probs, **cut, shift=1))
        assert not passes(textbook_nucleus(probs, **cut, shift=-1))


def rows_of_all_kinds(vocab, tied):
    """Logits from nearly flat to nearly certain, so that nuclei have 1 to V tokens."""
    scales = torch.tensor([0.0, 0.01, 0.3, 1, 2, 3, 4, 6, 10, 40]).repeat_interleave(6)
    logits = scales[:, None] * torch.randn(60, vocab)
    return logits.bfloat16().float() if tied else logits


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("vocab", [1, 2, 300, 1200, 5000, 20_000])
def test_nuclei_are_those_of_the_sampler_for_the_same_uniforms(vocab, tied):
    logits, uniform = rows_of_all_kinds(vocab, tied), torch.rand(60)
    uniform[::7], uniform[1::7] = 0.0, 1 - 2**-24
    for top_p, temperature in itertools.product([1e-6, 0.5, 0.9, 0.99, 1.0], [1.0, 1.7]):
        probs = (logits / temperature).softmax(dim=-1)
        want = sample_nucleus(logits[None], uniform[None], top_p, temperature)[0]
        assert torch.equal(draw_by_rank(probs, uniform, None, top_p), want)
        if vocab <= 1200:
            got = sampled(logits, uniform, top_p=top_p, temperature=temperature)
            assert torch.equal(got, want)


def test_most_rows_are_decided_without_a_sort(monkeypatch):
    sizes = []
    ranking = head._ranking
    monkeypatch.setattr(head, "_ranking", lambda p, size: sizes.append(size) or ranking(p, size))
    peaked = (6 * torch.randn(20, 20_000)).softmax(dim=-1)
    draw_by_rank(peaked, torch.rand(20), None, 0.9)
    assert set(sizes) == {head.FIRST_PREFIX}
    sizes.clear()
    draw_by_rank(torch.cat([peaked, torch.ones(1, 20_000) / 20_000]), torch.rand(21), None, 0.9)
    assert sizes == [256, 4096, 20_000]  # one row went on


@pytest.mark.parametrize("vocab", [300, 5000, 20_000])
def test_exactly_k_tokens_stay_and_equal_ones_by_rising_id(vocab):
    logits = rows_of_all_kinds(vocab, True)
    order = logits.sort(dim=-1, descending=True, stable=True).indices
    probs = logits.softmax(dim=-1)
    for top_k in (1, 7, 130, 299):
        last = draw_by_rank(probs, torch.full((60,), 1 - 2**-24), top_k, None)
        first = draw_by_rank(probs, torch.zeros(60), top_k, None)
        ranked = probs.sort(dim=-1, descending=True, stable=True)
        assert torch.equal(first, ranked.indices[:, 0])
        # the last token of the k that has any mass left in float32
        sums = ranked.values[:, :top_k].cumsum(dim=-1)
        place = (sums < sums[:, -1:]).sum(dim=-1, keepdim=True)
        assert torch.equal(last, ranked.indices.gather(1, place)[:, 0])
    assert torch.equal(order[:6, :3], torch.arange(3).expand(6, 3))  # the flat rows are all ties


@pytest.mark.parametrize("vocab", [1, 2, 511, 512, 513, 3000])
def test_without_a_cut_tokens_are_drawn_in_the_order_of_the_vocabulary(vocab):
    probs, uniform = rows_of_all_kinds(vocab, False).softmax(dim=-1), torch.rand(60)
    assert torch.equal(draw_in_order(probs, uniform), draw_tokens(probs, uniform))
    edges = torch.zeros(60), torch.full((60,), 1 - 2**-53).double()
    assert (draw_in_order(probs, edges[1]) < vocab).all()
    for uniform in edges:
        probs[:, : vocab // 3] = 0
        probs[:, vocab - vocab // 3 :] = 0
        tokens = draw_in_order(probs, uniform)
        assert (probs.gather(1, tokens[:, None]) > 0).all()


def test_a_token_depends_on_its_own_logits_and_number_alone():
    logits, uniform = rows_of_all_kinds(700, False), torch.rand(60)
    for cut in ({}, {"top_p": 0.9}, {"top_k": 20}):
        together = sampled(logits, uniform, **cut)
        for row in range(0, 60, 7):
            part = slice(row, row + 1)
            assert torch.equal(sampled(logits[part], uniform[part], **cut), together[part])


def test_a_sampled_token_s_log_probability_is_that_of_the_plain_softmax():
    logits, uniform = rows_of_all_kinds(700, False), torch.rand(60)
    got = vocabulary_sweep(
        logits, torch.eye(700), choose="sample", uniform_T=uniform, temperature=0.5, top_p=0.8
    )
    log_probs = logits.double().log_softmax(dim=-1)
    want = log_probs.gather(1, got.tokens_T[:, None])[:, 0]
    torch.testing.assert_close(got.log_prob_T.double(), want, rtol=1e-5, atol=1e-5)
    assert relative(got.entropy_T, plain_sweep(logits)[2]) < 1e-5


# --- the sweep: the likeliest tokens ---


@pytest.mark.parametrize("rows, vocab, most", [(1, 2, 1), (9, 513, 5), (7, 600, 600), (3, 20, 99)])
@pytest.mark.parametrize("options", [{}, {"choose": "sample", "temperature": 0.5, "top_p": 0.7}])
def test_the_likeliest_tokens_are_those_of_the_softmax_without_temperature(
    rows, vocab, most, options
):
    hidden, weight = torch.randn(rows, 8), torch.randn(vocab, 8)
    options = {"uniform_T": torch.rand(rows), "slab_bytes": slab_of(4, vocab), **options}
    got = vocabulary_sweep(hidden, weight, num_likeliest=most, **options)
    want, ids = (hidden @ weight.T).double().softmax(dim=-1).sort(dim=-1, descending=True)
    assert torch.equal(got.likeliest_ids_TM, ids[:, :most])
    assert got.likeliest_probs_TM.dtype == torch.float32
    torch.testing.assert_close(got.likeliest_probs_TM.double(), want[:, :most], rtol=1e-5, atol=0)
    without = vocabulary_sweep(hidden, weight, **options)
    assert all(torch.equal(one, other) for one, other in zip(got[:4], without[:4]))
    assert without.likeliest_ids_TM is without.likeliest_probs_TM is None


@pytest.mark.parametrize("choose", ["argmax", "sample"])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_the_likeliest_tokens_are_those_the_processors_leave(choose, temperature):
    hidden, weight = torch.randn(10, 8), torch.randn(600, 8)

    def keep_twenty(_, logits):
        logits[:, 20:] = -torch.inf
        return logits

    got = vocabulary_sweep(
        hidden, weight, processors=keep_twenty, num_likeliest=30, choose=choose,
        temperature=temperature, uniform_T=torch.rand(10), slab_bytes=slab_of(4, 600),
    )
    want, ids = (hidden @ weight[:20].T).double().softmax(dim=-1).sort(dim=-1, descending=True)
    assert torch.equal(got.likeliest_ids_TM[:, :20], ids)
    probs = got.likeliest_probs_TM.double()
    torch.testing.assert_close(probs[:, :20], want, rtol=1e-5, atol=0)
    assert (probs[:, 20:] == 0).all() and (got.likeliest_ids_TM[:, 20:] >= 20).all()


def test_equal_tokens_are_different_ones_among_the_likeliest():
    got = vocabulary_sweep(torch.zeros(3, 4), torch.randn(3000, 4), num_likeliest=50)
    assert all(len(set(ids.tolist())) == 50 for ids in got.likeliest_ids_TM)
    torch.testing.assert_close(got.likeliest_probs_TM, torch.full((3, 50), 1 / 3000))


# --- the sweep: processors and mistakes ---


@pytest.mark.parametrize("choose", ["argmax", "sample"])
def test_processors_steer_the_choice_and_nothing_else(choose):
    hidden, weight, uniform = torch.randn(10, 8), torch.randn(600, 8), torch.rand(10)
    options = {"choose": choose, "uniform_T": uniform, "expected_embedding_of": weight}
    plain = vocabulary_sweep(hidden, weight, slab_bytes=slab_of(4, 600), **options)
    seen = []

    def ban_even_tokens(first_row, logits):
        seen.append((first_row, len(logits)))
        assert torch.equal(logits.argmax(dim=-1), best[first_row : first_row + len(logits)])
        logits[:, ::2] = -torch.inf  # in place, as some do
        return logits

    best = (hidden @ weight.T).argmax(dim=-1)
    got = vocabulary_sweep(
        hidden, weight, slab_bytes=slab_of(4, 600), processors=ban_even_tokens, **options
    )
    assert seen == [(0, 4), (4, 4), (8, 2)]
    assert (got.tokens_T % 2 == 1).all()
    for name in ("entropy_T", "log_sum_exp_T", "embedding_TH"):
        assert torch.equal(getattr(got, name), getattr(plain, name))
    want = (hidden @ weight.T).log_softmax(dim=-1).gather(1, got.tokens_T[:, None])[:, 0]
    torch.testing.assert_close(got.log_prob_T, want, rtol=1e-5, atol=1e-5)


def test_processors_that_leave_no_token_are_refused():
    hidden, weight = torch.randn(4, 8), torch.randn(30, 8)
    for fill in (-torch.inf, math.nan):
        with pytest.raises(ValueError, match="leave every row at least one token"):
            vocabulary_sweep(hidden, weight, processors=lambda _, x: x.index_fill(0, ONE, fill))
    with pytest.raises(ValueError, match=r"must give logits \[4, 30\], got \[4, 29\]"):
        vocabulary_sweep(hidden, weight, processors=lambda _, x: x[:, 1:])


ONE = torch.tensor([1])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("options", [{}, {"choose": "sample"}, {"choose": "sample", "top_p": 0.5}])
def test_hidden_states_that_are_no_numbers_are_named(bad, options):
    hidden, weight = torch.randn(5, 8), torch.randn(3000, 8)
    hidden[3, 2] = bad
    with pytest.raises(ValueError, match="logits must be finite; 1 of 5 rows have NaN or inf"):
        vocabulary_sweep(hidden, weight, uniform_T=torch.rand(5), **options)


def test_mistakes_in_the_sweep_are_named():
    hidden, weight, half = torch.randn(4, 8), torch.randn(30, 8), torch.full((4,), 0.5)
    wrong = {
        "choose must be 'argmax' or 'sample'": {"choose": "greedy"},
        "temperature must be above 0": {"temperature": 0.0},
        "top_k must be at least 1": {"top_k": 0},
        "num_likeliest must be at least 1": {"num_likeliest": 0},
        r"top_p must be in \(0, 1\]": {"top_p": 1.2},
        "sampling needs uniform_T": {"choose": "sample"},
        r"uniform_T must be \[4\], got \[3\]": {"choose": "sample", "uniform_T": half[:3]},
        r"uniform_T must be in \[0, 1\)": {"choose": "sample", "uniform_T": half * 2},
        r"must be \[30, G\], got \[29, 8\]": {"expected_embedding_of": weight[1:]},
    }
    for message, options in wrong.items():
        with pytest.raises(ValueError, match=message):
            vocabulary_sweep(hidden, weight, **options)
    with pytest.raises(ValueError, match=r"expected hidden \[T, H\] and weight \[V, H\]"):
        vocabulary_sweep(hidden[None], weight)
