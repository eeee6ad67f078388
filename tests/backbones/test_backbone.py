"""The backbone's own laws: modes, cache, directions, saving, generation, bad input."""

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig

from tess.backbones.cache import HybridCache
from tess.backbones.causal_lm import HybridForCausalLM
from tess.backbones.config import HybridConfig
from tess.backbones.feedforward import balance_routers
from tess.backbones.hybrid import HybridModel
from tiny import BACKBONE as OPTIONS

DIRECTIONS = ("forward", "bidirectional", "gated")


def make(direction="forward", kind=HybridModel, **changes):
    torch.manual_seed(0)
    model = kind(HybridConfig(**OPTIONS | {"mamba_direction": direction} | changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "reverse_gate" in name:
                parameter.normal_()
            elif parameter.ndim > 1:
                parameter.mul_(4)
    return model


def ids(*shape):
    torch.manual_seed(sum(shape))
    return torch.randint(0, 61, shape)


def relative(got, want):
    return ((got - want).norm() / want.norm()).item()


@pytest.mark.parametrize("direction", DIRECTIONS)
@torch.no_grad()
def test_denoising_never_writes_the_cache(direction):
    model, cache = make(direction), HybridCache()
    model(ids(2, 9), cache=cache)
    before = {i: [t.clone() for t in state] for i, state in cache.layers.items()}
    first = model(ids(2, 6), cache=cache, mode="denoise").last_hidden_state
    second = model(ids(2, 6), cache=cache, mode="denoise").last_hidden_state
    assert torch.equal(first, second)
    assert cache.get_seq_length() == 9
    for index, state in cache.layers.items():
        assert all(torch.equal(a, b) for a, b in zip(state, before[index]))


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("source_mode", ["causal", "prefix"])
@torch.no_grad()
def test_denoising_depends_on_the_source_and_on_both_sides_of_the_block(direction, source_mode):
    model = make(direction)

    def denoise(source, target):
        cache = HybridCache()
        model(source, cache=cache, mode=source_mode)
        return model(target, cache=cache, mode="denoise").last_hidden_state

    source, target = ids(1, 9), ids(1, 7)
    base = denoise(source, target)
    other_source, other_end = source.clone(), target.clone()
    other_source[0, 0] += 1
    other_end[0, -1] = (other_end[0, -1] + 1) % 61
    assert not torch.allclose(denoise(other_source, target), base)
    changed = denoise(source, other_end)
    assert ((changed - base).abs().amax(-1) > 1e-6).all()  # the last token reaches every position


@torch.no_grad()
def test_forward_direction_carries_order_without_any_positional_encoding():
    model = make("forward", hybrid_override_pattern="M*")
    target = ids(1, 7)
    swapped = target[:, [0, 2, 1, 3, 4, 5, 6]]
    one = model(target, mode="denoise").last_hidden_state
    other = model(swapped, mode="denoise").last_hidden_state
    assert not torch.allclose(one[:, 6], other[:, 6], atol=1e-5)
    blind = make("forward", hybrid_override_pattern="*-*")  # no Mamba layer: a bag of words
    one = blind(target, mode="denoise").last_hidden_state
    other = blind(swapped, mode="denoise").last_hidden_state
    torch.testing.assert_close(one[:, 6], other[:, 6], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_attention_free_model_reads_right_to_left_only_in_bidirectional_directions():
    target = ids(1, 8)
    other = target.clone()
    other[0, -1] = (other[0, -1] + 1) % 61
    for direction, reaches in (("forward", False), ("bidirectional", True), ("gated", True)):
        model = make(direction, hybrid_override_pattern="MEM-")
        a = model(target, mode="denoise").last_hidden_state
        b = model(other, mode="denoise").last_hidden_state
        assert (not torch.equal(a[:, 0], b[:, 0])) == reaches


@torch.no_grad()
def test_gate_at_zero_is_the_forward_direction_bit_for_bit():
    forward, gated = make("forward"), make("gated")
    missing = gated.load_state_dict(forward.state_dict(), strict=False)
    assert all("reverse_gate" in key for key in missing.missing_keys)
    for name, parameter in gated.named_parameters():
        if "reverse_gate" in name:
            parameter.zero_()
    for length in (1, 7, 16, 33):
        block = ids(2, length)
        want = forward(block, mode="denoise").last_hidden_state
        assert torch.equal(gated(block, mode="denoise").last_hidden_state, want)


def test_gate_starts_at_zero_and_receives_gradient():
    torch.manual_seed(0)
    model = HybridModel(HybridConfig(**OPTIONS | {"mamba_direction": "gated"}))
    gates = [p for name, p in model.named_parameters() if "reverse_gate" in name]
    assert len(gates) == 2 and all((gate == 0).all() for gate in gates)
    model(ids(1, 9), mode="denoise").last_hidden_state.square().sum().backward()
    assert all((gate.grad != 0).any() for gate in gates)


@pytest.mark.parametrize("direction", DIRECTIONS)
@torch.no_grad()
def test_padded_denoising_equals_every_row_alone(direction):
    model = make(direction)
    sources, targets = [3, 9, 1], [8, 2, 5]
    source, source_mask = ids(3, 9), torch.zeros(3, 9, dtype=torch.long)
    target, target_mask = ids(3, 8), torch.zeros(3, 8, dtype=torch.long)
    for row, (s, t) in enumerate(zip(sources, targets)):
        source_mask[row, 9 - s :], target_mask[row, :t] = 1, 1
    for mode in ("causal", "prefix"):
        cache = HybridCache()
        model(source, attention_mask=source_mask, cache=cache, mode=mode)
        got = model(
            target, attention_mask=target_mask, cache=cache, mode="denoise"
        ).last_hidden_state
        for row, (s, t) in enumerate(zip(sources, targets)):
            alone = HybridCache()
            model(source[row : row + 1, 9 - s :], cache=alone, mode=mode)
            want = model(
                target[row : row + 1, :t], cache=alone, mode="denoise"
            ).last_hidden_state
            assert relative(got[row : row + 1, :t], want) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("pattern", ["MM", "M*EM"])
@torch.no_grad()
def test_a_padded_block_after_a_cache_equals_each_row_alone(pattern):
    model, cache = make(hybrid_override_pattern=pattern).double(), HybridCache()
    model(ids(3, 6), cache=cache)
    before = cache.snapshot()
    mask = torch.ones(3, 5, dtype=torch.long)
    mask[0, :2], mask[1, :] = 0, 0
    mask[1, 4:] = 1
    block, after = ids(3, 5), ids(3, 2)
    got = model(block, attention_mask=mask, cache=cache).last_hidden_state
    then = model(after, cache=cache).last_hidden_state
    for row in range(3):
        alone = before.select(torch.tensor([row]))
        start = int((mask[row] == 0).sum())
        want = model(block[row : row + 1, start:], cache=alone).last_hidden_state[0]
        assert relative(got[row, start:], want) < 1e-12
        want = model(after[row : row + 1], cache=alone).last_hidden_state[0]
        assert relative(then[row], want) < 1e-12


def test_causal_source_cached_equals_the_same_source_recomputed_token_by_token():
    model, whole, stepwise = make(), HybridCache(), HybridCache()
    source, target = ids(2, 11), ids(2, 6)
    model(source, cache=whole)
    for t in range(11):
        model(source[:, t : t + 1], cache=stepwise)
    want = model(target, cache=whole, mode="denoise").last_hidden_state
    got = model(target, cache=stepwise, mode="denoise").last_hidden_state
    assert relative(got, want) < 1e-5


@torch.no_grad()
def test_snapshot_select_and_repeat():
    model, cache = make(), HybridCache()
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[1, :2] = 0
    model(ids(3, 7), attention_mask=mask, cache=cache)
    saved = cache.snapshot()
    block = ids(3, 4)
    first = model(block, cache=cache).last_hidden_state
    cache.restore(saved)
    assert cache.get_seq_length() == 7
    assert torch.equal(model(block, cache=cache).last_hidden_state, first)

    rows = torch.tensor([2, 1, 1])
    picked = saved.select(rows)
    got = model(block[rows], cache=picked, mode="denoise").last_hidden_state
    want = model(block, cache=saved, mode="denoise").last_hidden_state[rows]
    assert relative(got, want) < 1e-5
    doubled = saved.repeat(2)
    got = model(
        block.repeat_interleave(2, 0), cache=doubled, mode="denoise"
    ).last_hidden_state
    want = model(block, cache=saved, mode="denoise").last_hidden_state
    assert relative(got[::2], want) < 1e-5 and relative(got[1::2], want) < 1e-5
    assert doubled.num_bytes() == 2 * saved.num_bytes()


@torch.no_grad()
def test_beam_search_reorders_the_cache():
    model = make(kind=HybridForCausalLM)
    prompt = ids(2, 6).clamp(min=3)  # no pad ids: generate() would take them for padding
    options = {"max_new_tokens": 8, "num_beams": 3, "eos_token_id": None, "pad_token_id": 0}
    cached = model.generate(prompt, **options)
    assert torch.equal(cached, model.generate(prompt, use_cache=False, **options))


@torch.no_grad()
def test_sampling_is_reproducible_and_follows_the_seed():
    model, prompt = make(kind=HybridForCausalLM), ids(2, 4).clamp(min=3)
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(model.generate(prompt, do_sample=True, max_new_tokens=12, eos_token_id=None))
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_saved_files_carry_the_released_names_one_tensor_per_expert(tmp_path):
    model = make(kind=HybridForCausalLM, moe_latent_size=24)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}
    assert shapes["backbone.embeddings.weight"] == [61, 48]
    assert shapes["backbone.layers.0.mixer.in_proj.weight"] == [64 + 128 + 4, 48]
    assert shapes["backbone.layers.0.mixer.conv1d.weight"] == [128, 1, 4]
    assert shapes["backbone.layers.2.mixer.experts.7.up_proj.weight"] == [40, 24]
    assert shapes["backbone.layers.2.mixer.gate.e_score_correction_bias"] == [8]
    assert shapes["backbone.norm_f.weight"] == [48] and shapes["lm_head.weight"] == [61, 48]
    # tensors per layer: M 9, * 5, - 3, E 3 + 2E + 2 + 2 (latent); embedding, final norm, head
    assert len(shapes) == 2 * 9 + 2 * 5 + 3 + (3 + 16 + 2 + 2) + 3
    again = HybridForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(ids(1, 9)).logits, model(ids(1, 9)).logits)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), HybridConfig)


def test_tied_head_is_saved_once_and_stays_tied(tmp_path):
    model = make(kind=HybridForCausalLM, tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert "lm_head.weight" not in file.keys()
    again = HybridForCausalLM.from_pretrained(tmp_path)
    assert again.lm_head.weight is again.backbone.embeddings.weight


def test_half_precision_load_keeps_the_router_bias_in_float32(tmp_path):
    model = make(kind=HybridForCausalLM)
    bias = model.backbone.layers[2].mixer.gate.e_score_correction_bias
    bias.copy_(64 + torch.arange(8) * 2.0**-6)  # differences that bfloat16 cannot hold
    model.save_pretrained(tmp_path)
    again = HybridForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    gate = again.backbone.layers[2].mixer.gate
    assert again.lm_head.weight.dtype == torch.bfloat16
    assert torch.equal(gate.e_score_correction_bias, bias)


def test_autocast_training_step_has_finite_gradients_and_float32_routing():
    model = make("bidirectional", kind=HybridForCausalLM).train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(ids(2, 40), labels=ids(2, 40)).loss
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_gradient_checkpointing_changes_no_gradient():
    model = make("bidirectional", kind=HybridForCausalLM).train()
    grads = []
    for checkpointing in (False, True):
        model.zero_grad()
        if checkpointing:
            model.activation_checkpointing_enable()
        model(ids(2, 20), labels=ids(2, 20)).loss.backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for one, other in zip(*grads):
        torch.testing.assert_close(one, other)


def test_router_balancing_moves_load_to_idle_experts():
    model = make().train()
    gate = model.layers[2].mixer.gate
    model(ids(4, 30))
    load = gate.load.clone()
    assert load.sum() == 4 * 30 * 2
    balance_routers(model, 1e-3)
    expected = 1e-3 * (load.float().mean() - load).sign()
    torch.testing.assert_close(gate.e_score_correction_bias, expected)
    assert gate.load.sum() == 0


def test_initialisation_is_nemotrons():
    torch.manual_seed(0)
    model = HybridModel(
        HybridConfig(**OPTIONS | {"hidden_size": 256, "mamba_num_heads": 16, "mamba_head_dim": 32})
    )
    mixer = model.layers[0].mixer
    torch.testing.assert_close(mixer.A_log.exp(), torch.arange(1, 17).float())
    step = torch.nn.functional.softplus(mixer.dt_bias)
    assert 1e-4 <= step.min() and step.max() <= 0.1 + 1e-6
    assert mixer.in_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)
    # uniform within 1 / sqrt(inner width) over sqrt(depth 6)
    want = (512 * 6) ** -0.5 / 3**0.5
    assert mixer.out_proj.weight.std().item() == pytest.approx(want, rel=0.05)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hybrid_override_pattern": "MX"}, r"hybrid_override_pattern 'MX' has \['X'\]"),
        ({"hybrid_override_pattern": ""}, "at least one layer"),
        ({"mamba_direction": "backward"}, "mamba_direction must be one of forward, bidirectional"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3 does not divide the 4"),
        ({"n_groups": 3}, "n_groups=3 does not divide the 4"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok=9 is more than the 8"),
        ({"layers_block_type": ["mamba", "lstm"]}, r"layers_block_type has \['lstm'\]"),
        ({"mlp_hidden_act": "gelu"}, "must be 'relu2'"),
    ],
)
def test_a_wrong_config_says_what_is_wrong(changes, message):
    with pytest.raises(ValueError, match=message):
        HybridConfig(**OPTIONS | changes)


@torch.no_grad()
def test_a_wrong_call_says_what_is_wrong():
    model = make()
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model()
    with pytest.raises(ValueError, match="mode must be one of causal, prefix, denoise"):
        model(ids(1, 4), mode="encode")
    with pytest.raises(ValueError, match=r"attention_mask must be \[1, 4\]"):
        model(ids(1, 4), attention_mask=torch.ones(1, 5))
    mask = torch.tensor([[1, 1, 1, 0]])
    with pytest.raises(ValueError, match="left-padded; got right padding"):
        model(ids(1, 4), attention_mask=mask, cache=HybridCache())
    cache = HybridCache()
    model(ids(2, 4), cache=cache)
    with pytest.raises(ValueError, match="already holds 4 positions"):
        model(ids(2, 4), cache=cache, mode="prefix")
    with pytest.raises(ValueError, match="the cache holds 2 rows, the block has 3"):
        model(ids(3, 4), cache=cache, mode="denoise")


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("source_mode", ["causal", "prefix"])
def test_gradient_checkpointing_changes_no_gradient_through_the_cache(direction, source_mode):
    model = make(direction).train()
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable()
        model.zero_grad()
        cache = HybridCache()
        model(ids(2, 9), cache=cache, mode=source_mode)
        model(ids(2, 6), cache=cache, mode="denoise").last_hidden_state.sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for one, other in zip(*grads):
        torch.testing.assert_close(one, other)
    with pytest.raises(ValueError, match="use_reentrant=False"):
        model.activation_checkpointing_enable({"use_reentrant": True})


def test_padding_does_not_count_as_load_of_the_experts():
    model, mask = make().train(), torch.ones(2, 10, dtype=torch.long)
    mask[1, :6] = 0
    model(ids(2, 10), attention_mask=mask)
    assert model.layers[2].mixer.gate.load.sum() == 14 * 2


def test_a_checkpoint_saved_by_transformers_loads_with_its_experts(tmp_path):
    from transformers import NemotronHConfig, NemotronHForCausalLM

    torch.manual_seed(0)
    options = {name: value for name, value in OPTIONS.items() if name != "mamba_direction"}
    oracle = NemotronHForCausalLM(NemotronHConfig(**options)).eval()
    for module in oracle.modules():
        if hasattr(module, "time_step_limit"):
            module.time_step_limit = (0.0, float("inf"))
    oracle.save_pretrained(tmp_path)
    ours = HybridForCausalLM.from_pretrained(tmp_path).eval()
    assert ours.config.model_type == "tess_hybrid"
    with torch.no_grad():
        want = oracle(ids(2, 9), use_cache=False).logits
        assert relative(ours(ids(2, 9)).logits, want) < 1e-5


def test_missing_and_unknown_tensors_are_refused_by_name(tmp_path):
    from safetensors.torch import load_file, save_file

    make(kind=HybridForCausalLM).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["backbone.stranger"] = tensors.pop("backbone.layers.1.mixer.q_proj.weight")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    message = "lacks backbone.layers.1.mixer.q_proj.weight and has unknown backbone.stranger"
    with pytest.raises(ValueError, match=message):
        HybridForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("limit", [[0, 1e308], [0.0, float("inf")], [0, 3]])
@torch.no_grad()
def test_released_spellings_of_the_step_limit_run(limit):
    model = make(time_step_limit=limit)
    assert torch.isfinite(model(ids(1, 5)).last_hidden_state).all()
    assert model.config.time_step_limit[1] == (3.0 if limit[1] == 3 else float("inf"))
