"""The section `protocol` of `report.json`: figures with intervals, baselines, and a paired test."""

from collections.abc import Mapping, Sequence

from tess.evaluation.report import Section
from tess.metrics.bertscore import BertScore
from tess.metrics.catalog import get_protocol
from tess.metrics.measures import Measure
from tess.metrics.protocols import (
    ProtocolScores,
    apply_protocol,
    baselines,
    lead_sentences,
    mean_words,
)
from tess.metrics.significance import LEVEL, RESAMPLES, bootstrap_interval, paired_test

TITLES = {"system": "system", "first_candidate": "first candidate"}


def protocol_section(
    name: str,
    systems: Mapping[str, Sequence[str]],
    references: Sequence[Sequence[str]],
    sources: Sequence[str],
    *,
    task: str | None = None,
    samples: str = "1",
    resamples: int = RESAMPLES,
    seed: int = 0,
    bertscore: BertScore | None = None,
) -> Section:
    """Score systems and baselines under a protocol, as plain data.

    Args:
        systems: texts by name; `system` is the one that is tested against the copy, `samples` says
            how its texts were chosen, and the texts of any other are one sample each.
        task: decides the length of the lead where it is known.
        seed: of the resamples.

    Raises:
        UserError: an unknown protocol, or texts that do not line up.
    """
    protocol = get_protocol(name)
    words, sentences = mean_words(references), lead_sentences(task or name)
    plain = baselines(name, sources, references, words=words, sentences=sentences)
    scored = {
        title: apply_protocol(
            name,
            texts,
            references,
            sources,
            samples=samples if title == "system" else "1",
            bertscore=bertscore,
        )
        for title, texts in (dict(systems) | plain).items()
    }
    system, copy = scored["system"], scored["copy"]
    return {
        "name": name,
        "what": protocol.what,
        "main": protocol.main,
        "signature": system.signature,
        "signatures": system.signatures,
        "level": LEVEL,
        "resamples": resamples,
        "resampling_seed": seed,
        "lead_sentences": sentences,
        "truncation_words": words,
        "figures": {
            title: figures(one, resamples=resamples, seed=seed) for title, one in scored.items()
        },
        "against_copy": {
            key: paired_test(measure, copy.measures[key], resamples=resamples, seed=seed)._asdict()
            for key, measure in system.measures.items()
        },
    }


def figures(
    scores: ProtocolScores, *, level: float = LEVEL, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, dict[str, float]]:
    """Each measure's `value` with the bounds `low` and `high` of its bootstrap interval."""

    def figure(measure: Measure) -> dict[str, float]:
        interval = bootstrap_interval(measure, level=level, resamples=resamples, seed=seed)
        return {"value": measure.value, **interval._asdict()}

    return {key: figure(measure) for key, measure in scores.measures.items()}


def protocol_lines(section: Section) -> list[str]:
    """The section in Markdown: a table and the signatures."""
    columns = section["figures"]
    names = {
        **TITLES,
        "copy": "copy",
        "lead": f"lead {section['lead_sentences']}",
        "truncation": f"first {section['truncation_words']} words",
    }
    titles = [names.get(key, key) for key in columns]
    lines = [
        f"## Protocol `{section['name']}`",
        "",
        f"{section['what']}. Judged by `{section['main']}`; in brackets the "
        f"{100 * section['level']:g} % bootstrap interval over rows ({section['resamples']} "
        "resamples), p by paired approximate randomisation against the copy.",
        "",
        f"| measure | {' | '.join(titles)} | system - copy | p |",
        "|---|" + "---:|" * (len(titles) + 2),
    ]
    for key, test in section["against_copy"].items():
        cells = [bounded(**column[key]) for column in columns.values()]
        cells += [_difference(test), f"{test['p_value']:.4f}"]
        label = f"**{key}**" if key == section["main"] else key
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return [*lines, "", "```", *section["signatures"].values(), "```", ""]


def protocol_summary(section: Section) -> list[str]:
    """The main measure of all columns, for the terminal."""
    main, test = section["main"], section["against_copy"][section["main"]]
    columns = ", ".join(
        f"{title} {bounded(**column[main])}"
        for title, column in section["figures"].items()
    )
    return [
        f"protocol {section['name']}, {main}: {columns}; system - copy "
        f"{_difference(test)}, p = {test['p_value']:.4f}",
        section["signature"],
    ]


def _difference(test: Mapping[str, float]) -> str:
    return bounded(test["difference"], test["low"], test["high"], "+")


def bounded(value: float, low: float, high: float, sign: str = "") -> str:
    """`32.6 [31.2, 34.0]`; sign "+" shows that of positive numbers too."""
    form = f"{sign}.{digits_of(value, low, high)}f"
    return f"{value:{form}} [{low:{form}}, {high:{form}}]"


def digits_of(*values: float) -> int:
    """Decimals that leave figures of this size three digits."""
    largest = max(map(abs, values))
    return 1 if largest >= 10 else 2 if largest >= 1 else 3
