"""Score a checkpoint on a task or a file of text pairs, beside the copy-the-source baseline.

Writes report.json (keys: docs/evaluation.md), report.md and predictions.jsonl. Example:

    tess-evaluate --task simplification --limit 20 --output_dir out
"""

import argparse
from collections.abc import Sequence
from dataclasses import fields

from tess.cli import Parser, checkpoint_or_default, no_collection, run
from tess.data.rows import Example, load_rows
from tess.data.tasks.catalog import DEFAULT_DATASET, TASKS, load_task
from tess.decoders.options import add_sampler_flags, sampler_options
from tess.errors import UserError
from tess.metrics.catalog import PROTOCOLS


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--checkpoint", help="a folder or a hub id (default: the shipped one)")
    rows = parser.add_mutually_exclusive_group(required=True)
    rows.add_argument("--task", help=f"one of {', '.join(TASKS)}")
    rows.add_argument("--data", help="JSONL, CSV, TSV or Parquet file with source and target")
    add("--split", help="split of the task (default: test)")
    names = "; ".join(f"{task.name}: {', '.join(task.datasets)}" for task in TASKS.values())
    add("--dataset", help=f"dataset of the task (default: {DEFAULT_DATASET}). {names}")
    add("--source_column", default="source", help="column of --data (default: %(default)s)")
    add("--target_column", default="target", help="column of --data (default: %(default)s)")
    add("--decoder", help="tess, ar, ar+mtp or tess+ar (default: tess, or ar where that is all)")
    add("--num_draft_tokens", type=int, help="tokens that ar+mtp drafts at a time (default: 3)")
    add("--num_beams", type=int, help="beams of ar (default: 1, greedy search)")
    add("--length_penalty", type=float, help="of --num_beams; higher, longer texts (default: 1)")
    add("--num_inference_steps", type=int, help="steps of tess (default: 16, or T if that is less)")
    add("--gen_length", type=int, help="canvas of every text (default: by length head or rule)")
    add(
        "--gold_length", action="store_true",
        help="diagnostic: the reference's own length as the canvas of tess",
    )
    add("--protocol", help=f"also score by one of {', '.join(PROTOCOLS)}, with intervals and tests")
    add("--bertscore", metavar="MODEL", help="add BERTScore by this model to --protocol")
    add("--limit", type=int, help="evaluate only the first rows")
    add("--seed", type=int, default=0, help="seed of the noise (default: %(default)s)")
    add("--batch_size", type=int, default=8, help="texts at once (default: %(default)s)")
    add("--strict", action="store_true", help="refuse a too long source instead of cutting it")
    add("--output_dir", required=True, help="folder for the three files; made if missing")
    add_sampler_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    if args.bertscore and not args.protocol:
        raise UserError("--bertscore goes with --protocol")
    checkpoint = checkpoint_or_default(args.checkpoint)
    examples, data = _rows(args)

    with no_collection():
        from tess.decoders.diffusion import TessDecoder
        from tess.decoders.load import find_checkpoints, load_decoder
        from tess.evaluation import run as evaluation
        from tess.evaluation.page import summary
        from tess.evaluation.partial import PARTIAL
        from tess.metrics.bertscore import BertScore
        from tess.storage.files import prepare_output_dir
        from tess.storage.hub import local_folder
        from tess.storage.kept import digest_folder

    settings = evaluation.Settings(
        **{item.name: getattr(args, item.name) for item in fields(evaluation.Settings)}
    )
    found = find_checkpoints(local_folder(checkpoint))
    name = args.decoder or next(iter(found), None)
    if args.gold_length and name not in (None, TessDecoder.name):
        raise UserError(f"--gold_length is of the canvas of tess, and this decoder is {name}")
    folder = prepare_output_dir(args.output_dir)
    decoder = load_decoder(
        checkpoint,
        args.decoder,
        num_draft_tokens=args.num_draft_tokens,
        options=sampler_options(args),
        num_beams=args.num_beams,
        length_penalty=args.length_penalty,
    )
    result = evaluation.evaluate(
        decoder,
        examples,
        settings,
        checkpoint=str(checkpoint),
        data=data,
        progress=True,
        bertscore=BertScore(args.bertscore) if args.bertscore else None,
        partial=folder / PARTIAL,
        weights={kind: digest_folder(path) for kind, path in found.items()},
    )
    if result.num_kept:
        print(f"went on after {result.num_kept} texts of an evaluation that did not end")
    paths = evaluation.write_report(result, folder)
    print(summary(result.report))
    print("wrote", ", ".join(str(path) for path in paths))


def _rows(args: argparse.Namespace) -> tuple[list[Example], dict[str, str | None]]:
    """The rows, and what the report says of where they are from."""
    if args.data:
        if args.split or args.dataset:
            raise UserError("--split and --dataset go with --task, not with --data")
        rows = load_rows(args.data, args.source_column, args.target_column)
        return rows, {"file": args.data, "task": None, "dataset": None, "split": None}
    split, dataset = args.split or "test", args.dataset or DEFAULT_DATASET
    rows = load_task(args.task, split, dataset, args.limit)
    return rows, {"file": None, "task": args.task, "dataset": dataset, "split": split}


def command() -> None:
    """`tess-evaluate`."""
    run(main)
