"""Weights on disk, read straight into a model: shard by shard, without a second copy in memory.

Two layouts of routed experts are read: one tensor per expert, as released, and all of a layer
stacked [E, out, in], as transformers holds them. The released prefix `backbone.` and transformers'
`model.` mean the same.
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from tess.backbones.damage import fault_of
from tess.backbones.pretrained import name_some, stays_float32

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
GENERATION_FILE = "generation_config.json"
_STORED = ("F64", "F32", "F16", "BF16")  # what is read
_IN_MEMORY = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_EXPERT = re.compile(r"(.*\bmixer\.experts)\.(\d+)\.(up_proj|down_proj)\.weight")
_BLOCK_BYTES = 4 << 20  # copied at a time
_MAPPED_BYTES = 32 << 20  # a file is mapped anew after so much of it, or all of it stays resident


@dataclass(frozen=True)
class _Piece:
    """One tensor of a file, and where it goes: a whole parameter, or one expert's part of it."""

    file: Path
    key: str
    shape: tuple[int, ...]
    target: str
    expert: int | None


def load_checkpoint(
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    starts_new: Callable[[str], bool] = lambda name: False,
    leaves_out: Callable[[str], bool] = lambda name: False,
) -> Any:
    """Build a model on `device` and fill it from the safetensors files of `folder`.

    Everything is checked before the first weight is read.

    Args:
        model_class, config: what to build.
        folder: holds model.safetensors, or shards and model.safetensors.index.json.
        dtype: of the weights in memory; None takes the config's, else float32. What
            `KEPT_IN_FLOAT32` lists is float32 then too (float64 for float64).
        starts_new: says of a parameter's name that the files need not have it; it is initialised.
        leaves_out: says of a tensor's name (with prefix `backbone.`) that it is not wanted.

    Raises:
        ValueError: a missing, truncated or unreadable file; tensors missing, unknown, there twice
            or of another shape or type than the config says. File, name, expected and found are
            in its one sentence.
    """
    folder = Path(folder)
    dtype = dtype or config.dtype or torch.float32
    if isinstance(dtype, str):  # as it stands in a config that was just saved
        dtype = getattr(torch, dtype, dtype)
    if dtype not in _IN_MEMORY:
        raise ValueError(f"dtype must be one of {', '.join(map(str, _IN_MEMORY))}, got {dtype}")
    with init_empty_weights(include_buffers=False):
        model = model_class(config)
    pieces = _plan(model, folder, starts_new, leaves_out)
    _materialize(model, {piece.target for piece in pieces}, dtype, torch.device(device))
    state = model.state_dict()
    reader = _Reader()
    for piece in pieces:
        tensor = state[piece.target]
        reader.copy(piece, tensor if piece.expert is None else tensor[piece.expert])
    reader.close()
    _initialise_new(model)
    model.tie_weights()
    if model.can_generate() and (settings := read_generation_config(folder)) is not None:
        model.generation_config = settings
    return model.eval()


def read_generation_config(folder: Path) -> GenerationConfig | None:
    """What is in the folder's generation_config.json, if there is one.

    Raises:
        ValueError: a file that cannot be read.
    """
    if not (folder / GENERATION_FILE).is_file():
        return None
    try:
        return GenerationConfig.from_pretrained(folder)
    except Exception as error:  # transformers lets through whatever its reader stumbles over
        fault = fault_of(folder / GENERATION_FILE)
        reason = f"it {fault}" if fault else " ".join(str(error).split())
        raise ValueError(
            f"{folder / GENERATION_FILE} holds no generation settings: {reason}"
        ) from error


def tensor_names(folder: str | Path) -> list[str]:
    """Names of all tensors in a folder's safetensors files, as they are written there."""
    return [key for _, key, _, _ in _headers(Path(folder))]


def released_name(key: str) -> str:
    """A tensor's name as this project and most released files spell it."""
    name = f"backbone.{key.removeprefix('model.')}" if key.startswith("model.") else key
    return name.replace("backbone.embedding.", "backbone.embeddings.", 1)


def split_experts(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The released form of one tensor: stacked experts one by one, all else as it is."""
    head, _, last = name.rpartition(".")
    if head.endswith("mixer.experts"):
        for index, expert in enumerate(tensor):
            yield f"{head}.{index}.{last}.weight", expert
    else:
        yield name, tensor


# What the files hold


def _plan(
    model: PreTrainedModel,
    folder: Path,
    starts_new: Callable[[str], bool],
    leaves_out: Callable[[str], bool],
) -> list[_Piece]:
    """Every tensor that will be read, after all of them were held against the model."""
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tied = set(model.all_tied_weights_keys)
    pieces, unknown = [], []
    for file, key, shape, dtype in _headers(folder):
        name = released_name(key)
        if leaves_out(name):
            continue
        match = _EXPERT.fullmatch(name)
        target, expert = (f"{match[1]}.{match[3]}", int(match[2])) if match else (name, None)
        if target not in expected or target in tied:  # a tied head comes with the embedding
            unknown.append(key)
            continue
        want = expected[target] if expert is None else expected[target][1:]
        if expert is not None and expert >= expected[target][0]:
            unknown.append(key)
            continue
        if dtype not in _STORED:
            raise ValueError(
                f"{file}: {key} is stored as {dtype}; expected {', '.join(_STORED)} (quantized "
                "checkpoints are not read)"
            )
        if shape != want:
            raise ValueError(
                f"{file}: {key} is {list(shape)}, but by the config it is {list(want)}"
            )
        pieces.append(_Piece(file, key, shape, target, expert))
    missing = [name for name in _lacking(pieces, expected, tied) if not starts_new(name)]
    problems = [
        f"{word} {name_some(names)}"
        for word, names in (("lacks", missing), ("has unknown", unknown))
        if names
    ]
    if problems:
        raise ValueError(f"the checkpoint {folder} does not fit: it {' and '.join(problems)}")
    return pieces


def _lacking(
    pieces: list[_Piece], expected: dict[str, tuple[int, ...]], tied: set[str]
) -> Iterator[str]:
    """Names that no file has, one per expert where experts are stored one by one."""
    found: dict[str, set[int | None]] = {}
    for piece in pieces:
        experts = found.setdefault(piece.target, set())
        if piece.expert in experts or (experts and (None in experts or piece.expert is None)):
            raise ValueError(f"{piece.file}: {piece.key} is there a second time")
        experts.add(piece.expert)
    for name, shape in expected.items():
        experts = found.get(name)
        if experts is None:
            if name not in tied:
                yield name
        elif None not in experts:
            head, _, last = name.rpartition(".")
            for index in sorted(set(range(shape[0])) - experts):
                yield f"{head}.{index}.{last}.weight"


def _headers(folder: Path) -> Iterator[tuple[Path, str, tuple[int, ...], str]]:
    """(file, name, shape, stored type) of every tensor; no weights are read."""
    for file, listed in _files(folder).items():
        with _open(file) as opened:
            keys = list(opened.keys())
            if listed is not None and (gone := sorted(listed - set(keys))):
                raise ValueError(f"{file} lacks {name_some(gone)}, which {INDEX_FILE} puts there")
            for key in keys:
                part = opened.get_slice(key)
                yield file, key, tuple(part.get_shape()), part.get_dtype()


def _files(folder: Path) -> dict[Path, set[str] | None]:
    """The files with weights, and the names that an index puts into each (None: no index)."""
    index, single = folder / INDEX_FILE, folder / SINGLE_FILE
    if not index.is_file():
        if not single.is_file():
            raise ValueError(f"{folder} has no weights; expected {SINGLE_FILE} or {INDEX_FILE}")
        return {single: None}
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        files: dict[Path, set[str] | None] = {}
        for key, name in weight_map.items():
            if Path(name).name != name:
                raise ValueError(f"{name!r} is no file of the folder itself")
            files.setdefault(folder / name, set()).add(key)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = fault_of(index) or f"is no index with a weight_map: {error}"
        raise ValueError(f"{index} {reason}") from error
    if single.is_file() and set(files) != {single}:
        raise ValueError(f"{folder} has both {SINGLE_FILE} and {INDEX_FILE}; expected one of them")
    for file, keys in files.items():
        if not file.is_file():
            raise ValueError(
                f"shard {file} is missing, in which {INDEX_FILE} has {name_some(sorted(keys))}"
            )
    return files


def _open(file: Path) -> Any:
    try:
        return safe_open(file, "pt")
    except (SafetensorError, OSError) as error:
        size = file.stat().st_size
        fault = fault_of(file) or f"is truncated or no safetensors file ({size} bytes): {error}"
        raise ValueError(f"{file} {fault}") from error


# Filling the model


def _materialize(
    model: nn.Module, loaded: set[str], dtype: torch.dtype, device: torch.device
) -> None:
    """Give every parameter memory on the device; buffers move there."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    made: dict[int, nn.Parameter] = {}  # tied parameters are one object, and stay one
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in made:
                full = f"{path}.{name}" if path else name
                kind = wide if stays_float32(full) else dtype
                data = torch.empty(parameter.shape, dtype=kind, device=device)
                made[id(parameter)] = nn.Parameter(data, parameter.requires_grad)
                # transformers' initialisation leaves alone what has this mark
                made[id(parameter)]._is_hf_initialized = full in loaded
            module._parameters[name] = made[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)


def _initialise_new(model: PreTrainedModel) -> None:
    for module in model.modules():
        own = [parameter for parameter in module._parameters.values() if parameter is not None]
        if any(not parameter._is_hf_initialized for parameter in own):
            model._init_weights(module)


class _Reader:
    """Copies tensors out of files, mapping a bounded part of a file at a time."""

    def __init__(self) -> None:
        self.file: Path | None = None
        self.opened: Any = None
        self.mapped = 0

    def copy(self, piece: _Piece, target: Tensor) -> None:
        """Fill `target`, of any type and device, in blocks of rows."""
        rows = max(1, piece.shape[0])
        row_bytes = target.numel() // rows * target.element_size()
        step = max(1, _BLOCK_BYTES // max(1, row_bytes))
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            if piece.file != self.file or self.mapped > _MAPPED_BYTES:
                self.close()
                self.file, self.opened = piece.file, _open(piece.file)
            self.mapped += (stop - start) * row_bytes  # about: a file's type may be another
            part = self.opened.get_slice(piece.key)[start:stop]  # a copy, unlike a whole tensor
            target[start:stop].copy_(part)

    def close(self) -> None:
        """Give the mapping back."""
        self.file, self.opened, self.mapped = None, None, 0
