"""A value on disk beside what it depends on."""

import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from tess.storage.files import write_atomically


def kept(
    path: Path, key: Mapping[str, Any], ignoring: Collection[str] = ()
) -> dict[str, Any] | None:
    """The `value` in a file of `keep`, where it was made with the same `key`.

    ignoring: names of the key that may differ.
    """

    def compared(one: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in one.items() if name not in ignoring}

    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return found["value"] if compared(found["key"]) == compared(key) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


_HISTORY = {"is_local", "local_files_only", "name_or_path", "_name_or_path", "transformers_version"}
"""Keys of JSON files that say how a file came to be there, not what it is."""


def digest(value: Any) -> str:
    """A short hash of a value that JSON can hold."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def digest_folder(folder: Path) -> str:
    """A hash over all files of a checkpoint, by name."""
    found = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        found.update(str(path.relative_to(folder)).encode())
        if path.suffix == ".json":
            content = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(content, dict):
                content = {k: v for k, v in content.items() if k not in _HISTORY}
            found.update(json.dumps(content, sort_keys=True).encode())
            continue
        with open(path, "rb") as file:
            found.update(hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()[:16]


def keep(path: Path, key: Mapping[str, Any], value: Any) -> None:
    """Write a value beside what it depends on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"key": key, "value": value}, ensure_ascii=False, indent=2)
    write_atomically(path, text + "\n")
