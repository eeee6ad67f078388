"""Our backbone against transformers' Nemotron-H, the public oracle.

transformers floors the Mamba step size at `time_step_min` in prefill (huggingface/transformers
#48989), which no released checkpoint was trained with; the oracle's clamp is opened before use.
"""

import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import NemotronHConfig, NemotronHForCausalLM

from tess.backbones.cache import HybridCache
from tess.backbones.causal_lm import HybridForCausalLM
from tess.backbones.config import HybridConfig
from tess.backbones.released import load_released

BASE = {
    "vocab_size": 61, "hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 12, "intermediate_size": 80, "ssm_state_size": 16, "mamba_num_heads": 4,
    "mamba_head_dim": 16, "n_groups": 1, "chunk_size": 16, "n_routed_experts": 8,
    "num_experts_per_tok": 2, "moe_intermediate_size": 40,
    "moe_shared_expert_intermediate_size": 56,
}

CONFIGS = {
    "all-mixers": {"hybrid_override_pattern": "M*E-"},
    "latent-moe": {"hybrid_override_pattern": "ME*E", "moe_latent_size": 24},
    "groups-2": {"hybrid_override_pattern": "M*M-", "n_groups": 2},
    "groups-4-state-24": {"hybrid_override_pattern": "MM*", "n_groups": 4, "ssm_state_size": 24},
    "state-wider-than-head": {"hybrid_override_pattern": "M*M*", "ssm_state_size": 40},
    "head-wider-than-state": {"hybrid_override_pattern": "M-M*", "mamba_head_dim": 32},
    "attention-free": {"hybrid_override_pattern": "MEM-"},
    "mamba-only": {"hybrid_override_pattern": "MMM", "n_groups": 2},
    "attention-only": {"hybrid_override_pattern": "*-*-"},
    "expert-groups": {
        "hybrid_override_pattern": "EM*E", "n_group": 4, "topk_group": 2,
        "num_experts_per_tok": 3, "routed_scaling_factor": 2.5,
    },
    "raw-expert-weights": {"hybrid_override_pattern": "E*ME", "norm_topk_prob": False},
    "biases": {
        "hybrid_override_pattern": "M-*E", "use_bias": True, "mlp_bias": True,
        "use_conv_bias": False,
    },
    "multi-query": {"hybrid_override_pattern": "M**-", "num_key_value_heads": 1},
    "chunk-5-conv-2": {"hybrid_override_pattern": "M*M*", "chunk_size": 5, "conv_kernel": 2},
}


def build(name):
    """The oracle and our model with the same random weights, steps sizes down to 1e-5 included."""
    torch.manual_seed(len(name))
    options = BASE | CONFIGS[name]
    oracle = NemotronHForCausalLM(NemotronHConfig(**options)).eval()
    with torch.no_grad():
        for module in oracle.modules():
            if hasattr(module, "time_step_limit"):
                module.time_step_limit = (0.0, math.inf)
                module.dt_bias.uniform_(-11.5, 1.0)
                module.D.normal_()
                module.norm.weight.uniform_(0.5, 1.5)
            if hasattr(module, "e_score_correction_bias"):
                module.e_score_correction_bias.normal_()
            if isinstance(module, torch.nn.Linear) and module.bias is not None:
                module.bias.normal_(std=0.1)
        for parameter in oracle.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)  # far from the near-linear regime of the initialisation
    ours = HybridForCausalLM(HybridConfig(**options)).eval()
    ours.load_state_dict(
        {key.replace("model.", "backbone."): value for key, value in oracle.state_dict().items()}
    )
    return oracle, ours


def relative(got, want):
    return ((got - want).norm() / want.norm()).item()


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("length", [1, 16, 37])
@torch.no_grad()
def test_logits_equal_transformers(name, length):
    oracle, ours = build(name)
    ids = torch.randint(0, 61, (2, length))
    want = oracle(input_ids=ids, use_cache=False).logits
    assert relative(ours(input_ids=ids).logits, want) < 1e-5


@pytest.mark.parametrize("stored", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", ["all-mixers", "latent-moe", "expert-groups"])
@torch.no_grad()
def test_bfloat16_models_choose_the_experts_that_transformers_chooses(name, stored, tmp_path):
    # transformers keeps router weights in float32 as of 5.24; before, it rounds them, which
    # changes nothing where the file has them in bfloat16, as released ones do
    build(name)[0].bfloat16().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    routers = {key: value for key, value in weights.items() if key.endswith("gate.weight")}
    for key, value in routers.items():
        wide = value.float() * (1 + 2**-12 if stored == "float32" else 1)
        routers[key] = weights[key] = wide if stored == "float32" else wide.bfloat16()
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    ours = load_released(tmp_path, dtype=torch.bfloat16)
    oracle = NemotronHForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    for module in oracle.modules():
        if hasattr(module, "time_step_limit"):
            module.time_step_limit = (0.0, math.inf)
    for key, value in routers.items():
        layer = int(key.split(".")[2])
        router = ours.backbone.layers[layer].mixer.gate
        assert router.weight.dtype == torch.float32 and torch.equal(router.weight, value.float())
        theirs = oracle.model.layers[layer].mixer.gate
        if stored == "bfloat16" or theirs.weight.dtype == torch.float32:
            assert torch.equal(theirs.weight.float(), router.weight)
        theirs.weight.data = value.float()
        hidden = torch.randn(200, BASE["hidden_size"]).bfloat16()
        scores = theirs(hidden)
        scores = scores[0] if isinstance(scores, tuple) else scores
        want = torch.nn.functional.linear(hidden.float(), value.float())
        torch.testing.assert_close(scores.view_as(want), want)
    ids = torch.randint(0, 61, (2, 37))
    want = oracle(input_ids=ids, use_cache=False).logits.float()
    assert relative(ours(input_ids=ids).logits, want) < 0.03


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "biases"])
@torch.no_grad()
def test_left_padded_batch_equals_transformers_and_unpadded_rows(name):
    oracle, ours = build(name)
    ids, mask = torch.randint(0, 61, (3, 29)), torch.ones(3, 29, dtype=torch.long)
    mask[1, :11], mask[2, :28] = 0, 0
    got = ours(input_ids=ids, attention_mask=mask).logits
    want = oracle(input_ids=ids, attention_mask=mask, use_cache=False).logits
    real = mask.bool()
    assert relative(got[real], want[real]) < 1e-5
    for row, start in ((1, 11), (2, 28)):
        alone = ours(input_ids=ids[row : row + 1, start:]).logits[0]
        assert relative(got[row, start:], alone) < 1e-5


@torch.no_grad()
def test_left_padding_is_exact_with_projection_biases_too():
    # transformers leaks the projection bias of padded positions into the convolution; rows alone
    # are the oracle here
    _, ours = build("biases")
    ids, mask = torch.randint(0, 61, (2, 23)), torch.ones(2, 23, dtype=torch.long)
    mask[1, :9] = 0
    got = ours(input_ids=ids, attention_mask=mask).logits
    assert relative(got[1, 9:], ours(input_ids=ids[1:, 9:]).logits[0]) < 1e-5


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("block", [1, 7, 33])
@torch.no_grad()
def test_cached_continuation_equals_one_full_forward(name, block):
    oracle, ours = build(name)
    ids, mask = torch.randint(0, 61, (2, 43)), torch.ones(2, 43, dtype=torch.long)
    mask[1, :4] = 0
    attention_free = "*" not in CONFIGS[name]["hybrid_override_pattern"]
    if attention_free or name == "biases":  # transformers crashes / leaks; our own full forward
        want = ours(input_ids=ids, attention_mask=mask).logits
    else:
        want = oracle(input_ids=ids, attention_mask=mask, use_cache=False).logits
    cache, parts, start = HybridCache(), [], 0
    for size in [10] + [block] * 43:
        stop = min(43, start + size)
        if start == stop:
            break
        out = ours(
            input_ids=ids[:, start:stop], attention_mask=mask[:, :stop], cache=cache,
            use_cache=True,
        )
        parts.append(out.logits)
        start = stop
    real = mask.bool()
    assert relative(torch.cat(parts, 1)[real], want[real]) < 1e-5
    assert cache.get_seq_length() == 43


@pytest.mark.parametrize("name", ["all-mixers", "latent-moe", "groups-2", "expert-groups"])
def test_gradients_equal_transformers(name):
    oracle, ours = build(name)
    ids = torch.randint(0, 61, (2, 19))
    oracle(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    ours(input_ids=ids, labels=ids).loss.backward()
    expected = {k.replace("model.", "backbone."): p.grad for k, p in oracle.named_parameters()}
    for key, parameter in ours.named_parameters():
        assert relative(parameter.grad, expected[key]) < 1e-4, key


@torch.no_grad()
def test_greedy_generation_equals_transformers():
    oracle, ours = build("all-mixers")
    ids, mask = torch.randint(3, 61, (3, 12)), torch.ones(3, 12, dtype=torch.long)
    mask[1, :5], mask[2, :11] = 0, 0
    options = {"max_new_tokens": 15, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    want = oracle.generate(ids, attention_mask=mask, **options)
    assert torch.equal(ours.generate(ids, attention_mask=mask, **options), want)
    uncached = ours.generate(ids, attention_mask=mask, use_cache=False, **options)
    assert torch.equal(uncached, want)


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3, "length_penalty": 0.5},
        {"num_beams": 4, "num_return_sequences": 2, "early_stopping": True},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "bad_words_ids": [[7], [9, 11]]},
        {"eos_token_id": [5, 17], "min_new_tokens": 4},
        {"do_sample": True, "top_p": 0.9, "temperature": 1.4},
        {"do_sample": True, "top_k": 5, "num_return_sequences": 2},
    ],
    ids=["beam", "beams", "processors", "stopping", "nucleus", "top-k"],
)
@torch.no_grad()
def test_every_way_to_generate_equals_transformers(options):
    oracle, ours = build("all-mixers")
    ids, mask = torch.randint(3, 61, (3, 12)), torch.ones(3, 12, dtype=torch.long)
    mask[1, :5], mask[2, :11] = 0, 0
    options = {"max_new_tokens": 15, "do_sample": False, "pad_token_id": 0} | options
    options = {"eos_token_id": 29} | options
    texts = []
    for model in (oracle, ours):
        torch.manual_seed(3)
        texts.append(model.generate(ids, attention_mask=mask, **options))
    assert torch.equal(*texts)


def test_old_and_new_spelling_of_a_config_build_the_same_model():
    old = HybridConfig(
        hybrid_override_pattern="M*E-", mamba_n_groups=2, mamba_d_conv=3, mamba_chunk_size=32,
        attention_head_dim=16, rms_norm_eps=1e-6, num_hidden_layers=4,
    )
    new = HybridConfig(
        layers_block_type=["mamba", "full_attention", "moe", "mlp"], n_groups=2, conv_kernel=3,
        chunk_size=32, head_dim=16, layer_norm_epsilon=1e-6,
    )
    assert old.to_dict() == new.to_dict()
    assert old.layers_block_type == ["mamba", "attention", "moe", "mlp"]
    assert old.num_hidden_layers == 4
