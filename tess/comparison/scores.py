"""From kept texts to figures: measures with intervals, paired tests, costs, means over seeds."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from tess.comparison.recipe import COPY, UNTRAINED
from tess.evaluation.run import acceptance_length
from tess.metrics.protocols import ProtocolScores, apply_protocol
from tess.metrics.significance import paired_test

COST_KEYS = (
    "nfe_mean", "nfe_max", "new_tokens_mean", "tokens_per_forward", "acceptance_length",
    "flops_per_output_token",
)


def score_all(
    protocol: str,
    texts: Mapping[str, Sequence[str]],
    references: Sequence[Sequence[str]],
    sources: Sequence[str],
    samples: Mapping[str, str],
) -> dict[str, ProtocolScores]:
    """Every system and baseline under the protocol; samples: how texts were chosen, by name."""
    return {
        name: apply_protocol(protocol, rows, references, sources, samples=samples.get(name, "1"))
        for name, rows in texts.items()
    }


def against(
    ours: ProtocolScores, theirs: ProtocolScores, level: float, resamples: int
) -> dict[str, Any]:
    """Each measure's paired test: ours minus theirs, its interval, and p."""
    return {
        name: paired_test(
            measure, theirs.measures[name], level=level, resamples=resamples
        )._asdict()
        for name, measure in ours.measures.items()
    }


def costs(rows: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Evaluations, tokens, and what a check of a draft adds, as means over rows."""
    nfe = [row["nfe"] for row in rows]
    tokens = sum(row["num_new_tokens"] for row in rows)
    return {
        "nfe_mean": statistics.mean(nfe),
        "nfe_max": max(nfe),
        "new_tokens_mean": tokens / len(rows),
        "tokens_per_forward": tokens / sum(nfe),
        "acceptance_length": acceptance_length(
            [row["num_verifications"] for row in rows], tokens
        ),
    }


def share_equal(ours: Sequence[str], theirs: Sequence[str]) -> float:
    """Share of rows with the very same text."""
    return sum(a == b for a, b in zip(ours, theirs, strict=True)) / len(ours)


def over_seeds(seeds: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Mean, lowest and highest of each measure and cost over the seeds."""
    runs = list(seeds.values())
    found: dict[str, Any] = {
        name: _spread([run["measures"][name]["value"] for run in runs])
        for name in runs[0]["measures"]
    }
    for name in COST_KEYS:
        values = [run["cost"][name] for run in runs]
        if None not in values:
            found[name] = _spread(values)
    return found


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"mean": statistics.mean(values), "min": min(values), "max": max(values)}


def verdict(
    ours: Mapping[str, Any], others: Mapping[str, Mapping[str, Any]], main: str, higher: bool
) -> dict[str, bool]:
    """Whether the main measure is better than that of the copy and of the untrained model, with
    intervals that do not meet."""

    def better(a: Mapping[str, float], b: Mapping[str, float]) -> bool:
        return a["low"] > b["high"] if higher else a["high"] < b["low"]

    return {
        f"better_than_{name}": better(ours[main], others[name][main])
        for name in (COPY, UNTRAINED)
        if name in others
    }
