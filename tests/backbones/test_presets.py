"""The named shapes: NVIDIA's counts and widths of released models, and sizes as the names say."""

from functools import cache
from pathlib import Path

import pytest
import torch

from tess.backbones.causal_lm import HybridForCausalLM
from tess.backbones.config import HybridConfig
from tess.backbones.presets import PRESETS, preset_config
from tess.costs.model_info import count_parameters, describe

ROOT = Path(__file__).resolve().parents[2]
# backbone and head; Super with its MTP is, to the last number, what the released files hold
TOTALS = {
    "nemotron-h-4b": 4_489_223_040,
    "nemotron-h-8b": 8_100_852_736,
    "nemotron-h-47b": 46_791_554_816,
    "nemotron-h-56b": 56_324_350_464,
    "nemotron-nano-9b-v2": 8_888_227_328,
    "nemotron-nano-12b-v2": 12_310_001_152,
    "nemotron-3-nano-4b": 3_973_556_832,
    "nemotron-3-nano": 31_577_937_344,
    "nemotron-3.5-lightning": 31_577_937_344,
    "nemotron-3-super": 120_668_687_360,
    "nemotron-3-ultra": 549_308_968_960,
}
MTP = {
    "nemotron-3.5-lightning": 1_335_325_824,
    "nemotron-3-super": 2_942_324_736,
    "nemotron-3-ultra": 11_215_609_856,
}
ACTIVE = {
    "nemotron-3-nano": 3.580e9,
    "nemotron-3.5-lightning": 3.580e9,
    "nemotron-3-super": 12.770e9,
    "nemotron-3-ultra": 56.059e9,
}
SMALL = {
    "small-3m": 3e6, "small-10m": 10e6, "small-30m": 30e6, "small-100m": 100e6, "small-315m": 315e6,
}
# d_inner, channels of the convolution, rows of in_proj; MiB of SSM and of windows; KiB of keys
WIDTHS = {
    "nemotron-3-nano-4b": (7680, 9728, 17504, 78.8, 1.2, 16),
    "nemotron-h-8b": (8192, 10240, 18560, 96, 1.4, 16),
    "nemotron-nano-9b-v2": (10240, 12288, 22656, 135, 1.9, 16),
    "nemotron-3-nano": (4096, 6144, 10304, 46, 0.8, 6),
    "nemotron-3-super": (8192, 10240, 18560, 160, 2.3, 8),
    "nemotron-3-ultra": (16384, 18432, 35072, 384, 5.1, 12),
}
# layers (M, E, -, *), context length, chunk, factor on the routed experts
LAYERS = {
    "nemotron-h-4b": ((24, 0, 24, 4), 8192, 128, 1.0),
    "nemotron-h-8b": ((24, 0, 24, 4), 8192, 128, 1.0),
    "nemotron-h-47b": ((45, 0, 48, 5), 8192, 128, 1.0),
    "nemotron-h-56b": ((54, 0, 54, 10), 8192, 128, 1.0),
    "nemotron-nano-9b-v2": ((27, 0, 25, 4), 131072, 128, 1.0),
    "nemotron-nano-12b-v2": ((28, 0, 28, 6), 131072, 128, 1.0),
    "nemotron-3-nano-4b": ((21, 0, 17, 4), 262144, 256, 1.0),
    "nemotron-3-nano": ((23, 23, 0, 6), 262144, 128, 2.5),
    "nemotron-3.5-lightning": ((23, 23, 0, 6), 1048576, 128, 2.5),
    "nemotron-3-super": ((40, 40, 0, 8), 262144, 128, 5.0),
    "nemotron-3-ultra": ((48, 48, 0, 12), 262144, 128, 5.0),
}
# where attention stands in the patterns that are put together from parts
ATTENTION = {
    "nemotron-3-super": [7, 16, 25, 36, 47, 58, 69, 78],
    "nemotron-3-nano": [5, 12, 19, 26, 33, 42],
    "nemotron-3-ultra": [7, 14, 23, 32, 39, 48, 57, 64, 73, 82, 89, 98],
    "nemotron-nano-12b-v2": [7, 16, 25, 34, 43, 52],
    "nemotron-h-56b": [7, *range(18, 118 - 11, 11)],
}


@cache
def described(name):
    """The description that the script prints."""
    (found,) = describe(name)
    return found


def test_the_presets_are_the_agreed_ones():
    assert sorted(PRESETS) == sorted([*TOTALS, *SMALL])


@pytest.mark.parametrize("name", TOTALS)
def test_a_released_model_has_its_number_of_parameters(name):
    assert described(name)["parameters"] == TOTALS[name]
    assert described(name)["mtp_parameters"] == MTP.get(name, 0)


def test_super_with_its_predictor_has_the_size_of_the_released_files():
    with torch.device("meta"):
        model = HybridForCausalLM(preset_config("nemotron-3-super"))
    assert count_parameters(model) == 123_611_012_096


@pytest.mark.parametrize("name", TOTALS)
def test_active_parameters_are_the_published_ones_and_in_a_dense_model_all(name):
    active = described(name)["active_parameters"]
    if name in ACTIVE:
        assert active == pytest.approx(ACTIVE[name], rel=1e-3)
    else:
        assert active == TOTALS[name]


def released_tensors(module):
    """Number of tensors in a released file, which holds every expert on its own."""
    experts = ("experts.up_proj", "experts.down_proj")
    # the shared experts are no stack: their names have a `.weight` behind these
    return sum(
        len(tensor) if name.endswith(experts) else 1 for name, tensor in module.state_dict().items()
    )


@pytest.mark.parametrize(
    ("name", "count"), [("nemotron-3.5-lightning", 270), ("nemotron-3-super", 1040)]
)
def test_the_predictor_has_the_released_number_of_tensors(name, count):
    with torch.device("meta"):
        model = HybridForCausalLM(preset_config(name))
    assert released_tensors(model.mtp) == count


@pytest.mark.parametrize("name", WIDTHS)
def test_mamba_widths_and_cache_sizes_are_the_published_ones(name):
    inner, conv, rows, ssm, windows, keys = WIDTHS[name]
    config = preset_config(name, hybrid_override_pattern="M", num_nextn_predict_layers=0)
    with torch.device("meta"):
        mixer = HybridForCausalLM(config).backbone.layers[0].mixer
    assert (config.mamba_inner_size, config.conv_dim) == (inner, conv)
    assert mixer.in_proj.out_features == rows
    assert described(name)["ssm_bytes_per_sequence"] / 2**20 == pytest.approx(ssm, abs=0.06)
    assert described(name)["conv_bytes_per_sequence"] / 2**20 == pytest.approx(windows, abs=0.06)
    assert described(name)["kv_bytes_per_token"] == keys * 2**10


@pytest.mark.parametrize("name", LAYERS)
def test_layers_context_chunk_and_routing_are_the_released_ones(name):
    counts, context, chunk, scale = LAYERS[name]
    config = preset_config(name)
    pattern = config.hybrid_override_pattern
    assert tuple(map(pattern.count, "ME-*")) == counts and len(pattern) == sum(counts)
    assert config.max_position_embeddings == context
    assert (config.chunk_size, config.routed_scaling_factor) == (chunk, scale)
    assert (config.vocab_size, config.tie_word_embeddings) == (131072, False)
    if name in ATTENTION:
        assert [i for i, letter in enumerate(pattern) if letter == "*"] == ATTENTION[name]


@pytest.mark.parametrize("name", SMALL)
def test_a_small_model_is_as_large_as_its_name_says(name):
    assert described(name)["parameters"] == pytest.approx(SMALL[name], rel=0.15)
    config = preset_config(name)
    assert config.tie_word_embeddings and set("M*E") <= set(config.hybrid_override_pattern)


def test_small_models_grow_in_every_direction():
    configs = [preset_config(name) for name in SMALL]
    for field in ("hidden_size", "num_hidden_layers", "vocab_size", "mamba_inner_size"):
        sizes = [getattr(config, field) for config in configs]
        assert sizes == sorted(sizes), field


def test_the_smallest_has_the_shape_of_the_shipped_checkpoint():
    shipped = HybridConfig.from_pretrained(ROOT / "checkpoints" / "default" / "ar").to_dict()
    history = {"architectures", "dtype", "transformers_version", "_name_or_path", "use_cache"}
    history |= {"num_nextn_predict_layers"}  # the checkpoint was given its predictor later
    ours = preset_config("small-3m").to_dict()
    assert {name for name in ours if ours[name] != shipped.get(name)} <= history


def test_a_field_can_be_changed_and_the_preset_stays():
    changed = preset_config("nemotron-3-super", num_nextn_predict_layers=0, vocab_size=512)
    assert (changed.num_nextn_predict_layers, changed.vocab_size) == (0, 512)
    assert preset_config("nemotron-3-super").num_nextn_predict_layers == 1


def test_an_unknown_name_or_field_is_said_in_one_sentence():
    with pytest.raises(ValueError, match="'nemotron3-super'; did you mean nemotron-3-super"):
        preset_config("nemotron3-super")
    with pytest.raises(ValueError, match="known are .*nemotron-h-4b, .*small-315m$"):
        preset_config("qqq")
    with pytest.raises(ValueError, match="no field hiden_size"):
        preset_config("small-3m", hiden_size=4)
