"""Sizes of a checkpoint or preset from its config alone, against counts by hand."""

import dataclasses
import json
import re

import pytest

from tess.backbones.causal_lm import HybridForCausalLM
from tess.backbones.config import HybridConfig
from tess.backbones.presets import PRESETS, preset_config
from tess.commands import generate, info
from tess.config import TessConfig
from tess.costs.gpus import GPUS, Workload
from tess.costs.model_info import describe
from tess.costs.roofline import roofline
from tess.errors import UserError
from tiny import COUNTED as TINY

# a file as NVIDIA writes it: lists of layers, bare Infinity, fields that mean nothing to the model
RELEASED = """{
    "architectures": ["NemotronHForCausalLM"], "model_type": "nemotron_h",
    "torch_dtype": "bfloat16", "use_mamba_kernels": true,
    "auto_map": {"AutoConfig": "configuration_nemotron_h.NemotronHConfig"},
    "layers_block_type": ["mamba", "attention", "moe"], "num_hidden_layers": 3,
    "num_nextn_predict_layers": 1, "mtp_layers_block_type": ["attention", "moe"],
    "vocab_size": 31, "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1,
    "attention_head_dim": 8, "rope_theta": 10000, "partial_rotary_factor": 1.0,
    "intermediate_size": 12, "ssm_state_size": 4, "mamba_num_heads": 2, "mamba_head_dim": 8,
    "n_groups": 1, "time_step_limit": [0.0, Infinity], "time_step_rank": 512, "expand": 2,
    "mamba_ssm_cache_dtype": "float32", "norm_eps": 1e-05, "rms_norm_eps": 1e-05,
    "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 1,
    "moe_intermediate_size": 12, "moe_shared_expert_intermediate_size": 20,
    "moe_shared_expert_overlap": false, "sliding_window": null, "residual_in_fp32": false,
    "quantization_config": {"quant_method": "modelopt"}
}"""


def script(name, arguments):
    """Call a command's main in this process."""
    {"model_info": info, "generate": generate}[name].main(arguments)


def words_of_help(name, capsys):
    """Every word of a script's --help."""
    with pytest.raises(SystemExit):
        script(name, ["--help"])
    return set(re.findall(r"\w+", capsys.readouterr().out))


def test_counts_of_a_tiny_model_by_hand(tmp_path):
    HybridForCausalLM(HybridConfig(**TINY)).save_pretrained(tmp_path)
    (found,) = describe(tmp_path)
    mamba = (16 + 24 + 2) * 16 + 24 * 4 + 24 + 3 * 2 + 16 + 16 * 16
    attention = 2 * 16 * 16 + 2 * 8 * 16
    expert, shared, router = 2 * 12 * 16, 2 * 20 * 16, 4 * 16
    total = mamba + attention + 4 * expert + shared + router + 4 * 16 + 2 * 31 * 16
    assert found["parameters"] == total
    assert found["active_parameters"] == total - 3 * expert
    assert found["kv_bytes_per_token"] == 2 * 8 * 2
    assert found["state_bytes_per_sequence"] == 16 * 4 * 4 + 3 * 24 * 2
    assert found["kind"] == "ar"


def test_a_predictor_is_counted_apart(tmp_path):
    HybridForCausalLM(HybridConfig(**TINY)).save_pretrained(tmp_path / "a")
    with_mtp = HybridConfig(**TINY, num_nextn_predict_layers=1)
    HybridForCausalLM(with_mtp).save_pretrained(tmp_path / "b")
    plain, other = describe(tmp_path)
    same = ("parameters", "active_parameters", "kv_bytes_per_token", "state_bytes_per_sequence")
    assert all(plain[key] == other[key] for key in same)
    assert plain["mtp_parameters"] == plain["mtp_kv_bytes_per_token"] == 0
    expert = 2 * 12 * 16
    layers = 16 + 2 * 16 * 16 + 2 * 8 * 16 + 16 + 4 * 16 + 2 * 20 * 16 + 4 * expert
    assert other["mtp_parameters"] == layers + 3 * 16 + 2 * 16 * 16
    assert other["mtp_active_parameters"] == other["mtp_parameters"] - 3 * expert
    assert other["mtp_kv_bytes_per_token"] == 2 * 8 * 2


def test_a_released_folder_is_described_like_one_of_ours(tmp_path):
    (tmp_path / "config.json").write_text(RELEASED)
    (found,) = describe(tmp_path)
    config = HybridConfig(**TINY, num_nextn_predict_layers=1)
    HybridForCausalLM(config).save_pretrained(tmp_path / "ours")
    (ours,) = describe(tmp_path / "ours")
    assert found.pop("folder") == str(tmp_path) and ours.pop("folder")
    assert found == ours and found["kind"] == "ar"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (('"mamba", "attention"', '"mamba", "rnn"'), "cannot be used: .*rnn"),
        (('"hidden_size": 16', '"hidden_size": "16"'), "cannot be used: .*hidden_size"),
        (('"nemotron_h"', '"nemotron_h_puzzle"'), "model_type .*_puzzle'; expected one of"),
    ],
)
def test_a_released_file_that_does_not_fit_is_refused_by_name(tmp_path, change, message):
    assert change[0] in RELEASED
    (tmp_path / "config.json").write_text(RELEASED.replace(*change))
    with pytest.raises(UserError, match=f"config.json.* {message}"):
        describe(tmp_path)


def test_script_describes_a_preset_and_times_it(capsys):
    script("model_info", ["nemotron-3.5-lightning", "--gpu", "h100", "--batch", "8", "--json"])
    (found,) = json.loads(capsys.readouterr().out)
    assert (found["preset"], found["folder"]) == ("nemotron-3.5-lightning", None)
    assert found["parameters"] == 31_577_937_344
    times = found["roofline"]
    assert times["workload"] == {
        "batch": 8, "source": 512, "target": 128, "drafts": 3, "acceptance": 2.5,
    }
    config = preset_config("nemotron-3.5-lightning")
    assert times == dataclasses.asdict(roofline(config, "h100", Workload(batch=8)))
    keys = {*found, *times, *times["workload"], *times["ar_step"]}
    assert keys <= words_of_help("model_info", capsys)

    script("model_info", ["nemotron-3.5-lightning", "--gpu", "h100", "--acceptance", "1.5"])
    text = capsys.readouterr().out
    assert "AR step" in text and "at an assumed 1.5 a round" in text and "fit its 80 GB" in text
    script("model_info", ["nemotron-3-super", "--gpu", "h100"])
    assert "weights of 247.2 GB DO NOT FIT its 80 GB" in capsys.readouterr().out
    script("model_info", ["small-10m", "--gpu", "rtx4090"])
    assert "no multi-token predictor" in capsys.readouterr().out


def test_help_names_every_preset_and_gpu(capsys):
    with pytest.raises(SystemExit):
        script("model_info", ["--help"])
    # argparse may break a line at a hyphen
    text = re.sub(r"\s+", "", capsys.readouterr().out)
    assert all(name in text for name in (*PRESETS, *GPUS))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nemotron-3-nanoo"], "no folder .*nanoo., and .*did you mean nemotron-3-nano"),
        (["./nemotron-3-nano"], "there is no folder"),
        (["small-3m", "--target", "4"], "--target belongs to the times, which need --gpu"),
        (["small-3m", "--gpu", "h100", "--drafts", "1"], "acceptance counts"),
    ],
)
def test_script_says_what_it_cannot_do(arguments, message):
    with pytest.raises(UserError, match=message):
        script("model_info", arguments)


def test_a_folder_with_the_name_of_a_preset_is_reached_by_its_path(tmp_path, monkeypatch):
    HybridForCausalLM(HybridConfig(**TINY)).save_pretrained(tmp_path / "small-3m")
    monkeypatch.chdir(tmp_path)
    (preset,), (folder,) = describe("small-3m"), describe("./small-3m")
    assert preset["preset"] == "small-3m" and folder["hidden_size"] == 16


def test_a_joint_denoiser_is_timed_with_its_source_in_the_block(tmp_path):
    backbone = HybridConfig(**TINY, num_nextn_predict_layers=1)
    for encoding in ("causal", "joint"):
        config = TessConfig(backbone_config=backbone, source_encoding=encoding)
        config.save_pretrained(tmp_path / encoding)
    causal, joint = describe(tmp_path, "h100", Workload(source=50, target=6))
    assert joint["roofline"]["denoise_step"]["flops"] > causal["roofline"]["denoise_step"]["flops"]
    assert causal["kind"] == "tess" and causal["roofline"]["mtp_round"] is None


def test_script_prints_json_and_refuses_other_folders(tmp_path, capsys):
    HybridForCausalLM(HybridConfig(**TINY)).save_pretrained(tmp_path / "ar")
    script("model_info", [str(tmp_path), "--json"])
    (found,) = json.loads(capsys.readouterr().out)
    assert found["pattern"] == "M*E"
    assert set(found) <= words_of_help("model_info", capsys)
    script("model_info", [str(tmp_path)])
    assert "pattern M*E" in capsys.readouterr().out
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no model"):
        describe(tmp_path / "empty")
    with pytest.raises(UserError, match="there is no folder"):
        describe(tmp_path / "missing")
