"""Measure against a named rival in the same run: scripts/benchmark.py SUBCOMMAND [--json FILE]"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tess.benchmarks.commands import JSON_KEYS as SAMPLING_KEYS
from tess.benchmarks.commands import RUN, add_commands, positive
from tess.benchmarks.gpu.checks import DTYPES, OPERATIONS
from tess.benchmarks.gpu.peers import PACKAGES
from tess.benchmarks.gpu.report import format_gpu
from tess.benchmarks.gpu.run import Options, benchmark_gpu
from tess.benchmarks.gpu.shapes import SHAPES
from tess.cli import default_checkpoint, run
from tess.errors import UserError

JSON_KEYS = """\
--json FILE writes one object; its keys are stable:
  benchmark             the subcommand
  rival                 what it is compared with, where there is one
  environment           date, processor, threads, python, torch, transformers; of gpu date, device,
                        capability, memory_bytes, driver, cuda, python, torch, triton, transformers,
                        autotuned (TESS_AUTOTUNE=1; otherwise the shipped configurations are timed)
  rows                  a list with an object per line of the table
backbone:
  pattern, hidden_size, length, batch, seed
                        what was run
  relative_difference   largest of the rows in float32
  of each row:
      part              "model": hidden width 256; "wide": 1024; "scan": the Mamba-2 scan alone at
                        the shapes of Nemotron-3-Nano; "block": 64 tokens denoised after a cached
                        text, the rival reads both again
      what              "forward", "forward + backward" or "denoise"
      dtype             "float32" or "bfloat16" (autocast)
      ours_ms, rival_ms medians in milliseconds; the rival with its default chunks of 128
      ratio             median of rival / ours, turn by turn: above 1, ours is faster
      ratio_q1, ratio_q3
                        its quartiles
      pairs             measurements of each
      fast_rival_ms, fast_ratio, fast_ratio_q1, fast_ratio_q3
                        the same with chunks of 64, where the rival is faster on a CPU
      products_ms, products_share
                        the bare products of the model's weights, and products_ms / ours_ms: 1 is
                        the most that can be reached; null for the scan
      difference        of the two outputs, as a share of the rival's norm; null for blocks
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
gpu:
  dry_run               true: on the CPU in Triton's interpreter, the times mean nothing
  dtype, seed, repeats  what was run
  shapes                of each: name, batch, length, hidden, heads, head_width, states, groups,
                        taps, experts, top_k, inner, expert_width, vocabulary, num_top, few_tokens
  ceilings              copy_bytes_per_second, bfloat16_flops, float32_flops of this machine
  peers                 package and version of each, null where it is not installed
  checks                of each configuration, against float64:
      op, variant, shape, dtype, configuration
                        what was run; "its own" is what this device runs
      worst, error, bound
                        the output or gradient ("d NAME") nearest to its bound, or beyond it
      runs_equal        whether all runs gave the same bits
      passed            null: this configuration does not fit the device
      tables            of configurations that were used
  tables_not_run        those that no check used
  failed                operations with a check that did not pass, or no right values when timed
  of each row:
      op, variant, shape, what
                        the comparison; what: "forward" or "forward + backward"
      system, package   "ours", "PyTorch path of ours", or a peer
      comparable        whether it computes the same values; otherwise it is a measure only
      failed            ours is wrong or does not run: no times
      ms, ms_q20, ms_q80, runs
                        median and quantiles of a run in milliseconds, and how many runs
      host_ms           median time that the host takes to launch a run
      ratio             ms / ours: above 1, ours is faster
      peak_bytes, memory_ratio
                        most bytes of a run beyond those before it, and that / ours
      difference        of outputs and gradients from those of the PyTorch path, worst norm ratio
      least_ms, of_roofline, bound_by
                        the least time by the ceilings, least_ms / ms, and which ceiling binds
      note              why it has no figures, or what to know of them
  goals                 goal, wanted, at_least (or at most), figure, met; null where not measured
"""


BACKBONE_PARTS = ("model", "scan", "wide", "block")


def make_parser() -> argparse.ArgumentParser:
    """The subcommands and their flags."""
    layout = {
        "epilog": JSON_KEYS + SAMPLING_KEYS,
        "formatter_class": argparse.RawDescriptionHelpFormatter,
    }
    parser = argparse.ArgumentParser(description=__doc__, **layout)
    commands = parser.add_subparsers(dest="command", required=True, metavar="SUBCOMMAND")
    backbone = commands.add_parser(
        "backbone", help="the backbone against transformers' Nemotron-H", **layout
    )
    backbone.add_argument("--pattern", default="M*E-", help="layers (default: %(default)s)")
    backbone.add_argument("--length", type=positive, default=512, help="tokens (default: 512)")
    backbone.add_argument("--batch", type=positive, default=1, help="rows (default: 1)")
    backbone.add_argument("--repeats", type=positive, default=15, help="turns (default: 15)")
    backbone.add_argument(
        "--parts", choices=BACKBONE_PARTS, nargs="+", default=list(BACKBONE_PARTS),
        help="(default: all, see below)",
    )
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
    )
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
    parts = ("embedding", "training", "denoising")
    vocabulary.add_argument(
        "--parts", choices=parts, nargs="+", default=list(parts), help="(default: all)"
    )
    vocabulary.add_argument(
        "--vocab_size", type=positive, nargs="+", default=[8_192, 32_768, 131_072],
        help="(default: 8192 32768 131072)",
    )
    vocabulary.add_argument("--repeats", type=positive, default=5, help="pairs (default: 5)")
    vocabulary.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32",
        help="of the steps, bfloat16 by autocast (default: float32)",
    )
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

    gpu = commands.add_parser("gpu", help="the kernels on this GPU: right, then how fast", **layout)
    gpu.add_argument(
        "--shapes", choices=SHAPES, nargs="+", default=list(SHAPES),
        help="Nemotron-3-Nano, the shipped model (default: both)",
    )
    gpu.add_argument(
        "--ops", choices=OPERATIONS, nargs="+", default=list(OPERATIONS), help="(default: all)"
    )
    gpu.add_argument(
        "--peers", choices=tuple(PACKAGES), nargs="*", default=list(PACKAGES),
        help="packages to compare with (default: all)",
    )
    gpu.add_argument(
        "--dtype", choices=tuple(DTYPES), default="bfloat16",
        help="of the times (default: bfloat16)",
    )
    gpu.add_argument("--repeats", type=positive, default=20, help="timed runs (default: 20)")
    gpu.add_argument("--batch", type=positive, help="texts (default: 8, shipped model 64)")
    gpu.add_argument("--length", type=positive, help="tokens (default: 4096, shipped model 128)")
    gpu.add_argument("--seed", type=int, default=0, help="inputs (default: 0)")
    gpu.add_argument(
        "--workers", type=int, default=Options.workers,
        help="processes that check the kernels; 0: this one (default: %(default)s)",
    )
    gpu.add_argument(
        "--dry_run", action="store_true",
        help="tiny shapes on the CPU in Triton's interpreter, to see that everything runs",
    )
    sampling = add_commands(lambda name, **options: commands.add_parser(name, **options, **layout))
    for command in (backbone, decoding, loading, vocabulary, law, gpu, *sampling):
        command.add_argument("--json", type=Path, help="also write all figures here, see below")
    return parser


def gpu_result(args: argparse.Namespace) -> dict[str, Any]:
    """Run the GPU benchmark; what is known after each part is in the JSON file at once."""

    def keep(result: dict[str, Any]) -> None:
        if args.json is not None:
            args.json.write_text(json.dumps(result, indent=2) + "\n")

    options = Options(
        shapes=tuple(args.shapes), ops=tuple(args.ops), peers=tuple(args.peers), dtype=args.dtype,
        repeats=args.repeats, batch=args.batch, length=args.length, seed=args.seed,
        workers=args.workers, dry_run=args.dry_run,
    )
    return benchmark_gpu(options, lambda line: print(line, file=sys.stderr, flush=True), keep)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, measure, print the table, and write the figures if asked.

    Returns 1 where the GPU benchmark found a wrong kernel, or else 0. Each benchmark is imported
    when it is asked for: that of the GPU needs fewer packages than the others.
    """
    args = make_parser().parse_args(argv)
    if args.json is not None and not args.json.resolve().parent.is_dir():
        raise UserError(f"--json {args.json}: there is no folder {args.json.resolve().parent}")
    if args.command in RUN:
        result, table = RUN[args.command](args)
    elif args.command == "gpu":
        result = gpu_result(args)
        table = format_gpu(result)
    elif args.command == "backbone":
        from tess.benchmarks.backbone import benchmark_backbone, format_table

        result = benchmark_backbone(
            args.pattern, args.length, args.batch, args.repeats, args.seed, tuple(args.parts)
        )
        table = format_table(result)
    elif args.command == "decoding":
        from tess.benchmarks.decoding import benchmark_decoding, format_decoding

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
        from tess.benchmarks.loading import benchmark_loading, format_loading

        result = benchmark_loading(args.megabytes, args.shard_megabytes)
        table = format_loading(result)
    elif args.command == "vocabulary":
        from tess.benchmarks.vocabulary import benchmark_vocabulary, format_vocabulary

        result = benchmark_vocabulary(
            args.vocab_size, args.parts, args.repeats, args.dtype, args.seed
        )
        table = format_vocabulary(result)
    else:
        from tess.benchmarks.law.order_statistics import benchmark_law, format_law

        result = benchmark_law(
            args.vocab_size, args.width, embedding=args.embedding, n=args.n, seed=args.seed
        )
        table = format_law(result)
    print(table)
    if args.json is not None and args.command != "sampling":  # which writes after every cell
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    return int(bool(result.get("failed")))


def command() -> None:
    """`tess-benchmark`."""
    run(main)
