"""Train a model: tess-train [CONFIG.yaml|json] [--flag value ...]

CONFIG holds any of the flags below as keys; flags win over it. The same command goes on from the
last checkpoint in --output_dir. The result is OUTPUT_DIR/final, which tess-generate and
tess-evaluate take as --checkpoint.
"""

import argparse
from collections.abc import Sequence
from typing import Any

from tess.cli import add_version, run
from tess.training.flags import make_parser as parser_of_settings
from tess.training.flags import parse_settings
from tess.training.settings import Settings


def make_parser() -> argparse.ArgumentParser:
    """The parser of `tess-train`."""
    parser = parser_of_settings(__doc__)
    add_version(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    settings = parse_settings(argv, make_parser(), files=True)
    from tess.training.run import train

    final = train(settings, [_cost(settings)])
    if settings.training.process_index == 0:
        print(f"saved {final}")
    return 0


def _cost(settings: Settings) -> Any:
    """A callback that says what an update costs, before the first one."""
    from transformers import TrainerCallback

    from tess.costs.training import update_flops

    class Cost(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            if not state.is_world_process_zero:
                return
            rows = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
            lengths = settings.data.max_source_length, settings.data.max_target_length
            first_pass = settings.diffusion.self_conditioning_probability
            teraflop = update_flops(given["model"].config, rows, *lengths, first_pass) / 1e12
            print(f"an update of {rows} rows at their greatest length: {teraflop:.3g} TFLOP")

    return Cost()


def command() -> None:
    """`tess-train`."""
    run(main)
