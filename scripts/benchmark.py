"""Measure against a named rival in the same run: scripts/benchmark.py SUBCOMMAND [--json FILE]"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from tess.benchmark_decoding import benchmark_decoding, format_decoding
from tess.benchmark_law import benchmark_law, format_law
from tess.benchmark_loading import benchmark_loading, format_loading
from tess.benchmark_vocabulary import PARTS, benchmark_vocabulary, format_vocabulary
from tess.benchmarks import benchmark_backbone, format_table
from tess.cli import default_checkpoint, run
from tess.errors import UserError

JSON_KEYS = """\
--json FILE writes one object; its keys are stable:
  benchmark             "backbone", "decoding", "loading", "vocabulary" or "law"
  rival                 what it is compared with (backbone, decoding, vocabulary)
  environment           date, processor, threads, python, torch, transformers
  rows                  a list with an object per line of the table
backbone:
  pattern, hidden_size, length, batch, seed
                        what was run
  relative_difference   of the two outputs, as a share of the rival's norm
  of each row:
      what              "forward" or "forward + backward"
      dtype             "float32" or "bfloat16" (autocast)
      ours_ms, rival_ms medians in milliseconds
      ratio             median of rival / ours, pair by pair: above 1, ours is faster
      ratio_q1, ratio_q3
                        its quartiles
      pairs             measurements of each
decoding:
  checkpoint, parameters, dtype, sources, repeats
                        what was run: a model, its size, packaged texts, passes over each batch
  of each row:
      system            "ar", "ar+mtp, N drafted" or "transformers"
      batch_size        texts at once
      new_tokens        written in one pass over all sources
      ms_per_token      best pass over each batch, summed, per new token
      speedup           median over batches of ar's time / the system's: above 1, it is faster
      equal_texts       texts that equal those of ar
      acceptance_length tokens that one check of a draft adds; null without drafts
      accepted_share    drafted tokens that stay; null without drafts
      tokens_per_forward
                        new tokens per evaluation of the model; reading the source is one
loading:
  tensor_bytes, shards  what was read: size of all tensors, number of files
  of each row:
      system            "ours" or "transformers"
      peak              most resident bytes while reading, mapped files included, less those before
      peak_share        peak / tensor_bytes
      seconds           of one read, files in the page cache
vocabulary:
  pattern, hidden_size, batch, length, source, dtype, seed
                        what was run; length and source in tokens
  official              a second rival, whose tensors go over source and target
  of each row:
      part              "embedding", "training" or "denoising"
      vocab_size        V
      num_top           K, order statistics drawn exactly (embedding)
      ours_us, rival_us medians in microseconds per position (embedding)
      ours_ms, rival_ms, ratio, ratio_q1, ratio_q3, pairs
                        of a step, as above
      official_ms, official_ratio
                        the same of the second rival
      ours_peak, rival_peak, official_peak, peak_ratio, official_peak_ratio
                        most bytes beyond those before the step; null outside Linux
      products_ms, of_products
                        the two bare products with the vocabulary, and ours_ms / products_ms
                        (denoising)
law:
  embedding, vocab_size, width, simplex_value, token, n, seed
                        what was drawn: n samples a side of one noised token
  of each row:
      time, sigma       of the schedule, and the noise times the simplex value
      sampler           compared with dense samples: "dense" (others of them), "K=N", or one that
                        leaves something out
      ks, ks_share      largest Kolmogorov-Smirnov statistic; the same over its bound
      energy            energy distance in standard deviations of its null
      accuracy, accuracy_deviations
                        of a classifier on held-out samples, 0.5 is chance
      rejected          whether any statistic is beyond its bound
"""


def positive(text: str) -> int:
    """An argument that has to be 1 or more."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {value}")
    return value


def make_parser() -> argparse.ArgumentParser:
    """The subcommands and their flags."""
    layout = {"epilog": JSON_KEYS, "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(description=__doc__, **layout)
    commands = parser.add_subparsers(dest="command", required=True, metavar="SUBCOMMAND")
    backbone = commands.add_parser(
        "backbone", help="the backbone against transformers' Nemotron-H", **layout
    )
    backbone.add_argument("--pattern", default="M*E-", help="layers (default: %(default)s)")
    backbone.add_argument("--length", type=positive, default=512, help="tokens (default: 512)")
    backbone.add_argument("--batch", type=positive, default=1, help="rows (default: 1)")
    backbone.add_argument("--repeats", type=positive, default=15, help="pairs (default: 15)")
    backbone.add_argument("--seed", type=int, default=0, help="weights and input (default: 0)")

    decoding = commands.add_parser(
        "decoding", help="greedy AR, AR + MTP and transformers' generate on one model", **layout
    )
    decoding.add_argument("--checkpoint", type=Path, help="with a predictor (default: the shipped)")
    decoding.add_argument("--rows", type=positive, default=200, help="sources (default: 200)")
    decoding.add_argument(
        "--batch_size", type=positive, nargs="+", default=[1, 8], help="(default: 1 8)"
    )
    decoding.add_argument(
        "--num_draft_tokens", type=positive, nargs="+", default=[1, 2, 3, 4, 6],
        help="(default: 1 2 3 4 6)",
    )  # fmt: skip
    decoding.add_argument("--repeats", type=positive, default=3, help="passes (default: 3)")
    decoding.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="(default: float32)"
    )

    loading = commands.add_parser(
        "loading", help="peak memory of reading a released folder", **layout
    )
    loading.add_argument("--megabytes", type=positive, default=400, help="(default: 400)")
    loading.add_argument("--shard_megabytes", type=positive, default=100, help="(default: 100)")

    vocabulary = commands.add_parser(
        "vocabulary", help="noised simplex and whole steps against materialised tensors", **layout
    )
    vocabulary.add_argument(
        "--parts", choices=PARTS, nargs="+", default=list(PARTS), help="(default: all)"
    )
    vocabulary.add_argument(
        "--vocab_size", type=positive, nargs="+", default=[8_192, 32_768, 131_072],
        help="(default: 8192 32768 131072)",
    )  # fmt: skip
    vocabulary.add_argument("--repeats", type=positive, default=5, help="pairs (default: 5)")
    vocabulary.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32",
        help="of the steps, bfloat16 by autocast (default: float32)",
    )  # fmt: skip
    vocabulary.add_argument("--seed", type=int, default=0, help="weights and data (default: 0)")

    law = commands.add_parser(
        "law", help="order statistics against dense noise, by two-sample tests", **layout
    )
    law.add_argument("--embedding", type=Path, help="safetensors file or checkpoint folder")
    law.add_argument(
        "--vocab_size", type=positive, default=131_072, help="without it (default: 131072)"
    )
    law.add_argument("--width", type=positive, default=128, help="without it (default: 128)")
    law.add_argument("--n", type=positive, default=2_048, help="samples a side (default: 2048)")
    law.add_argument("--seed", type=int, default=0, help="(default: 0)")
    for command in (backbone, decoding, loading, vocabulary, law):
        command.add_argument("--json", type=Path, help="also write all figures here, see below")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, measure, print the table, and write the figures if asked."""
    args = make_parser().parse_args(argv)
    if args.json is not None and not args.json.resolve().parent.is_dir():
        raise UserError(f"--json {args.json}: there is no folder {args.json.resolve().parent}")
    if args.command == "backbone":
        result = benchmark_backbone(args.pattern, args.length, args.batch, args.repeats, args.seed)
        table = format_table(result)
    elif args.command == "decoding":
        result = benchmark_decoding(
            args.checkpoint or default_checkpoint(),
            rows=args.rows,
            batch_sizes=args.batch_size,
            drafts=args.num_draft_tokens,
            repeats=args.repeats,
            dtype=args.dtype,
        )
        table = format_decoding(result)
    elif args.command == "loading":
        result = benchmark_loading(args.megabytes, args.shard_megabytes)
        table = format_loading(result)
    elif args.command == "vocabulary":
        result = benchmark_vocabulary(
            args.vocab_size, args.parts, args.repeats, args.dtype, args.seed
        )
        table = format_vocabulary(result)
    else:
        result = benchmark_law(
            args.vocab_size, args.width, embedding=args.embedding, n=args.n, seed=args.seed
        )
        table = format_law(result)
    print(table)
    if args.json is not None:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    run(main)
