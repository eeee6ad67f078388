"""What the tables of the benchmarks have in common."""

from typing import Any


def setting(env: dict[str, Any]) -> str:
    """Versions, machine and date of `tess.costs.machine.environment`."""
    return (
        f"torch {env['torch']}, transformers {env['transformers']}, {env['threads']} threads, "
        f"{env['processor']}, {env['date']}"
    )


def number(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def ratio(row: dict[str, Any], prefix: str = "") -> str:
    """The median with its quartiles."""
    low, high = row[f"{prefix}ratio_q1"], row[f"{prefix}ratio_q3"]
    return f"{row[f'{prefix}ratio']:.2f} ({low:.2f}-{high:.2f})"
