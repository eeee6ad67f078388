"""Every recipe of scripts/train.py is valid, builds a model, and is what docs/recipes.md says."""

import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import yaml

import tess.training.start
from tess.backbones.config import HybridConfig
from tess.config import TessConfig
from tess.costs.training import update_flops
from tess.data.tasks.catalog import get_task
from tess.training.flags import parse_settings
from tess.training.settings import OWN
from tess.training.start import build_parts

ROOT = Path(__file__).parents[2]
RECIPES = {
    path.name: path
    for path in sorted((ROOT / "scripts" / "recipes").glob("*.yaml"))
    if not path.name.startswith(("compare_", "accelerate_"))
}
PAGE = (ROOT / "docs" / "recipes.md").read_text()
ROWS = {
    row.split("|")[1].strip(" `"): [cell.strip() for cell in row.split("|")[1:-1]]
    for row in PAGE.splitlines()
    if re.match(r"\| `\w+\.yaml` ", row)
}
UNRUN = [name for name in RECIPES if name.endswith(("_gpu.yaml", "_paper.yaml"))]


class Tokens:
    """The size and the special ids of a tokenizer that is not there."""

    pad_token_id, bos_token_id, eos_token_id = 0, 1, 2

    def __init__(self, settings, texts):
        self.size = settings.model.vocab_size or 4096

    def __len__(self):
        return self.size

    def get_vocab(self):
        return {str(id_): id_ for id_ in range(self.size)}


def settings_of(name, *flags):
    """A recipe's settings, with what its header leaves to the command line."""
    given = yaml.safe_load(RECIPES[name].read_text())
    flags = ["--output_dir", "out", "--use_cpu", "true", *flags]
    if not given.get("train_tokenizer") and not given.get("tokenizer"):
        flags += [
            "--tokenizer" if "pretrain" in name and "long" not in name else "--init_from",
            "x",
        ]
    return parse_settings([str(RECIPES[name]), *flags])


def model_of(settings, monkeypatch):
    monkeypatch.setattr(tess.training.start, "_tokenizer", Tokens)
    with torch.device("meta"):
        return build_parts(settings, []).model


def column(name, title):
    lines = PAGE.splitlines()
    row = next(i for i, line in enumerate(lines) if line.startswith(f"| `{name}`"))
    head = next(line for line in reversed(lines[:row]) if line.startswith("| recipe"))
    return ROWS[name][[cell.strip() for cell in head.split("|")[1:-1]].index(title)]


def test_the_page_lists_the_recipes_that_there_are():
    assert set(ROWS) == set(RECIPES)


def test_every_setting_stands_in_a_recipe_or_on_the_page():
    recipes = (ROOT / "scripts" / "recipes").glob("*.yaml")
    words = set(re.findall(r"\w+", PAGE + " ".join(path.read_text() for path in recipes)))
    ours = {field.name for kind in OWN for field in fields(kind)}
    assert not ours - words


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_valid_and_its_model_is_the_page_s(name, monkeypatch):
    settings = settings_of(name)
    assert settings.data.corruptions
    if settings.data.task:
        assert "train" in get_task(settings.data.task).splits(settings.data.dataset or "samples")
    said = column(name, "parameters")
    if settings.model.init_from:
        assert said.startswith("that of the first stage")
        return
    model = model_of(settings, monkeypatch)
    assert said == f"{sum(p.numel() for p in model.parameters()):,}"


@pytest.mark.parametrize("name", UNRUN)
def test_an_unrun_recipe_says_so_and_its_cost_is_computed(name, monkeypatch):
    assert RECIPES[name].read_text().startswith("# UNRUN")
    settings = settings_of(name)
    config = model_of(settings, monkeypatch).config
    batch, data = settings.training.per_device_train_batch_size, settings.data
    steps = settings.training.max_steps
    assert f"{batch} × {steps:,}" in ROWS[name][4]
    teraflops = update_flops(config, batch, data.max_source_length, data.max_target_length) / 1e12
    assert ROWS[name][5] == f"{teraflops:.2f}"
    milliseconds = teraflops / 98.9 * 1000 + 45
    minutes = milliseconds * steps / 60_000
    if name.endswith("_gpu.yaml"):
        assert ROWS[name][7] == f"{minutes:.0f} min" and minutes < 20
        assert 30e6 < int(ROWS[name][3].replace(",", "")) < 150e6
    else:
        assert ROWS[name][7].startswith(f"{1.1 * minutes / 60:.1f} h")
        assert settings.run.ema_decay == 0 and settings.run.num_samples_to_print == 0  # FSDP


@pytest.mark.parametrize("name", [name for name in RECIPES if name.endswith("_gpu.yaml")])
def test_a_gpu_recipe_trains_the_autoregressive_model_too(name, monkeypatch):
    assert "--objective ar --mtp_depth 3" in RECIPES[name].read_text()
    model = model_of(settings_of(name, "--objective", "ar", "--mtp_depth", "3"), monkeypatch)
    assert f"{sum(p.numel() for p in model.parameters()):,}" in PAGE


def test_the_launchers_files_start_several_processes():
    files = sorted((ROOT / "scripts" / "recipes").glob("accelerate_*.yaml"))
    configs = {path.name: yaml.safe_load(path.read_text()) for path in files}
    assert {name: config["distributed_type"] for name, config in configs.items()} == {
        "accelerate_ddp_cpu.yaml": "MULTI_GPU",
        "accelerate_fsdp2.yaml": "FSDP",
    }
    assert configs["accelerate_fsdp2.yaml"]["fsdp_config"]["fsdp_version"] == 2
    assert re.search(r"^# UNRUN", files[1].read_text())


# The operations


def small(**changes):
    sizes = {
        "vocab_size": 50, "hidden_size": 8, "hybrid_override_pattern": "--",
        "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4,
        "mamba_num_heads": 2, "mamba_head_dim": 4, "n_groups": 1, "ssm_state_size": 4,
        "tie_word_embeddings": True,
    }
    return HybridConfig(**sizes | changes)


def test_a_causal_update_is_six_for_each_weight_and_position():
    backbone = small()
    stack = 2 * (2 * 8 * 16 + 8)  # two layers, their norms included
    want = 6 * 3 * (12 * stack + 5 * 8 * 51)  # the head, and the last norm, at the targets only
    assert update_flops(backbone, 3, 7, 5) == want


def test_a_denoiser_reads_source_and_canvas_apart_or_together():
    def flops(first_pass, **changes):
        config = TessConfig(backbone_config=small(), **changes)
        return update_flops(config, 3, 7, 5, first_pass)

    stack, extra = 2 * (2 * 8 * 16 + 8), flops(1.0) - flops(0.0)
    assert flops(0.0, source_encoding="joint") == pytest.approx(flops(0.0))  # no attention, no scan
    assert flops(0.5) == pytest.approx(flops(0.0) + extra / 2)
    # the first pass reads the source in the joint layout only
    joint = flops(1.0, source_encoding="joint") - flops(0.0, source_encoding="joint")
    assert joint - extra == pytest.approx(2 * 3 * 7 * stack)
    head, noise, sweep = 2 * 15 * 8 * 51, 2 * 15 * 8 * (33 + 8), 2 * 15 * 8 * 50
    assert extra == pytest.approx(2 * 15 * stack + head + noise + sweep)
