"""Laws of the samplers that carry soft predictions: DDIM, Euler's flow, DPM-Solver++.

Convergence is measured on denoisers whose flow is known; expected values are computed here from the
papers' equations in float64.
"""

# B examples, L positions, V vocabulary, N steps

import itertools
import math

import pytest
import torch
from torch import Tensor

from tess.schedulers import dpm_solver
from tess.schedulers.carried import CarriedSimplex
from tess.schedulers.ddim import SimplexDDIMScheduler, ddim_factors
from tess.schedulers.dpm_solver import SimplexDPMSolverScheduler
from tess.schedulers.euler import SimplexEulerScheduler
from tess.schedulers.renoising import RenoisingScheduler
from tess.schedulers.simplex import DenseSimplex, SoftTokens

K, V = 2.0, 5
KEYS = torch.tensor([11, -7, 2**40])
SOFT = (SimplexDDIMScheduler, SimplexEulerScheduler, SimplexDPMSolverScheduler)
# every way of sampling, by its settings
WAYS = [
    (SimplexDDIMScheduler, {}),
    (SimplexDDIMScheduler, {"eta": 0.5}),
    (SimplexDDIMScheduler, {"eta": 1.0}),
    (SimplexEulerScheduler, {}),
    (SimplexEulerScheduler, {"stochastic_sampling": True}),
    (SimplexDPMSolverScheduler, {"solver_order": 1}),
    (SimplexDPMSolverScheduler, {}),
]
DETERMINISTIC = [WAYS[0], WAYS[3], WAYS[5], WAYS[6]]


def dense(kind, vocab_size: int = V, **settings):
    """With a small simplex whose values can be looked at."""
    given = {"vocab_size": vocab_size, "simplex_value": K, "noise": "dense"}
    return kind(**given | settings)


def logits_of(values: Tensor) -> Tensor:
    """Some denoiser, one multiplication: an example's values are the same bits in every batch."""
    return values * 0.7


def sample_with(scheduler, sample, denoiser=logits_of):
    """The sample after all timesteps."""
    for t in scheduler.timesteps:
        values = sample if isinstance(sample, Tensor) else sample.values
        sample = scheduler.step(denoiser(values), t, sample).prev_sample
    return sample


# --- order of convergence ---

START, END = 0.9, 0.25  # times between which the flow is solved
STEPS = (60, 120, 240)
PRIOR = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05], dtype=torch.float64)
MEAN, SPREAD = 0.3, 1.4  # of the Gaussian prior


def share_at(t: float, s: float = 1e-4) -> float:
    """The schedule's alpha_bar (arXiv 2102.09672, eq. 17)."""
    return math.cos((t + s) / (1 + s) * math.pi / 2) ** 2 / math.cos(s / (1 + s) * math.pi / 2) ** 2


def log_snr(t: float) -> float:
    share = share_at(t)
    return 0.5 * math.log(share / (1 - share))


def time_at(snr: float, s: float = 1e-4) -> float:
    """Inverse of `log_snr`."""
    signal = math.sqrt(1 / (1 + math.exp(-2 * snr))) * math.cos(s / (1 + s) * math.pi / 2)
    return math.acos(signal) * 2 / math.pi * (1 + s) - s


def grid(num_steps: int, spacing: str) -> list[float]:
    """N + 1 times from START to END, by steps in lambda: equal ones, or short and long in turn."""
    first, last = log_snr(START), log_snr(END)
    lengths = [1.0, 1.0] if spacing == "equal" else [1.0, 3.0]
    steps = list(itertools.islice(itertools.cycle(lengths), num_steps))
    ends = [sum(steps[:i]) / sum(steps) for i in range(num_steps + 1)]
    return [time_at(first + (last - first) * end) for end in ends]


def posterior_logits(values: Tensor, share: float) -> Tensor:
    """Exact logits of a token of law PRIOR, given x = sqrt(a) S + sqrt(1 - a) k eps."""
    return PRIOR.log() + 2 * math.sqrt(share) * values / (K * (1 - share))


def categorical_flow(start: Tensor, first: float, last: float, num_steps: int = 500) -> Tensor:
    """x at log-SNR `last` from x at `first`, by Runge-Kutta steps of fourth order.

    The probability flow of z = x / sqrt(1 - a) is dz/dlambda = e^lambda x0 (arXiv 2206.00927).
    """

    def slope(z: Tensor, snr: float) -> Tensor:
        share = 1 / (1 + math.exp(-2 * snr))
        p = posterior_logits(z * math.sqrt(1 - share), share).softmax(-1)
        return math.exp(snr) * (2 * K * p - K)

    h = (last - first) / num_steps
    z = start * math.sqrt(1 + math.exp(2 * first))
    for i in range(num_steps):
        snr = first + i * h
        one = slope(z, snr)
        two = slope(z + h / 2 * one, snr + h / 2)
        three = slope(z + h / 2 * two, snr + h / 2)
        four = slope(z + h * three, snr + h)
        z = z + h / 6 * (one + 2 * two + 2 * three + four)
    return z / math.sqrt(1 + math.exp(2 * last))


def gaussian_mean(values: Tensor, share: float) -> Tensor:
    """E[x0 | x] of x0 with independent N(MEAN, SPREAD^2) coordinates."""
    signal = math.sqrt(share)
    gain = signal * SPREAD**2 / (share * SPREAD**2 + (1 - share) * K**2)
    return MEAN + gain * (values - signal * MEAN)


def gaussian_flow(start: Tensor, first: float, last: float) -> Tensor:
    """x at time `last`: the flow keeps every coordinate's quantile."""
    one, two = (
        math.sqrt(share_at(t) * SPREAD**2 + (1 - share_at(t)) * K**2) for t in (first, last)
    )
    begin, end = (math.sqrt(share_at(t)) * MEAN for t in (first, last))
    return end + two / one * (start - begin)


def measured_order(kind, settings: dict, prior: str, spacing: str = "equal") -> float:
    """Slope of the log error at END against the log of the step, by least squares."""
    exact_kind = {"categorical": "logits", "gaussian": "sample"}[prior]
    scheduler = dense(kind, prediction_type=exact_kind, **settings)
    start = K * torch.randn(1, 8, V, dtype=torch.float64)
    errors = []
    for num_steps in STEPS:
        scheduler.set_timesteps(timesteps=grid(num_steps, spacing))
        times = scheduler.timesteps.double().tolist()
        sample = DenseSimplex(start)
        for t in times[:-1]:
            model = posterior_logits if prior == "categorical" else gaussian_mean
            sample = scheduler.step(model(sample.values, share_at(t)), t, sample).prev_sample
        assert sample.values.dtype == torch.float64
        if prior == "categorical":
            want = categorical_flow(start, log_snr(times[0]), log_snr(times[-1]))
        else:
            want = gaussian_flow(start, times[0], times[-1])
        errors.append((sample.values - want).abs().max().item())
    x = torch.tensor(STEPS, dtype=torch.float64).log()
    y = torch.tensor(errors, dtype=torch.float64).log()
    return -float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


def without_correction(scales):
    """A wrong solver: the earlier prediction has no part."""
    return dpm_solver_factors(scales[-2:])


def for_equal_steps(scales):
    """A wrong solver: r = 1, whatever the steps."""
    scale, factors = dpm_solver_factors(scales)
    return scale, [1.5 * sum(factors), -0.5 * sum(factors)] if len(factors) == 2 else factors


dpm_solver_factors = dpm_solver.dpm_solver_factors


@pytest.mark.parametrize("prior", ["categorical", "gaussian"])
@pytest.mark.parametrize("kind, settings", DETERMINISTIC)
def test_errors_fall_with_the_order_of_the_method(kind, settings, prior):
    expected = 2 if (kind, settings) == WAYS[6] else 1
    assert abs(measured_order(kind, settings, prior) - expected) < 0.15


@pytest.mark.parametrize("prior", ["categorical", "gaussian"])
def test_second_order_holds_where_steps_differ(prior):
    assert abs(measured_order(SimplexDPMSolverScheduler, {}, prior, "in turn") - 2) < 0.15


@pytest.mark.parametrize(
    "wrong, spacing", [(without_correction, "equal"), (for_equal_steps, "in turn")]
)
@pytest.mark.parametrize("prior", ["categorical", "gaussian"])
def test_a_wrong_second_order_is_seen(monkeypatch, wrong, spacing, prior):
    monkeypatch.setattr(dpm_solver, "dpm_solver_factors", wrong)
    order = measured_order(SimplexDPMSolverScheduler, {}, prior, spacing)
    assert order < 2 - 0.5


# --- single steps ---


def test_the_second_order_step_is_the_algorithm_of_the_paper():
    """arXiv 2211.01095, algorithm 2, lines 5 to 9, at times whose steps differ."""
    scheduler, times = dense(SimplexDPMSolverScheduler), [0.7, 0.5, 0.42]
    scheduler.set_timesteps(timesteps=times)
    sample = DenseSimplex(torch.randn(2, 3, V, dtype=torch.float64))
    predictions = torch.randn(2, 2, 3, V, dtype=torch.float64)
    clean = 2 * K * predictions.softmax(-1) - K
    before = scheduler.step(predictions[0], times[0], sample).prev_sample
    got = scheduler.step(predictions[1], times[1], before).prev_sample.values
    t_2, t_1, t_0 = scheduler.timesteps.tolist()  # as float32 has them
    h_before, h = log_snr(t_1) - log_snr(t_2), log_snr(t_0) - log_snr(t_1)
    r = h_before / h
    direction = (1 + 1 / (2 * r)) * clean[1] - 1 / (2 * r) * clean[0]
    a, sigma_ratio = share_at(t_0), math.sqrt((1 - share_at(t_0)) / (1 - share_at(t_1)))
    want = sigma_ratio * before.values - math.sqrt(a) * (math.exp(-h) - 1) * direction
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind, settings", DETERMINISTIC)
def test_a_prediction_that_stays_is_solved_exactly(kind, settings):
    scheduler = dense(kind, **settings)
    scheduler.set_timesteps(6)
    logits = 3 * torch.randn(2, 3, V, dtype=torch.float64)
    clean = 2 * K * logits.softmax(-1) - K
    noise = K * torch.randn(2, 3, V, dtype=torch.float64)
    sample = DenseSimplex(noise)
    for t in scheduler.timesteps:
        then = scheduler.previous_timestep(t)
        sample = scheduler.step(logits, t, sample).prev_sample
        share = share_at(then)
        want = math.sqrt(share) * clean + math.sqrt(1 - share) * noise
        torch.testing.assert_close(sample.values, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("spacing", ["uniform", "recoverability"])
def test_the_deterministic_euler_flow_is_ddim(spacing):
    """So is DPM-Solver++ of first order (arXiv 2211.01095, section 4)."""
    start = K * torch.randn(2, 3, V, dtype=torch.float64)
    ends = []
    for kind, settings in DETERMINISTIC:
        scheduler = dense(kind, timestep_spacing=spacing, **settings)
        scheduler.set_timesteps(timesteps=[1.0, 0.8, 0.5, 0.2])
        states = [DenseSimplex(start)]
        for t in scheduler.timesteps:
            states.append(scheduler.step(logits_of(states[-1].values), t, states[-1]).prev_sample)
        ends.append(torch.stack([state.values for state in states]))
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ends[2], ends[0], rtol=1e-12, atol=1e-12)
    assert (ends[3] - ends[0]).abs().max() > 1e-2  # second order is another method


@pytest.mark.parametrize("kind, settings", WAYS)
@pytest.mark.parametrize("num_steps", [1, 2, 3, 16])
def test_the_last_step_lands_on_the_last_prediction(kind, settings, num_steps):
    scheduler = dense(kind, **settings)
    scheduler.set_timesteps(num_steps)
    sample = scheduler.initial((3, 4), KEYS)
    for t in scheduler.timesteps:
        assert sample.values.isfinite().all()
        out = scheduler.step(logits_of(sample.values), t, sample)
        sample = out.prev_sample
    assert torch.equal(sample.values, out.pred_original_sample)
    assert sample.counter == num_steps and sample.values.dtype == torch.float32


def ks(a: Tensor, b: Tensor) -> float:
    """sup |F_a - F_b| over its bound: above 1 with probability 1e-3 for equal laws."""
    both = torch.cat([a, b])
    order = both.argsort()
    sign = torch.cat([torch.full_like(a, 1 / len(a)), torch.full_like(b, -1 / len(b))])
    return float(sign[order].cumsum(0).abs().max()) / (1.95 * math.sqrt(1 / len(a) + 1 / len(b)))


WIDE = 40_000  # values of one position, for statistics


def one_step(kind, settings, values: Tensor, clean: Tensor, t: float, then: float) -> Tensor:
    scheduler = dense(kind, WIDE, prediction_type="sample", **settings)
    scheduler.set_timesteps(timesteps=[t, then])
    sample = DenseSimplex(values, keys=KEYS[:1], counter=4)
    return scheduler.step(clean, t, sample).prev_sample.values.flatten()


def test_eta_one_is_the_ancestral_step():
    """The posterior of arXiv 2006.11239, equations 6 and 7, between shares a > a'."""
    t, then = 0.7, 0.55
    share, next_share = share_at(t), share_at(then)
    ratio = share / next_share  # alpha_t of a chain with just these two times
    values, clean = torch.randn(1, 1, WIDE), torch.randn(1, 1, WIDE)
    mean = (
        math.sqrt(next_share) * (1 - ratio) / (1 - share) * clean
        + math.sqrt(ratio) * (1 - next_share) / (1 - share) * values
    )
    deviation = K * math.sqrt((1 - next_share) / (1 - share) * (1 - ratio))
    scales = [(math.sqrt(a), math.sqrt(1 - a)) for a in (share, next_share)]
    scale, factor, sigma = ddim_factors(*scales, eta=1.0)
    assert sigma * K == pytest.approx(deviation, rel=1e-12)
    torch.testing.assert_close(factor * clean + scale * values, mean, rtol=1e-5, atol=1e-5)

    want = (mean + deviation * torch.randn(1, 1, WIDE)).flatten()
    steps = {
        eta: one_step(SimplexDDIMScheduler, {"eta": eta}, values, clean, t, then)
        for eta in (0.8, 1.0)
    }
    assert ks(steps[1.0], want) < 1
    rest = {eta: step - mean.flatten() for eta, step in steps.items()}
    noise = deviation * torch.randn(WIDE)
    assert ks(rest[1.0], noise) < 1 < ks(rest[0.8], noise)


@pytest.mark.parametrize("kind, settings", WAYS)
def test_a_step_towards_the_truth_has_the_marginal_of_the_next_time(kind, settings):
    """From x ~ q(x_t | x0) and x0 itself every sampler gives q(x_t' | x0)."""
    t, then = 0.6, 0.4
    clean = torch.full((1, 1, WIDE), K)
    share, next_share = share_at(t), share_at(then)
    values = math.sqrt(share) * clean + math.sqrt(1 - share) * K * torch.randn(1, 1, WIDE)
    got = one_step(kind, settings, values, clean, t, then)
    want = math.sqrt(next_share) * K + math.sqrt(1 - next_share) * K * torch.randn(WIDE)
    wrong = math.sqrt(next_share) * K + (1 - next_share) * K * torch.randn(WIDE)
    assert ks(got, want) < 1 < ks(got, wrong)


def test_stochastic_sampling_forgets_the_old_noise():
    t, then = 0.6, 0.4
    clean, values = torch.zeros(1, 1, WIDE), torch.randn(1, 1, WIDE)
    got = {
        stochastic: one_step(
            SimplexEulerScheduler, {"stochastic_sampling": stochastic}, values, clean, t, then
        )
        for stochastic in (False, True)
    }
    shared = {s: torch.corrcoef(torch.stack([got[s], values.flatten()]))[0, 1] for s in got}
    assert shared[False] > 0.999 and abs(shared[True]) < 4 / math.sqrt(WIDE)


# --- samples ---


@pytest.mark.parametrize("kind", SOFT)
def test_all_samplers_start_from_the_same_noise(kind):
    start = dense(kind, 51).initial((3, 9), KEYS)
    assert torch.equal(start.values, dense(RenoisingScheduler, 51).initial((3, 9), KEYS).logits())
    assert (start.counter, start.simplex_value, start.history) == (0, K, ())


@pytest.mark.parametrize("kind, settings", WAYS)
def test_an_example_ignores_batch_order_length_and_what_left(kind, settings):
    scheduler = dense(kind, 51, **settings)
    scheduler.set_timesteps(4)
    start = scheduler.initial((3, 9), KEYS)
    together = sample_with(scheduler, start)
    order = torch.tensor([2, 0])
    assert torch.equal(sample_with(scheduler, start.select(order)).values, together.values[order])
    short = sample_with(scheduler, scheduler.initial((1, 5), KEYS[1:2]))
    assert torch.equal(short.values[0], together.values[1, :5])
    assert torch.equal(short.uniforms()[0], together.uniforms()[1, :5])

    left = start  # the batch shrinks while it is sampled
    for index, t in enumerate(scheduler.timesteps):
        left = scheduler.step(logits_of(left.values), t, left).prev_sample
        if index == 1:
            left = left.select(torch.tensor([False, True, True]))
    assert torch.equal(left.values, together.values[1:]) and torch.equal(left.keys, KEYS[1:])


def test_history_goes_with_the_rows_and_only_as_far_as_it_holds():
    scheduler = dense(SimplexDPMSolverScheduler)
    scheduler.set_timesteps(4)
    logits, sample = torch.randn(3, 4, V), scheduler.initial((3, 4), KEYS)
    out = scheduler.step(logits, 1.0, sample)
    assert len(out.prev_sample.history) == 1 and sample.history == ()
    assert torch.equal(out.prev_sample.history[0], out.pred_original_sample)
    some = out.prev_sample.select([2, 0])
    assert torch.equal(some.history[0], out.pred_original_sample[[2, 0]])
    # a sampler without memory leaves none to whoever comes next
    other = dense(SimplexDDIMScheduler)
    other.set_timesteps(4)
    assert other.step(logits, other.timesteps[1], out.prev_sample).prev_sample.history == ()
    # a grid that starts anew has no step before
    again = scheduler.step(logits, 1.0, out.prev_sample).prev_sample
    bare = scheduler.step(logits, 1.0, DenseSimplex(out.prev_sample.values)).prev_sample
    assert torch.equal(again.values, bare.values)


@pytest.mark.parametrize("kind, settings", [way for way in WAYS if way is not WAYS[6]])
def test_a_tensor_gives_a_tensor(kind, settings):
    scheduler = dense(kind, **settings)
    scheduler.set_timesteps(4)
    sample, logits = K * torch.randn(2, 3, V), torch.randn(2, 3, V)
    first, second, other = (
        scheduler.step(logits, 1.0, sample, generator=torch.Generator().manual_seed(seed))
        for seed in (0, 0, 1)
    )
    assert isinstance(first.prev_sample, Tensor)
    assert torch.equal(first.prev_sample, second.prev_sample)
    random = settings.get("eta", 0) > 0 or settings.get("stochastic_sampling", False)
    assert torch.equal(first.prev_sample, other.prev_sample) != random
    prev, clean = scheduler.step(logits, 1.0, sample, return_dict=False)
    assert prev.shape == sample.shape
    torch.testing.assert_close(clean, 2 * K * logits.softmax(-1) - K)


def test_fresh_noise_is_another_one_at_every_step():
    scheduler = dense(SimplexEulerScheduler, WIDE, stochastic_sampling=True)
    scheduler.set_timesteps(timesteps=[1.0, 0.99, 0.98])
    states = [scheduler.initial((1, 1), KEYS[:1])]
    for t in scheduler.timesteps[:2]:
        states.append(scheduler.step(torch.zeros(1, 1, WIDE), t, states[-1]).prev_sample)
    correlations = torch.corrcoef(torch.stack([s.values.flatten() for s in states]))
    assert (correlations - torch.eye(3)).abs().max() < 4 / math.sqrt(WIDE)


# --- without the vocabulary ---


def soft_tokens(logits: Tensor, num: int) -> SoftTokens:
    top = logits.softmax(-1).topk(num, dim=-1)
    return SoftTokens(top.indices, top.values)


@pytest.mark.parametrize("kind, settings", [*DETERMINISTIC, WAYS[4]])
def test_order_statistics_carry_the_same_signal(kind, settings):
    """The weights of a carried simplex and the dense values move by the same factors."""
    carried, whole = kind(vocab_size=V, simplex_value=K, **settings), dense(kind, **settings)
    assert carried.reads == "soft_tokens" and whole.reads == "logits"
    for scheduler in (carried, whole):
        scheduler.set_timesteps(5)
    sample = carried.initial((3, 4), KEYS)
    silent = DenseSimplex(torch.zeros(3, 4, V), keys=KEYS)  # the signal alone
    assert isinstance(sample, CarriedSimplex) and sample.simplex_value == K
    for t in carried.timesteps:
        logits = 2 * torch.randn(3, 4, V)
        out = carried.step(soft_tokens(logits, V), t, sample)
        sample = out.prev_sample
        silent = whole.step(logits, t, silent).prev_sample
        then = carried.previous_timestep(t)
        torch.testing.assert_close(
            sample.noise_scale, torch.full((3, 1), math.sqrt(1 - share_at(then))), atol=1e-6, rtol=0
        )
        if not settings.get("stochastic_sampling"):
            weights = torch.zeros(3, 4, V).scatter_add(
                -1, sample.token_ids.clamp(min=0), sample.token_weights
            )
            signal = silent.values - silent.values.mean(-1, keepdim=True)
            got = 2 * K * (weights - weights.mean(-1, keepdim=True))
            torch.testing.assert_close(got, signal, atol=1e-4, rtol=0)
    want = (2 * K * logits.softmax(-1)).softmax(-1)
    torch.testing.assert_close(sample.embedding(torch.eye(V)), want, atol=1e-5, rtol=0)
    assert sample.counter == 5 and isinstance(out.pred_original_sample, SoftTokens)


@pytest.mark.parametrize("kind, settings", [*DETERMINISTIC, WAYS[4]])
def test_a_carried_example_ignores_the_batch_and_what_left(kind, settings):
    scheduler = kind(vocab_size=40, simplex_value=K, **settings)
    scheduler.set_timesteps(3)
    logits, weight = 2 * torch.randn(3, 3, 4, 40), torch.randn(40, 6)
    together = left = scheduler.initial((3, 4), KEYS)
    rows = torch.arange(3)
    for index, t in enumerate(scheduler.timesteps):
        soft = soft_tokens(logits[index], 8)
        together = scheduler.step(soft, t, together).prev_sample
        soft = SoftTokens(*(part[rows] for part in soft))
        left = scheduler.step(soft, t, left).prev_sample
        if index == 0:
            rows = torch.tensor([2, 1])
            left = left.select(rows)
            assert torch.equal(left.embedding(weight), together.embedding(weight)[rows])
    assert torch.equal(left.embedding(weight), together.embedding(weight)[rows])
