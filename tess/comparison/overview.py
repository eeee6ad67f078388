"""Several comparisons side by side: one table and one figure over their reports."""

import json
from collections.abc import Sequence
from pathlib import Path

from tess.comparison.page import interval
from tess.comparison.plots import draw_panel, evaluations
from tess.comparison.recipe import COPY, UNTRAINED
from tess.comparison.report import Report, SeedResult, from_json, to_json, without_samples
from tess.errors import UserError
from tess.evaluation.plots import STYLE, check_plots, save_figure

FILES = ("overview.md", "overview.svg", "overview.png")


def read_reports(paths: Sequence[str | Path]) -> list[Report]:
    """The `report.json` of each path, which may also be the folder that holds it.

    Raises:
        UserError: a missing or unreadable file, or one that is no comparison's report.
    """
    reports = []
    for path in map(Path, paths):
        file = path / "report.json" if path.is_dir() else path
        if not file.is_file():
            raise UserError(f"there is no report {str(file)!r}")
        try:
            reports.append(from_json(Report, json.loads(file.read_text(encoding="utf-8"))))
        except ValueError as error:
            raise UserError(f"{file} is not JSON: {error}") from error
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{file} is not the report of a comparison (scripts/compare.py)"
            ) from error
    return reports


def overview_markdown(reports: Sequence[Report]) -> str:
    """A row for each system of each comparison: the main measure, evaluations, time, operations.

    Figures are the first seed's, as on the comparisons' own pages.
    """
    lines = [
        "| task | system | measure | value | evaluations | ms per text, batch 1 | "
        "MFLOP per token | better than copy |",
        "|---|---|---|---:|---:|---:|---:|---|",
    ]
    for report in reports:
        results = report.results
        main = results.protocol.main
        copy = results.baselines.measures[COPY][main]
        lines.append(f"| {report.name} | copy of the source | `{main}` | {interval(copy)} "
                     "| – | – | – | – |")
        for name, system in results.systems.items():
            one, timing = system.first, report.timings.systems.get(name)
            flops = one.cost.flops_per_output_token
            cells = [
                report.name,
                name,
                f"`{main}`",
                interval(one.measures[main]),
                f"{one.cost.nfe_mean:.1f}",
                f"{timing.latency.median_ms:.0f}" if timing else "–",
                f"{flops / 1e6:.1f}" if flops else "–",
                _better(one, main) if name != UNTRAINED else "–",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _better(figures: SeedResult, main: str) -> str:
    """Whether intervals are apart; else whether the paired difference leaves out 0."""
    if figures.intervals_apart.better_than_copy:
        return "yes, intervals apart"
    difference = figures.against_copy[main]
    if difference.low <= 0 <= difference.high:
        return "not told apart"
    return "paired only" if difference.low > 0 else "no"


def write_overview(
    reports: Sequence[Report], folder: Path, plots: bool = True
) -> list[Path]:
    """Write `overview.md`, with `plots` also `overview.svg` and `overview.png`, and each report's
    figures as `NAME.json`; their paths.

    Those files are the reports without the sample texts, whose licence may forbid passing them on.

    Raises:
        UserError: no report, two of one name, or matplotlib is missing.
    """
    if not reports:
        raise UserError("expected at least one report, got none")
    names = [report.name for report in reports]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"expected reports of different names, got {twice[0]!r} twice")
    if plots:
        check_plots()
    paths = [folder / FILES[0]]
    paths[0].write_text(overview_markdown(reports))
    for report in reports:
        figures = to_json(without_samples(report))
        paths.append(folder / f"{report.name}.json")
        paths[-1].write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n")
    if plots:
        paths += _plot(reports, folder / "overview")
    return paths


def _plot(reports: Sequence[Report], stem: Path) -> list[Path]:
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.3 * len(reports), 3.6), layout="constrained")
        axes = figure.subplots(1, len(reports), squeeze=False)[0]
        for axis, report in zip(axes, reports, strict=True):
            draw_panel(axis, report, evaluations(report), "network evaluations per text (mean)")
            rows = report.results.data.rows
            axis.set_title(f"{report.name}, {rows} rows", fontsize=9, loc="left")
        axes[0].legend(loc="best", fontsize=7)
        return save_figure(figure, stem)
