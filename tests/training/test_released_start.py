"""A run that starts from a released folder: what it makes of its tokens."""

import json

import pytest
import torch

from tess.backbones.causal_lm import HybridForCausalLM
from tess.backbones.config import HybridConfig
from tess.backbones.released import save_released
from tess.commands.train import main
from tess.decoders.load import load_decoder
from tess.storage.parts import load_parts
from tess.text.end_tokens import end_tokens
from tess.text.tokenization import train_tokenizer

SIZES = {
    "hybrid_override_pattern": "M*-", "hidden_size": 32, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "intermediate_size": 32, "ssm_state_size": 8,
    "mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 1, "chunk_size": 8,
}


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """Its config ends texts with 4 and 2, its tokenizer with 2 and has no pad token."""
    folder = tmp_path_factory.mktemp("released")
    torch.manual_seed(0)
    tokenizer = train_tokenizer(["a cat sat on the mat"] * 3, 265)
    tokenizer.pad_token = None
    config = HybridConfig(**SIZES, vocab_size=280, eos_token_id=4, eos_after_source=False)
    save_released(HybridForCausalLM(config), folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("objective", ["ar", "tess"])
def test_it_closes_sources_with_the_tokenizers_end_and_keeps_all_others(
    released, tmp_path, objective
):
    main([
        "--init_from", str(released), "--objective", objective, "--task", "simplification",
        "--output_dir", str(tmp_path), "--max_steps", "1", "--max_train_samples", "8",
        "--max_eval_samples", "2", "--max_source_length", "24", "--max_target_length", "12",
        "--per_device_train_batch_size", "2", "--save_strategy", "no", "--report_to", "none",
        "--use_cpu", "--num_samples_to_print", "0",
    ])
    final = tmp_path / "final"
    parts = load_parts(final)
    assert end_tokens(parts.tokenizer) == (2, 4) and parts.tokenizer.pad_token_id == 0
    path = final / "config.json" if objective == "ar" else final / "denoiser" / "config.json"
    config = json.loads(path.read_text())
    backbone = config if objective == "ar" else config["backbone_config"]
    assert backbone["eos_token_id"] == [2, 4]  # its own comes first, `tess_loss` reads it there
    assert backbone.get("eos_after_source", True)
    decoder = load_decoder(final)
    assert decoder.encode(["a cat"]).rows[0][-1] == 2
    assert not load_decoder(released).closes_sources
    if objective == "ar":
        stored = json.loads((final / "generation_config.json").read_text())
        assert stored["eos_token_id"] == [2, 4]
