"""The section `results` of a comparison's report: all that the same seeds give again."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tess.comparison.arms import DEFAULTS, Trained, differing
from tess.comparison.recipe import ARMS, COPY, UNTRAINED, Stage, System
from tess.comparison.report import (
    Baselines,
    DataFacts,
    ProtocolFacts,
    Results,
    Sample,
    SeedResult,
    StageFacts,
    SystemResult,
    TrainedRun,
    Training,
)
from tess.comparison.rows import training_facts
from tess.comparison.scores import (
    against,
    costs,
    intervals,
    over_seeds,
    score_all,
    share_equal,
    verdict,
)
from tess.comparison.state import Comparison
from tess.comparison.texts import Written
from tess.comparison.timing import evenly_spaced
from tess.metrics.catalog import PROTOCOLS
from tess.metrics.protocols import ProtocolScores, baselines, lead_sentences, mean_words
from tess.metrics.significance import LEVEL, RESAMPLES

Facts = Mapping[str, Any]
"""Of a stage's data, see `tess.comparison.rows.training_facts`."""

_HIDDEN = {"output_dir", "init_from", "tokenizer", "objective", "data_root", *DEFAULTS}


@dataclass(frozen=True)
class _Scale:
    """What all systems are held against. greedy: the system whose texts are those of plain ar."""

    protocol: str
    sources: list[str]
    references: list[list[str]]
    baselines: Mapping[str, ProtocolScores]
    greedy: str | None


def make_results(
    run: Comparison, trained: Sequence[Trained], written: Mapping[int, Mapping[str, Written]]
) -> Results:
    """Score everything. written: seed -> system -> texts."""
    recipe, sources = run.recipe, run.sources
    references = [list(example.references) for example in run.examples]
    facts = training_facts(run.arms, run.examples, run.folder / "training_data.json")
    words, of_what = _truncation(run, facts, references)
    sentences = recipe.lead_sentences or lead_sentences(recipe.task or recipe.protocol)
    plain = baselines(
        recipe.protocol,
        sources,
        references,
        words=words,
        sentences=sentences,
        fixed=recipe.fixed_text,
    )
    scored = score_all(recipe.protocol, plain, references, sources, {})
    greedy = next((system.name for system in run.systems if system.is_greedy_ar), None)
    scale = _Scale(recipe.protocol, sources, references, scored, greedy)
    seeds = {str(seed): _one_seed(run.systems, one, scale) for seed, one in written.items()}
    first = written[recipe.seeds[0]]
    return Results(
        protocol=_protocol(recipe.protocol, scored[COPY]),
        data=DataFacts(**recipe.data_label(), rows=len(sources)),
        seeds=list(recipe.seeds),
        batch_size=recipe.batch_size,
        training=_training(run, trained, facts),
        weights={str(seed): dict(found.weights) for seed, found in run.models.items()},
        baselines=Baselines(
            lead_sentences=sentences,
            truncation_words=words,
            truncation_words_are=of_what,
            fixed_text=recipe.fixed_text,
            measures={name: intervals(one) for name, one in scored.items()},
        ),
        greedy_ar=greedy,
        systems={
            system.name: SystemResult(
                settings=system.settings(),
                decoder=first[system.name].decoder,
                seeds={seed: one[system.name] for seed, one in seeds.items()},
                over_seeds=over_seeds([one[system.name] for one in seeds.values()]),
            )
            for system in run.systems
        },
        samples=[
            Sample(
                row=index,
                source=sources[index],
                references=references[index],
                texts={name: one.texts[index].text for name, one in first.items()},
            )
            for index in (evenly_spaced(len(sources), recipe.samples) if recipe.samples else [])
        ],
    )


def _protocol(name: str, scores: ProtocolScores) -> ProtocolFacts:
    protocol = PROTOCOLS[name]
    return ProtocolFacts(
        name=protocol.name,
        what=protocol.what,
        main=protocol.main,
        level=LEVEL,
        resamples=RESAMPLES,
        signatures=scores.signatures,
        higher_is_better={
            key: measure.higher_is_better for key, measure in scores.measures.items()
        },
    )


def _truncation(
    run: Comparison, facts: Mapping[str, Facts], references: Sequence[Sequence[str]]
) -> tuple[int, str]:
    if run.recipe.truncation_words is not None:
        return run.recipe.truncation_words, "given by the recipe"
    if facts:
        return list(facts.values())[-1]["target_words"], "mean of the last stage's targets"
    return mean_words(references), "mean of the test references, as no training data is named"


def _one_seed(
    systems: Sequence[System], written: Mapping[str, Written], scale: _Scale
) -> dict[str, SeedResult]:
    texts = {name: [text.text for text in one.texts] for name, one in written.items()}
    samples = {
        name: f"{one.decoder.num_candidates}-{one.decoder.choose_by}"
        for name, one in written.items()
        if one.decoder.num_candidates > 1
    }
    scored = score_all(scale.protocol, texts, scale.references, scale.sources, samples)
    measures = {name: intervals(one) for name, one in scored.items()}
    copy, main, greedy = scale.baselines[COPY], PROTOCOLS[scale.protocol].main, scale.greedy
    bounds = intervals(copy)[main], measures[UNTRAINED][main]
    higher = copy.measures[main].higher_is_better is not False
    found = {}
    for system in systems:
        name, one = system.name, written[system.name]
        to_ar = None
        if greedy is not None and name != greedy:
            to_ar = against(scored[name], scored[greedy], LEVEL, RESAMPLES)
        found[name] = SeedResult(
            signature=scored[name].signature,
            measures=measures[name],
            against_greedy_ar=to_ar,
            against_copy=against(scored[name], copy, LEVEL, RESAMPLES),
            exact_equal_to_ar=greedy and share_equal(texts[name], texts[greedy]),
            intervals_apart=verdict(measures[name][main], *bounds, higher),
            empty_texts=sum(not text.strip() for text in texts[name]),
            cost=costs(one.texts, one.flops_per_output_token, one.flops_note),
        )
    return found


def _training(
    run: Comparison, trained: Sequence[Trained], facts: Mapping[str, Facts]
) -> Training:
    recipe = run.recipe
    stages = [_stage(run, stage, trained, facts.get(stage.name, {})) for stage in recipe.stages]
    return Training(
        allowed_differences=list(recipe.allow_differences),
        checkpoints_differ_in=run.differing,
        checkpoints=recipe.checkpoints,
        updates=run.updates,
        stages=stages or None,
    )


def _stage(run: Comparison, stage: Stage, trained: Sequence[Trained], data: Facts) -> StageFacts:
    own = {arm.kind: arm for arm in reversed(run.arms) if arm.stage == stage.name}
    some = own[next(kind for kind in ARMS if kind in own)]
    some = some.teacher or some  # whose rows are the data's, not a file in the output folder
    apart = differing(own["tess"], own["ar"]) if len(own) == 2 else {}
    hidden = _HIDDEN | set(apart) | {"seed"}
    return StageFacts(
        name=stage.name,
        arms=list(stage.arms),
        shared={k: v for k, v in some.settings.items() if k not in hidden},
        differing=apart,
        data=data,
        runs=[
            TrainedRun(one.decoder, one.seed, one.updates, one.weights)
            for one in trained if one.stage == stage.name
        ],
    )
