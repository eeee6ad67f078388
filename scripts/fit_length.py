#!/usr/bin/env python
"""Give a diffusion checkpoint a length head: trained alone, all other weights stay as they are.

Prints mean absolute errors of the predicted length in tokens, and the share of targets that fit the
canvas (quantile + margin), on held-out rows and on each --test_file. Example:

    python scripts/fit_length.py DIR --task simplification --output_dir out
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tess.cli import run
from tess.data.settings import DataArguments
from tess.data.texts import load_data
from tess.errors import UserError
from tess.storage.parts import check_target
from tess.training.length_fitting import (
    GUESSES,
    as_saved,
    encode_rows,
    fit_length_head,
    length_report,
    load_denoiser,
    save_length_head,
    split_rows,
)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("checkpoint", help="folder of a tess checkpoint")
    rows = parser.add_mutually_exclusive_group(required=True)
    rows.add_argument("--task", help="fit on this task's packaged training rows")
    rows.add_argument("--train_file", nargs="+", default=[], help="or on files of text pairs")
    add("--test_file", nargs="+", default=[], help="report on these too; their texts are left out")
    add("--data_root", help="folder that relative file names start from")
    add("--detokenize", action="store_true", help="undo Penn-Treebank tokenisation of files")
    add("--max_train_samples", type=int, help="use the first so many rows")
    add("--output_dir", help="where to write (default: the checkpoint itself)")
    add("--quantile", type=float, default=0.95, help="of the canvas (default: %(default)s)")
    add("--margin", type=int, default=2, help="tokens added to it (default: %(default)s)")
    add("--updates", type=int, default=800, help="of 256 rows (default: %(default)s)")
    add("--seed", type=int, default=0, help="of split, start and order (default: %(default)s)")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    if not 0 < args.quantile < 1:
        raise UserError(f"--quantile must be above 0 and below 1, got {args.quantile}")
    for name, least in (("margin", 0), ("updates", 1)):
        if getattr(args, name) < least:
            raise UserError(f"--{name} must be at least {least}, got {getattr(args, name)}")
    checkpoint = Path(args.checkpoint)
    output_dir = Path(args.output_dir) if args.output_dir else checkpoint
    if output_dir.resolve() != checkpoint.resolve():
        check_target(output_dir)
    parts = load_denoiser(checkpoint)
    files = {"data_root": args.data_root, "detokenize": args.detokenize}
    texts, _ = load_data(
        DataArguments(
            task=args.task,
            train_file=args.train_file,
            validation_file=args.test_file,
            max_train_samples=args.max_train_samples,
            **files,
        ),
        want_eval=False,
    )
    print(f"encoding {len(texts)} sources", flush=True)
    rows = encode_rows(parts.model, parts.tokenizer, texts)
    fitted_on, held_out = split_rows(rows, 0.1, args.seed)
    head = fit_length_head(
        fitted_on, parts.model.config.max_target_length, updates=args.updates, seed=args.seed
    )
    head = as_saved(head, checkpoint)
    measured = {"held-out rows": held_out}
    for name in args.test_file:
        test_texts, _ = load_data(DataArguments(train_file=[name], **files), want_eval=False)
        measured[name] = encode_rows(parts.model, parts.tokenizer, test_texts)
    print(f"fitted on {len(fitted_on)} rows, seed {args.seed}")
    for name, test_rows in measured.items():
        report = length_report(head, fitted_on, test_rows, args.quantile, args.margin)
        print(_lines(name, report, args.quantile, args.margin))
    save_length_head(checkpoint, output_dir, head, args.quantile, args.margin)
    print("wrote", output_dir)


def _lines(name: str, report: dict[str, Any], quantile: float, margin: int) -> str:
    lines = [f"{name}: {report['rows']} rows, {report['target']:.1f} tokens on average"]
    for guess, error in report["mean_absolute_error"].items():
        lines.append(f"  {error:6.2f} mean absolute error, {GUESSES[guess]}")
    lines.append(f"  {report['loss']:6.3f} cross-entropy of the head in nats")
    lines.append(
        f"  {report['coverage']:6.1%} of targets fit the canvas (quantile {quantile} + {margin}: "
        f"{report['canvas']:.1f} tokens on average)"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    run(main)
