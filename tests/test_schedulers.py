"""Laws and golden values of the noise schedules, the noised simplex and the re-noising sampler.

Expected values are computed here from the papers' equations in float64, not by the code under test.
"""

import math

import pytest
import torch

from tess.schedulers.noise import SCHEDULES, alpha_bar
from tess.schedulers.renoising import RenoisingScheduler, RenoisingSchedulerOutput, sample_nucleus
from tess.schedulers.simplex import NoisedSimplex

K = 5.0
KEYS = torch.tensor([11, -7, 2**40])
IDS = torch.tensor([[3, 1, 0, 6], [2, 2, 5, 4], [6, 0, 1, 3]])


@pytest.fixture
def scheduler() -> RenoisingScheduler:
    return RenoisingScheduler()


def cosine_share(t: float, s: float = 1e-4) -> float:
    """arXiv 2102.09672, eq. 17."""
    return math.cos((t + s) / (1 + s) * math.pi / 2) ** 2 / math.cos(s / (1 + s) * math.pi / 2) ** 2


def vertices(ids: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """arXiv 2305.08379, section 3: +k on the token's coordinate, -k elsewhere."""
    simplex = torch.full((*ids.shape, vocab_size), -K, dtype=torch.float64)
    for row, column in torch.cartesian_prod(*map(torch.arange, ids.shape)).tolist():
        simplex[row, column, ids[row, column]] = K
    return simplex


# --- schedules ---


def test_improved_cosine_has_the_values_of_the_equation():
    times = [0.0, 0.1, 0.25, 0.5, 0.7342, 0.999, 1.0]
    got = alpha_bar(torch.tensor(times, dtype=torch.float64))
    expected = torch.tensor([cosine_share(t) for t in times], dtype=torch.float64)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-15)
    # a figure that can be checked by hand: cos^2(pi/4) at the middle, moved a little by s
    assert abs(float(got[3]) - 0.5) < 2e-4


def test_linear_schedules_are_the_product_over_steps():
    steps, start, end = 50, 1e-3, 0.3
    grids = {
        "linear": [start + (end - start) * i / (steps - 1) for i in range(steps)],
        "scaled_linear": [
            (start**0.5 + (end**0.5 - start**0.5) * i / (steps - 1)) ** 2 for i in range(steps)
        ],
        "sigmoid": [
            start + (end - start) / (1 + math.exp(6 - 12 * i / (steps - 1))) for i in range(steps)
        ],
    }
    for name, betas in grids.items():
        for i in (0, 1, 17, steps):
            got = alpha_bar(
                i / steps, name, num_train_timesteps=steps, beta_start=start, beta_end=end
            )
            assert float(got) == pytest.approx(math.prod(1 - b for b in betas[:i]), rel=1e-10)


def test_capped_cosine_keeps_a_thousandth_of_the_last_but_one_step():
    steps = 40
    for i in (0, 1, 20, 39):
        got = float(alpha_bar(i / steps, "squaredcos_cap_v2", num_train_timesteps=steps))
        assert got == pytest.approx(cosine_share(i / steps), rel=1e-10)
    last = float(alpha_bar(1.0, "squaredcos_cap_v2", num_train_timesteps=steps))
    assert last == pytest.approx(0.001 * cosine_share(39 / steps), rel=1e-10)


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_start_clean_and_never_rise(name):
    times = torch.linspace(0, 1, 501)
    share = alpha_bar(times, name)
    assert share.dtype == torch.float32 and share[0] == 1
    assert (share[1:] <= share[:-1]).all() and 0 <= share[-1] < 1e-3


def test_schedule_mistakes_are_named():
    with pytest.raises(ValueError, match="unknown noise schedule 'cosin'; known are squaredcos"):
        alpha_bar(0.5, "cosin")
    with pytest.raises(ValueError, match=r"times must be in \[0, 1\]"):
        alpha_bar(torch.tensor([0.5, 1.5]))
    with pytest.raises(ValueError, match="unknown beta_schedule 'cosin'"):
        RenoisingScheduler(beta_schedule="cosin")


# --- noised simplex ---


def test_noised_logits_are_the_forward_process(scheduler):
    noise = torch.randn(3, 4, 7)
    times = torch.tensor([0.1, 0.5, 0.93])
    got = scheduler.add_noise(IDS, times, noise).logits()
    assert got.dtype == torch.float32
    share = torch.tensor([cosine_share(float(t)) for t in times], dtype=torch.float64)[
        :, None, None
    ]
    expected = share.sqrt() * vertices(IDS, 7) + (1 - share).sqrt() * K * noise.double()
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


def test_noise_level_can_differ_by_position(scheduler):
    noise = torch.randn(3, 4, 7)
    times = torch.rand(3, 4)
    got = scheduler.add_noise(IDS, times, noise).logits()
    for column in range(4):
        alone = scheduler.add_noise(IDS, times[:, column], noise).logits()
        assert torch.equal(got[:, column], alone[:, column])


@pytest.mark.parametrize("vocab_size, expected", [(50_265, 0.305), (131_072, 0.144)])
def test_clean_token_has_the_known_share_of_the_mass(scheduler, vocab_size, expected):
    ids = torch.tensor([[17]])
    clean = scheduler.add_noise(ids, torch.zeros(1), keys=KEYS[:1], vocab_size=vocab_size)
    share = float(clean.probabilities()[0, 0, 17])
    assert share == pytest.approx(expected, abs=5e-4)
    formula = math.exp(2 * K) / (math.exp(2 * K) + vocab_size - 1)
    assert share == pytest.approx(formula, rel=1e-4)


def test_embedding_is_the_mean_of_the_rows_and_sends_gradients(scheduler):
    weight = torch.randn(7, 5, requires_grad=True)
    noised = scheduler.add_noise(IDS, torch.full((3,), 0.3), torch.randn(3, 4, 7))
    got = noised.embedding(weight)
    exponents = noised.logits().double().exp()
    expected = exponents / exponents.sum(-1, keepdim=True) @ weight.detach().double()
    torch.testing.assert_close(got.detach().double(), expected, rtol=1e-5, atol=1e-6)
    got.square().sum().backward()
    assert weight.grad.abs().sum() > 0


def test_keyed_noise_of_an_example_ignores_batch_order_and_length(scheduler):
    together = scheduler.initial((3, 9), 100, KEYS).logits()
    assert torch.equal(scheduler.initial((1, 5), 100, KEYS[1:2]).logits()[0], together[1, :5])
    order = torch.tensor([2, 0])
    assert torch.equal(scheduler.initial((3, 9), 100, KEYS).select(order).logits(), together[order])
    assert torch.equal(
        scheduler.initial((3, 9), 100, KEYS).select(torch.tensor([False, True, True])).logits(),
        together[1:],
    )


def test_inconsistent_simplex_is_refused():
    ones = torch.ones(3, 1)
    with pytest.raises(ValueError, match="either keys or a noise tensor"):
        NoisedSimplex(IDS, ones, ones, K, 7)
    with pytest.raises(ValueError, match="noise must be"):
        NoisedSimplex(IDS, ones, ones, K, 7, noise=torch.zeros(3, 4, 8))
    with pytest.raises(ValueError, match="signal_scale must be"):
        NoisedSimplex(IDS, torch.ones(3), ones, K, 7, keys=KEYS)


# --- sampler ---


def test_grid_runs_from_one_to_one_nth(scheduler):
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == [1.0, 0.75, 0.5, 0.25]
    assert scheduler.order == 1 and len(scheduler) == 5000


def test_step_is_algorithm_two_of_ssd_lm(scheduler):
    scheduler.set_timesteps(10)
    logits = torch.randn(3, 4, 7)
    sample = scheduler.initial((3, 4), 7, KEYS)
    out = scheduler.step(logits, scheduler.timesteps[3], sample)  # from 0.7 to 0.6
    assert isinstance(out, RenoisingSchedulerOutput)
    assert torch.equal(out.token_ids, logits.argmax(-1))
    share = cosine_share(0.6)
    pure = scheduler.initial((3, 4), 7, KEYS)
    noise = NoisedSimplex(
        IDS, pure.signal_scale, pure.noise_scale, 1.0, 7, KEYS, counter=1
    ).logits()
    expected = (
        math.sqrt(share) * vertices(logits.argmax(-1), 7)
        + math.sqrt(1 - share) * K * noise.double()
    )
    torch.testing.assert_close(out.prev_sample.logits().double(), expected, rtol=1e-5, atol=1e-5)


def test_every_step_has_fresh_noise(scheduler):
    scheduler.set_timesteps(10)
    sample = scheduler.initial((3, 4), 7, KEYS)
    logits = torch.randn(3, 4, 7)
    once = scheduler.step(logits, 1.0, sample).prev_sample
    twice = scheduler.step(logits, 0.9, once).prev_sample
    assert (once.counter, twice.counter) == (1, 2)
    noises = [
        (s.logits() - s.signal_scale[..., None] * vertices(s.token_ids, 7)) / s.noise_scale[0] / K
        for s in (sample, once, twice)
    ]
    assert not torch.allclose(noises[0], noises[1], atol=0.1)
    assert not torch.allclose(noises[1], noises[2], atol=0.1)


def test_last_step_lands_on_the_vertex(scheduler):
    scheduler.set_timesteps(3)
    logits = torch.randn(3, 4, 7)
    last = scheduler.timesteps[-1]
    keyed = scheduler.step(logits, last, scheduler.initial((3, 4), 7, KEYS)).prev_sample.logits()
    dense = scheduler.step(logits, last, torch.randn(3, 4, 7)).prev_sample
    assert torch.equal(keyed.double(), vertices(logits.argmax(-1), 7))
    assert torch.equal(dense.double(), vertices(logits.argmax(-1), 7))


def test_dense_samples_draw_from_the_generator(scheduler):
    scheduler.set_timesteps(10)
    logits, sample = torch.randn(3, 4, 7), K * torch.randn(3, 4, 7)
    draws = [
        scheduler.step(
            logits, 0.7, sample, top_p=0.9, generator=torch.Generator().manual_seed(seed)
        )
        for seed in (0, 0, 1)
    ]
    assert torch.equal(draws[0].prev_sample, draws[1].prev_sample)
    assert not torch.equal(draws[0].prev_sample, draws[2].prev_sample)


def test_sampled_tokens_of_an_example_ignore_batch_and_order(scheduler):
    scheduler.set_timesteps(10)
    logits = torch.randn(3, 6, 50)
    sample = scheduler.initial((3, 6), 50, KEYS)
    together = scheduler.step(logits, 1.0, sample, top_p=0.9, temperature=2.0).token_ids
    order = torch.tensor([2, 0, 1])
    shuffled = scheduler.step(logits[order], 1.0, sample.select(order), top_p=0.9, temperature=2.0)
    assert torch.equal(shuffled.token_ids, together[order])
    short = scheduler.step(
        logits[1:2, :4], 1.0, scheduler.initial((1, 4), 50, KEYS[1:2]), top_p=0.9, temperature=2.0
    )
    assert torch.equal(short.token_ids[0], together[1, :4])


def test_nucleus_is_the_smallest_set_that_reaches_the_mass():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(1, 20_000, 4)
    draws = torch.rand(1, 20_000)
    tokens = sample_nucleus(logits, draws, top_p=0.7, temperature=1.0)
    assert set(tokens.unique().tolist()) == {0, 1}  # 0.5 is short of 0.7, 0.5 + 0.3 is not
    share = (tokens == 0).double().mean().item()
    assert abs(share - 0.5 / 0.8) < 5 * math.sqrt(0.24 / 20_000)
    assert (sample_nucleus(logits, draws, top_p=1e-6, temperature=1.0) == 0).all()


def test_nucleus_without_a_limit_samples_the_tempered_softmax():
    logits = torch.randn(5)
    tokens = sample_nucleus(logits.expand(1, 40_000, 5), torch.rand(1, 40_000), 1.0, 2.0)
    expected = (logits.double() / 2).exp() / (logits.double() / 2).exp().sum()
    got = torch.bincount(tokens.flatten(), minlength=5) / 40_000
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=0.015)


def test_as_many_steps_as_in_training_visit_the_training_times():
    scheduler = RenoisingScheduler(num_train_timesteps=100)
    scheduler.set_timesteps(100)
    sample = scheduler.initial((1, 2), 5, KEYS[:1])
    for t in scheduler.timesteps:
        sample = scheduler.step(torch.randn(1, 2, 5), t, sample).prev_sample
    assert sample.counter == 100 and sample.noise_scale.item() == 0


def test_scheduler_mistakes_are_one_sentence(scheduler):
    for steps in (0, -1, 5001):
        with pytest.raises(
            ValueError, match=f"num_inference_steps must be from 1 to 5000.*{steps}"
        ):
            scheduler.set_timesteps(steps)
    with pytest.raises(ValueError, match="set_timesteps"):
        scheduler.step(torch.randn(1, 2, 5), 1.0, torch.randn(1, 2, 5))
    scheduler.set_timesteps(4)
    sample = torch.randn(1, 2, 5)
    with pytest.raises(ValueError, match="not one of the 4 timesteps"):
        scheduler.step(sample, 0.3, sample)
    with pytest.raises(ValueError, match=r"top_p must be in \(0, 1\], got 0"):
        scheduler.step(sample, 1.0, sample, top_p=0)
    with pytest.raises(ValueError, match="temperature must be above 0"):
        scheduler.step(sample, 1.0, sample, top_p=0.9, temperature=0)
    with pytest.raises(ValueError, match="needs vocab_size"):
        scheduler.add_noise(IDS, torch.rand(3), keys=KEYS)
    with pytest.raises(ValueError, match="simplex_value must be above 0"):
        RenoisingScheduler(simplex_value=0.0)


def test_scheduler_saves_and_loads_its_settings(tmp_path):
    saved = RenoisingScheduler(num_train_timesteps=321, simplex_value=4.5, beta_schedule="sigmoid")
    saved.set_timesteps(7)
    saved.save_pretrained(tmp_path)
    loaded = RenoisingScheduler.from_pretrained(tmp_path)
    assert loaded.config.num_train_timesteps == 321 and loaded.config.simplex_value == 4.5
    assert torch.equal(
        loaded.alpha_bar(torch.rand(5) * 0 + 0.4), saved.alpha_bar(torch.full((5,), 0.4))
    )
    assert RenoisingScheduler.from_config(saved.config).config.beta_schedule == "sigmoid"
    assert not {"device", "timesteps", "num_inference_steps"} & set(loaded.config)


def test_scaling_the_input_changes_nothing_and_tuples_are_offered(scheduler):
    scheduler.set_timesteps(2)
    sample = torch.randn(1, 2, 5)
    assert scheduler.scale_model_input(sample, 1.0) is sample
    prev, tokens = scheduler.step(sample, 1.0, sample, return_dict=False)
    assert prev.shape == (1, 2, 5) and tokens.shape == (1, 2)
