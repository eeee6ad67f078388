"""One setting of a dataclass that HfArgumentParser turns into a flag."""

from dataclasses import field
from typing import Any


def option(default: Any, help: str, **more: Any) -> Any:
    """A dataclass field with its default and what --help says of it; `more` is argparse's."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help, **more})
    return field(default=default, metadata={"help": help, **more})
