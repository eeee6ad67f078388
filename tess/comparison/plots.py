"""The two figures of a comparison, as SVG and PNG: quality against evaluations, and against time.

matplotlib is imported inside the functions: it is an extra (`plots`).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tess.comparison.recipe import COPY, UNTRAINED
from tess.comparison.report import Figure, Report, SystemResult
from tess.evaluation.plots import STYLE, check_plots, save_figure

FAMILIES = {
    "tess": ("#0072B2", "o"),
    "ar": ("#D55E00", "s"),
    "ar+mtp": ("#E69F00", "D"),
    "tess+ar": ("#009E73", "^"),
}
"""Colour (of Okabe and Ito's palette) and marker of a decoder."""

GREY = "#666666"
SIZE = (6.4, 4.2)


def plot_comparison(report: Report, folder: Path) -> list[Path]:
    """Draw `quality_nfe` and `quality_latency` into `folder`; the paths written.

    Points have the bootstrap interval of the first seed; the greedy AR and the copy are lines.

    Raises:
        UserError: matplotlib is not installed.
    """
    check_plots()
    nfe = evaluations(report)
    times = {name: one.latency.median_ms for name, one in report.timings.systems.items()}
    return [
        *_draw(report, nfe, "network evaluations per text (mean)", folder / "quality_nfe"),
        *_draw(report, times, "milliseconds per text at batch 1 (median)",
               folder / "quality_latency"),
    ]


def evaluations(report: Report) -> dict[str, float]:
    """Network evaluations per text of every system, mean."""
    return {name: one.first.cost.nfe_mean for name, one in report.results.systems.items()}


def _draw(report: Report, across: Mapping[str, float], label: str, stem: Path):
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=SIZE, layout="constrained")
        axis = figure.subplots()
        draw_panel(axis, report, across, label)
        axis.set_title(_title(report), fontsize=9, loc="left")
        axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8, labelspacing=0.9)
        return save_figure(figure, stem)


def draw_panel(
    axis: Any, report: Report, across: Mapping[str, float], label: str
) -> None:
    """The main measure of all systems over `across` (system -> place) on a matplotlib axis."""
    results = report.results
    main, greedy = results.protocol.main, results.greedy_ar
    _level(axis, results.baselines.measures[COPY][main], GREY, ":", "copy of the source")
    if greedy is not None:
        own = results.systems[greedy].first.measures[main]
        _level(axis, own, FAMILIES["ar"][0], "--", f"{greedy} (greedy)")
    _line(axis, report, across, main)
    for number, (name, system) in enumerate(results.systems.items(), start=1):
        if name in across:
            _point(axis, f"{number}", name, system, across[name], main)
    axis.set_xscale("log", base=2)
    _ticks(axis, across)
    axis.set_xlabel(label)
    axis.set_ylabel(main)


def _title(report: Report) -> str:
    results = report.results
    intervals = f"{100 * results.protocol.level:g} % intervals over rows"
    return f"{report.name}: {results.data.rows} rows, seed {results.seeds[0]}, {intervals}"


def _level(axis: Any, figure: Figure, colour: str, style: str, label: str) -> None:
    axis.axhline(figure.value, color=colour, linestyle=style, linewidth=1.2, label=label)
    axis.axhspan(figure.low, figure.high, color=colour, alpha=0.07, linewidth=0)


def _line(axis: Any, report: Report, across: Mapping[str, float], main: str) -> None:
    """Joins the tess systems that differ in nothing but steps."""
    groups: dict[str, list[tuple[float, float]]] = {}
    for name, system in report.results.systems.items():
        settings = dict(system.settings)
        if settings.pop("num_inference_steps", None) is None or name not in across:
            continue
        value = system.first.measures[main].value
        groups.setdefault(repr(sorted(settings.items())), []).append((across[name], value))
    for points in groups.values():
        if len(points) > 1:
            axis.plot(*zip(*sorted(points), strict=True), color=FAMILIES["tess"][0],
                      linewidth=1.0, alpha=0.6, zorder=1)


def _point(
    axis: Any, number: str, name: str, system: SystemResult, at: float, main: str
) -> None:
    """A marker with the system's number in it, which the legend explains."""
    figure = system.first.measures[main]
    colour, marker = FAMILIES[system.settings["decoder"]]
    colour = GREY if name == UNTRAINED else colour
    error = [[figure.value - figure.low], [figure.high - figure.value]]
    axis.errorbar(
        at, figure.value, yerr=error, color=colour, marker=marker, markersize=11, capsize=2,
        linewidth=0, elinewidth=1.0, alpha=0.85, label=f"{number}  {name}",
    )
    axis.annotate(
        number, (at, figure.value), ha="center", va="center", fontsize=7, color="white",
        fontweight="bold",
    )


def _ticks(axis: Any, across: Mapping[str, float]) -> None:
    """Powers of two as plain numbers, over what is shown."""
    low, high = min(across.values()), max(across.values())
    ticks, tick = [], 2.0**-4
    while tick <= 2 * high:
        ticks += [tick] if tick >= low / 2 else []
        tick *= 2
    axis.set_xlim(low / 1.4, high * 1.8)
    axis.set_xticks(ticks, [f"{one:g}" for one in ticks])
    axis.minorticks_off()
