"""The figures of `tess.benchmarks.sampling.grid` as Markdown."""

from collections.abc import Sequence
from typing import Any

from tess.benchmarks.sampling.grid import GOAL_STEPS, REFERENCE_STEPS, goals

TITLES = {
    "sari": ("SARI", 1),
    "bleu": ("BLEU", 1),
    "rougeL": ("ROUGE-L", 1),
    "self_bleu": ("self-BLEU", 1),
    "distinct2": ("distinct-2", 3),
    "repeated_words": ("repeated words", 3),
}


def format_sampling(result: dict[str, Any]) -> str:
    """What was measured, the goals, and two tables: all steps, and stopping."""
    first = result["setting"]["rules"][0]
    lines = [
        _setting_line(result),
        "",
        *_goal_lines(result),
        "",
        "All steps, and the same runs stopped by the first rule (patience "
        f"{first['patience']}, entropy at most {bound(first)}):",
        "",
        *_table(result),
    ]
    if any(row["steps"] > GOAL_STEPS for row in result["rows"]):
        lines += ["", "Every stopping rule, in runs of more steps:", "", *_rules_table(result)]
    return "\n".join(lines)


def _setting_line(result: dict[str, Any]) -> str:
    setting, env = result["setting"], result["environment"]
    data = ", ".join(str(value) for name, value in setting["data"].items() if name[0] not in "ro")
    counts = sorted({len(row["seeds"]) for row in result["rows"]})
    seeds = " or ".join(map(str, counts))
    return (
        f"sampling: {setting['checkpoint']} ({setting['parameters'] / 1e6:.1f} M parameters, "
        f"{setting['dtype']}) on {setting['data']['rows']} of {setting['data']['of']} rows "
        f"({data}), {seeds} seeds, mean ± standard deviation; Python {env['python']}, "
        f"torch {env['torch']}, transformers {env['transformers']}, {env['threads']} threads, "
        f"{env['processor']}, {env['date']}. Metrics: docs/evaluation.md; "
        "self-BLEU is against the source."
    )


def _goal_lines(result: dict[str, Any]) -> list[str]:
    found = goals(result)
    if found["bar"] is None:
        return [f"No goal to compare with: re-noising at {REFERENCE_STEPS} steps was not run."]
    bar = ", ".join(
        f"{TITLES[name][0]} {figure['mean']:.1f} ± {figure['sd']:.1f}"
        for name, figure in found["bar"].items()
    )
    few = [f"{row['scheduler']} {row['spacing']}" for row in found["few"]]
    early = [
        f"{row['scheduler']} {row['spacing']} of {row['steps']} steps by patience "
        f"{one['patience']}, entropy {bound(one)} ({one['nfe_mean']:.1f})"
        for row, one in found["stopping"]
    ]
    return [
        f"- Re-noising at {REFERENCE_STEPS} evaluations, uniform spacing: {bar}.",
        f"- Within the seeds' spread of that at {GOAL_STEPS} evaluations, in both metrics: "
        f"{', '.join(few) or 'none'}.",
        f"- The same with stopping, at {GOAL_STEPS} evaluations or fewer on average: "
        f"{', '.join(early) or 'none'}.",
    ]


def _table(result: dict[str, Any]) -> list[str]:
    lines = [
        "| scheduler | spacing | steps | "
        + " | ".join(title for title, _ in TITLES.values())
        + " | stopped: evaluations, mean (most) | SARI | BLEU |",
        "|---|---|---:|" + "---:|" * (len(TITLES) + 3),
        "| copy of the source | | 0 | "
        + " | ".join(f"{result['copy'][name]:.{digits}f}" for name, (_, digits) in TITLES.items())
        + " | | | |",
    ]
    for row in result["rows"]:
        cells = [spread(row["full"][name], digits) for name, (_, digits) in TITLES.items()]
        cells += _stopped_cells(row["stopped"][0])
        lines.append(
            f"| {row['scheduler']} | {row['spacing']} | {row['steps']} | {' | '.join(cells)} |"
        )
    return lines


def _rules_table(result: dict[str, Any]) -> list[str]:
    lines = [
        "| scheduler | spacing | steps | patience | entropy | evaluations, mean (most) | SARI | "
        "BLEU |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in result["rows"]:
        for one in row["stopped"] if row["steps"] > GOAL_STEPS else ():
            lines.append(
                f"| {row['scheduler']} | {row['spacing']} | {row['steps']} | {one['patience']} | "
                f"{bound(one)} | {' | '.join(_stopped_cells(one))} |"
            )
    return lines


def bound(rule: dict[str, Any]) -> str:
    """A rule's bound of the entropy in words."""
    return "any" if rule["max_entropy"] is None else f"{rule['max_entropy']:g}"


def _stopped_cells(figures: dict[str, Any]) -> Sequence[str]:
    evaluations = f"{figures['nfe_mean']:.1f} ({figures['nfe_max']})"
    return [evaluations, spread(figures["sari"], 1), spread(figures["bleu"], 1)]


def spread(figure: dict[str, float], digits: int) -> str:
    """Mean and standard deviation."""
    return f"{figure['mean']:.{digits}f} ± {figure['sd']:.{digits}f}"
