"""The flags of `tess-train`: ours are read before torch loads, transformers' by its own parser."""

import argparse
import logging
import re
import sys
import types
import typing
from collections.abc import Sequence
from dataclasses import MISSING, fields
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from tess.errors import UserError
from tess.options import flags_from_file, unknown_name
from tess.training.checks import check_files, check_settings, check_training
from tess.training.settings import OWN, Settings, TrainingDefaults, without_effect

if typing.TYPE_CHECKING:
    from tess.training.arguments import TrainingArguments

logger = logging.getLogger(__name__)

YES, NO = ("yes", "true", "t", "y", "1"), ("no", "false", "f", "n", "0")

REFUSED = {
    "resume_from_checkpoint": "the same command goes on from the last checkpoint in --output_dir",
    "deepspeed": "FSDP2 shards a large model, see scripts/recipes/accelerate_fsdp2.yaml",
    "auto_find_batch_size": "the order of the rows follows from the batch size",
    "bf16_full_eval": "an evaluation runs as the training does",
    "fp16_full_eval": "an evaluation runs as the training does",
    "label_smoothing_factor": "the losses have no such term",
}
"""Settings of transformers that would have no effect or a wrong one, and why."""


class Parser(argparse.ArgumentParser):
    """A parser whose errors are `UserError`s, without the usage of a hundred flags."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def make_parser(description: str = "") -> argparse.ArgumentParser:
    """The parser of our own settings; transformers' are named at the end of its help."""
    parser = Parser(
        prog="tess-train",
        usage="tess-train [CONFIG.yaml|json] [--flag value ...]",
        description=description,
        epilog="Beside these, every setting of transformers' TrainingArguments is a flag and a key "
        f"(--help_all explains them): {', '.join(sorted(transformers_names()))}.",
        allow_abbrev=False,
    )
    parser.add_argument("--help_all", action=_HelpAll, nargs=0, help="explain all flags")
    for kind in (*OWN, TrainingDefaults):
        _add_fields(parser.add_argument_group(kind.__doc__.split("\n")[0]), kind)
    return parser


def known_names() -> list[str]:
    """Every setting, ours first; keys of a file and, behind two dashes, flags."""
    own = [field.name for kind in (*OWN, TrainingDefaults) for field in fields(kind)]
    return [*own, *(name for name in transformers_names() if name not in own)]


@cache
def transformers_names() -> tuple[str, ...]:
    """The fields of transformers' `TrainingArguments`, read off its source: loading it is slow."""
    folder = find_spec("transformers").submodule_search_locations[0]
    source = (Path(folder) / "training_args.py").read_text(encoding="utf-8")
    _, _, body = source.partition("\nclass TrainingArguments:\n")
    body, _, _ = body.partition("\n    def __post_init__(")
    return tuple(re.findall(r"^    ([a-z]\w*): \S", body, re.MULTILINE))


def parse_settings(
    argv: Sequence[str] | None = None,
    parser: argparse.ArgumentParser | None = None,
    files: bool = False,
) -> Settings:
    """Read `[CONFIG] [--flag value ...]`; a flag wins over the file.

    parser: as `make_parser` gives it.
    files: look for the files of rows too, which a comparison may have yet to write.

    Raises:
        UserError: unreadable file, unknown key or flag (with near matches), a value of the wrong
        type, or settings that do not go together.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser, names = parser or make_parser(), known_names()
    filed: list[str] = []
    if argv and not argv[0].startswith("-"):
        filed, argv = flags_from_file(Path(argv[0]), dict.fromkeys(names)), argv[1:]
    read, rest = parser.parse_known_args([*filed, *argv])
    given = _given(filed), _given(argv)
    _check_given(*given, names, read.objective)
    groups = [kind(**{f.name: getattr(read, f.name) for f in fields(kind)}) for kind in OWN]
    settings = Settings(*groups, training=None)
    check_settings(*groups)
    if files:
        check_files(settings.data)
    for field in fields(TrainingDefaults):
        if any(field.name in group for group in given):
            rest += [f"--{field.name}", str(getattr(read, field.name))]
    settings.training = _parse_training(rest)
    check_training(settings.training)
    return settings


def _given(flags: Sequence[str]) -> list[str]:
    return [flag[2:].partition("=")[0] for flag in flags if flag.startswith("--")]


def _check_given(
    filed: Sequence[str], flags: Sequence[str], names: Sequence[str], objective: str
) -> None:
    for name in flags:
        if name.removeprefix("no_") not in names and name not in names:
            raise UserError(unknown_name(f"--{name}", [f"--{n}" for n in names], "flag"))
    for name in (*filed, *flags):
        if name in REFUSED:
            raise UserError(f"--{name} is not supported: {REFUSED[name]}")
    idle = without_effect(objective, flags if "objective" in flags else (*filed, *flags))
    if idle:
        other = "ar" if objective == "tess" else "tess"
        raise UserError(f"--{idle[0]} belongs to --objective {other}")
    if idle := without_effect(objective, filed):
        logger.warning("with --objective %s nothing reads %s", objective, ", ".join(idle))
    if "output_dir" not in (*filed, *flags):
        raise UserError("name the folder to write to with --output_dir")


def _parse_training(flags: Sequence[str]) -> "TrainingArguments":
    parser = _transformers_parser()
    try:
        args, unknown = parser.parse_args_into_dataclasses(flags, return_remaining_strings=True)
    except ImportError as error:
        raise UserError(" ".join(str(error).split())) from error
    if unknown:
        raise UserError(f"expected a flag, which begins with two dashes, got {unknown[0]!r}")
    return args


def _transformers_parser() -> Any:
    from transformers import HfArgumentParser

    from tess.training.arguments import TrainingArguments

    class Quiet(Parser, HfArgumentParser):
        pass

    return Quiet(TrainingArguments, allow_abbrev=False, add_help=False, usage=argparse.SUPPRESS)


class _HelpAll(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        parser.epilog = None
        parser.print_help()
        print("\ntransformers' TrainingArguments\n")
        _transformers_parser().print_help()
        parser.exit()


# A dataclass as flags


def _add_fields(group: Any, kind: type) -> None:
    hints = typing.get_type_hints(kind)
    for field in fields(kind):
        more = {"help": field.metadata["help"], **_reading(hints[field.name])}
        if "choices" in field.metadata:
            more["choices"] = field.metadata["choices"]
        default = field.default if field.default is not MISSING else field.default_factory()
        group.add_argument(f"--{field.name}", default=default, **more)


def _reading(hint: Any) -> dict[str, Any]:
    """argparse's options for a field of type bool, int, float, str, list[str], or one or None."""
    if isinstance(hint, types.UnionType):
        (hint,) = [part for part in typing.get_args(hint) if part is not types.NoneType]
    if typing.get_origin(hint) is list:
        (inner,) = typing.get_args(hint)
        return {"type": inner, "nargs": "+"}
    if hint is bool:
        return {"type": _truth, "nargs": "?", "const": True, "metavar": "true|false"}
    return {"type": hint}


def _truth(text: str) -> bool:
    if text.lower() not in YES + NO:
        raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")
    return text.lower() in YES
