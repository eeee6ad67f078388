"""Train a model: tess-train [CONFIG.yaml|json] [--flag value ...]

CONFIG holds any of the flags below as keys; flags win over it. The same command goes on from the
last checkpoint in --output_dir. The result is OUTPUT_DIR/final, which tess-generate and
tess-evaluate take as --checkpoint.
"""

import argparse
from collections.abc import Sequence

from tess.cli import add_version, run
from tess.training.flags import make_parser as parser_of_settings
from tess.training.flags import parse_settings


def make_parser() -> argparse.ArgumentParser:
    """The parser of `tess-train`."""
    parser = parser_of_settings(__doc__)
    add_version(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    settings = parse_settings(argv, make_parser(), files=True)
    from tess.training.run import train

    final = train(settings)
    if settings.training.process_index == 0:
        print(f"saved {final}")
    return 0


def command() -> None:
    """`tess-train`."""
    run(main)
