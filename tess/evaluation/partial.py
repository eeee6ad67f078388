"""Texts of an evaluation as they come, so that one that was killed goes on where it was."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from tess.storage.files import write_atomically

PARTIAL = "predictions.partial.jsonl"


@dataclass(frozen=True)
class Text:
    """What is kept of a generated text; see `tess.decoders.base.Generation`."""

    text: str
    num_new_tokens: int
    nfe: int
    num_verifications: int
    first: "Text | None" = None


class PartialTexts:
    """A file with what its texts depend on in the first line, and then a line for each text.

    Args:
        path: a file that is there and depends on the same goes on; any other is begun anew.
        depends_on: as JSON can hold it.

    finished: the texts by the number of their source. seconds: those that all of them took.
    """

    def __init__(self, path: Path, depends_on: Mapping[str, Any]) -> None:
        self.path, self.seconds = path, 0.0
        self.finished: dict[int, Text] = {}
        head, lines = json.dumps(depends_on, ensure_ascii=False, sort_keys=True), []
        if path.is_file():
            first, *lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
            lines = lines[:-1] if first == head else []  # behind the last line end: a torn line
        for line in lines:
            row = json.loads(line)
            self.finished[row.pop("row")] = _text(row)
            self.seconds += row["seconds"]
        write_atomically(path, "".join(f"{line}\n" for line in [head, *lines]))

    def add(self, texts: Mapping[int, Any], seconds: float) -> None:
        """Write the texts of a batch, which took so long."""
        with open(self.path, "a", encoding="utf-8", newline="\n") as file:
            for number, text in texts.items():
                kept = {"row": number, **asdict(_kept(text)), "seconds": seconds / len(texts)}
                file.write(json.dumps(kept, ensure_ascii=False) + "\n")


def _kept(generation: Any) -> Text:
    values = {item.name: getattr(generation, item.name) for item in fields(Text)}
    first = values.pop("first")
    return Text(**values, first=None if first is None else _kept(first))


def _text(row: Mapping[str, Any]) -> Text:
    values = {item.name: row[item.name] for item in fields(Text)}
    first = values.pop("first")
    return Text(**values, first=None if first is None else _text(first))
