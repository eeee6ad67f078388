"""Folders as released: read, written, refused; transformers is the oracle."""

import json
import math
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import NemotronHConfig, NemotronHForCausalLM

from tess.backbones.causal_lm import HybridForCausalLM
from tess.backbones.checkpoint import load_checkpoint, tensor_names
from tess.backbones.config import HybridConfig
from tess.backbones.damage import POINTER
from tess.backbones.hybrid import HybridModel
from tess.backbones.released import load_released, read_released_config, save_released
from tiny import BACKBONE

OPTIONS = BACKBONE | {"moe_latent_size": 24, "num_nextn_predict_layers": 1}
NANO_SHAPED = OPTIONS | {
    "hybrid_override_pattern": "MEMEM*EME", "n_routed_experts": 128, "num_experts_per_tok": 6,
    "moe_intermediate_size": 16, "moe_latent_size": None, "routed_scaling_factor": 2.5,
}


def make(dtype=torch.float32, **changes):
    """A random model whose router biases are as large, and differ as little, as released ones."""
    torch.manual_seed(0)
    model = HybridForCausalLM(HybridConfig(**OPTIONS | changes)).eval()
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(dtype)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(64 + torch.rand(len(buffer)) * 0.2)
    return model


def open_steps(oracle):
    """transformers floors the step size, which no released model was trained with (#48989)."""
    for module in oracle.modules():
        if hasattr(module, "time_step_limit"):
            module.time_step_limit = (0.0, math.inf)
    return oracle.eval()


def relative(got, want):
    return ((got - want).norm() / want.norm()).item()


def same_tensors(model, other):
    return all(torch.equal(a.float(), b.float()) for a, b in zip(*map(values, (model, other))))


def values(model):
    return [tensor for _, tensor in sorted(model.state_dict().items())]


@pytest.mark.parametrize("layout", ["per_expert", "stacked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [OPTIONS, NANO_SHAPED], ids=["all-mixers", "nano-shaped"])
def test_a_sharded_folder_makes_the_round_trip_bit_for_bit(tmp_path, layout, dtype, shape):
    model = make(dtype, **shape)
    options = {"expert_layout": layout, "max_shard_bytes": 60_000}
    save_released(model, tmp_path / "a", **options)
    loaded = load_released(tmp_path / "a")
    assert same_tensors(loaded, model)
    save_released(loaded, tmp_path / "b", **options)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "b").iterdir()) and len(files) > 6
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    index = json.loads((tmp_path / "a" / "model.safetensors.index.json").read_text())
    assert sorted(index["weight_map"]) == sorted(tensor_names(tmp_path / "a"))
    experts = shape["n_routed_experts"] if layout == "per_expert" else 1
    ending = ".up_proj" + (".weight" if layout == "per_expert" else "")
    layers = (shape["hybrid_override_pattern"] + "E").count("E")  # and the predictor's
    routed = [key for key in index["weight_map"] if ".experts." in key and key.endswith(ending)]
    assert len(routed) == layers * experts


@pytest.mark.parametrize("shape", [OPTIONS, NANO_SHAPED], ids=["all-mixers", "nano-shaped"])
@torch.no_grad()
def test_what_transformers_saves_is_read_and_gives_its_logits(tmp_path, shape):
    torch.manual_seed(0)
    fields = shape | {"num_nextn_predict_layers": 0}
    oracle = open_steps(NemotronHForCausalLM(NemotronHConfig(**fields)))
    oracle.save_pretrained(tmp_path, max_shard_size="60KB")
    ids = torch.randint(0, 61, (2, 19))
    want = oracle(input_ids=ids, use_cache=False).logits
    assert relative(load_released(tmp_path, dtype=torch.float32)(ids).logits, want) < 1e-5


@pytest.mark.parametrize("layout", ["per_expert", "stacked"])
@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_what_we_write_is_read_by_transformers_and_gives_our_logits(tmp_path, layout, tied):
    model = make(tie_word_embeddings=tied)
    save_released(model, tmp_path, expert_layout=layout, max_shard_bytes=60_000)
    oracle, found = NemotronHForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, output_loading_info=True
    )
    assert not found["missing_keys"] and not found["unexpected_keys"]
    ids = torch.randint(0, 61, (2, 19))
    want = open_steps(oracle)(input_ids=ids, use_cache=False).logits
    assert relative(model(ids).logits, want) < 1e-5
    loaded = load_released(tmp_path)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    # readers of this layout, transformers among them, do not tie
    assert loaded.lm_head.weight is not loaded.backbone.embeddings.weight


def test_a_tied_head_of_a_folder_saved_here_stays_tied(tmp_path):
    model = make(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in tensor_names(tmp_path)
    loaded = load_checkpoint(HybridForCausalLM, model.config, tmp_path)
    assert loaded.lm_head.weight is loaded.backbone.embeddings.weight
    assert same_tensors(loaded, model)


def test_the_prefix_of_transformers_means_the_same(tmp_path):
    model = make()
    save_released(model, tmp_path)
    path = tmp_path / "model.safetensors"
    renamed = {key.replace("backbone.", "model."): t for key, t in load_file(path).items()}
    save_file(renamed, path, metadata={"format": "pt"})
    assert same_tensors(load_released(tmp_path), model)


@pytest.mark.parametrize(
    "changes",
    [
        {"layers_block_type": ["mamba", "attention", "moe", "mamba", "mlp", "attention"]},
        {"layers_block_type": ["linear_attention", "full_attention", "moe"] * 2},
        {"mtp_layers_block_type": ["attention", "moe"], "torch_dtype": "bfloat16"},
        {"mtp_layers_block_type": ["full_attention", "moe"], "num_hidden_layers": 6},
        {"time_step_limit": [0.0, math.inf]},
        {"time_step_limit": [0.0, 1e308], "rope_theta": 10000, "residual_in_fp32": False},
        {"auto_map": {"AutoConfig": "x.Y"}, "time_step_rank": 256, "norm_eps": 1e-5},
        {
            "layers_block_type": ["linear_attention", "full_attention", "moe"] * 2,
            "hybrid_override_pattern": None, "mtp_layers_block_type": None,
        },
        {"num_hidden_layers": 99, "layers_block_type": None, "num_nextn_predict_layers": None},
    ],
)
def test_every_spelling_of_released_configs_is_read(tmp_path, changes):
    fields = OPTIONS | {"model_type": "nemotron_h"} | changes
    if changes.get("layers_block_type") and "hybrid_override_pattern" not in changes:
        del fields["hybrid_override_pattern"]
    (tmp_path / "config.json").write_text(json.dumps(fields))  # json writes bare Infinity
    config = read_released_config(tmp_path)
    assert config.time_step_limit == (0.0, math.inf)
    assert config.mtp_hybrid_override_pattern == "*E"
    assert config.num_hidden_layers == 6 and config.hybrid_override_pattern[:3] == "M*E"
    if "torch_dtype" in changes:
        assert config.dtype == torch.bfloat16


def test_settings_that_only_the_file_knows_come_back(tmp_path):
    config = HybridConfig(**OPTIONS, n_shared_experts=1, residual_in_fp32=False, rope_theta=10000)
    save_released(HybridForCausalLM(config), tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    assert fields["model_type"] == "nemotron_h"
    assert fields["architectures"] == ["NemotronHForCausalLM"]
    assert (fields["n_shared_experts"], fields["rope_theta"]) == (1, 10000)
    assert fields["num_hidden_layers"] == 6 and "mamba_direction" not in fields
    assert "Infinity" in (tmp_path / "config.json").read_text()


def test_precision_of_what_is_exponentiated_is_float32_whatever_the_weights_are(tmp_path):
    model = make(torch.bfloat16)
    trained = model.backbone.layers[0].mixer
    trained.A_log.data = trained.A_log.data.float() + 1e-5  # more than bfloat16 can hold
    save_released(model, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert stored["backbone.layers.0.mixer.A_log"].dtype == torch.float32
    assert stored["backbone.layers.3.mixer.A_log"].dtype == torch.bfloat16
    assert stored["mtp.layers.1.mixer.gate.e_score_correction_bias"].dtype == torch.float32
    for dtype, wide in (
        (torch.bfloat16, torch.float32), (torch.float16, torch.float32),
        (torch.float64, torch.float64),
    ):
        loaded = load_released(tmp_path, dtype=dtype)
        mixer = loaded.backbone.layers[0].mixer
        assert {mixer.A_log.dtype, mixer.D.dtype, mixer.dt_bias.dtype} == {wide}
        assert mixer.in_proj.weight.dtype == mixer.norm.weight.dtype == dtype
        assert torch.equal(mixer.A_log.float(), trained.A_log)
        bias = loaded.mtp.layers[1].mixer.gate.e_score_correction_bias
        assert bias.dtype == torch.float32
        assert torch.equal(bias, model.mtp.layers[1].mixer.gate.e_score_correction_bias)


def test_the_stored_type_is_kept_unless_another_is_asked_for(tmp_path):
    save_released(make(torch.bfloat16), tmp_path)
    assert load_released(tmp_path).lm_head.weight.dtype == torch.bfloat16
    assert load_released(tmp_path, dtype=torch.float32).lm_head.weight.dtype == torch.float32


def test_weights_go_to_the_device_and_nothing_is_initialised_over_them(tmp_path):
    model = make()
    save_released(model, tmp_path)
    assert not load_released(tmp_path).training
    loaded = load_released(tmp_path, device=torch.device("cpu"))
    assert {tensor.device.type for tensor in values(loaded)} == {"cpu"}
    assert not any(buffer.is_meta for buffer in loaded.buffers())
    ids = torch.randint(0, 61, (2, 9))
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_a_stored_head_is_read_whatever_the_config_says_about_tying(tmp_path):
    model = make()
    save_released(model, tmp_path)
    edit_config(tmp_path, tie_word_embeddings=True)
    ids = torch.randint(0, 61, (2, 9))
    assert torch.equal(load_released(tmp_path)(ids).logits, model(ids).logits)


def test_writing_over_a_sharded_checkpoint_leaves_nothing_of_it(tmp_path):
    save_released(make(), tmp_path, max_shard_bytes=60_000)
    other = make(hidden_size=64)
    save_released(other, tmp_path)
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["model.safetensors"]
    assert same_tensors(load_released(tmp_path), other)


def test_a_predictor_can_be_left_out_and_its_loss_is_noticed(tmp_path):
    model = make()
    save_released(model, tmp_path)
    assert load_released(tmp_path, mtp=False).mtp is None
    path = tmp_path / "model.safetensors"
    kept = {key: t for key, t in load_file(path).items() if not key.startswith("mtp.")}
    save_file(kept, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="has no mtp.* tensors, .*read it with mtp=False"):
        load_released(tmp_path)
    assert load_released(tmp_path, mtp=False).mtp is None


@pytest.mark.parametrize("count", [0, 1, 2, None, "left out"])
def test_whether_there_is_a_predictor_the_files_say_and_not_the_count(tmp_path, count):
    model = make()
    save_released(model, tmp_path)
    edit_config(tmp_path, num_nextn_predict_layers=count)
    if count == "left out":
        path = tmp_path / "config.json"
        fields = json.loads(path.read_text())
        del fields["num_nextn_predict_layers"]
        path.write_text(json.dumps(fields))
    loaded = load_released(tmp_path)
    assert same_tensors(loaded, model) and loaded.config.num_nextn_predict_layers == 1


def test_a_second_block_of_the_predictor_is_counted_and_the_rest_can_be_read(tmp_path):
    model = make()
    save_released(model, tmp_path)
    second = {
        name.replace("mtp.layers.0.", "mtp.layers.2."): tensor
        for name, tensor in load_file(tmp_path / "model.safetensors").items()
        if name.startswith("mtp.layers.0.")
    }
    rewrite(tmp_path / "model.safetensors", lambda tensors: tensors.update(second))
    with pytest.raises(ValueError, match="has 2 blocks of mtp.* tensors, and one can be used"):
        load_released(tmp_path)
    ids = torch.randint(0, 61, (2, 9))
    assert torch.equal(load_released(tmp_path, mtp=False)(ids).logits, model(ids).logits)


@pytest.mark.parametrize("prefix", ["backbone", "model"])
def test_an_embedding_in_the_singular_is_the_embedding(tmp_path, prefix):
    model = make()
    save_released(model, tmp_path)
    rewrite(
        tmp_path / "model.safetensors",
        lambda tensors: tensors.update(
            {f"{prefix}.embedding.weight": tensors.pop("backbone.embeddings.weight")}
        ),
    )
    assert same_tensors(load_released(tmp_path), model)


def test_an_index_that_names_only_the_single_file_may_stand_beside_it(tmp_path):
    model = make()
    save_released(model, tmp_path)
    index = {"weight_map": dict.fromkeys(tensor_names(tmp_path), "model.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert same_tensors(load_released(tmp_path), model)


def test_router_weights_are_float32_in_memory_and_a_file_is_written_as_it_was_read(tmp_path):
    model = make(torch.bfloat16)
    save_released(model, tmp_path / "a")
    name = "backbone.layers.2.mixer.gate.weight"
    assert load_file(tmp_path / "a" / "model.safetensors")[name].dtype == torch.bfloat16
    loaded = load_released(tmp_path / "a")
    router = loaded.backbone.layers[2].mixer.gate
    assert router.weight.dtype == torch.float32
    assert torch.equal(router.weight, model.backbone.layers[2].mixer.gate.weight.float())
    router.weight.data += 1e-5  # a step of training that bfloat16 cannot hold
    save_released(loaded, tmp_path / "b")
    stored = load_file(tmp_path / "b" / "model.safetensors")
    assert stored[name].dtype == torch.float32 and torch.equal(stored[name], router.weight)
    assert stored["lm_head.weight"].dtype == torch.bfloat16
    # transformers writes what it holds in memory, and so does our own layout
    loaded.save_pretrained(tmp_path / "c")
    assert load_file(tmp_path / "c" / "model.safetensors")[name].dtype == torch.float32
    again = HybridForCausalLM.from_pretrained(tmp_path / "c", dtype=torch.bfloat16)
    assert torch.equal(again.backbone.layers[2].mixer.gate.weight, router.weight)


# What is refused


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def sharded(tmp_path):
    save_released(make(), tmp_path, max_shard_bytes=60_000)
    return tmp_path


def rewrite(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def shard_with(folder, key):
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return folder / index["weight_map"][key]


def refused(folder):
    with pytest.raises(ValueError) as caught:
        load_released(folder)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_truncated_shard_is_named(sharded):
    shard = sharded / sorted(p.name for p in sharded.glob("*.safetensors"))[2]
    shard.write_bytes(shard.read_bytes()[:-100])
    message = refused(sharded)
    assert str(shard) in message and "truncated" in message
    shard.write_bytes(b"")
    assert str(shard) in refused(sharded)


def test_a_missing_shard_is_named_with_what_it_should_hold(sharded):
    shard = shard_with(sharded, "mtp.layers.0.eh_proj.weight")
    shard.unlink()
    message = refused(sharded)
    assert f"shard {shard} is missing" in message and "mtp.layers." in message


def test_a_key_that_the_index_promises_and_the_shard_lacks_is_named(sharded):
    shard = shard_with(sharded, "backbone.norm_f.weight")
    rewrite(shard, lambda tensors: tensors.pop("backbone.norm_f.weight"))
    message = refused(sharded)
    assert str(shard) in message and "lacks backbone.norm_f.weight" in message


def test_a_shape_against_the_config_names_file_key_expected_and_found(sharded):
    edit_config(sharded, vocab_size=62)
    message = refused(sharded)
    shard = shard_with(sharded, "backbone.embeddings.weight")
    assert f"{shard}: backbone.embeddings.weight is [61, 48]" in message
    assert "by the config it is [62, 48]" in message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("lm_head.weight"), "lacks lm_head.weight"),
        (
            lambda t: t.pop("backbone.layers.2.mixer.experts.3.up_proj.weight"),
            "lacks backbone.layers.2.mixer.experts.3.up_proj.weight",
        ),
        (lambda t: t.update(surprise=torch.ones(2)), "has unknown surprise"),
        (
            lambda t: t.update(
                {"backbone.layers.2.mixer.experts.8.up_proj.weight": torch.ones(40, 24)}
            ),
            "has unknown backbone.layers.2.mixer.experts.8.up_proj.weight",
        ),
        (
            lambda t: t.update(
                {"backbone.layers.2.mixer.experts.up_proj": torch.ones(8, 40, 24)}
            ),
            "is there a second time",
        ),
        (
            lambda t: t.update({"lm_head.weight": torch.ones(61, 48).to(torch.float8_e4m3fn)}),
            "lm_head.weight is stored as F8_E4M3; expected F64, F32, F16, BF16",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(tmp_path, change, message):
    save_released(make(), tmp_path)
    rewrite(tmp_path / "model.safetensors", change)
    assert message in refused(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hybrid_override_pattern": "MXE*Q"}, r"'MXE\*Q' has \['Q', 'X'\]; layers are"),
        ({"mtp_hybrid_override_pattern": "*Y"}, r"mtp_hybrid_override_pattern '\*Y' has \['Y'\]"),
        ({"model_type": "nemotron_h_puzzle"}, "model_type 'nemotron_h_puzzle'; expected 'nemotr"),
        ({"quantization_config": {"quant_method": "modelopt"}}, r"quantized weights \(modelopt\)"),
        ({"hidden_size": "48"}, "hidden_size"),
        ({"hidden_size": -4}, "hidden_size must be 1 or more, got -4"),
        ({"n_groups": 0}, "n_groups must be 1 or more, got 0"),
        ({"hybrid_override_pattern": None}, "names no layers; expected hybrid_override_pattern"),
        ({"layers_block_type": ["mamba", "moe"]}, "layers_block_type says 'ME' and"),
        ({"layers_block_type": []}, "layers_block_type says '' and"),
        ({"time_step_limit": [0.1]}, "time_step_limit must be a lower and an upper limit"),
    ],
)
def test_a_config_that_cannot_be_used_is_one_sentence(tmp_path, changes, message):
    save_released(make(), tmp_path)
    edit_config(tmp_path, **changes)
    with pytest.raises(ValueError, match=message) as caught:
        load_released(tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value) and "\n" not in str(caught.value)


def test_a_folder_without_config_or_weights_or_with_a_broken_index_is_named(tmp_path):
    with pytest.raises(ValueError, match="has no config.json"):
        load_released(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json is no JSON object"):
        load_released(tmp_path)
    save_released(make(), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="has no weights; expected model.safetensors or"):
        load_released(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"lm_head.weight": "../model.safetensors"}}')
    with pytest.raises(ValueError, match="'../model.safetensors' is no file of the folder itself"):
        load_released(tmp_path)
    index.write_text("[]")
    with pytest.raises(ValueError, match="index.json is no index with a weight_map"):
        load_released(tmp_path)
    index.unlink()
    save_released(make(), tmp_path)
    index.write_text('{"weight_map": {}}')
    with pytest.raises(ValueError, match="has both model.safetensors and model.safetensors.index"):
        load_released(tmp_path)
    index.unlink()
    for content in ("[1]", '"5"', "{"):
        (tmp_path / "generation_config.json").write_text(content)
        with pytest.raises(ValueError, match="generation_config.json holds no generation settings"):
            load_released(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="config.json is no JSON object"):
        load_released(tmp_path)
    with pytest.raises(ValueError, match="expert_layout must be one of"):
        save_released(make(), tmp_path, expert_layout="sparse")


def test_a_model_without_its_own_head_reads_the_part_that_it_wants(tmp_path):
    model = make()
    save_released(model, tmp_path)
    # the names of a bare backbone have no prefix, so it is not taken for what it is not
    with pytest.raises(ValueError, match="lacks embeddings.weight"):
        load_checkpoint(HybridModel, model.config, tmp_path)


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (POINTER + b"v1\noid sha256:0\nsize 7\n", "is a Git LFS pointer, not the file itself"),
        (b"", "is empty"),
        (b"\x80\x81\xfe", "is no JSON object, but binary"),
    ],
    ids=["pointer", "empty", "binary"],
)
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "generation_config.json"])
def test_a_file_that_is_damaged_as_a_whole_is_named_with_what_it_is(
    tmp_path, name, content, fault
):
    save_released(make(), tmp_path)
    (tmp_path / name).write_bytes(content)
    message = refused(tmp_path)
    assert str(tmp_path / name) in message
    assert (fault if name.endswith("json") or content[:1] != b"\x80" else "truncated") in message


# Memory

LOAD = """
import sys, torch
from tess.backbones.released import load_released
torch.zeros(8).sum()
def peak():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
open("/proc/self/clear_refs", "w").write("5")  # the peak so far, of the imports, is forgotten
before = peak()
model = load_released(sys.argv[1])
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's memory counters")
def test_reading_needs_little_more_memory_than_the_tensors_take(tmp_path):
    sizes = {"vocab_size": 20_000, "hidden_size": 512, "n_routed_experts": 64}
    model = make(**sizes, moe_latent_size=None, moe_intermediate_size=128)
    save_released(model, tmp_path)  # one file: mapped whole it would be a second copy
    held = sum(tensor.numel() * tensor.element_size() for tensor in values(model))
    del model
    out = subprocess.run(
        [sys.executable, "-c", LOAD, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert held > 150e6
    assert int(out.stdout) < 1.2 * held
