"""The goals that the figures of `tess-benchmark gpu` are held against, and its tables."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

Row = dict[str, Any]


class Goal(NamedTuple):
    """A figure of one comparison at Nemotron-3-Nano's sizes.

    rival: how the systems' names begin; the fastest of them counts. value: of ours and the rival's
    row. least: the figure has to be at least `wanted`, otherwise at most.
    """

    goal: str
    op: str
    variant: str
    what: str
    rival: str
    value: Callable[[Row, Row], float | None]
    wanted: float
    least: bool = True


def _faster(ours: Row, rival: Row) -> float:
    return rival["ms"] / ours["ms"]


def _share(ours: Row, rival: Row) -> float:
    return ours["ms"] / rival["ms"]


def _memory(ours: Row, rival: Row) -> float | None:
    if not (ours["peak_bytes"] and rival["peak_bytes"]):
        return None
    return ours["peak_bytes"] / rival["peak_bytes"]


_TRAINING = "forward + backward"
_TWO = "mamba-ssm two passes with flips"
GOALS = (
    Goal("causal scan, times as fast as mamba-ssm", "ssd_scan", "forward", "forward",
         "mamba-ssm", _faster, 2.0),
    Goal("bidirectional scan, share of ONE causal mamba-ssm pass", "ssd_scan", "bidirectional",
         "forward", "mamba-ssm, one causal pass", _share, 0.75, least=False),
    Goal(f"bidirectional training, times as fast as {_TWO}", "ssd_scan", "bidirectional",
         _TRAINING, "mamba-ssm, two passes", _faster, 2.0),
    Goal(f"bidirectional training, share of the memory of {_TWO}", "ssd_scan", "bidirectional",
         _TRAINING, "mamba-ssm, two passes", _memory, 0.5, least=False),
    Goal("experts, times as fast as grouped_mm with sort and scatter", "experts", "tokens",
         "forward", "torch grouped_mm", _faster, 1.3),
    Goal("noised simplex, times as fast as materialised", "simplex_embedding",
         "order statistics", "forward", "torch, materialised", _faster, 25.0),
    Goal("cross-entropy training, times its three bare products", "linear_cross_entropy", "mean",
         _TRAINING, "bare products", _share, 1.2, least=False),
)


def goals(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Each goal with its figure where it was measured; `met` is None in a dry run."""
    shape = next((s for s in result["shapes"] if s["name"] in ("nano", "tiny")), None)
    found = []
    for goal in GOALS:
        figure = None if shape is None else _figure(goal, result["rows"], shape)
        met = None
        if figure is not None and not result["dry_run"]:
            met = figure >= goal.wanted if goal.least else figure <= goal.wanted
        found.append(
            {"goal": goal.goal, "wanted": goal.wanted, "at_least": goal.least, "figure": figure,
             "met": met}
        )
    return found


def _figure(goal: Goal, rows: list[Row], shape: dict[str, Any]) -> float | None:
    variant = goal.variant
    if variant == "tokens":
        variant = f"{shape['batch'] * shape['length']} tokens"
    place = (goal.op, variant, shape["name"], goal.what)
    group = [row for row in rows if _place(row) == place and row["ms"]]
    rivals = [row for row in group if _named(row["system"], goal.rival)]
    ours = [row for row in group if row["system"] == "ours"]
    if not ours or not rivals:
        return None
    return goal.value(ours[0], min(rivals, key=lambda row: row["ms"]))


def _named(system: str, wanted: str) -> bool:
    """All parts of the wanted name, which are set off by commas, are in the system's name."""
    return all(part in system for part in wanted.split(", "))


def _place(row: Row) -> tuple[str, ...]:
    return row["op"], row["variant"], row["shape"], row["what"]


# ---- tables ----


def format_gpu(result: dict[str, Any]) -> str:
    """All of it as Markdown: machine, peers, gate, times, goals."""
    parts = (_head(result), _gate(result), _times(result), _goals(result))
    return "\n".join(line for part in parts for line in part)


def _head(result: dict[str, Any]) -> Iterator[str]:
    env, top = result["environment"], result["ceilings"]
    if result["dry_run"]:
        yield "DRY RUN in Triton's interpreter: every time, in (brackets), means nothing."
    memory = f", {env['memory_bytes'] / 1e9:.0f} GB" if env["memory_bytes"] else ""
    yield (
        f"gpu: {env['device']}{memory}, driver {env['driver']}, CUDA {env['cuda']}; torch "
        f"{env['torch']}, triton {env['triton']}, transformers {env['transformers']}, Python "
        f"{env['python']}, {env['date']}, seed {result['seed']}{', autotuned' * env['autotuned']}"
    )
    figures = (
        f"copy {top['copy_bytes_per_second'] / 1e9:.0f} GB/s, bfloat16 products "
        f"{top['bfloat16_flops'] / 1e12:.1f} TFLOP/s, float32 products "
        f"{top['float32_flops'] / 1e12:.1f} TFLOP/s"
    )
    yield f"ceilings: {_mark(figures, result)}"
    for shape in result["shapes"]:
        yield "shape " + ", ".join(f"{name} {value}" for name, value in shape.items())
    here = [f"{p['package']} {p['version']}" for p in result["peers"] if p["version"]]
    yield f"peers: {', '.join(here)}"
    if absent := [p["package"] for p in result["peers"] if not p["version"]]:
        yield f"absent: {', '.join(absent)} (pip install; each is optional)"
    yield ""


def _gate(result: dict[str, Any]) -> Iterator[str]:
    yield (
        "| operation | shape | dtype | options | configurations | worst error / bound | of | "
        "same bits | gate |"
    )
    yield "|---" * 9 + "|"
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in result["checks"]:
        groups.setdefault((row["op"], row["shape"], row["dtype"]), []).append(row)
    for place, rows in groups.items():
        measured = [row for row in rows if row["error"] is not None]
        worst = max(measured, key=lambda row: row["error"] / row["bound"], default=None)
        cells = ["-", "-"]
        if worst is not None:
            cells = [f"{worst['error']:.1e} / {worst['bound']:.1e}"]
            cells.append(f"{worst['worst']}, {worst['variant']}")
        ran = [row for row in rows if row["passed"] is not None]
        options = len({row["variant"] for row in rows})
        equal = "yes" if all(row["runs_equal"] for row in measured) else "NO"
        equal = equal if measured else "-"
        gate = "pass" if all(row["passed"] for row in ran) else "FAIL"
        yield _line(*place, options, len(ran), *cells, equal, gate)
    yield ""
    for row in result["checks"]:
        if row["passed"] is not True:
            yield _complaint(row)
    if result["tables_not_run"]:
        yield f"no check uses the tables {', '.join(result['tables_not_run'])}"
    yield ""


def _complaint(row: Row) -> str:
    said = row["note"]
    if not said:
        said = f"{row['worst']} is off by {row['error']:.1e}, allowed {row['bound']:.1e}"
        said += "" if row["runs_equal"] else "; runs differ in bits"
    verdict = "not run" if row["passed"] is None else "FAIL"
    place = f"{row['op']}, {row['variant']}, {row['shape']}, {row['dtype']}"
    return f"{verdict}: {place}, configuration {row['configuration']}: {said}"


def _times(result: dict[str, Any]) -> Iterator[str]:
    title = f"{result['dtype']}, medians of up to {result['repeats']} runs with a cold L2 cache"
    yield f"{_mark(title, result)}; a ratio is the other's figure / ours"
    yield ""
    yield (
        "| operation | shape | what | system | ms (q20-q80) | ratio | host ms | peak MB | ratio | "
        "difference | of the roofline | note |"
    )
    yield "|---" * 12 + "|"
    for row in result["rows"]:
        place = f"{row['op']}, {row['variant']}", row["shape"], row["what"], row["system"]
        if row["failed"]:
            yield _line(*place, *["-"] * 7, f"FAIL, no times: {row['note']}")
            continue
        *times, peak, memory, apart, roof = _figures(row)
        times, roof = [_mark(figure, result) for figure in times], _mark(roof, result)
        yield _line(*place, *times, peak, memory, apart, roof, row["note"])
    for op in result["failed"]:
        yield f"no times of {op}: it failed"
    yield ""


def _figures(row: Row) -> list[str]:
    """The cells between the system's name and the note."""

    def cell(name: str, form: str = ".2f", scale: float = 1.0) -> str:
        return "-" if row[name] is None else format(scale * row[name], form)

    times = cell("ms", ".3f")
    if row["ms"] is not None:
        times += f" ({cell('ms_q20', '.3f')}-{cell('ms_q80', '.3f')})"
    roof = cell("of_roofline")
    if row["of_roofline"] is not None:
        roof += f" of {cell('least_ms', '.3f')} ms ({row['bound_by']})"
    peak = cell("peak_bytes", ".0f", 1e-6)
    memory, apart = cell("memory_ratio"), cell("difference", ".1e")
    return [times, cell("ratio"), cell("host_ms"), peak, memory, apart, roof]


def _goals(result: dict[str, Any]) -> Iterator[str]:
    yield "| goal, Nemotron-3-Nano | wanted | measured | met |"
    yield "|---" * 4 + "|"
    for goal in result["goals"]:
        wanted = f"{'>=' if goal['at_least'] else '<='} {goal['wanted']:g}"
        figure = "not measured" if goal["figure"] is None else f"{goal['figure']:.2f}"
        met = {None: "-", True: "yes", False: "no"}[goal["met"]]
        yield _line(goal["goal"], wanted, _mark(figure, result), met)


def _mark(figure: str, result: dict[str, Any]) -> str:
    """A dry run's figure is in brackets."""
    return f"({figure})" if result["dry_run"] and figure != "-" else figure


def _line(*cells: Any) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"
