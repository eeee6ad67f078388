"""What a checkpoint folder holds: parameters, how many are active, the cost of its cache."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from tess.backbones.config import HybridConfig
from tess.backbones.feedforward import StackedExperts
from tess.backbones.hybrid import HybridForCausalLM
from tess.config import TessConfig
from tess.denoiser import TessDenoiser
from tess.errors import UserError
from tess.saving import read_config

BYTES = {"float32": 4, "bfloat16": 2}


def describe(folder: Path) -> list[dict[str, Any]]:
    """One description for every model in `folder`: a decoder's folder, or one that holds several.

    Raises:
        UserError: no model of ours in there.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; expected a checkpoint folder")
    places = [folder, *sorted(path for path in folder.iterdir() if path.is_dir())]
    found = [describe_model(place) for place in places if (place / "config.json").is_file()]
    for place in places:
        denoiser = place / "denoiser"
        if place != folder and (denoiser / "config.json").is_file():
            found.append(describe_model(denoiser))
    if not found:
        raise UserError(f"{folder} holds no model: no config.json in it or in the folders below")
    return found


def describe_model(folder: Path) -> dict[str, Any]:
    """Sizes of the model in `folder`, from its config alone: no weights are read.

    Keys: folder, kind ("tess" or "ar"), pattern, hidden_size, vocab_size, parameters,
    active_parameters (per token: of the routed experts only the chosen ones count),
    kv_bytes_per_token (bfloat16), state_bytes_per_sequence (SSM float32 + conv bfloat16).
    """
    kind, config = _read_config(folder)
    with torch.device("meta"):
        model = TessDenoiser(config) if kind == "tess" else HybridForCausalLM(config)
    backbone: HybridConfig = config.backbone_config if kind == "tess" else config
    total = count_parameters(model)
    pattern = backbone.hybrid_override_pattern
    head_bytes = backbone.num_key_value_heads * backbone.head_dim * BYTES["bfloat16"]
    state = backbone.mamba_inner_size * backbone.ssm_state_size * BYTES["float32"]
    window = (backbone.conv_kernel - 1) * backbone.conv_dim * BYTES["bfloat16"]
    return {
        "folder": str(folder),
        "kind": kind,
        "pattern": pattern,
        "hidden_size": backbone.hidden_size,
        "vocab_size": backbone.vocab_size,
        "parameters": total,
        "active_parameters": total - idle_parameters(model, backbone),
        "kv_bytes_per_token": 2 * head_bytes * pattern.count("*"),
        "state_bytes_per_sequence": (state + window) * pattern.count("M"),
    }


def count_parameters(model: nn.Module) -> int:
    """Trainable numbers; tied weights count once, router biases (buffers) not at all."""
    return sum(parameter.numel() for parameter in model.parameters())


def idle_parameters(model: nn.Module, config: HybridConfig) -> int:
    """Numbers of routed experts that one token does not visit."""
    idle = 0
    for module in model.modules():
        if isinstance(module, StackedExperts):
            share = 1 - config.num_experts_per_tok / config.n_routed_experts
            idle += round(share * count_parameters(module))
    return idle


def _read_config(folder: Path) -> tuple[str, TessConfig | HybridConfig]:
    raw = TessConfig.get_config_dict(folder)[0]
    kinds = {
        TessConfig.model_type: ("tess", TessConfig),
        HybridConfig.model_type: ("ar", HybridConfig),
    }
    if raw.get("model_type") not in kinds:
        raise UserError(
            f"{folder / 'config.json'} has model_type {raw.get('model_type')!r}; "
            f"expected one of {', '.join(kinds)}"
        )
    kind, config_class = kinds[raw["model_type"]]
    return kind, read_config(folder, config_class)
