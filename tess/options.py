"""Options and the mappings of a settings file: read, checked by name and by type."""

import argparse
import difflib
import json
from collections.abc import Collection, Mapping
from dataclasses import field
from pathlib import Path
from typing import Any

import yaml

from tess.errors import UserError


def option(default: Any, help: str, **more: Any) -> Any:
    """A dataclass field with its default and what --help says of it; `more` is argparse's."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help, **more})
    return field(default=default, metadata={"help": help, **more})


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


def typed(value: Any, kind: type, what: str) -> Any:
    """The value as `kind`; an int is a float too, a bool is no int.

    Raises:
        UserError: another type.
    """
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
        UserError: when it is missing, of another kind, broken, or no mapping.
    """
    if path.suffix not in (".yaml", ".yml", ".json"):
        raise UserError(f"expected a .yaml or .json file of settings, got {str(path)!r}")
    if not path.is_file():
        raise UserError(f"there is no file {str(path)!r}")
    try:
        config = (
            json.loads(path.read_text())
            if path.suffix == ".json"
            else yaml.safe_load(path.read_text())
        )
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{path} is not readable: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"{path}: expected a mapping of settings, found {type(config).__name__}")
    return config


def unknown_name(name: str, known: list[str], kind: str) -> str:
    near = difflib.get_close_matches(name, known, n=3)
    hint = f"; did you mean {' or '.join(near)}?" if near else "; --help lists all"
    return f"there is no {kind} {name!r}{hint}"
