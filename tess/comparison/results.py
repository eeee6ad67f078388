"""The section `results` of a comparison's report: all that the same seeds give again."""

from collections.abc import Mapping, Sequence
from typing import Any

from tess.comparison.arms import DEFAULTS, Arm, differing
from tess.comparison.recipe import ARMS, COPY, UNTRAINED, Recipe, System
from tess.comparison.scores import against, costs, over_seeds, score_all, share_equal, verdict
from tess.comparison.systems import Models
from tess.comparison.timing import evenly_spaced
from tess.data.rows import Example
from tess.evaluation.protocol import figures
from tess.metrics.catalog import PROTOCOLS
from tess.metrics.protocols import ProtocolScores, baselines, lead_sentences, mean_words
from tess.metrics.significance import LEVEL, RESAMPLES

_HIDDEN = {"output_dir", "init_from", "tokenizer", "objective", "data_root", *DEFAULTS}


def make_results(
    recipe: Recipe,
    examples: Sequence[Example],
    systems: Sequence[System],
    arms: Sequence[Arm],
    trained: Sequence[Mapping[str, Any]],
    facts: Mapping[str, Mapping[str, Any]],
    models: Mapping[int, Models],
    different: Mapping[str, list[Any]],
    written: Mapping[int, Mapping[str, tuple[dict[str, Any], list[dict[str, Any]]]]],
) -> dict[str, Any]:
    """Score everything; see `docs/comparison.md` for the keys.

    Args:
        trained, facts: of the arms, and of the stages' data.
        different: what differs between the checkpoints and was allowed.
        written: seed -> system -> description of the decoder, and a row for each text.
    """
    sources = [example.source for example in examples]
    references = [list(example.references) for example in examples]
    words, of_what = _truncation(recipe, facts, references)
    sentences = recipe.lead_sentences or lead_sentences(recipe.task or recipe.protocol)
    plain = baselines(
        recipe.protocol,
        sources,
        references,
        words=words,
        sentences=sentences,
        fixed=recipe.fixed_text,
    )
    scored = {
        name: score_all(recipe.protocol, {name: texts}, references, sources, {})[name]
        for name, texts in plain.items()
    }
    greedy = next((system.name for system in systems if system.is_greedy_ar), None)
    seeds = {
        seed: _one_seed(recipe.protocol, systems, found, references, sources, scored, greedy)
        for seed, found in written.items()
    }
    first = written[recipe.seeds[0]]
    protocol, any_scores = PROTOCOLS[recipe.protocol], next(iter(scored.values()))
    return {
        "protocol": {
            "name": protocol.name,
            "what": protocol.what,
            "main": protocol.main,
            "level": LEVEL,
            "resamples": RESAMPLES,
            "signatures": any_scores.signatures,
            "higher_is_better": {
                name: measure.higher_is_better for name, measure in any_scores.measures.items()
            },
        },
        "data": recipe.data_label() | {"rows": len(examples)},
        "seeds": list(recipe.seeds),
        "batch_size": recipe.batch_size,
        "training": _training(recipe, arms, trained, facts, different),
        "weights": {str(seed): dict(found.weights) for seed, found in models.items()},
        "baselines": {
            "lead_sentences": sentences,
            "truncation_words": words,
            "truncation_words_are": of_what,
            **({} if recipe.fixed_text is None else {"fixed_text": recipe.fixed_text}),
            "measures": {name: figures(one) for name, one in scored.items()},
        },
        "greedy_ar": greedy,
        "systems": {
            system.name: {
                "settings": system.settings(),
                "decoder": {k: v for k, v in first[system.name][0].items() if "flops" not in k},
                "seeds": {str(seed): one[system.name] for seed, one in seeds.items()},
                "over_seeds": over_seeds(
                    {str(seed): one[system.name] for seed, one in seeds.items()}
                ),
            }
            for system in systems
        },
        "samples": [
            {
                "row": index,
                "source": sources[index],
                "references": references[index],
                "texts": {system.name: first[system.name][1][index]["text"] for system in systems},
            }
            for index in evenly_spaced(len(examples), recipe.samples)
        ]
        if recipe.samples
        else [],
    }


def _truncation(
    recipe: Recipe, facts: Mapping[str, Mapping[str, Any]], references: Sequence[Sequence[str]]
) -> tuple[int, str]:
    if recipe.truncation_words is not None:
        return recipe.truncation_words, "given by the recipe"
    if facts:
        return list(facts.values())[-1]["target_words"], "mean of the last stage's targets"
    return mean_words(references), "mean of the test references, as no training data is named"


def _one_seed(
    protocol: str,
    systems: Sequence[System],
    written: Mapping[str, tuple[dict[str, Any], list[dict[str, Any]]]],
    references: Sequence[Sequence[str]],
    sources: Sequence[str],
    baseline_scores: Mapping[str, ProtocolScores],
    greedy: str | None,
) -> dict[str, dict[str, Any]]:
    texts = {name: [row["text"] for row in rows] for name, (_, rows) in written.items()}
    samples = {}
    for system in systems:
        described = written[system.name][0]
        if described["num_candidates"] > 1:
            samples[system.name] = f"{described['num_candidates']}-{described['choose_by']}"
    scored = score_all(protocol, texts, references, sources, samples)
    measures = {name: figures(one) for name, one in scored.items()}
    copy, main = baseline_scores[COPY], PROTOCOLS[protocol].main
    others = {COPY: figures(copy), UNTRAINED: measures[UNTRAINED]}
    higher = copy.measures[main].higher_is_better is not False
    found = {}
    for system in systems:
        name = system.name
        described, rows = written[name]
        to_ar = None
        if greedy is not None and name != greedy:
            to_ar = against(scored[name], scored[greedy], LEVEL, RESAMPLES)
        found[name] = {
            "signature": scored[name].signature,
            "measures": measures[name],
            "against_greedy_ar": to_ar,
            "against_copy": against(scored[name], copy, LEVEL, RESAMPLES),
            "exact_equal_to_ar": None
            if greedy is None
            else share_equal(texts[name], texts[greedy]),
            "intervals_apart": verdict(measures[name], others, main, higher),
            "empty_texts": sum(not text.strip() for text in texts[name]),
            "cost": costs(rows)
            | {key: described[key] for key in ("flops_per_output_token", "flops_note")},
        }
    return found


def _training(
    recipe: Recipe,
    arms: Sequence[Arm],
    trained: Sequence[Mapping[str, Any]],
    facts: Mapping[str, Mapping[str, Any]],
    different: Mapping[str, list[Any]],
) -> dict[str, Any]:
    found: dict[str, Any] = {
        "allowed_differences": list(recipe.allow_differences),
        "checkpoints_differ_in": dict(different),
    }
    if recipe.checkpoints:
        return found | {"checkpoints": dict(recipe.checkpoints)}
    stages = []
    for stage in recipe.stages:
        own = {arm.kind: arm for arm in reversed(arms) if arm.stage == stage.name}
        some = own[next(kind for kind in ARMS if kind in own)]
        some = some.teacher or some  # whose rows are the data's, not a file in the output folder
        apart = differing(own["tess"], own["ar"]) if len(own) == 2 else {}
        stages.append({
            "name": stage.name,
            "arms": list(stage.arms),
            "shared": {k: v for k, v in some.settings.items() if k not in _HIDDEN | set(apart)
                       and k != "seed"},
            "differing": apart,
            "data": dict(facts.get(stage.name, {})),
            "runs": [
                {key: record[key] for key in ("decoder", "seed", "updates", "weights")}
                for record in trained if record["stage"] == stage.name
            ],
        })
    return found | {"stages": stages}
