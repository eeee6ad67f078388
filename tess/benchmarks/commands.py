"""The subcommands of scripts/benchmark.py that are about sampling: flags, calls, keys."""

import argparse
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from tess.cli import default_checkpoint

Add = Callable[..., argparse.ArgumentParser]

JSON_KEYS = """\
cache:
  pattern, hidden_size, vocab_size, parameters, seed
                        of the model with random weights, "hidden 256"
  of each row:
      model             "hidden 256" or "checkpoint"
      source, target, batch
                        tokens, and texts at once
      cached_ms, encoded_ms, joint_ms, encoding_ms
                        medians of a step with the cache, with the source encoded in it, with source
                        and target as one sequence; and of encoding the source by itself
      ratio, ratio_q1, ratio_q3, joint_ratio, joint_ratio_q1, joint_ratio_q3, pairs
                        encoded / cached and joint / cached, turn by turn, with quartiles
      generations       the same of N steps and one encoding, from the parts of each turn
      cache_bytes       what the cache holds
      equal_tokens      share of tokens that the step chooses equally with and without it
sampling:
  setting               checkpoint, weights (digest), parameters, dtype, data, batch_size, rules
  copy                  metrics of the sources themselves
  cells                 of each: scheduler, spacing, steps, seed, seconds; full, the metrics with
                        all steps; stopped, those under each stopping rule
  of each row:
      scheduler, spacing, steps, seeds
                        what was run
      full              nfe_mean, nfe_max, and mean, sd, min and max over seeds of each metric
      stopped           the same under each rule: patience, max_entropy
lengths:
  checkpoint, data, steps, seeds, copy
                        as above
  of each row:
      scheduler, canvas "predicted" by the length head, "rule", "fixed", or "gold" (a diagnostic)
      full              as above
      canvas_mean, gold_mean, too_short
                        tokens; the share of rows whose canvas is shorter than the reference
agreement:
  checkpoint, data, steps, batch_size, seed
                        what was run
  of each row:
      scheduler, dtype, comparison
                        "uncached", "alone", "reordered", or "float32" in the same batches
      equal_texts, texts
                        texts that are equal, token for token, of how many
      equal_tokens      share of tokens that are equal, place by place
drafting:
  checkpoint, parameters, dtype, sources, repeats, seed, redraft_every
                        what was run; parameters of both models
  of each row:
      system, redraft, num_inference_steps, batch_size, rows
                        "ar", "ar+mtp", or "tess+ar": whether a round goes on with the rest of its
                        draft or makes a new one, its steps; sources at once, and of how many
      equal_texts       texts that equal those of ar
      new_tokens, diffusion_evaluations, ar_evaluations, tokens_per_ar_evaluation
                        written; evaluations of each model per text
      first_accepted_mean, first_accepted_median
                        tokens of the first draft that stay
      accepted_share    drafted tokens that stay
      ms_per_token, speedup
                        as of decoding
carried:
  embedding, vocab_size, width, simplex_value, num_top, n, seed
                        what was drawn: n samples a side at each time
  of each row:
      prediction        what the samples' predictions are like
      time, sigma, sampler
                           "dense" (others of them) or "M=N", predictions cut to N tokens
      mean_error        of the mean embedding, as a share of the embeddings' spread
      correlation, dense_correlation, correlation_error
                        with the time before, and the largest difference of a probe's two
      ks, ks_share, energy, energy_deviations, accuracy, accuracy_deviations, rejected
                        as of law
"""


def positive(text: str) -> int:
    """An argument that has to be 1 or more."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {value}")
    return value


def add_commands(add: Add) -> list[argparse.ArgumentParser]:
    """Add the subcommands by `add(name, help=...)`; imports nothing that a GPU benchmark lacks."""
    parts = (_add_cache, _add_sampling, _add_lengths, _add_agreement, _add_drafting, _add_carried)
    return [part(add) for part in parts]


def _list(
    parser: argparse.ArgumentParser, flag: str, kind: Any, default: Sequence[Any], what: str
) -> None:
    """A flag that takes several values."""
    shown = " ".join(map(str, default))
    parser.add_argument(
        flag, type=kind, nargs="+", default=list(default), help=f"{what} (default: {shown})"
    )


def _add_cache(add: Add) -> argparse.ArgumentParser:
    parser = add("cache", help="a denoising step with and without the source cache")
    _list(parser, "--source", positive, (128, 256, 512, 1_024, 2_048), "tokens")
    parser.add_argument("--target", type=positive, default=128, help="tokens (default: 128)")
    _list(parser, "--batch", positive, (1, 8), "texts at once")
    _list(parser, "--steps", positive, (8, 16), "of a whole generation")
    parser.add_argument("--repeats", type=positive, default=7, help="turns (default: 7)")
    parser.add_argument("--seed", type=int, default=0, help="weights and input (default: 0)")
    parser.add_argument(
        "--checkpoint", type=Path,
        help="measured too, where its learned positions allow (default: the shipped)",
    )
    return parser


def _add_rows(parser: argparse.ArgumentParser, limit: str) -> None:
    parser.add_argument("--checkpoint", type=Path, help="(default: the shipped)")
    parser.add_argument("--task", help="(default: simplification)")
    parser.add_argument("--dataset", help="of the task (default: samples, the packaged rows)")
    parser.add_argument("--split", help="(default: test)")
    parser.add_argument("--data", type=Path, help="a file with source and target instead")
    parser.add_argument(
        "--limit", type=positive, help=f"rows, spread evenly over all (default: {limit})"
    )
    parser.add_argument("--batch_size", type=positive, default=16, help="(default: 16)")


def _add_sampling(add: Add) -> argparse.ArgumentParser:
    parser = add("sampling", help="quality against evaluations: schedulers, spacings, stopping")
    _add_rows(parser, "24; about an hour on one core with all cells")
    parser.add_argument(
        "--schedulers", nargs="+", metavar="NAME",
        help="(default: renoising ddim euler_stochastic dpm_solver ddim_carried)",
    )
    parser.add_argument("--spacings", nargs="+", metavar="NAME", help="(default: all)")
    parser.add_argument("--steps", type=positive, nargs="+", help="(default: 1 2 4 8 16 32 100)")
    _list(parser, "--seeds", int, (0, 1, 2), "of the noise")
    _list(parser, "--stop_patience", positive, (1, 2), "of the stopping rules")
    _list(parser, "--stop_entropy", float, (math.inf, 1.0), "of the stopping rules, in nats")
    parser.add_argument("--markdown", type=Path, help="also write the tables here")
    parser.add_argument("--plot", type=Path, help="also write a figure here (SVG; extra plots)")
    return parser


def _add_lengths(add: Add) -> argparse.ArgumentParser:
    parser = add("lengths", help="predicted, rule, fixed and gold canvases")
    _add_rows(parser, "all")
    parser.add_argument("--canvases", nargs="+", metavar="NAME", help="(default: all there are)")
    _list(parser, "--schedulers", str, ("renoising",), "names")
    parser.add_argument("--steps", type=positive, default=16, help="(default: 16)")
    _list(parser, "--seeds", int, (0, 1, 2), "of the noise")
    return parser


def _add_agreement(add: Add) -> argparse.ArgumentParser:
    parser = add("agreement", help="texts with and without cache, alone, in batches, in bfloat16")
    _add_rows(parser, "all")
    _list(parser, "--schedulers", str, ("renoising", "ddim", "ddim_carried"), "names")
    parser.add_argument("--steps", type=positive, default=8, help="(default: 8)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default: 0)")
    return parser


def _add_drafting(add: Add) -> argparse.ArgumentParser:
    parser = add("drafting", help="drafts by diffusion, verified by the autoregressive model")
    parser.add_argument("--checkpoint", type=Path, help="(default: the shipped)")
    parser.add_argument("--rows", type=positive, default=200, help="sources (default: 200)")
    _list(parser, "--num_inference_steps", positive, (1, 4, 8, 16), "of a draft")
    _list(parser, "--redraft_steps", positive, (1, 4), "of drafts that are new in every round")
    parser.add_argument(
        "--redraft_every", type=positive, default=5, help="of so many batches one (default: 5)"
    )
    _list(parser, "--batch_size", positive, (1, 8), "sources at once")
    parser.add_argument("--repeats", type=positive, default=1, help="passes (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default: 0)")
    return parser


def _add_carried(add: Add) -> argparse.ArgumentParser:
    parser = add("carried", help="soft predictions as short lists against the dense simplex")
    parser.add_argument("--embedding", type=Path, help="safetensors file or checkpoint folder")
    parser.add_argument(
        "--vocab_size", type=positive, default=32_768, help="without it (default: 32768)"
    )
    parser.add_argument("--width", type=positive, default=128, help="without it (default: 128)")
    _list(parser, "--num_soft_tokens", positive, (8, 32, 128), "M, tokens of a prediction")
    parser.add_argument("--n", type=positive, default=2_048, help="samples a side (default: 2048)")
    parser.add_argument("--seed", type=int, default=0, help="(default: 0)")
    return parser


def _data(args: argparse.Namespace, limit: int | None) -> Any:
    from tess.benchmarks.sampling.trials import Data

    return Data.load(args.task, args.dataset, args.split, limit, args.data)


def run_cache(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """`cache`: figures and table."""
    from tess.benchmarks.cache import benchmark_cache, format_cache

    result = benchmark_cache(
        args.source, args.target, args.batch, args.steps, args.repeats, args.seed,
        args.checkpoint or default_checkpoint(),
    )
    return result, format_cache(result)


def run_sampling(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """`sampling`: figures and tables, and the files asked for."""
    from tess.benchmarks.sampling.grid import LIMIT, SCHEDULERS, STEPS, benchmark_sampling
    from tess.benchmarks.sampling.plot import plot_sampling
    from tess.benchmarks.sampling.report import format_sampling
    from tess.benchmarks.sampling.trials import SPACINGS, Trials
    from tess.evaluation.plots import check_plots
    from tess.schedulers.stopping import StoppingRule

    if args.plot is not None:
        check_plots()
    rules = [StoppingRule(*pair) for pair in product(args.stop_patience, args.stop_entropy)]
    everything = args.data is not None
    data = _data(args, args.limit or (None if everything else LIMIT))
    trials = Trials.load(args.checkpoint or default_checkpoint(), data, args.batch_size)
    result = benchmark_sampling(
        trials, args.schedulers or SCHEDULERS, args.spacings or tuple(SPACINGS),
        args.steps or STEPS, args.seeds, rules, args.json,
        lambda line: print(line, file=sys.stderr, flush=True),
    )
    table = format_sampling(result)
    if args.markdown is not None:
        args.markdown.write_text(f"# Quality against network evaluations\n\n{table}\n")
    if args.plot is not None:
        plot_sampling(result, args.plot)
    return result, table


def run_lengths(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """`lengths`: figures and table."""
    from tess.benchmarks.sampling.lengths import benchmark_lengths, format_lengths
    from tess.benchmarks.sampling.trials import Trials

    folder = args.checkpoint or default_checkpoint()
    trials = Trials.load(folder, _data(args, args.limit), args.batch_size)
    result = benchmark_lengths(trials, args.canvases, args.schedulers, args.steps, args.seeds)
    return result, format_lengths(result)


def run_agreement(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """`agreement`: figures and table."""
    from tess.benchmarks.sampling.agreement import benchmark_agreement, format_agreement

    result = benchmark_agreement(
        args.checkpoint or default_checkpoint(), _data(args, args.limit), args.schedulers,
        args.steps, args.batch_size, args.seed,
    )
    return result, format_agreement(result)


def run_drafting(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """`drafting`: figures and table."""
    from tess.benchmarks.drafting import benchmark_drafting, format_drafting

    result = benchmark_drafting(
        args.checkpoint or default_checkpoint(), rows=args.rows,
        num_inference_steps=args.num_inference_steps, redraft_steps=args.redraft_steps,
        redraft_every=args.redraft_every, batch_sizes=args.batch_size, repeats=args.repeats,
        seed=args.seed,
    )
    return result, format_drafting(result)


def run_carried(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """`carried`: figures and table."""
    from tess.benchmarks.law.carried import benchmark_carried, format_carried

    result = benchmark_carried(
        args.vocab_size, args.width, embedding=args.embedding,
        num_soft_tokens=args.num_soft_tokens, n=args.n, seed=args.seed,
    )
    return result, format_carried(result)


RUN: Mapping[str, Callable[[argparse.Namespace], tuple[dict[str, Any], str]]] = {
    "cache": run_cache,
    "sampling": run_sampling,
    "lengths": run_lengths,
    "agreement": run_agreement,
    "drafting": run_drafting,
    "carried": run_carried,
}
"""By the subcommand's name."""
