"""A value on disk beside what it depends on."""

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


def keep(path: Path, key: Mapping[str, Any], value: Any) -> None:
    """Write a value beside what it depends on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"key": key, "value": value}, ensure_ascii=False, indent=2)
    write_atomically(path, text + "\n")
