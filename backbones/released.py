"""Folders in the layout of NVIDIA's releases: `model_type: nemotron_h`, config.json, safetensors.

Reading takes old and new spellings, either expert layout, and the multi-token predictor (`mtp.*`).
Writing gives the released names, one tensor per expert unless asked otherwise; transformers reads
the result.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import save_file
from torch import Tensor

from tess.backbones.causal_lm import HybridForCausalLM
from tess.backbones.checkpoint import (
    INDEX_FILE,
    SINGLE_FILE,
    load_checkpoint,
    split_experts,
    tensor_names,
)
from tess.backbones.config import HybridConfig
from tess.backbones.damage import fault_of
from tess.backbones.layouts import EXPERT_LAYOUTS
from tess.backbones.pretrained import stays_float32

MODEL_TYPE = "nemotron_h"
_MTP_LAYER = re.compile(r"mtp\.layers\.(\d+)\.")
MAX_SHARD_BYTES = 5_000_000_000

_OURS_ALONE = ("mamba_direction", "mtp_after_norm_f")  # the released layout has no such fields
_LAYERS = {"hybrid_override_pattern", "layers_block_type", "layer_types"}
_MAY_BE_NULL = _LAYERS | {
    "mtp_hybrid_override_pattern", "mtp_layers_block_type", "num_nextn_predict_layers",
}
_HISTORY = ("_name_or_path", "architectures", "dtype", "transformers_version", "model_type")


def read_released_config(folder: str | Path) -> HybridConfig:
    """The config of a released folder, bare `Infinity` and all spellings included.

    Raises:
        ValueError: not such a folder, or values that `HybridConfig` refuses.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} has no config.json; expected a released checkpoint folder")
    try:  # transformers' reader knows every way to write infinity
        fields, _ = HybridConfig.get_config_dict(folder)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        reason = fault_of(path) or f"is no JSON object: {' '.join(str(error).split())}"
        raise ValueError(f"{path} {reason}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path} is no JSON object, but a {type(fields).__name__}")
    if fields.get("model_type") != MODEL_TYPE:
        found = fields.get("model_type")
        raise ValueError(f"{path} has model_type {found!r}; expected {MODEL_TYPE!r}")
    if "dtype" not in fields and "torch_dtype" in fields:
        fields["dtype"] = fields.pop("torch_dtype")
    fields.pop("auto_map", None)  # names remote code, which is not used
    fields.setdefault("eos_after_source", False)  # only what was trained here says that
    for name in _MAY_BE_NULL:
        if fields.get(name, 0) is None:
            del fields[name]
    if not _LAYERS & set(fields):
        raise ValueError(f"{path} names no layers; expected {' or '.join(sorted(_LAYERS))}")
    # readers trust what follows over these two: the pattern, and the tensors (`mtp_blocks`)
    fields.pop("num_hidden_layers", None)
    blocks = fields.get("num_nextn_predict_layers")
    if isinstance(blocks, int) and blocks > 1:
        fields["num_nextn_predict_layers"] = 1
    try:
        return HybridConfig(**fields)
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise ValueError(f"{path} cannot be used: {' '.join(str(error).split())}") from error


def load_released(
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    mtp: bool = True,
) -> HybridForCausalLM:
    """Read a released folder straight into a model on `device`, in `dtype` (None: the stored one).

    Whether there is a multi-token predictor, the files say, not the config's count. `mtp=False`
    leaves it out, and reads folders whose config names one but whose files lost it, as those that
    transformers saves.

    Raises:
        ValueError: quantized weights, or more than one block of a predictor; see
            `read_released_config` and `load_checkpoint` too.
    """
    config = read_released_config(folder)
    if method := getattr(config, "quantization_config", None):
        name = method.get("quant_method", "unknown") if isinstance(method, dict) else method
        path = Path(folder) / "config.json"
        raise ValueError(f"{path} describes quantized weights ({name}); expected BF16 or F32")
    names = tensor_names(folder)
    # readers of this layout do not tie, whatever the field says; without a stored head we must
    config.tie_word_embeddings = config.tie_word_embeddings and "lm_head.weight" not in names
    blocks = mtp_blocks(config, names) if mtp else 0
    if mtp and config.num_nextn_predict_layers and not blocks:
        raise ValueError(
            f"{folder} has no mtp.* tensors, though num_nextn_predict_layers in its config.json is "
            "1 or more (transformers drops them when it saves); read it with mtp=False"
        )
    if blocks > 1:
        raise ValueError(
            f"{folder} has {blocks} blocks of mtp.* tensors, and one can be used; read it with "
            "mtp=False"
        )
    config.num_nextn_predict_layers = blocks
    return load_checkpoint(
        HybridForCausalLM, config, folder, dtype=dtype, device=device,
        leaves_out=lambda name: not mtp and name.startswith("mtp."),
    )


def mtp_blocks(config: HybridConfig, names: Iterable[str]) -> int:
    """Blocks of a multi-token predictor among a folder's tensors; each repeats the pattern."""
    layers = [int(index[1]) for name in names if (index := _MTP_LAYER.match(name))]
    return math.ceil((max(layers, default=-1) + 1) / len(config.mtp_hybrid_override_pattern))


def save_released(
    model: HybridForCausalLM,
    folder: str | Path,
    *,
    expert_layout: str = "per_expert",
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write config, weights and generation settings in the released layout, shard by shard.

    Weights that are in `folder` already are replaced.

    Tensors keep their type; what is float32 for precision alone is written in the type of the other
    weights where that loses nothing, so that reading and writing changes no bit of a file. A
    head tied to the embedding is written out, since readers of this layout do not tie. The gates of
    the reverse scan are left out: no causal function reads them.

    Raises:
        ValueError: an unknown expert layout.
    """
    if expert_layout not in EXPERT_LAYOUTS:
        raise ValueError(
            f"expert_layout must be one of {', '.join(EXPERT_LAYOUTS)}, got {expert_layout!r}"
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for old in (*folder.glob("model*.safetensors"), folder / INDEX_FILE):
        old.unlink(missing_ok=True)  # readers would prefer an index that is left over
    dtype = model.backbone.embeddings.weight.dtype
    _write_config(model.config, dtype, folder)
    model.generation_config.save_pretrained(folder)
    shards = list(_shards(_tensors(model, expert_layout), max_shard_bytes))
    names = [
        SINGLE_FILE if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        for i in range(1, len(shards) + 1)
    ]
    for name, shard in zip(names, shards):
        tensors = {key: make() for key, make in shard}
        save_file(tensors, folder / name, metadata={"format": "pt"})
    if len(shards) > 1:
        weight_map = {key: name for name, shard in zip(names, shards) for key, _ in shard}
        total = sum(size for _, size, _ in _tensors(model, expert_layout))
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


def released_fields(config: HybridConfig, dtype: torch.dtype) -> dict[str, Any]:
    """config.json of the released layout for a model with weights of `dtype`."""
    # every field of the class, defaults too (readers have defaults of their own), and what a file
    # had beyond these
    own = {name: getattr(config, name) for name in HybridConfig.__annotations__}
    fields = config.to_diff_dict() | own | {"num_hidden_layers": config.num_hidden_layers}
    fields["tie_word_embeddings"] = False
    for name in (*_OURS_ALONE, *_HISTORY):
        fields.pop(name, None)
    if not config.eos_after_source:  # as in every release
        del fields["eos_after_source"]
    return {
        "architectures": ["NemotronHForCausalLM"],
        "model_type": MODEL_TYPE,
        "dtype": str(dtype).removeprefix("torch."),
        **dict(sorted(fields.items())),
    }


def _write_config(config: HybridConfig, dtype: torch.dtype, folder: Path) -> None:
    # json writes an open step limit as the bare Infinity that released files have
    text = json.dumps(released_fields(config, dtype), indent=2)
    (folder / "config.json").write_text(text + "\n")


def _tensors(
    model: HybridForCausalLM, expert_layout: str
) -> Iterator[tuple[str, int, Callable[[], Tensor]]]:
    """(name, bytes, how to make it) of everything that is written."""
    dtype = model.backbone.embeddings.weight.dtype
    for name, tensor in model.state_dict().items():
        if name.endswith(".reverse_gate"):
            continue
        kind = tensor.dtype
        is_bias = name.endswith("e_score_correction_bias")  # float32 in every release
        if stays_float32(name) and not is_bias and torch.equal(tensor.to(dtype).to(kind), tensor):
            kind = dtype
        parts = split_experts(name, tensor) if expert_layout == "per_expert" else [(name, tensor)]
        for key, part in parts:
            # a copy: parts of one tensor may not share memory in a file
            make = partial(part.detach().contiguous().to, "cpu", kind, copy=True)
            yield key, part.numel() * kind.itemsize, make


def _shards(
    tensors: Iterator[tuple[str, int, Callable[[], Tensor]]], max_bytes: int
) -> Iterator[list[tuple[str, Callable[[], Tensor]]]]:
    shard: list[tuple[str, Callable[[], Tensor]]] = []
    filled = 0
    for name, size, make in tensors:
        if shard and filled + size > max_bytes:
            yield shard
            shard, filled = [], 0
        shard.append((name, make))
        filled += size
    if shard:
        yield shard
