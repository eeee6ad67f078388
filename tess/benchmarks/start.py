"""Processor time from start to help and to text, beside another commit of this repository."""

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tess.benchmarks.turns import checkpoint_label, summarize_turns
from tess.cli import CHECKOUT
from tess.errors import UserError

SCRIPTS = (
    "generate", "train", "evaluate", "compare", "convert_checkpoint", "model_info", "benchmark",
)
LIBRARIES = ("torch", "torch._dynamo", "transformers", "diffusers")
HELP_SECONDS = 0.5
TEXT_SHARE = 0.6

# Runs a script as a process of its own would, and writes down what it loaded.
_WATCHED = f"""
import json, runpy, sys
place, *sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    with open(place, "w") as file:
        json.dump([name for name in {LIBRARIES} if name in sys.modules], file)
"""


def benchmark_start(
    checkpoint: str | Path,
    text: str,
    rival: str,
    scripts: Sequence[str] = SCRIPTS,
    repeats: int = 5,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Start today's scripts and the rival's in turn, each in a child process, and sum up.

    Both print the help of every script; both write one text with the same checkpoint. The time is
    that of the processor, user and system together, from the start of the child to its end. `say`
    is told what is under way.

    Raises:
        UserError: a system without `os.wait4`, no git history, no such commit, or a child failed.
    """
    if not hasattr(os, "wait4"):
        raise UserError(f"the benchmark reads a child's processor time, not so on {sys.platform}")
    calls = {f"{name} --help": (f"{name}.py", "--help") for name in scripts}
    calls["generate TEXT"] = "generate.py", text, "--checkpoint", _absolute(checkpoint)
    commit = _commit(rival)
    with _tree(commit) as folder:
        ours, theirs = _Build(CHECKOUT), _Build(folder)
        rows = []
        for name, call in calls.items():
            say(f"starting {name}")
            rows.append({"command": name} | _compare(ours, theirs, call, repeats))
    return {
        "benchmark": "start",
        "rival": commit,
        "checkpoint": checkpoint_label(checkpoint),
        "text": text,
        "rows": rows,
        "goals": _goals(rows),
        "environment": {
            "date": date.today().isoformat(),
            "processor": platform.processor() or platform.machine(),
            "processors": os.cpu_count(),
            "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "diffusers")},
        },
    }


def _absolute(checkpoint: str | Path) -> str:
    """A folder from the root, as the children start elsewhere; a hub id as it is."""
    folder = Path(checkpoint).resolve()
    return str(folder if folder.exists() else checkpoint)


@dataclass(frozen=True)
class _Build:
    """A checkout, whose scripts and packages are the ones that run."""

    root: Path

    def milliseconds(self, call: Sequence[str]) -> float:
        """Of the processor, for one call of a script."""
        return self._run([str(self.root / "scripts" / call[0]), *call[1:]])

    def loaded(self, call: Sequence[str]) -> list[str]:
        """Those of `LIBRARIES` that one call of a script loads."""
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder) / "loaded.json"
            script = str(self.root / "scripts" / call[0])
            self._run(["-c", _WATCHED, str(place), script, *call[1:]])
            return json.loads(place.read_text())

    def _run(self, arguments: Sequence[str]) -> float:
        paths = [str(self.root), os.environ.get("PYTHONPATH")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
        with tempfile.TemporaryFile() as said:
            child = subprocess.Popen(
                [sys.executable, *arguments], cwd=self.root, env=environment,
                stdout=subprocess.DEVNULL, stderr=said,
            )
            try:
                _, status, usage = os.wait4(child.pid, 0)
            except BaseException:  # no child goes on alone
                child.kill()
                child.wait()
                raise
            child.returncode = os.waitstatus_to_exitcode(status)
            if child.returncode:
                said.seek(0)
                last = said.read().decode(errors="replace").strip().split("\n")[-1]
                call = " ".join(arguments[-2:])
                raise UserError(f"{call} ended with status {child.returncode}: {last}")
        return 1e3 * (usage.ru_utime + usage.ru_stime)


def _compare(ours: _Build, rival: _Build, call: Sequence[str], repeats: int) -> dict[str, Any]:
    """What both load, which warms the files up, and then their times in turn."""
    loaded = {"loaded": ours.loaded(call), "rival_loaded": rival.loaded(call)}
    pairs = [(ours.milliseconds(call), rival.milliseconds(call)) for _ in range(repeats)]
    mine, theirs = map(list, zip(*pairs, strict=True))
    return summarize_turns(mine, theirs) | loaded


def _goals(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The slowest help in seconds, and the text's time as a share of the rival's."""
    helps = [row["ours_ms"] / 1e3 for row in rows[:-1]]
    figures = (
        ("seconds of the slowest --help", HELP_SECONDS, max(helps, default=None)),
        ("time of a text, as a share of the rival's", TEXT_SHARE, 1 / rows[-1]["ratio"]),
    )
    return [
        {"goal": goal, "at_most": most, "figure": figure,
         "met": None if figure is None else figure <= most}
        for goal, most, figure in figures
    ]


# ---- the rival's tree ----


def _git(*arguments: str) -> str:
    try:
        out = subprocess.run(
            ["git", "-C", str(CHECKOUT), *arguments], capture_output=True, text=True
        )
    except FileNotFoundError as error:
        raise UserError("the rival is a commit of this repository, and git is not there") from error
    if out.returncode:
        said = (out.stderr.strip() or "no such commit").split("\n")[0]
        raise UserError(f"the rival is a commit of the git history of {CHECKOUT}: {said}")
    return out.stdout.strip()


def _commit(revision: str) -> str:
    """The full name of a commit of this repository, not of one around an installed package."""
    if Path(_git("rev-parse", "--show-toplevel")).resolve() != CHECKOUT:
        raise UserError(f"the rival is a commit of this repository, and {CHECKOUT} has no history")
    return _git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}")


@contextmanager
def _tree(commit: str) -> Iterator[Path]:
    """The files of a commit in a temporary folder; the repository itself is not written to."""
    with tempfile.TemporaryDirectory() as folder:
        archive, tree = Path(folder).resolve() / "rival.tar", Path(folder).resolve() / "rival"
        _git("archive", "--format=tar", f"--output={archive}", commit)
        shutil.unpack_archive(archive, tree)
        yield tree
