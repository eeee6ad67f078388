"""What a checkpoint folder or a preset holds: parameters, its cache, the least times on a GPU."""

from copy import copy
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tess.backbones.causal_lm import HybridForCausalLM
from tess.backbones.config import HybridConfig
from tess.backbones.feedforward import StackedExperts
from tess.backbones.presets import PRESETS, preset_config
from tess.backbones.released import MODEL_TYPE, read_released_config
from tess.config import TessConfig
from tess.costs.gpus import Workload
from tess.costs.roofline import (
    conv_bytes_per_sequence,
    kv_bytes_per_token,
    roofline,
    ssm_bytes_per_sequence,
)
from tess.denoiser import TessDenoiser
from tess.errors import UserError
from tess.storage.hub import CONFIGS, local_folder
from tess.storage.parts import read_config


def describe(
    place: Path | str, gpu: str | None = None, work: Workload | None = None
) -> list[dict[str, Any]]:
    """One description for every model: of a preset, or in a folder that holds one or several.

    Args:
        place: a folder or hub id (`tess.storage.hub.local_folder`), or as text the name of a
            preset, which goes before a folder of that name (`./NAME` is the folder).
        gpu: add the least times on this GPU (`tess.costs.roofline.GPUS`).
        work: of what those are; None: the standard one.

    Raises:
        UserError: no model of ours there, or an unknown GPU.
    """
    if place in PRESETS:
        found = [({"folder": None, "preset": place}, preset_config(place))]
    else:
        found = [
            ({"folder": str(folder), "preset": None}, _read_config(folder))
            for folder in _model_folders(place)
        ]
    return [labels | describe_config(config, gpu, work) for labels, config in found]


def describe_config(
    config: TessConfig | HybridConfig, gpu: str | None = None, work: Workload | None = None
) -> dict[str, Any]:
    """Sizes of a model of this shape; nothing is allocated.

    Keys: kind ("tess" or "ar"), pattern, hidden_size, vocab_size; parameters and active_parameters
    (per token: of the routed experts only the chosen ones count), both without the multi-token
    predictor, and mtp_parameters and mtp_active_parameters of the predictor alone;
    kv_bytes_per_token and mtp_kv_bytes_per_token (bfloat16), state_bytes_per_sequence, which is
    ssm_bytes_per_sequence (float32) + conv_bytes_per_sequence (bfloat16); roofline: None without a
    `gpu`, else the fields of `tess.costs.roofline.Roofline`.
    """
    is_tess = isinstance(config, TessConfig)
    backbone: HybridConfig = config
    if is_tess:
        backbone = copy(config.backbone_config)
        backbone.num_nextn_predict_layers = 0  # a denoiser has no predictor, whatever this says
    with torch.device("meta"):
        model = TessDenoiser(config) if is_tess else HybridForCausalLM(config)
    times = None
    if gpu is not None:
        joint = is_tess and config.source_encoding == "joint"
        times = asdict(roofline(backbone, gpu, work or Workload(), joint))
    return {
        "kind": "tess" if is_tess else "ar",
        "pattern": backbone.hybrid_override_pattern,
        "hidden_size": backbone.hidden_size,
        "vocab_size": backbone.vocab_size,
        **_parameters(model, backbone),
        **_cache_sizes(backbone),
        "roofline": times,
    }


def _parameters(model: nn.Module, config: HybridConfig) -> dict[str, int]:
    mtp = getattr(model, "mtp", None) or nn.Module()  # an empty one has no parameters
    total, ahead = count_parameters(model), count_parameters(mtp)
    idle, idle_ahead = idle_parameters(model, config), idle_parameters(mtp, config)
    return {
        "parameters": total - ahead,
        "active_parameters": total - ahead - (idle - idle_ahead),
        "mtp_parameters": ahead,
        "mtp_active_parameters": ahead - idle_ahead,
    }


def _cache_sizes(config: HybridConfig) -> dict[str, int]:
    pattern = config.hybrid_override_pattern
    ahead = config.mtp_hybrid_override_pattern if config.num_nextn_predict_layers else ""
    ssm = ssm_bytes_per_sequence(config, pattern)
    windows = conv_bytes_per_sequence(config, pattern)
    return {
        "kv_bytes_per_token": kv_bytes_per_token(config, pattern),
        "mtp_kv_bytes_per_token": kv_bytes_per_token(config, ahead),
        "state_bytes_per_sequence": ssm + windows,
        "ssm_bytes_per_sequence": ssm,
        "conv_bytes_per_sequence": windows,
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


def _model_folders(place: Path | str) -> list[Path]:
    try:
        folder = local_folder(place, CONFIGS)
    except UserError as error:
        raise UserError(f"{error}{_or_preset(place)}") from error
    places = [folder, *sorted(path for path in folder.iterdir() if path.is_dir())]
    found = [place for place in places if (place / "config.json").is_file()]
    for place in places:
        denoiser = place / "denoiser"
        if place != folder and (denoiser / "config.json").is_file():
            found.append(denoiser)
    if not found:
        raise UserError(f"{folder} holds no model: no config.json in it or in the folders below")
    return found


def _or_preset(place: Path | str) -> str:
    """What the message says after a folder that is not there; a name may be a mistyped preset."""
    try:
        preset_config(str(place))
    except ValueError as error:
        if isinstance(place, str) and "/" not in place:
            return f", and {error}"
    return "; expected a checkpoint folder"


def _read_config(folder: Path) -> TessConfig | HybridConfig:
    path = folder / "config.json"
    content = TessConfig.get_config_dict(folder)[0]
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object, found a {type(content).__name__}")
    model_type = content.get("model_type")
    if model_type == MODEL_TYPE:
        try:
            return read_released_config(folder)
        except ValueError as error:
            raise UserError(str(error)) from error
    kinds = {kind.model_type: kind for kind in (TessConfig, HybridConfig)}
    if model_type not in kinds:
        known = ", ".join([*kinds, MODEL_TYPE])
        raise UserError(f"{path} has model_type {model_type!r}; expected one of {known}")
    return read_config(folder, kinds[model_type])
