"""Figures as SVG files, by matplotlib, which the extra `plots` installs."""

from pathlib import Path
from typing import Any

from tess.errors import UserError

STYLE = {
    "svg.hashsalt": "tess",  # the same figures give the same file
    "svg.fonttype": "none",  # text stays text
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e5e5e5",
    "legend.frameon": False,
}


def check_plots() -> None:
    """Before a long run whose end is a figure.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UserError(
            "figures need matplotlib: pip install 'tess-diffusion[plots]' (or leave out --plot)"
        ) from error


def save_figure(figure: Any, stem: Path) -> list[Path]:
    """Write a figure as SVG and PNG, the same figure as the same bytes; their paths."""
    paths = [stem.with_suffix(".svg"), stem.with_suffix(".png")]
    figure.savefig(paths[0], format="svg", metadata={"Date": None, "Creator": None})
    figure.savefig(paths[1], format="png", dpi=150, metadata={"Software": None})
    return paths
