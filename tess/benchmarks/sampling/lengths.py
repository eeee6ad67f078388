"""How the canvas is chosen, and what it does to the texts: length head, rule, one size, gold."""

from collections.abc import Sequence
from typing import Any

from tess.benchmarks.sampling.grid import SEEDS, over_seeds
from tess.benchmarks.sampling.trials import Trials
from tess.costs.machine import environment
from tess.errors import UserError
from tess.sampling.writer import target_lengths
from tess.text.tokenization import encode_texts, target_layout

CANVASES = ("predicted", "rule", "fixed", "gold")


def benchmark_lengths(
    trials: Trials,
    canvases: Sequence[str] | None = None,
    schedulers: Sequence[str] = ("renoising",),
    steps: int = 16,
    seeds: Sequence[int] = SEEDS,
) -> dict[str, Any]:
    """Write and score all rows with each way to choose the canvas.

    canvases: "predicted" by the length head; "rule", ratio and margin of the config; "fixed", the
        longest target; "gold", the first reference's own length, a diagnostic that no system can
        have. None: all that the model has.

    Raises:
        UserError: an unknown way, or "predicted" of a model without a length head.
    """
    has_head = trials.pipeline.denoiser.config.length_head
    if canvases is None:
        canvases = CANVASES if has_head else CANVASES[1:]
    if unknown := sorted(set(canvases) - set(CANVASES)):
        raise UserError(f"--canvases takes {', '.join(CANVASES)}, got {', '.join(unknown)}")
    if "predicted" in canvases and not has_head:
        raise UserError("the model has no length head to predict a canvas with (length_head false)")
    gold = _gold(trials)
    rows = []
    for scheduler in schedulers:
        trials.use(scheduler)
        for canvas in canvases:
            figures, lengths = [], []
            for seed in seeds:
                written, chosen = _write(trials, canvas, gold, steps, seed)
                figures.append(trials.figures(written))
                lengths.append(chosen)
            rows.append(
                {"scheduler": scheduler, "canvas": canvas, "full": over_seeds(figures)}
                | _compared(lengths[0], gold)
            )
    return {
        "benchmark": "lengths",
        "rival": "the first reference's own length (gold), a diagnostic",
        "checkpoint": trials.checkpoint,
        "data": dict(trials.data.label),
        "steps": steps,
        "seeds": list(seeds),
        "copy": trials.score(trials.sources),
        "rows": rows,
        "environment": environment(),
    }


def _gold(trials: Trials) -> list[int]:
    """Tokens of each row's first reference with `</s>`, cut to the longest target."""
    tokenizer = trials.pipeline.tokenizer
    longest = trials.pipeline.denoiser.config.max_target_length
    firsts = encode_texts(tokenizer, [references[0] for references in trials.references])
    return [len(target_layout(tokenizer, ids, longest)) for ids in firsts]


def _write(
    trials: Trials, canvas: str, gold: list[int], steps: int, seed: int
) -> tuple[Any, list[int]]:
    """The texts and the canvases they were given."""
    pipeline = trials.pipeline
    lengths: list[int] | int | None = None  # the pipeline asks the length head
    if canvas == "rule":
        lengths = target_lengths(pipeline.denoiser.config, trials.rows)
    elif canvas == "fixed":
        lengths = pipeline.denoiser.config.max_target_length
    elif canvas == "gold":
        lengths = gold
    written, _ = trials.write(steps, seed, gen_length=lengths)
    return written, written.canvases


def _compared(lengths: Sequence[int], gold: Sequence[int]) -> dict[str, float]:
    """The canvases beside the lengths that the references have."""
    pairs = list(zip(lengths, gold, strict=True))
    return {
        "canvas_mean": sum(lengths) / len(lengths),
        "gold_mean": sum(gold) / len(gold),
        "too_short": sum(length < wanted for length, wanted in pairs) / len(pairs),
    }
