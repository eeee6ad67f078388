"""Sizes of a checkpoint from its config, against counts by hand and a released model's figure."""

import json
import re
import runpy
from pathlib import Path

import pytest
import torch

from tess.backbones.config import HybridConfig
from tess.backbones.hybrid import HybridForCausalLM
from tess.errors import UserError
from tess.model_info import count_parameters, describe, idle_parameters

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
TINY = {
    "vocab_size": 31, "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1,
    "head_dim": 8, "intermediate_size": 24, "ssm_state_size": 4, "mamba_num_heads": 2,
    "mamba_head_dim": 8, "n_groups": 1, "n_routed_experts": 4, "num_experts_per_tok": 1,
    "moe_intermediate_size": 12, "moe_shared_expert_intermediate_size": 20,
    "hybrid_override_pattern": "M*E",
}  # fmt: skip
NANO_30B = {
    "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
    "hidden_size": 2688, "num_key_value_heads": 2, "mamba_num_heads": 64,
    "n_routed_experts": 128, "num_experts_per_tok": 6, "moe_intermediate_size": 1856,
    "moe_shared_expert_intermediate_size": 3712,
}  # fmt: skip


def script(name, arguments):
    """Call a script's main in this process."""
    runpy.run_path(str(SCRIPTS / f"{name}.py"))["main"](arguments)


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


def test_the_released_nano_30b_has_its_published_number_of_parameters():
    config = HybridConfig(**NANO_30B)
    with torch.device("meta"):
        model = HybridForCausalLM(config)
    assert count_parameters(model) == 31_577_937_344
    active = count_parameters(model) - idle_parameters(model, config)
    assert active == pytest.approx(3.580e9, rel=1e-3)


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
    with pytest.raises(UserError, match="is not a folder"):
        describe(tmp_path / "missing")


def test_backbone_benchmark_compares_the_same_function_and_writes_its_figures(tmp_path, capsys):
    out = tmp_path / "figures.json"
    script("benchmark", ["backbone", "--length", "20", "--repeats", "2", "--json", str(out)])
    figures = json.loads(out.read_text())
    assert figures["relative_difference"] < 1e-5
    assert [(row["what"], row["dtype"]) for row in figures["rows"]] == [
        (what, dtype)
        for what in ("forward", "forward + backward")
        for dtype in ("float32", "bfloat16")
    ]
    for row in figures["rows"]:
        assert row["ours_ms"] > 0 and row["rival_ms"] > 0 and row["pairs"] == 2
    assert "ratio" in capsys.readouterr().out
    keys = set(figures) | set(figures["rows"][0]) | set(figures["environment"])
    assert keys <= words_of_help("benchmark", capsys)
    with pytest.raises(UserError, match="there is no folder"):
        script("benchmark", ["backbone", "--json", str(tmp_path / "no" / "x.json")])
