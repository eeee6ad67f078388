"""What is wrong with a file that cannot be read, in words: asked after a reader has failed."""

import json
from pathlib import Path

POINTER = b"version https://git-lfs.github.com/spec/"
READ_FILES = (
    "model_index.json", "config.json", "scheduler_config.json", "generation_config.json",
    "tokenizer.json", "tokenizer_config.json", "*.safetensors",
)


def fault_of(file: Path) -> str | None:
    """`is empty`, `is a Git LFS pointer ...` and the like; None where nothing shows."""
    with open(file, "rb") as opened:
        start = opened.read(len(POINTER))
    if not start:
        return "is empty"
    if start == POINTER:
        return "is a Git LFS pointer, not the file itself; `git lfs pull` fetches that"
    if file.suffix != ".json":
        return None
    try:
        json.loads(file.read_bytes().decode())
    except UnicodeDecodeError:
        return "is no JSON object, but binary"
    except ValueError as error:
        return f"is no JSON object: {error}"
    return None


def fault_in(folder: Path) -> str | None:
    """File and fault of the first damaged file of a checkpoint's folder and the folders in it."""
    for pattern in READ_FILES:
        for file in sorted([*folder.glob(pattern), *folder.glob(f"*/{pattern}")]):
            if file.is_file() and (fault := fault_of(file)):
                return f"{file} {fault}"
    return None
