"""`report.json` of a comparison as a page in Markdown."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tess.comparison.recipe import UNTRAINED
from tess.comparison.report import Difference, Figure, Report, Results, StageFacts, Verdict
from tess.evaluation.protocol import bounded, digits_of

BASELINES = {
    "copy": "copy of the source",
    "lead": "lead",
    "truncation": "truncation",
    "fixed": "one fixed text",
}


def markdown(report: Report, plots: Sequence[str] = ()) -> str:
    """The whole page; plots: file names of the figures beside it."""
    parts = [
        _head(report),
        _quality(report),
        _measures(report),
        _cost(report),
        _time(report),
        _figures(plots),
        _seeds(report),
        _training(report),
        _samples(report),
        _setting(report),
    ]
    return "\n".join(line for lines in parts for line in lines).rstrip("\n") + "\n"


def interval(figure: Figure) -> str:
    """`32.6 [31.2, 34.0]`."""
    return bounded(figure.value, figure.low, figure.high)


def _head(report: Report) -> list[str]:
    results = report.results
    protocol, data, seeds = results.protocol, results.data, results.seeds
    rows = data.test_file or f"{data.task}, split {data.split or 'test'}"
    if data.task and data.dataset:
        rows += f" of {data.dataset}"
    several = f", {len(seeds)} seeds" if len(seeds) > 1 else f", seed {seeds[0]}"
    return [
        f"# Comparison: {report.name}",
        "",
        f"{data.rows} test rows ({rows}){several}. Protocol `{protocol.name}`: "
        f"{protocol.what}. Judged by `{protocol.main}`.",
        "",
        f"Brackets are {100 * protocol.level:g} % bootstrap intervals over the test rows "
        f"({protocol.resamples} resamples); they do not say what another training seed would "
        "give. Differences are paired on the same rows, p by approximate randomisation, not "
        "corrected for the number of comparisons.",
        "",
    ]


def _quality(report: Report) -> list[str]:
    results = report.results
    main, greedy = results.protocol.main, results.greedy_ar
    better = {True: "higher is better", False: "lower is better"}.get(
        results.protocol.higher_is_better[main], "neither end is better"
    )
    lines = [
        f"## Quality: `{main}` ({better})",
        "",
        f"| system | {main} | minus {greedy or 'greedy AR'} | p | minus copy | p | "
        "text equal to greedy AR |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, system in results.systems.items():
        one = system.first
        cells = [name, interval(one.measures[main])]
        for tests in (one.against_greedy_ar, one.against_copy):
            cells += _test(tests and tests[main])
        equal = one.exact_equal_to_ar
        cells.append("-" if equal is None else f"{100 * equal:.0f} %")
        lines.append(f"| {' | '.join(cells)} |")
    for name, measures in results.baselines.measures.items():
        title = f"*{_baseline(name, results)}*"
        lines.append(f"| {title} | {interval(measures[main])} | | | | | |")
    return [*lines, "", *_verdicts(results), ""]


def _test(test: Difference | None) -> list[str]:
    if test is None:
        return ["-", "-"]
    return [bounded(test.difference, test.low, test.high, "+"), f"{test.p_value:.4f}"]


def _baseline(name: str, results: Results) -> str:
    plain = results.baselines
    extra = {
        "lead": f" (first sentences: {plain.lead_sentences})",
        "truncation": f" (first {plain.truncation_words} words, {plain.truncation_words_are})",
        "fixed": f" (“{plain.fixed_text}”)",
    }
    return BASELINES[name] + extra.get(name, "")


def _verdicts(results: Results) -> list[str]:
    main, lines = results.protocol.main, []
    verdicts: dict[str, Callable[[Verdict], bool]] = {
        "the copy": lambda verdict: verdict.better_than_copy,
        "the untrained model": lambda verdict: verdict.better_than_untrained,
    }
    for what, better in verdicts.items():
        named = [
            name
            for name, system in results.systems.items()
            if name != UNTRAINED and better(system.first.intervals_apart)
        ]
        systems = ", ".join(named) if named else "no system"
        lines.append(f"- Better than {what} in `{main}` with intervals apart: {systems}.")
    return lines


def _measures(report: Report) -> list[str]:
    results = report.results
    columns = {name: system.first.measures for name, system in results.systems.items()}
    columns |= {BASELINES[n]: m for n, m in results.baselines.measures.items()}
    better = results.protocol.higher_is_better
    keys = list(better)
    arrows = {True: " ↑", False: " ↓", None: ""}
    titles = [f"{key}{arrows[better[key]]}" for key in keys]
    lines = ["## All measures", "", f"| system | {' | '.join(titles)} |", _rule(len(keys))]
    for name, measures in columns.items():
        lines.append(f"| {name} | {' | '.join(interval(measures[key]) for key in keys)} |")
    return [*lines, "", "↑ higher is better, ↓ lower is better.", ""]


def _rule(columns: int) -> str:
    return "|---|" + "---:|" * columns


def _cost(report: Report) -> list[str]:
    lines = [
        "## Cost by count",
        "",
        "| system | NFE, mean | NFE, max | new tokens, mean | tokens per forward | acceptance "
        "length | MFLOP per token |",
        _rule(6),
    ]
    for name, system in report.results.systems.items():
        cost = system.first.cost
        flops = cost.flops_per_output_token
        cells = [
            f"{cost.nfe_mean:.2f}",
            f"{cost.nfe_max}",
            f"{cost.new_tokens_mean:.1f}",
            f"{cost.tokens_per_forward:.2f}",
            _number(cost.acceptance_length, ".2f"),
            _number(flops and flops / 1e6, ",.2f"),
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    cut = max(system.decoder.sources_cut for system in report.results.systems.values())
    rows = report.results.data.rows
    return [
        *lines,
        "",
        "NFE: network evaluations per text, all candidates together; of AR the source is the "
        "first, with beams each is as many rows wide. Tokens are of the systems' own outputs, "
        "padding left out. Floating-point operations are counted by formula "
        "(`tess/costs/decoding.py`), the source included."
        + (
            f" {cut} of {rows} sources were longer than the model takes and are cut." if cut else ""
        ),
        "",
    ]


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


def _time(report: Report) -> list[str]:
    systems = report.timings.systems
    if not systems:
        return []
    first = next(iter(systems.values()))
    sizes = [row.batch_size for row in first.throughput]
    setting, timed = first.setting, first.latency
    most = max(sizes)
    titles = ["median ms per text", "p90 ms"]
    titles += [f"batch {size}, tokens/s" + (" (largest)" if size == most else "") for size in sizes]
    memory = "GPU" if setting["accelerator"] else "resident"
    titles.append(f"peak memory at batch {most}, MB ({memory})")
    lines = ["## Time and memory", "", f"| system | {' | '.join(titles)} |", _rule(len(titles))]
    for name, one in systems.items():
        peak = one.peak_memory_bytes
        cells = [f"{one.latency.median_ms:.1f}", f"{one.latency.p90_ms:.1f}"]
        for row in one.throughput:
            speed = row.new_tokens_per_second
            cells.append("out of memory" if speed is None else f"{speed:.1f}")
        cells.append(_number(peak and peak / 1e6, ",.0f"))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    several = any(one.setting != setting for one in systems.values())
    mixed = " **Not all systems were timed on the same machine and versions.**" if several else ""
    loads = [one.load_average for one in systems.values() if one.load_average is not None]
    busy = f" Load average of the machine meanwhile: {min(loads):.1f} to {max(loads):.1f}."
    return [
        *lines,
        "",
        f"On {setting['accelerator'] or setting['processor']}, threads: {setting['threads']}, "
        f"{report.timings.dtype}; {timed.texts} texts after a warm-up, the shortest of "
        f"{timed.repeats} runs. Tokens per second are without padding; systems write texts of "
        "different lengths, so compare milliseconds per text. Resident memory is the peak of a "
        "fresh process that loads and writes one batch, less that of a process that only imports "
        f"the package.{busy if loads else ''}{mixed}",
        "",
    ]


def _figures(plots: Sequence[str]) -> list[str]:
    if not plots:
        return []
    return ["## Figures", "", *(f"![{name.split('.')[0]}]({name})" for name in plots), ""]


def _seeds(report: Report) -> list[str]:
    results = report.results
    seeds, main = results.seeds, results.protocol.main
    if len(seeds) < 2:
        return []
    first, *others = results.weights.values()
    what = "sampling seeds; the checkpoints are the same in all"
    if any(weights != first for weights in others):
        what = "training and sampling seeds"
    lines = [
        f"## Over {len(seeds)} seeds",
        "",
        f"Tables above are of seed {seeds[0]}. Mean of `{main}` and its range over {what}:",
        "",
        "| system | mean | lowest | highest | " + " | ".join(f"seed {s}" for s in seeds) + " |",
        _rule(3 + len(seeds)),
    ]
    for name, system in results.systems.items():
        spread = system.over_seeds[main]
        values = [spread.mean, spread.min, spread.max]
        digits = digits_of(*values)
        cells = [f"{value:.{digits}f}" for value in values]
        cells += [interval(one.measures[main]) for one in system.seeds.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return [*lines, ""]


def _training(report: Report) -> list[str]:
    training, lines = report.results.training, ["## Training", ""]
    for arm, digest in next(iter(report.results.weights.values())).items():
        lines.append(f"- {arm}: {_parameters(report, arm)}weights `{digest}`")
    lines.append("")
    if training.checkpoints is not None:
        lines += ["No training: checkpoints that were there.", ""]
        for arm, place in training.checkpoints.items():
            updates = (training.updates or {}).get(arm)
            known = "number of updates unknown" if updates is None else f"{updates} updates"
            lines.append(f"- {arm}: `{place}`, {known}")
        lines.append("")
    speeds = {
        (one.stage, one.decoder, one.seed): one.seconds_per_update
        for one in report.timings.seconds_per_update
    }
    for stage in training.stages or []:
        lines += _stage(stage, speeds)
    differ = training.checkpoints_differ_in
    same = "Backbone sizes and tokenizer of both checkpoints are equal."
    if differ:
        same = f"The checkpoints differ in {', '.join(differ)}, which the recipe allows."
    lines += [same, ""]
    if training.allowed_differences:
        named = ", ".join(f"`{name}`" for name in training.allowed_differences)
        lines += [f"**The recipe allows the arms to differ in {named}.**", ""]
    return lines


def _parameters(report: Report, arm: str) -> str:
    for system in report.results.systems.values():
        if system.settings["decoder"] == arm:
            return f"{system.decoder.num_parameters:,} parameters, "
    return ""


def _stage(stage: StageFacts, speeds: Mapping[tuple, float | None]) -> list[str]:
    lines = [f"### Stage `{stage.name}`", ""]
    lines += ["| decoder | seed | updates | seconds per update |", _rule(3)]
    for run in stage.runs:
        speed = speeds.get((stage.name, run.decoder, run.seed))
        cells = [f"{run.seed}", f"{run.updates}", _number(speed, ".3f")]
        lines.append(f"| {run.decoder} | {' | '.join(cells)} |")
    shared = ", ".join(f"{k} {v}" for k, v in stage.shared.items() if v is not None)
    lines += ["", f"Both: {shared}." if len(stage.arms) > 1 else f"Settings: {shared}.", ""]
    if stage.differing:
        lines += ["| differs | tess | ar |", "|---|---|---|"]
        for name, (ours, theirs) in stage.differing.items():
            lines.append(f"| {name} | {_given(ours)} | {_given(theirs)} |")
        lines.append("")
    if data := stage.data:
        seen = data["test_rows_seen"]
        dropped = stage.shared.get("long_rows") == "drop"
        whole = " (those that are too long, and are dropped, included)" if dropped else ""
        lines += [
            f"{data['training_rows']} training rows{whole}, {data['target_words']} words in a "
            f"target on average; {seen} test rows share a text with them (case and punctuation "
            "aside).",
            "",
        ]
    return lines


def _given(value: Any) -> str:
    return "-" if value is None else str(value)


def _samples(report: Report) -> list[str]:
    samples = report.results.samples
    if not samples:
        return []
    lines = [
        "## Samples",
        "",
        f"{len(samples)} rows evenly spaced over the test rows, not chosen.",
        "",
    ]
    for sample in samples:
        lines += [f"### Row {sample.row + 1}", "", "| | |", "|---|---|"]
        lines.append(f"| source | {_cell(sample.source)} |")
        lines.append(f"| reference | {_cell(sample.references[0])} |")
        lines += [f"| {name} | {_cell(text)} |" for name, text in sample.texts.items()]
        lines.append("")
    return lines


def _cell(text: str) -> str:
    """Text inside a table: one line, no markup."""
    for mark in "\\|*_`<>[]":
        text = text.replace(mark, f"\\{mark}")
    return " ".join(text.split()) or "(empty)"


def _setting(report: Report) -> list[str]:
    results = report.results
    found = ", ".join(f"{key} {value}" for key, value in report.environment.items())
    signatures = results.protocol.signatures
    chosen = [
        system.first.signature
        for system in results.systems.values()
        if system.first.signature not in signatures.values()
    ]
    lines = ["## Setting", "", f"{found}.", "", "| system | settings |", "|---|---|"]
    for name, system in results.systems.items():
        settings = ", ".join(f"{key} {value}" for key, value in system.settings.items())
        lines.append(f"| {name} | {settings} |")
    lines += ["", "Signatures:", "", "```", *signatures.values(), *dict.fromkeys(chosen), "```"]
    return [*lines, "", "Recipe:", "", "```yaml", report.recipe.rstrip("\n"), "```"]
