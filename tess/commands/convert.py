"""Make a causal checkpoint a TESS pipeline, or back: tess-convert SOURCE TARGET

SOURCE is a folder as NVIDIA releases Nemotron-H, v2 and 3 (config.json, safetensors, tokenizer), or
one that tess-train wrote. The pipeline has all its weights, a new time embedding, and a
second Mamba scan behind gates at zero: the causal function is unchanged to the last bit, and
training the pipeline (tess-train --init_from TARGET) is the adaptation. With --to released a
pipeline or a causal checkpoint becomes a folder in the released layout again.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from tess.backbones.layouts import EXPERT_LAYOUTS
from tess.cli import Parser, no_collection, run
from tess.errors import UserError

DTYPES = ("float32", "bfloat16", "float16")
OF_TESS = ("dtype", "tokenizer", "simplex_value", "max_source_length", "max_target_length")


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("source", metavar="SOURCE", help="checkpoint to read, a folder or a hub id")
    add("target", type=Path, metavar="TARGET", help="folder to write; replaces a checkpoint")
    add("--to", choices=("tess", "released"), default="tess", help="(default: %(default)s)")
    add("--dtype", choices=DTYPES, help="of the pipeline's weights (default: as stored)")
    add("--tokenizer", metavar="DIR", help="of the pipeline, if SOURCE has none")
    add(
        "--simplex_value", type=float, metavar="K",
        help="of the pipeline (default: (ln vocab_size - 0.82) / 2)",
    )
    add("--max_source_length", type=int, metavar="N", help="of the pipeline, tokens (default: 256)")
    add("--max_target_length", type=int, metavar="N", help="of the pipeline, tokens (default: 128)")
    add("--expert_layout", choices=EXPERT_LAYOUTS, help="of --to released (default: per_expert)")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    with no_collection():
        import torch

        from tess.storage.conversion import causal_to_tess, tess_to_causal
        from tess.storage.hub import local_folder

    source = local_folder(args.source)
    if args.to == "tess":
        if args.expert_layout:
            raise UserError("--expert_layout goes with --to released")
        names = ("simplex_value", "max_source_length", "max_target_length")
        fields = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
        left_out = causal_to_tess(
            source,
            args.target,
            dtype=getattr(torch, args.dtype) if args.dtype else None,
            tokenizer=args.tokenizer,
            denoiser=fields,
        )
    else:
        if given := [name for name in OF_TESS if getattr(args, name) is not None]:
            raise UserError(f"--{given[0]} goes with --to tess")
        left_out = tess_to_causal(
            source, args.target, expert_layout=args.expert_layout or EXPERT_LAYOUTS[0]
        )
    print(f"wrote {args.target}")
    if left_out:
        print(f"left out, because the new folder has no place for it: {', '.join(left_out)}")


def command() -> None:
    """`tess-convert`."""
    run(main)
