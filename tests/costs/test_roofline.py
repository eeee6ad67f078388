"""Least times: counts by hand, against the modules, the cache and the products that really run."""

import dataclasses
import math
from functools import cache

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tess.backbones.cache import HybridCache
from tess.backbones.causal_lm import HybridForCausalLM
from tess.backbones.config import HybridConfig
from tess.backbones.presets import PRESETS, preset_config
from tess.config import TessConfig
from tess.costs.gpus import GPUS, Gpu, Workload
from tess.costs.model_info import count_parameters
from tess.costs.roofline import (
    Cost,
    PassTime,
    ar_step,
    backbone_weights,
    conv_bytes_per_sequence,
    denoise_step,
    draft_pass,
    expected_embedding_cost,
    kv_bytes_per_token,
    mtp_round,
    mtp_weights,
    noised_embedding_cost,
    pass_time,
    roofline,
    ssm_bytes_per_sequence,
    touched_share,
    verify_pass,
)
from tess.denoiser import TessDenoiser
from tess.errors import UserError
from tess.schedulers.renoising import RenoisingScheduler
from tess.schedulers.simplex import NUM_TOP
from tiny import COUNTED as TINY
from tiny import WIDE

# numbers of its layers, norms of the stream included
MAMBA = 16 + (16 + 24 + 2) * 16 + 24 * 4 + 24 + 3 * 2 + 16 + 16 * 16
ATTENTION = 16 + 2 * 16 * 16 + 2 * 8 * 16
SHARED, EXPERT = 16 + 4 * 16 + 2 * 20 * 16, 2 * 12 * 16
HEAD = 16 + 31 * 16
STATE, KEYS = 16 * 4 * 4 + 3 * 24 * 2, 2 * 8 * 2


def tiny(**changes):
    """The tiny model above."""
    return HybridConfig(**(TINY | changes))


def test_an_ar_step_by_hand():
    """Two texts of ten tokens: two tokens use one of four experts each."""
    cost = ar_step(tiny(), batch=2, context=10)
    experts = 4 * EXPERT * (1 - 0.75**2)
    weights = 2 * (MAMBA + ATTENTION + SHARED + experts + HEAD)
    caches = 2 * 2 * STATE + 2 * (10 + 1) * KEYS
    assert cost.bytes == pytest.approx(weights + caches + 2 * 2 * 16)  # and two rows of embeddings
    products = 2 * 2 * (MAMBA + ATTENTION + SHARED + EXPERT + HEAD)
    attention = 2 * 4 * 16 * 11
    scan = 2 * (2 * (4 * 1 + 16) + 4 * 4 * 16)
    assert cost.flops == products + attention + scan


def test_a_denoising_step_by_hand():
    """Two targets of six tokens after ten cached ones; the cache is read once, not written."""
    cost = denoise_step(tiny(chunk_size=4), batch=2, source=10, target=6)
    experts = 4 * EXPERT * (1 - 0.75**12)
    weights = 2 * (MAMBA + ATTENTION + SHARED + experts + HEAD + 31 * 16)
    noised = 2 * (31 * 16 + 16 * 16)  # twelve times 33 rows: all there are, and the bulk's factor
    assert cost.bytes == pytest.approx(weights + noised + 2 * STATE + 2 * 10 * KEYS)
    products = 2 * 12 * (MAMBA + ATTENTION + SHARED + EXPERT + HEAD + 31 * 16)
    products += 2 * 12 * (33 * 16 + 16 * 16)
    attention = 12 * 4 * 16 * 16
    scan = 12 * (2 * 4 * (4 * 1 + 16) + 4 * 4 * 16)
    assert cost.flops == products + attention + scan


def test_a_round_of_drafts_by_hand():
    config = tiny(num_nextn_predict_layers=1)
    passes = mtp_round(config, batch=1, context=10, drafts=2, acceptance=2.5)
    assert len(passes) == 3
    # the predictor has read 7.5 tokens, reads the 2.5 new ones, and then its first draft
    always = ATTENTION + SHARED + 2 * 16 * 16 + 3 * 16 + HEAD
    for cost, read, cached in ((passes[0], 2.5, 7.5), (passes[1], 1, 10)):
        experts = 4 * EXPERT * (1 - 0.75**read)
        rows = 2 * 16 * read
        assert cost.bytes == pytest.approx(2 * (always + experts) + rows + (cached + read) * KEYS)
    experts = 4 * EXPERT * (1 - 0.75**3)
    weights = 2 * (MAMBA + ATTENTION + SHARED + experts + HEAD)
    assert passes[2].bytes == pytest.approx(weights + 3 * STATE + 13 * KEYS + 2 * 16 * 3)


def test_a_tied_table_is_read_once_and_multiplied_as_often():
    untied, tied = tiny(), tiny(tie_word_embeddings=True)
    for step, args in ((ar_step, (2, 10)), (denoise_step, (2, 10, 6))):
        assert step(tied, *args).bytes < step(untied, *args).bytes
        assert step(tied, *args).flops == step(untied, *args).flops
    difference = denoise_step(untied, 2, 10, 6).bytes - denoise_step(tied, 2, 10, 6).bytes
    assert difference == 2 * 31 * 16 + 2 * 31 * 16  # for both ends of the network


def test_without_a_cache_the_source_goes_through_the_stack_in_every_step():
    cached, joint = (denoise_step(tiny(), 2, 10, 6, joint=joint) for joint in (False, True))
    alone = denoise_step(tiny(), 2, 0, 16)  # sixteen positions and nothing cached
    # but logits and embeddings of six only
    vocabulary = 2 * 2 * 10 * (HEAD + 31 * 16 + 16 * (NUM_TOP + 1 + 16))
    assert joint.flops == alone.flops - vocabulary > cached.flops
    assert joint.bytes == alone.bytes


VARIANTS = {
    "biases": {"use_bias": True, "mlp_bias": True, "attention_bias": True},
    "latent": {"moe_latent_size": 8, "mlp_bias": True},
    "gated": {"mamba_direction": "gated", "use_conv_bias": False, "conv_kernel": 3},
    "tied": {"tie_word_embeddings": True, "hybrid_override_pattern": "M-E*-"},
    "own mtp": {"mtp_hybrid_override_pattern": "M*-E"},
}


@pytest.mark.parametrize("name", [*PRESETS, *VARIANTS])
def test_formulas_count_the_numbers_of_the_modules(name):
    config = preset_config(name) if name in PRESETS else tiny(**VARIANTS[name])
    config.num_nextn_predict_layers = int(name not in PRESETS or config.num_nextn_predict_layers)
    with torch.device("meta"):
        model = HybridForCausalLM(config)
    ahead = count_parameters(model.mtp) if model.mtp else 0
    assert mtp_weights(config) == ahead
    assert backbone_weights(config) == count_parameters(model) - ahead


def test_cache_formulas_count_the_bytes_of_a_real_cache():
    config, pattern = tiny(hybrid_override_pattern="MM*-*"), "MM*-*"
    model, saved = HybridForCausalLM(config).bfloat16().eval(), HybridCache()
    with torch.no_grad():
        model(torch.ones(3, 7, dtype=torch.long), cache=saved, use_cache=True)
    states = ssm_bytes_per_sequence(config, pattern) + conv_bytes_per_sequence(config, pattern)
    assert saved.num_bytes() == 3 * (states + 7 * kv_bytes_per_token(config, pattern))


def counted(function):
    """FLOP of the matrix products that a call runs."""
    # the counter knows no fused attention on the CPU
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        function()
    return counter.get_total_flops()


@cache
def wide_denoising(direction):
    """The denoising step that runs, in float64 (where experts are plain products): its FLOP."""
    config = HybridConfig(**WIDE, mamba_direction=direction)
    model = TessDenoiser(TessConfig(backbone_config=config)).double().eval()
    saved = model.encode_source(torch.ones(2, 40, dtype=torch.long), None)
    scheduler = RenoisingScheduler(vocab_size=512, num_top=NUM_TOP)
    sample = scheduler.initial((2, 32), torch.arange(2))

    def step(previous):
        hidden = model(sample, torch.ones(2), previous, cache=saved).last_hidden_state
        return model.predict(hidden)

    with torch.no_grad():
        previous = step(None)  # computes the embedding's moments, which the next steps read
    return config, counted(lambda: step(previous))


@pytest.mark.parametrize("direction", ["forward", "bidirectional"])
def test_a_denoising_step_has_the_operations_that_really_run(direction):
    config, ran = wide_denoising(direction)
    cost = denoise_step(config, batch=2, source=40, target=32)
    weighted_rows = 2 * 2 * 32 * config.hidden_size * (NUM_TOP + 1)  # the counter leaves them out
    assert ran == pytest.approx(cost.flops - weighted_rows, rel=0.01)
    for part in (expected_embedding_cost, noised_embedding_cost):
        without = cost.flops - part(config, 2 * 32).flops
        assert ran != pytest.approx(without, rel=0.01), part


def test_decoding_has_the_operations_that_really_run():
    config = HybridConfig(**WIDE)
    model, saved = HybridForCausalLM(config).double().eval(), HybridCache()
    with torch.no_grad():
        model(torch.ones(2, 40, dtype=torch.long), cache=saved, use_cache=True)

    def step():
        token = torch.ones(2, 1, dtype=torch.long)
        model(token, cache=saved.snapshot(), use_cache=True)

    def check():
        block = torch.ones(2, 4, dtype=torch.long)
        out = model.backbone(block, cache=saved, mode="verify")
        model.lm_head(out.last_hidden_state)
        saved.snapshot().advance(out.record, torch.tensor([4, 4]))  # the state moves only here

    def draft():
        state = torch.ones(2, 1, 128, dtype=torch.float64)
        model.lm_head(model.mtp(state, state, None, HybridCache()))

    # one position updates its state without a matrix product, so the counter misses that half
    assert counted(step) == pytest.approx(ar_step(config, 2, 40).flops, rel=0.04)
    assert counted(check) == pytest.approx(verify_pass(config, 2, 40, drafts=3).flops, rel=0.01)
    assert counted(draft) == pytest.approx(draft_pass(config, 2, 1, 0).flops, rel=0.01)


def drawn_shares(config, tokens, draws=4000):
    """Share of the experts that tokens with k random experts each use, one number per draw."""
    generator = torch.Generator().manual_seed(5)
    keys = torch.rand(draws, tokens, config.n_routed_experts, generator=generator)
    chosen = keys.topk(config.num_experts_per_tok, dim=-1).indices.flatten(1)
    used = torch.zeros(draws, config.n_routed_experts).scatter_(1, chosen, 1.0)
    return used.mean(dim=1)


def agrees(share, drawn):
    """Within four standard errors of the draws' mean."""
    return abs(drawn.mean() - share) < 4 * drawn.std() / math.sqrt(len(drawn)) + 1e-6


@pytest.mark.parametrize("tokens", [1, 4, 16, 50])
def test_the_share_of_experts_is_that_of_random_draws(tokens):
    config = preset_config("nemotron-3-nano", n_routed_experts=32, num_experts_per_tok=3)
    drawn = drawn_shares(config, tokens)
    assert agrees(touched_share(config, tokens), drawn)
    no_token_shares_an_expert = tokens * 3 / 32
    assert agrees(no_token_shares_an_expert, drawn) == (tokens == 1)


def test_time_is_the_larger_of_moving_and_computing():
    gpu = Gpu("one", flops=10.0, bandwidth=2.0, memory=1.0)
    assert (Cost(8, 10).seconds(gpu), Cost(8, 10).bound(gpu)) == (4.0, "memory")
    assert (Cost(8, 60).seconds(gpu), Cost(8, 60).bound(gpu)) == (6.0, "compute")
    # passes that wait for each other add up, and the longest says what binds
    together = pass_time([Cost(8, 10), Cost(8, 60)], gpu)
    assert together == PassTime(seconds=10.0, bytes=16, flops=70, bound="compute")


LARGER = [
    ("batch", [1, 2, 8, 64, 512]),
    ("source", [0, 1, 64, 512, 65536]),
    ("target", [1, 2, 16, 128]),
    ("drafts", [2, 3, 5, 7]),
]


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize(("field", "values"), LARGER)
def test_more_work_never_takes_less_time(gpu, field, values):
    config = preset_config("nemotron-3.5-lightning")
    small = Workload(source=16, target=8)
    found = [roofline(config, gpu, dataclasses.replace(small, **{field: v})) for v in values]
    for row in ("ar_step", "mtp_round", "denoise_step"):
        times = [getattr(times, row).seconds for times in found]
        assert times == sorted(times), row
    for row in ("ar_seconds", "mtp_seconds"):
        times = [getattr(times, row) for times in found]
        assert times == sorted(times), row


@pytest.mark.parametrize("name", ["nemotron-h-8b", "nemotron-3-super", "small-315m"])
def test_a_pass_moves_at_least_the_weights_that_it_uses(name):
    config = preset_config(name)
    table = config.vocab_size * config.hidden_size
    everything = 2 * backbone_weights(config)
    # many tokens use every expert; the embedding is read by rows, or is the head itself
    rest = everything - (0 if config.tie_word_embeddings else 2 * table)
    assert ar_step(config, 4096, 0).bytes >= rest * (1 - 1e-9)
    assert denoise_step(config, 32, 0, 128).bytes >= everything * (1 - 1e-9)
    seconds = everything / GPUS["h100"].bandwidth
    assert denoise_step(config, 32, 0, 128).seconds(GPUS["h100"]) >= seconds * (1 - 1e-9)


def test_break_even_is_the_number_of_steps_that_takes_as_long():
    work = Workload(batch=4, source=100, target=5, drafts=2, acceptance=2.0)
    config, gpu = preset_config("nemotron-3.5-lightning"), GPUS["a100"]
    found = roofline(config, "a100", work)
    steps = [ar_step(config, 4, 100 + i).seconds(gpu) for i in range(5)]
    assert found.ar_step.seconds == steps[0]
    assert found.ar_seconds == pytest.approx(sum(steps))
    assert found.break_even_ar * found.denoise_step.seconds == pytest.approx(sum(steps))
    rounds = [
        sum(cost.seconds(gpu) for cost in mtp_round(config, 4, 100 + i, 2, 2.0)) for i in range(5)
    ]
    assert found.mtp_seconds == pytest.approx(sum(rounds) / 2.0)
    assert found.break_even_mtp * found.denoise_step.seconds == pytest.approx(sum(rounds) / 2.0)
    assert found.mtp_round.seconds == pytest.approx(rounds[0])


def test_whether_the_weights_fit_is_said():
    assert roofline(preset_config("nemotron-3-nano"), "h100", Workload(target=1)).weights_fit
    large = roofline(preset_config("nemotron-3-super"), "h200", Workload(target=1))
    assert not large.weights_fit and large.weight_bytes == 2 * 123_611_012_096


def test_a_model_without_a_predictor_has_no_times_for_it():
    found = roofline(preset_config("small-3m"), "l40s", Workload(batch=2, target=3))
    assert found.mtp_round is found.mtp_seconds is found.break_even_mtp is None
    assert found.vocabulary_tensor_bytes == 4 * 2 * 3 * 4096


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"source": -1}, "source must be at least 0, got -1"),
        ({"target": 0}, "target must be at least 1"),
        ({"drafts": 0}, "drafts must be at least 1"),
        ({"acceptance": 0.5}, "from 1 to drafts . 1 = 4, got 0.5"),
        ({"drafts": 1, "acceptance": 2.1}, "from 1 to drafts . 1 = 2, got 2.1"),
    ],
)
def test_impossible_work_is_refused(fields, message):
    with pytest.raises(UserError, match=message):
        Workload(**fields)


def test_an_unknown_gpu_is_refused():
    with pytest.raises(UserError, match="unknown GPU 'h1000'; known are a100, h100"):
        roofline(tiny(), "h1000", Workload())
