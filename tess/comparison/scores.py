"""From kept texts to figures: measures with intervals, paired tests, costs, means over seeds."""

import statistics
from collections.abc import Mapping, Sequence

from tess.comparison.report import (
    Cost,
    Difference,
    Differences,
    Figure,
    Figures,
    SeedResult,
    Spread,
    Verdict,
)
from tess.decoders.base import Generation
from tess.evaluation.protocol import figures
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
) -> Differences:
    """Each measure's paired test: ours minus theirs, its interval, and p."""
    return {
        name: Difference(
            *paired_test(measure, theirs.measures[name], level=level, resamples=resamples)
        )
        for name, measure in ours.measures.items()
    }


def intervals(scores: ProtocolScores) -> Figures:
    """Each measure with its bootstrap interval."""
    return {name: Figure(**figure) for name, figure in figures(scores).items()}


def costs(texts: Sequence[Generation], flops: float | None, flops_note: str | None) -> Cost:
    """Evaluations, tokens, and what a check of a draft adds, as means over texts."""
    nfe = [text.nfe for text in texts]
    tokens = sum(text.num_new_tokens for text in texts)
    return Cost(
        nfe_mean=statistics.mean(nfe),
        nfe_max=max(nfe),
        new_tokens_mean=tokens / len(texts),
        tokens_per_forward=tokens / sum(nfe),
        acceptance_length=acceptance_length([text.num_verifications for text in texts], tokens),
        flops_per_output_token=flops,
        flops_note=flops_note,
    )


def share_equal(ours: Sequence[str], theirs: Sequence[str]) -> float:
    """Share of rows with the very same text."""
    return sum(a == b for a, b in zip(ours, theirs, strict=True)) / len(ours)


def over_seeds(runs: Sequence[SeedResult]) -> dict[str, Spread]:
    """Mean, lowest and highest of each measure and cost over the seeds."""
    found = {
        name: _spread([run.measures[name].value for run in runs]) for name in runs[0].measures
    }
    for name in COST_KEYS:
        values = [getattr(run.cost, name) for run in runs]
        if None not in values:
            found[name] = _spread(values)
    return found


def _spread(values: Sequence[float]) -> Spread:
    return Spread(statistics.mean(values), min(values), max(values))


def verdict(ours: Figure, copy: Figure, untrained: Figure, higher: bool) -> Verdict:
    """Of the main measure; higher: whether that is better."""

    def better(than: Figure) -> bool:
        return ours.low > than.high if higher else ours.high < than.low

    return Verdict(better(copy), better(untrained))
