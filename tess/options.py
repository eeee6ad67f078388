"""Options and the mappings of a settings file: read, checked by name and by type."""

import argparse
import codecs
import contextlib
import difflib
import json
import math
from collections.abc import Collection, Mapping
from dataclasses import field
from numbers import Integral
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

import yaml

from tess.errors import UserError

_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",  # before UTF-16, whose mark it begins with
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def option(default: Any, help: str, **more: Any) -> Any:
    """A dataclass field with its default and what --help says of it; `more` is argparse's."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help, **more})
    return field(default=default, metadata={"help": help, **more})


def check_count(name: str, value: Any, most: float = math.inf) -> None:
    """Raises UserError for what is no whole number from 1 to `most`."""
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise UserError(f"{name} must be an integer, got {value!r}")
    if value < 1:
        raise UserError(f"{name} must be at least 1, got {value}")
    if value > most:
        raise UserError(f"{name} must be at most {most:,}, got {value}")


def check_seed(seed: int) -> int:
    """The seed itself.

    Raises:
        UserError: no integer, or one that torch's generators do not take.
    """
    if not isinstance(seed, int) or isinstance(seed, bool) or not -(2**63) <= seed < 2**64:
        raise UserError(f"a seed must be an integer from -2^63 to 2^64 - 1, got {seed!r}")
    return seed


def known_keys(given: Mapping[Any, Any], known: Collection[str], where: str) -> None:
    """Raises UserError, with near matches, for a key that is not among `known`."""
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(str(key), sorted(known), n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else f"known: {sorted(known)}"
            raise UserError(f"{where}: there is no key {key!r}; {hint}")


def values_of(kinds: Mapping[str, Any], given: Any, where: str) -> dict[str, Any]:
    """The values of a mapping from a file, each of the type that `kinds` has for its key.

    Null is left out: the default holds.

    Raises:
        UserError: no mapping, an unknown key (with near matches), or a value of another type.
    """
    known_keys(_typed(given, Mapping, where), kinds, where)
    return {
        key: _typed(value, kinds[key], f"{where}: {key}")
        for key, value in given.items()
        if value is not None
    }


def _typed(value: Any, kind: Any, what: str) -> Any:
    """The value as the type of a field; an int is a float too, a bool is no int.

    Written out, as huggingface_hub's `strict` checks no frozen dataclass, knows no mapping, takes
    no int for a float, and prints two causes for `int | None`.
    """
    origin, inner = get_origin(kind) or kind, get_args(kind)
    if kind is Any:
        return value
    if origin is UnionType:
        return _typed(value, inner[0], what)
    if origin in (list, tuple):
        if not isinstance(value, list):
            raise UserError(f"{what} must be a list, got {value!r}")
        items = [_typed(item, inner[0], what) for item in value]
        if origin is tuple and len(set(items)) < len(items):
            raise UserError(f"{what} has a value twice: {items}")
        return origin(items)
    if origin is Mapping:
        if not isinstance(value, dict):
            raise UserError(f"{what} must be a mapping of settings, got {value!r}")
        return value
    fits = isinstance(value, (int, float) if kind is float else kind)
    if not fits or (isinstance(value, bool) and kind is not bool):
        raise UserError(f"{what} must be of type {kind.__name__}, got {value!r}")
    return kind(value)


def flags_from_file(path: Path, known: dict[str, argparse.Action]) -> list[str]:
    """The file's settings as flags, so that both ways are checked by one parser."""
    flags: list[str] = []
    for key, value in read_config(path).items():
        if key not in known:
            raise UserError(f"{path}: {unknown_name(key, list(known), 'key')}")
        if value is None or value == []:
            continue
        values = value if isinstance(value, list) else [value]
        flags += [f"--{key}", *(json.dumps(v) if isinstance(v, dict) else str(v) for v in values)]
    return flags


def read_config(path: Path) -> dict[str, Any]:
    """The mapping in a YAML or JSON file.

    Raises:
        UserError: when it is missing, of another kind, broken, no mapping, or has a key twice.
    """
    if path.suffix not in (".yaml", ".yml", ".json"):
        raise UserError(f"expected a .yaml or .json file of settings, got {str(path)!r}")
    if not path.is_file():
        raise UserError(f"there is no file {str(path)!r}")
    text = decode(read_bytes(path), path)
    try:
        config = _json(text) if path.suffix == ".json" else yaml.load(text, _UniqueKeys)
    except _Twice as error:
        raise UserError(f"{path}, {error}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not readable: {' '.join(str(error).split())}") from error
    if not isinstance(config, dict):
        raise UserError(f"{path}: expected a mapping of settings, found {type(config).__name__}")
    return config


def read_bytes(path: Path) -> bytes:
    """The bytes of a file; UserError where a Git LFS pointer lies in its place."""
    data = path.read_bytes()
    if data.startswith(b"version https://git-lfs."):
        raise UserError(
            f"{path} is a Git LFS pointer in place of the file; `git lfs pull` gets the file itself"
        )
    return data


def decode(data: bytes, path: Path) -> str:
    """UTF-8 text, or UTF-16 or UTF-32 with a byte-order mark; no mark is left before any line.

    Raises:
        UserError: other bytes, with the line; a zero byte, which no text has.
    """
    encoding = next((name for mark, name in _MARKS.items() if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        expected = encoding.upper()
        raise UserError(
            f"{path}, line {line}: expected {expected} text, found other bytes"
        ) from error
    if (at := text.find("\0")) >= 0:
        raise UserError(
            f"{path}, line {text.count(chr(10), 0, at) + 1}: expected text, found a zero byte "
            "(a binary file, or UTF-16 without a byte-order mark)"
        )
    text = text.removeprefix("\ufeff").replace("\n\ufeff", "\n")  # `cat` leaves marks inside
    return text if "\n" in text else text.replace("\r", "\n")  # the line ends of old Macs


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An `object_pairs_hook` of json: UserError for a key that an object has twice."""
    names = set()
    for name, _ in pairs:
        if name in names:
            raise _Twice(f"the key {name!r} is there twice")
        names.add(name)
    return dict(pairs)


def _json(text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=unique_keys)
    except _Twice:
        # json does not say where; to YAML, JSON without tabs is YAML
        with contextlib.suppress(yaml.YAMLError):
            yaml.load(text.replace("\t", " "), _UniqueKeys)
        raise


class _Twice(UserError):
    """A key that stands twice in one mapping."""


class _UniqueKeys(yaml.SafeLoader):
    """PyYAML's loader, which keeps the last of several equal keys without a word, but for that."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            line = key.start_mark.line + 1
            if key.value in lines:
                raise _Twice(
                    f"line {line}: the key {key.value!r} is there twice, "
                    f"first on line {lines[key.value]}"
                )
            lines[key.value] = line
        return node


def unknown_name(name: str, known: list[str], kind: str) -> str:
    near = difflib.get_close_matches(name, known, n=3)
    hint = f"; did you mean {' or '.join(near)}?" if near else "; --help lists all"
    return f"there is no {kind} {name!r}{hint}"
