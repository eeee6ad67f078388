"""`report.json` to read: a page in Markdown, and a table for the terminal."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tess.evaluation.protocol import protocol_lines, protocol_summary
from tess.evaluation.report import Report

GOLD_LENGTH_LABEL = "Diagnostic: uses the reference's length."
PAGE_TITLES = {
    "system": "system",
    "first_candidate": "first candidate",
    "copy_source": "copy of the source",
}
"""Of the columns of metrics in `report.md`."""
SHORT_TITLES = {"system": "system", "first_candidate": "first", "copy_source": "copy"}
"""The same in the terminal."""


def markdown(report: Report) -> str:
    """`report.json` as a page to read: the metrics in a table, then speed, then the setting."""
    columns = report["metrics"]
    system = columns["system"]
    lines = [
        f"# {report['decoder']} on {_data_name(report['data'])}",
        "",
        *([f"**{GOLD_LENGTH_LABEL}**", ""] if report["length"] == "gold" else []),
        f"| metric | {' | '.join(PAGE_TITLES[name] for name in columns)} |",
        "|---|" + "---:|" * len(columns),
        *(
            f"| {key} | {' | '.join(_cell(column[key]) for column in columns.values())} |"
            for key in _numbers(system)
        ),
        "",
        f"BLEU: `{system['bleu_signature']}`; chrF: `{system['chrf_signature']}`. ROUGE, BLEU, "
        "chrF, SARI, self_bleu and ibleu run to 100; the others are ratios and counts.",
        "",
        *(protocol_lines(report["protocol"]) if report["protocol"] else []),
        "| cost | |",
        "|---|---:|",
        f"| network evaluations per text, mean | {report['nfe_mean']:.2f} |",
        f"| network evaluations per text, maximum | {report['nfe_max']} |",
        *_first_candidate_lines(report),
        f"| new tokens (without padding) | {report['new_tokens']} |",
        f"| generation, seconds | {report['generation_seconds']:.2f} |",
        f"| new tokens per second | {report['new_tokens_per_second']:.1f} |",
        f"| new tokens per network evaluation | {report['tokens_per_forward']:.2f} |",
        *_draft_lines(report),
        "",
        "| setting | |",
        "|---|---|",
    ]
    steps = report["num_inference_steps"]
    settings = {
        "checkpoint": report["checkpoint"],
        "parameters": f"{report['num_parameters']:,}",
        "num_inference_steps": "none" if steps is None else steps,
        **_sampler_settings(report),
        "seed": report["seed"],
        "batch_size": report["batch_size"],
        **report["versions"],
        **{f"machine: {key}": value for key, value in report["machine"].items()},
    }
    lines += [f"| {key} | {_escape(value)} |" for key, value in settings.items()]
    return "\n".join(lines) + "\n"


def _first_candidate_lines(report: Report) -> list[str]:
    if report["num_candidates"] == 1:
        return []
    return [
        f"| network evaluations of the first candidate, mean | {report['nfe_first_mean']:.2f} |"
    ]


def _sampler_settings(report: Report) -> dict[str, Any]:
    """What of the sampler's settings applies, in words."""
    settings = {key: report[key] for key in ("scheduler", "timestep_spacing")}
    if report["scheduler"] is not None:
        rule = report["stopping"] or {"none": ""}
        settings["stopping"] = ", ".join(f"{key} {value}".strip() for key, value in rule.items())
    settings["length"] = report["length"]
    if report["gen_length"] is not None:
        settings["length"] += f" ({report['gen_length']})"
    if report["num_candidates"] > 1:
        settings["candidates"] = f"{report['num_candidates']}, chosen by {report['choose_by']}"
    if report["num_beams"] > 1:
        settings["beams"] = f"{report['num_beams']}, length penalty {report['length_penalty']:g}"
    return {key: value for key, value in settings.items() if value is not None}


def _draft_lines(report: Report) -> list[str]:
    if report["acceptance_length"] is None:
        return []
    drafted = report["num_draft_tokens"]
    fixed = [] if drafted is None else [f"| drafted tokens per evaluation | {drafted} |"]
    return [
        *fixed,
        f"| tokens kept per evaluation of a draft | {report['acceptance_length']:.2f} |",
    ]


def summary(report: Report) -> str:
    """The figures that matter first, as a small text table for the terminal."""
    columns = report["metrics"]
    keys = ("rouge1", "rouge2", "rougeL", "rougeLsum", "bleu", "chrf", "sari", "self_bleu")
    keys += ("distinct2", "repeated_words", "length_ratio", "exact_copies", "empty_predictions")
    rows = [
        f"{key:<18}" + "".join(f"{_cell(column[key]):>10}" for column in columns.values())
        for key in keys
    ]
    nfe = f"NFE mean {report['nfe_mean']:.2f}, max {report['nfe_max']}"
    if report["num_candidates"] > 1:
        nfe += (
            f" for {report['num_candidates']} candidates by {report['choose_by']}"
            f" (the first: mean {report['nfe_first_mean']:.2f})"
        )
    return "\n".join(
        [
            f"{report['decoder']} on {_data_name(report['data'])}, {report['rows']} rows",
            *([GOLD_LENGTH_LABEL] if report["length"] == "gold" else []),
            f"{'':<18}" + "".join(f"{SHORT_TITLES[name]:>10}" for name in columns),
            *rows,
            *(protocol_summary(report["protocol"]) if report["protocol"] else []),
            f"{nfe}; {report['new_tokens_per_second']:.1f} new tokens/s, "
            f"{report['tokens_per_forward']:.2f} tokens per evaluation",
        ]
    )


def _numbers(metrics: Mapping[str, Any]) -> list[str]:
    return [key for key, value in metrics.items() if not isinstance(value, str)]


def _cell(value: float | int) -> str:
    return str(value) if isinstance(value, int) else f"{value:.3f}"


def _escape(value: object) -> str:
    return str(value).replace("|", "\\|")


def _data_name(data: Mapping[str, str | None]) -> str:
    if data.get("file"):
        return Path(data["file"]).name
    return f"{data['task']} ({data['dataset']}, {data['split']})"
