"""Score a checkpoint on a task or a file of text pairs, beside the copy-the-source baseline.

Writes report.json (keys: docs/evaluation.md), report.md and predictions.jsonl. Example:

    tess-evaluate --task simplification --limit 20 --output_dir out
"""

import argparse
from collections.abc import Sequence

from tess.cli import Parser, default_checkpoint, run
from tess.data.rows import load_rows
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
    checkpoint = args.checkpoint or default_checkpoint()
    if args.data:
        if args.split or args.dataset:
            raise UserError("--split and --dataset go with --task, not with --data")
        examples = load_rows(args.data, args.source_column, args.target_column)
        data = {"file": args.data, "task": None, "dataset": None, "split": None}
    else:
        split, dataset = args.split or "test", args.dataset or DEFAULT_DATASET
        examples = load_task(args.task, split, dataset, args.limit)
        data = {"file": None, "task": args.task, "dataset": dataset, "split": split}
    if args.bertscore and not args.protocol:
        raise UserError("--bertscore goes with --protocol")

    from tess.decoders.load import load_decoder
    from tess.evaluation import run as evaluation
    from tess.evaluation.page import summary
    from tess.metrics.bertscore import BertScore
    from tess.storage.files import prepare_output_dir

    bertscore = BertScore(args.bertscore) if args.bertscore else None
    folder = prepare_output_dir(args.output_dir)
    result = evaluation.evaluate(
        load_decoder(
            checkpoint,
            args.decoder,
            num_draft_tokens=args.num_draft_tokens,
            options=sampler_options(args),
            num_beams=args.num_beams,
            length_penalty=args.length_penalty,
        ),
        examples,
        checkpoint=str(checkpoint),
        data=data,
        num_inference_steps=args.num_inference_steps,
        gen_length=args.gen_length,
        gold_length=args.gold_length,
        seed=args.seed,
        batch_size=args.batch_size,
        limit=args.limit,
        progress=True,
        strict=args.strict,
        protocol=args.protocol,
        bertscore=bertscore,
    )
    paths = evaluation.write_report(result, folder)
    print(summary(result.report))
    print("wrote", ", ".join(str(path) for path in paths))


def command() -> None:
    """`tess-evaluate`."""
    run(main)
