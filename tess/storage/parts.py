"""Checkpoints on disk: written whole or not at all, and read strictly.

A `tess` checkpoint is a pipeline folder (model_index.json, denoiser/, scheduler/, tokenizer/); an
`ar` checkpoint is a plain Hugging Face folder (config.json, model.safetensors, the tokenizer's
files), in this project's layout or as NVIDIA releases Nemotron-H.
"""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from tess.backbones.causal_lm import HybridForCausalLM
from tess.backbones.checkpoint import load_checkpoint, tensor_names
from tess.backbones.config import HybridConfig
from tess.backbones.damage import fault_in
from tess.backbones.released import MODEL_TYPE, load_released, mtp_blocks, read_released_config
from tess.config import TessConfig
from tess.denoiser import TessDenoiser
from tess.errors import UserError
from tess.schedulers.base import SimplexScheduler
from tess.schedulers.family import SAMPLERS
from tess.storage.files import check_replaceable
from tess.text.end_tokens import share_end_tokens
from tess.text.tokenization import load_tokenizer

logger = logging.getLogger(__name__)

Model = TessDenoiser | HybridForCausalLM

CAUSAL_TYPES = (HybridConfig.model_type, MODEL_TYPE)
"""`model_type` of the folders that hold a causal model: saved here, or released."""

SCHEDULERS = {kind.__name__: kind for kind in SAMPLERS.values()}
"""What a `tess` folder may name as its scheduler."""


@dataclass
class Parts:
    """What a checkpoint holds; an `ar` one has no scheduler."""

    model: Model
    tokenizer: PreTrainedTokenizerBase
    scheduler: SimplexScheduler | None = None


def save_parts(parts: Parts, folder: Path) -> None:
    """Write a checkpoint into `folder`; `replaced_folder` makes that atomic."""
    if parts.scheduler is None:
        parts.model.save_pretrained(folder)
        parts.tokenizer.save_pretrained(folder)
    else:
        from tess.pipeline import TessPipeline  # two seconds of diffusers, and only saving needs it

        pipeline = TessPipeline(
            denoiser=parts.model, scheduler=parts.scheduler, tokenizer=parts.tokenizer
        )
        pipeline.save_pretrained(folder)


def kind_of(folder: Path) -> str | None:
    """`tess`, `ar`, or None when `folder` is no checkpoint."""
    if (folder / "model_index.json").is_file():
        return "tess"
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return None
    known = isinstance(config, dict) and config.get("model_type") in CAUSAL_TYPES
    return "ar" if known else None


def check_target(folder: Path) -> None:
    """Raises UserError where a folder to write holds anything else than a checkpoint."""
    check_replaceable(folder)
    if folder.is_dir() and any(folder.iterdir()) and kind_of(folder) is None:
        raise UserError(
            f"{folder} holds something else than a checkpoint, which writing there would delete; "
            "empty it, or name another folder"
        )


def load_parts(
    folder: str | Path,
    dtype: torch.dtype | None = torch.float32,
    device: torch.device | str = "cpu",
) -> Parts:
    """Read a checkpoint of either kind, its weights straight onto `device`.

    `dtype` None keeps the type that the config names.

    Raises:
        UserError: no checkpoint there, a broken file, an unknown scheduler or model type, a setting
            of the wrong type (by file and name), tensors missing or unknown (by name), or a
            tokenizer that does not fit the model.
    """
    folder = Path(folder)
    kind = kind_of(folder)
    if kind is None:
        if fault := fault_in(folder):
            raise UserError(fault)
        raise UserError(
            f"{folder} is not a checkpoint: expected a folder with model_index.json (tess), or "
            f"with a config.json of model_type {' or '.join(map(repr, CAUSAL_TYPES))} (ar)"
        )
    try:
        scheduler = None
        if kind == "tess":
            scheduler_class = _scheduler_class(folder)
            config = read_config(folder / "denoiser", TessConfig)
            settings = (config.backbone_config,)
            model = load_checkpoint(
                TessDenoiser, config, folder / "denoiser", dtype=dtype, device=device
            )
            scheduler = _load_scheduler(scheduler_class, folder / "scheduler")
        else:
            model = _load_causal(folder, dtype, device)
            settings = (model.config, model.generation_config)
        place = folder / "tokenizer" if kind == "tess" else folder
        parts = Parts(model, load_tokenizer(place, *settings), scheduler)
    except (OSError, SafetensorError, ValueError) as error:
        if fault := fault_in(folder):
            raise UserError(fault) from error
        if isinstance(error, UserError):
            raise
        if isinstance(error, ValueError) and not isinstance(error, json.JSONDecodeError):
            raise UserError(str(error)) from error  # strict loading names the tensors
        raise UserError(
            f"the checkpoint {folder} cannot be read: {' '.join(str(error).split())}"
        ) from error
    share_end_tokens(parts.tokenizer, *settings)
    return parts


def _load_causal(
    folder: Path, dtype: torch.dtype | None, device: torch.device | str
) -> HybridForCausalLM:
    if _read_mapping(folder / "config.json")["model_type"] == MODEL_TYPE:
        config = read_released_config(folder)
        blocks = mtp_blocks(config, tensor_names(folder))
        if blocks > 1 or (config.num_nextn_predict_layers and not blocks):
            logger.warning(
                "%s has weights of %d multi-token predictors, and one is needed: it is read "
                "without", folder, blocks,
            )
        return load_released(folder, dtype=dtype, device=device, mtp=blocks == 1)
    config = read_config(folder, HybridConfig)
    return load_checkpoint(HybridForCausalLM, config, folder, dtype=dtype, device=device)


def read_config(folder: Path, kind: type[TessConfig] | type[HybridConfig]) -> Any:
    """The config of the model in `folder`.

    Raises:
        UserError: for another model type, and for a field of the wrong type or with a value that
            its class refuses; it names the file and the field.
    """
    path = folder / "config.json"
    model_type = _read_mapping(path).get("model_type")
    if model_type != kind.model_type:
        raise UserError(
            f"{path}: unknown model_type {model_type!r}; known here is {kind.model_type!r}"
        )
    try:
        return kind.from_pretrained(folder)
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise UserError(f"{path} cannot be used: {' '.join(str(error).split())}") from error


def _load_scheduler(kind: type[SimplexScheduler], folder: Path) -> SimplexScheduler:
    try:
        return kind.from_pretrained(folder)
    except (TypeError, ValueError) as error:  # a setting that the class does not take
        path = folder / "scheduler_config.json"
        raise UserError(f"{path} cannot be used: {' '.join(str(error).split())}") from error


def _scheduler_class(folder: Path) -> type[SimplexScheduler]:
    index, own = folder / "model_index.json", folder / "scheduler" / "scheduler_config.json"
    entry = _read_mapping(index).get("scheduler")
    named = {index: entry[-1] if isinstance(entry, list) and entry else entry}
    named[own] = _read_mapping(own).get("_class_name")
    for path, name in named.items():
        if name not in SCHEDULERS:
            known = ", ".join(SCHEDULERS)
            raise UserError(f"{path}: unknown scheduler {name!r}; known are {known}")
    return SCHEDULERS[named[own]]


def _read_mapping(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_text())
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object, found a {type(content).__name__}")
    return content


def own_fields(config: PreTrainedConfig) -> dict[str, Any]:
    """A config's settings, without where it was loaded from: a saved folder must not name that."""
    history = ("_name_or_path", "architectures", "dtype", "transformers_version")
    return {name: value for name, value in config.to_dict().items() if name not in history}


def copy_weights(source: torch.nn.Module, target: torch.nn.Module) -> tuple[list[str], list[str]]:
    """Load `source`'s tensors into `target` by name, across `tess` and `ar` models.

    Returns:
        Names that only `target` has (left as initialised), and names that only `source` has.

    Raises:
        UserError: for a tensor of another shape.
    """
    state: dict[str, Any] = source.state_dict()
    wanted = target.state_dict()
    for name in state.keys() & wanted.keys():
        if state[name].shape != wanted[name].shape:
            shapes = f"{list(state[name].shape)} there and {list(wanted[name].shape)} here"
            raise UserError(f"the checkpoint does not fit the settings: {name} is {shapes}")
    target.load_state_dict(state, strict=False)
    return _only_in(wanted, state), _only_in(state, wanted)


def _only_in(state: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Names that `other` lacks, but for a tied head, whose weight is there under its first name."""
    shared = {state[name].data_ptr() for name in state.keys() & other.keys()}
    return sorted(n for n in state.keys() - other.keys() if state[n].data_ptr() not in shared)
