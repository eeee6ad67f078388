"""Train a model: scripts/train.py [CONFIG.yaml|json] [--flag value ...]

CONFIG holds any of the flags below as keys; flags win over it. The same command goes on from the
last checkpoint in --output_dir. The result is OUTPUT_DIR/final, which scripts/generate.py and
scripts/evaluate.py take as --checkpoint.
"""

from collections.abc import Sequence

from tess.cli import run
from tess.training.run import train
from tess.training.settings import parse_settings


def main(argv: Sequence[str] | None = None) -> int:
    settings = parse_settings(argv, description=__doc__)
    final = train(settings)
    if settings.training.process_index == 0:
        print(f"saved {final}")
    return 0


def command() -> None:
    """`tess-train`."""
    run(main)
