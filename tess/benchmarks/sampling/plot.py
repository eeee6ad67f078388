"""Quality against network evaluations as a figure."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tess.errors import UserError
from tess.evaluation.plots import STYLE, check_plots

COLOURS = {
    "renoising": "#000000",
    "renoising_dense": "#999999",
    "ddim": "#0072B2",
    "ddim_eta1": "#56B4E9",
    "ddim_carried": "#56B4E9",
    "euler": "#D55E00",
    "euler_stochastic": "#E69F00",
    "euler_carried": "#E69F00",
    "dpm_solver": "#009E73",
    "dpm_solver_carried": "#CC79A7",
}
"""Of Okabe and Ito's palette, which is told apart with any colour vision."""
MARKERS = {"renoising": "o", "ddim": "s", "euler": "x", "dpm_solver": "^"}
WIDTHS = {"ddim": 3.0}
"""Of lines that others may hide: Euler's is the same, a second-order solver's close to it."""
PANELS = (("sari", "SARI"), ("bleu", "BLEU"))


def plot_sampling(result: Mapping[str, Any], path: Path) -> None:
    """Quality against network evaluations, as SVG: a row a metric, a column a spacing.

    result: of `tess.benchmarks.sampling.grid.benchmark_sampling`. Bands reach from the lowest to
    the highest seed; hollow diamonds are the runs of most steps under each stopping rule; the grey
    band is re-noising at its most steps, the dotted line a copy of the source.

    Raises:
        UserError: matplotlib is not installed, or there is no row to draw.
    """
    check_plots()
    import matplotlib
    from matplotlib.figure import Figure

    rows = result["rows"]
    if not rows:
        raise UserError("expected at least one row to draw, got none")
    spacings = sorted({row["spacing"] for row in rows})
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.1 * len(spacings) + 0.6, 6.4), layout="constrained")
        axes = figure.subplots(len(PANELS), len(spacings), sharex=True, sharey="row", squeeze=False)
        for line, (metric, title) in zip(axes, PANELS, strict=True):
            for axis, spacing in zip(line, spacings, strict=True):
                _panel(axis, [r for r in rows if r["spacing"] == spacing], metric, result["copy"])
            line[0].set_ylabel(title)
        for axis, spacing in zip(axes[0], spacings, strict=True):
            axis.set_title(f"{spacing} spacing", fontsize=10)
        for axis in axes[-1]:
            axis.set_xlabel("network evaluations per text (mean)")
        named: dict[str, Any] = {}
        for axis in axes.flat:
            handles, labels = axis.get_legend_handles_labels()
            named = dict(zip(labels, handles, strict=True)) | named
        figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=4)
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})


def _panel(
    axis: Any, rows: Sequence[Mapping[str, Any]], metric: str, copy: Mapping[str, float]
) -> None:
    _copy(axis, rows, metric, copy[metric])
    names = list(dict.fromkeys(row["scheduler"] for row in rows))
    if "renoising" in names:
        most = max((r for r in rows if r["scheduler"] == "renoising"), key=lambda r: r["steps"])
        band = most["full"][metric]
        axis.axhspan(
            band["min"], band["max"], color="#000000", alpha=0.12, linewidth=0,
            label="re-noising at its most steps",
        )
    for name in names:
        _line(axis, name, [row for row in rows if row["scheduler"] == name], metric)
    axis.scatter([], [], marker="D", facecolors="none", edgecolors="#000000", label="stopped early")
    axis.set_xscale("log", base=2)
    steps = sorted({row["steps"] for row in rows})
    axis.set_xticks(steps, [str(number) for number in steps])
    axis.minorticks_off()


def _copy(axis: Any, rows: Sequence[Mapping[str, Any]], metric: str, value: float) -> None:
    """A line where it does not squeeze the others, or else a note."""
    seen = [row["full"][metric][end] for row in rows for end in ("min", "max")]
    low, high = min(seen), max(seen)
    reach = max(high - low, 1.0)
    if low - reach <= value <= high + reach:
        axis.axhline(value, color="#666666", linestyle=":", label="copy of the source")
        return
    above = value > high
    axis.text(
        0.98, 0.97 if above else 0.03, f"copy of the source: {value:.1f} {'↑' if above else '↓'}",
        transform=axis.transAxes, ha="right", va="top" if above else "bottom", color="#666666",
    )


def _line(axis: Any, name: str, rows: Sequence[Mapping[str, Any]], metric: str) -> None:
    rows = sorted(rows, key=lambda row: row["steps"])
    steps = [row["steps"] for row in rows]
    figures = [row["full"][metric] for row in rows]
    colour = COLOURS[name]
    kind = next(kind for kind in MARKERS if name.startswith(kind))
    axis.plot(
        steps, [one["mean"] for one in figures], color=colour, marker=MARKERS[kind], markersize=4,
        linewidth=WIDTHS.get(name, 1.4), linestyle="-" if name == kind else "--", label=name,
    )
    axis.fill_between(
        steps, [one["min"] for one in figures], [one["max"] for one in figures], color=colour,
        alpha=0.15, linewidth=0,
    )
    stopped = rows[-1]["stopped"]
    axis.scatter(
        [one["nfe_mean"] for one in stopped], [one[metric]["mean"] for one in stopped],
        marker="D", s=26, facecolors="none", edgecolors=colour, zorder=3,
    )
