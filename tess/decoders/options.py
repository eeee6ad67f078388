"""The decoders by name, and `SamplerOptions` as flags: what commands share."""

import argparse
from dataclasses import MISSING
from typing import Any

from tess.sampling.options import SamplerOptions

DECODERS = ("tess", "ar", "ar+mtp", "tess+ar")

_KINDS = {int: int, int | None: int, float: float, float | None: float}


def add_sampler_flags(parser: argparse.ArgumentParser) -> None:
    """A group of flags, one per option."""
    group = parser.add_argument_group("how tess writes")
    for item in SamplerOptions.flags():
        kind = _KINDS.get(item.type, str)
        default = item.default if item.default_factory is MISSING else []
        more = {key: value for key, value in item.metadata.items() if key != "help"}
        more.setdefault("type", kind)
        shown = "" if default in (None, []) else f" (default {default})"
        group.add_argument(
            f"--{item.name}", default=default, help=item.metadata["help"] + shown,
            metavar={int: "N", float: "X"}.get(kind, "NAME"), **more,
        )


def sampler_options(args: argparse.Namespace, **more: Any) -> SamplerOptions:
    """The options that were given as flags."""
    given = {item.name: getattr(args, item.name) for item in SamplerOptions.flags()}
    return SamplerOptions(**given, **more)
