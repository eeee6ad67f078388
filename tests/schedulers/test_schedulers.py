"""Laws and golden values of the noised simplex and the re-noising sampler.

Expected values are computed here from the papers' equations in float64, not by the code under test.
"""

import json
import math

import pytest
import torch

from tess.kernels.order_statistics import embedding_moments
from tess.schedulers.presets import SCHEDULER_PRESETS
from tess.schedulers.recoverability import auto_simplex_value, recoverability_grid
from tess.schedulers.renoising import RenoisingScheduler, RenoisingSchedulerOutput, sample_nucleus
from tess.schedulers.simplex import DenseSimplex, NoisedSimplex

K = 5.0
KEYS = torch.tensor([11, -7, 2**40])
IDS = torch.tensor([[3, 1, 0, 6], [2, 2, 5, 4], [6, 0, 1, 3]])


def published(vocab_size: int, **settings) -> RenoisingScheduler:
    """TESS's settings with dense noise, whose logits can be looked at."""
    return RenoisingScheduler(
        vocab_size=vocab_size, **SCHEDULER_PRESETS["tess"] | {"noise": "dense"} | settings
    )


@pytest.fixture
def scheduler() -> RenoisingScheduler:
    return published(7)


def cosine_share(t: float, s: float = 1e-4) -> float:
    """arXiv 2102.09672, eq. 17."""
    return math.cos((t + s) / (1 + s) * math.pi / 2) ** 2 / math.cos(s / (1 + s) * math.pi / 2) ** 2


def vertices(ids: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """arXiv 2305.08379, section 3: +k on the token's coordinate, -k elsewhere."""
    simplex = torch.full((*ids.shape, vocab_size), -K, dtype=torch.float64)
    for row, column in torch.cartesian_prod(*map(torch.arange, ids.shape)).tolist():
        simplex[row, column, ids[row, column]] = K
    return simplex


# --- noised simplex ---


def test_noised_logits_are_the_forward_process(scheduler):
    noise = torch.randn(3, 4, 7)
    times = torch.tensor([0.1, 0.5, 0.93])
    got = scheduler.add_noise(IDS, times, noise)
    assert got.dtype == torch.float32
    share = torch.tensor([cosine_share(float(t)) for t in times], dtype=torch.float64)[
        :, None, None
    ]
    expected = share.sqrt() * vertices(IDS, 7) + (1 - share).sqrt() * K * noise.double()
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


def test_noise_level_can_differ_by_position(scheduler):
    noise = torch.randn(3, 4, 7)
    times = torch.rand(3, 4)
    got = scheduler.add_noise(IDS, times, noise)
    for column in range(4):
        alone = scheduler.add_noise(IDS, times[:, column], noise)
        assert torch.equal(got[:, column], alone[:, column])


@pytest.mark.parametrize("vocab_size, expected", [(50_265, 0.305), (131_072, 0.144)])
def test_clean_token_has_the_known_share_of_the_mass(vocab_size, expected):
    ids = torch.tensor([[17]])
    clean = published(vocab_size).add_noise(ids, torch.zeros(1), keys=KEYS[:1])
    share = float(clean.probabilities()[0, 0, 17])
    assert share == pytest.approx(expected, abs=5e-4)
    formula = math.exp(2 * K) / (math.exp(2 * K) + vocab_size - 1)
    assert share == pytest.approx(formula, rel=1e-4)


def test_embedding_is_the_mean_of_the_rows_and_sends_gradients(scheduler):
    weight = torch.randn(7, 5, requires_grad=True)
    noised = scheduler.add_noise(IDS, torch.full((3,), 0.3), keys=KEYS)
    exponents = noised.logits().double().exp()
    expected = exponents / exponents.sum(-1, keepdim=True) @ weight.detach().double()
    for simplex in (noised, DenseSimplex(noised.logits())):
        got = simplex.embedding(weight)
        torch.testing.assert_close(got.detach().double(), expected, rtol=1e-5, atol=1e-6)
        weight.grad = None
        got.square().sum().backward()
        assert weight.grad.abs().sum() > 0


@pytest.mark.parametrize("noise", ["dense", "order_statistics"])
def test_noise_of_an_example_ignores_batch_order_and_length(noise):
    scheduler, weight = published(100, noise=noise), torch.randn(100, 5)
    start = scheduler.initial((3, 9), KEYS)
    together = start.embedding(weight)
    short = scheduler.initial((1, 5), KEYS[1:2]).embedding(weight)
    assert torch.equal(short[0], together[1, :5])
    order = torch.tensor([2, 0])
    assert torch.equal(start.select(order).embedding(weight), together[order])
    some = start.select(torch.tensor([False, True, True]))
    assert torch.equal(some.embedding(weight), together[1:])
    assert torch.equal(some.uniforms(), start.uniforms()[1:])


def test_order_statistics_are_the_default_and_have_no_logits():
    noised = RenoisingScheduler(vocab_size=7).add_noise(IDS, torch.full((3,), 0.3), keys=KEYS)
    assert noised.noise == "order_statistics" and noised.needs_moments
    for dense in (noised.logits, noised.probabilities):
        with pytest.raises(ValueError, match='the whole simplex exists only with noise="dense"'):
            dense()
    weight = torch.randn(7, 5)
    given = noised.embedding(weight, embedding_moments(weight))
    assert torch.equal(noised.embedding(weight), given)


@pytest.mark.parametrize("num_top", [6, 7, 1000])
def test_more_order_statistics_than_tokens_are_all_of_them(num_top):
    noised = RenoisingScheduler(vocab_size=7, num_top=num_top).initial((3, 4), KEYS)
    weight = torch.eye(7, dtype=torch.float64)
    exact = RenoisingScheduler(vocab_size=7, num_top=6).initial((3, 4), KEYS).embedding(weight)
    assert torch.equal(noised.embedding(weight), exact)


@pytest.mark.parametrize("noise", ["dense", "order_statistics"])
def test_a_vocabulary_of_two_tokens_serves(noise):
    scheduler = RenoisingScheduler(vocab_size=2, simplex_value=2.0, noise=noise)
    scheduler.set_timesteps(3)
    ids = torch.tensor([[0, 1], [1, 1], [0, 0]])
    probabilities = scheduler.add_noise(ids, torch.zeros(3), keys=KEYS).embedding(torch.eye(2))
    own = probabilities.gather(-1, ids[..., None])
    torch.testing.assert_close(own, torch.full_like(own, 1 / (1 + math.exp(-4.0))))
    sample = scheduler.initial((3, 2), KEYS)
    for t in scheduler.timesteps:
        sample = scheduler.step(ids, t, sample).prev_sample
    assert torch.equal(sample.token_ids, ids)


def test_inconsistent_simplex_is_refused(scheduler):
    ones = torch.ones(3, 1)
    with pytest.raises(ValueError, match="noise must be one of order_statistics, dense, got 'x'"):
        NoisedSimplex(IDS, ones, ones, K, 7, KEYS, noise="x")
    with pytest.raises(ValueError, match="num_top must be an integer of at least 1, got 0"):
        NoisedSimplex(IDS, ones, ones, K, 7, KEYS, num_top=0)
    with pytest.raises(ValueError, match="signal_scale must be"):
        NoisedSimplex(IDS, torch.ones(3), ones, K, 7, keys=KEYS)
    with pytest.raises(ValueError, match="must have 7 rows, as the simplex has, got 8"):
        NoisedSimplex(IDS, ones, ones, K, 7, KEYS).embedding(torch.randn(8, 5))
    for ids in (IDS + 1, IDS - 1):  # padding marked by -1 too
        with pytest.raises(ValueError, match=r"token ids must be in 0\.\.6, got"):
            scheduler.add_noise(ids, torch.rand(3), keys=KEYS).embedding(torch.randn(7, 5))
        with pytest.raises(ValueError, match=r"token ids must be in 0\.\.6, got"):
            scheduler.add_noise(ids, torch.rand(3), torch.randn(3, 4, 7))


# --- sampler ---


def test_grid_runs_from_one_to_one_nth(scheduler):
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == [1.0, 0.75, 0.5, 0.25]
    assert scheduler.order == 1 and len(scheduler) == 5000


def test_step_is_algorithm_two_of_ssd_lm(scheduler):
    scheduler.set_timesteps(10)
    logits = torch.randn(3, 4, 7)
    sample = scheduler.initial((3, 4), KEYS)
    out = scheduler.step(logits, scheduler.timesteps[3], sample)  # from 0.7 to 0.6
    assert isinstance(out, RenoisingSchedulerOutput)
    assert torch.equal(out.token_ids, logits.argmax(-1))
    share = cosine_share(0.6)
    pure = scheduler.initial((3, 4), KEYS)
    noise = NoisedSimplex(
        IDS, pure.signal_scale, pure.noise_scale, 1.0, 7, KEYS, counter=1, noise="dense"
    ).logits()
    expected = (
        math.sqrt(share) * vertices(logits.argmax(-1), 7)
        + math.sqrt(1 - share) * K * noise.double()
    )
    torch.testing.assert_close(out.prev_sample.logits().double(), expected, rtol=1e-5, atol=1e-5)


def test_every_step_has_fresh_noise(scheduler):
    scheduler.set_timesteps(10)
    sample = scheduler.initial((3, 4), KEYS)
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
    keyed = scheduler.step(logits, last, scheduler.initial((3, 4), KEYS)).prev_sample.logits()
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


def test_sampled_tokens_of_an_example_ignore_batch_and_order():
    scheduler = published(50)
    scheduler.set_timesteps(10)
    logits = torch.randn(3, 6, 50)
    sample = scheduler.initial((3, 6), KEYS)
    together = scheduler.step(logits, 1.0, sample, top_p=0.9, temperature=2.0).token_ids
    order = torch.tensor([2, 0, 1])
    shuffled = scheduler.step(logits[order], 1.0, sample.select(order), top_p=0.9, temperature=2.0)
    assert torch.equal(shuffled.token_ids, together[order])
    short = scheduler.step(
        logits[1:2, :4], 1.0, scheduler.initial((1, 4), KEYS[1:2]), top_p=0.9, temperature=2.0
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
    scheduler = published(5, num_train_timesteps=100)
    scheduler.set_timesteps(100)
    sample = scheduler.initial((1, 2), KEYS[:1])
    for t in scheduler.timesteps:
        sample = scheduler.step(torch.randn(1, 2, 5), t, sample).prev_sample
    assert sample.counter == 100 and sample.noise_scale.item() == 0


@pytest.mark.parametrize("vocab_size", [2, 50, 4_096, 131_072])
@pytest.mark.parametrize("num_steps", [1, 2, 16, 200])
def test_the_recoverability_grid_is_walked_to_its_end(vocab_size, num_steps):
    k = {"simplex_value": 3.0} if vocab_size == 2 else {}
    scheduler = RenoisingScheduler(vocab_size=vocab_size, **k)
    scheduler.set_timesteps(num_steps)
    times = scheduler.timesteps
    assert times.dtype == torch.float32 and times[0] == 1 and len(times) == num_steps
    want = recoverability_grid(num_steps, scheduler.alpha_bar, vocab_size, uniform_share=0.5)
    assert torch.equal(times, want.float())
    assert [scheduler.previous_timestep(t) for t in times] == [*times[1:].tolist(), 0.0]


@pytest.mark.parametrize("kind", [list, tuple, torch.tensor])
def test_given_timesteps_are_walked(scheduler, kind):
    times = [1.0, 0.9, 0.3, 0.125]
    scheduler.set_timesteps(timesteps=kind(times))
    assert scheduler.timesteps.dtype == torch.float32 and scheduler.num_inference_steps == 4
    assert torch.equal(scheduler.timesteps, torch.tensor(times))
    assert [scheduler.previous_timestep(t) for t in times] == [
        *scheduler.timesteps[1:].tolist(),
        0.0,
    ]
    assert [scheduler.index_of(t) for t in times] == [0, 1, 2, 3]
    sample = scheduler.initial((3, 4), KEYS)
    for t in scheduler.timesteps:
        sample = scheduler.step(IDS, t, sample).prev_sample
    assert torch.equal(sample.logits().double(), vertices(IDS, 7))


@pytest.mark.parametrize(
    "times",
    [
        [],
        [[0.5, 0.2]],
        [1.1, 0.5],
        [0.5, 0.0],
        [0.5, -0.1],
        [0.2, 0.5],
        [0.5, 0.5],
        [0.5, 0.5 - 1e-7],
        [0.5, math.nan],
        [math.nan, 0.5],
        [1e-7],
        ["early", "late"],
        0.5,
    ],
)
def test_timesteps_that_do_not_fall_within_one_and_zero_are_refused(scheduler, times):
    with pytest.raises(
        ValueError, match=r"timesteps must be one or more numbers in \(0, 1\], each"
    ):
        scheduler.set_timesteps(timesteps=times)


def test_timesteps_are_given_in_one_way(scheduler):
    for given in ({}, {"num_inference_steps": 2, "timesteps": [1.0, 0.5]}):
        with pytest.raises(ValueError, match="either num_inference_steps or timesteps, not both"):
            scheduler.set_timesteps(**given)


def test_solvers_can_divide_by_both_scales():
    silent = published(7, beta_schedule="linear", beta_start=0.0)
    signal, noise = silent.scales(1e-5)  # within the first step, which adds no noise
    assert signal == 1 and 0 < noise < 1e-20
    assert silent.scales(0.0) == (1.0, 0.0)
    loud = published(7, beta_schedule="linear", beta_end=0.9)  # the product underflows
    assert 0 < loud.scales(1.0)[0] < 1e-20
    scales = published(7).scales(0.6)
    want = math.sqrt(cosine_share(0.6)), math.sqrt(1 - cosine_share(0.6))
    assert scales == pytest.approx(want, rel=1e-12)


def test_defaults_follow_the_vocabulary_and_a_preset_does_not():
    config = RenoisingScheduler(vocab_size=4_096).config
    assert config.simplex_value == auto_simplex_value(4_096)
    assert config.timestep_spacing == config.timestep_density == "recoverability"
    named = RenoisingScheduler(vocab_size=4_096, **SCHEDULER_PRESETS["vocab_aware"]).config
    assert all(named[name] == config[name] for name in config if not name.startswith("_"))
    tess = RenoisingScheduler(vocab_size=4_096, **SCHEDULER_PRESETS["tess"]).config
    assert (tess.simplex_value, tess.cosine_s, tess.num_train_timesteps) == (5.0, 1e-4, 5000)
    assert tess.timestep_spacing == tess.timestep_density == "uniform"


def test_training_times_follow_the_density():
    uniforms = torch.linspace(0.001, 1, 1000)
    assert torch.equal(published(50).training_timesteps(uniforms), uniforms)
    for share in (0.1, 0.5):
        scheduler = RenoisingScheduler(vocab_size=131_072, timestep_uniform_share=share)
        times = scheduler.training_timesteps(uniforms)
        assert torch.equal(times, scheduler.density().sample(uniforms))
        # recoverability is 99 % to 1 % in t = 0.180 .. 0.493
        inside = ((times > 0.180) & (times < 0.493)).double().mean().item()
        assert abs(inside - ((1 - share) * 0.98 + share * 0.313)) < 0.005


def test_chosen_tokens_serve_in_place_of_logits(scheduler):
    scheduler.set_timesteps(10)
    logits, sample = torch.randn(3, 4, 7), scheduler.initial((3, 4), KEYS)
    want = scheduler.step(logits, 0.7, sample)
    got = scheduler.step(logits.argmax(-1), 0.7, sample)
    assert torch.equal(got.token_ids, want.token_ids)
    assert torch.equal(got.prev_sample.logits(), want.prev_sample.logits())
    for option in ({"top_p": 0.9}, {"temperature": 0.5}):
        with pytest.raises(ValueError, match="top_p and temperature choose from logits"):
            scheduler.step(logits.argmax(-1), 0.7, sample, **option)
    for tokens in (logits.argmax(-1)[:, :3], logits.argmax(-1).int()):
        with pytest.raises(ValueError, match=r"tokens must be int64 \[3, 4\] as the sample is"):
            scheduler.step(tokens, 0.7, sample)


def test_a_sample_keeps_how_it_was_drawn(scheduler):
    scheduler.set_timesteps(10)
    start = RenoisingScheduler(vocab_size=7, simplex_value=2.5, num_top=3).initial((3, 4), KEYS)
    after = scheduler.step(IDS, 0.7, start).prev_sample
    assert (after.noise, after.num_top, after.simplex_value) == ("order_statistics", 3, 2.5)
    assert torch.equal(after.token_ids, IDS) and after.counter == 1


def test_scheduler_mistakes_are_one_sentence(scheduler):
    for steps in (0, -1, 5001):
        with pytest.raises(
            ValueError, match=f"num_inference_steps must be from 1 to 5000.*{steps}"
        ):
            scheduler.set_timesteps(steps)
    with pytest.raises(ValueError, match="set_timesteps"):
        scheduler.step(torch.randn(1, 2, 7), 1.0, torch.randn(1, 2, 7))
    scheduler.set_timesteps(4)
    sample = torch.randn(1, 2, 7)
    with pytest.raises(ValueError, match="not one of the 4 timesteps"):
        scheduler.step(sample, 0.3, sample)
    with pytest.raises(ValueError, match=r"top_p must be in \(0, 1\], got 0"):
        scheduler.step(sample, 1.0, sample, top_p=0)
    with pytest.raises(ValueError, match="temperature must be above 0"):
        scheduler.step(sample, 1.0, sample, top_p=0.9, temperature=0)
    for given in ({}, {"keys": KEYS, "noise": torch.randn(3, 4, 7)}):
        with pytest.raises(ValueError, match="needs either keys or a noise tensor, not both"):
            scheduler.add_noise(IDS, torch.rand(3), **given)
    with pytest.raises(ValueError, match=r"noise must be \[3, 4, 7\], got \[3, 4, 8\]"):
        scheduler.add_noise(IDS, torch.rand(3), torch.randn(3, 4, 8))
    for times in (torch.full((3,), 1.01), torch.full((3,), -0.1), torch.full((3,), math.nan)):
        with pytest.raises(ValueError, match=r"times must be in \[0, 1\]"):
            scheduler.add_noise(IDS, times, keys=KEYS)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"vocab_size": None}, "needs vocab_size, .* got None"),
        ({"vocab_size": 1}, "needs vocab_size, .* got 1"),
        ({"vocab_size": 2}, "automatic simplex value needs at least 3 tokens, got 2"),
        ({"simplex_value": 0.0}, "simplex_value must be above 0 and finite, got 0.0"),
        ({"simplex_value": -1.0}, "simplex_value must be above 0 and finite, got -1.0"),
        ({"simplex_value": math.nan}, "simplex_value must be above 0 and finite, got nan"),
        ({"simplex_value": "large"}, "simplex_value must be a number or \"auto\", got 'large'"),
        ({"simplex_value": math.inf}, "simplex_value must be above 0 and finite, got inf"),
        ({"simplex_value": True}, "simplex_value must be above 0 and finite, got True"),
        ({"num_top": 2.5}, "num_top must be an integer, got 2.5"),
        ({"num_train_timesteps": 0}, "num_train_timesteps must be from 1 to 1,000,000, got 0"),
        ({"timestep_spacing": "even"}, "timestep_spacing must be one of recoverability, uniform"),
        ({"timestep_density": "even"}, "timestep_density must be one of recoverability, uniform"),
        ({"lowest_timestep": 1.0}, r"lowest_timestep must be in \[0, 1\), got 1.0"),
        ({"lowest_timestep": -0.1}, r"lowest_timestep must be in \[0, 1\), got -0.1"),
        ({"timestep_uniform_share": 0.0}, r"timestep_uniform_share must be in \(0, 1\], got 0.0"),
        ({"timestep_uniform_share": 1.5}, r"timestep_uniform_share must be in \(0, 1\], got 1.5"),
        ({"noise": "sparse"}, "noise must be one of order_statistics, dense, got 'sparse'"),
        ({"num_top": 0}, "num_top must be an integer of at least 1, got 0"),
        ({"num_train_timesteps": 10**12}, "from 1 to 1,000,000, got 1000000000000"),
        ({"cosine_s": math.inf}, "cosine_s must be at least 0 and finite, got inf"),
        ({"beta_start": 0.5, "beta_end": 0.1}, "beta_start and beta_end must rise within"),
        ({"beta_end": math.nan}, "beta_start and beta_end must rise within"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        RenoisingScheduler(**{"vocab_size": 7} | settings)


def test_scheduler_saves_and_loads_its_settings(tmp_path):
    saved = published(
        7, num_train_timesteps=321, simplex_value=4.5, beta_schedule="sigmoid", num_top=5
    )
    saved.set_timesteps(7)
    saved.save_pretrained(tmp_path)
    loaded = RenoisingScheduler.from_pretrained(tmp_path)
    again = RenoisingScheduler.from_config(saved.config)
    for name in (name for name in saved.config if not name.startswith("_")):
        assert loaded.config[name] == again.config[name] == saved.config[name], name
    assert loaded.config.num_top == 5 and loaded.config.simplex_value == 4.5
    auto = RenoisingScheduler(vocab_size=4_096)
    auto.save_pretrained(tmp_path)
    kept = json.loads((tmp_path / "scheduler_config.json").read_text())["simplex_value"]
    assert kept == auto.config.simplex_value == auto_simplex_value(4_096)
    assert torch.equal(
        loaded.alpha_bar(torch.rand(5) * 0 + 0.4), saved.alpha_bar(torch.full((5,), 0.4))
    )
    assert RenoisingScheduler.from_config(saved.config).config.beta_schedule == "sigmoid"
    assert not {"device", "timesteps", "num_inference_steps"} & set(loaded.config)


def test_scaling_the_input_changes_nothing_and_tuples_are_offered(scheduler):
    scheduler.set_timesteps(2)
    sample = torch.randn(1, 2, 7)
    assert scheduler.scale_model_input(sample, 1.0) is sample
    prev, tokens = scheduler.step(sample, 1.0, sample, return_dict=False)
    assert prev.shape == (1, 2, 7) and tokens.shape == (1, 2)
