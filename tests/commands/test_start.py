"""Every command from outside: what it loads, how it is interrupted, what it says of mistakes."""

import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

from tess.version import VERSION

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
COMMANDS = [door.split(":")[0] for door in SCRIPTS.values()]
HEAVY = {"torch", "transformers", "diffusers", "numpy", "datasets"}


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def run_command(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return python(f"from {module} import command; command()", *arguments)


def test_every_command_has_a_door_and_a_script():
    files = {path.stem for path in (ROOT / "tess" / "commands").glob("*.py")} - {"__init__"}
    assert {f"tess.commands.{name}" for name in files} == set(COMMANDS)
    assert all(callable(import_module(module).command) for module in COMMANDS)
    imports = (
        re.search(r"^from (tess\.commands\.\w+) import command$", path.read_text(), re.MULTILINE)
        for path in (ROOT / "scripts").glob("*.py")
    )
    called = {found[1] for found in imports if found}
    assert called == set(COMMANDS)


@pytest.mark.parametrize("module", COMMANDS)
def test_help_and_version_are_printed_before_any_library_loads(module):
    code = f"""
import atexit, sys
def loaded():
    print("LOADED", *{{name.split(".")[0] for name in sys.modules}})
atexit.register(loaded)
from {module} import command
command()
"""
    help = python(code, "--help")
    assert help.returncode == 0 and not help.stderr, help.stderr
    text, loaded = help.stdout.split("LOADED")
    assert text.startswith("usage: ") and "--version" in text
    assert not HEAVY & set(loaded.split())
    assert run_command(module, "--version").stdout == f"tess-diffusion {VERSION}\n"


@pytest.mark.parametrize("module", COMMANDS)
def test_an_unknown_flag_is_one_sentence_and_loads_nothing(module):
    run = run_command(module, "--no_such_flag")
    assert run.returncode == 2 and not run.stdout
    assert run.stderr.startswith("error: ") and run.stderr.count("\n") == 1, run.stderr


IMPORTS_A_LIBRARY = """
import sys, time
from tess.cli import run

def main(argv):
    print("started", flush=True)
    {work}

run(main)
"""
LIBRARY = """
import sys, time
try:
    print("importing", flush=True)
    time.sleep(60)
except BaseException:  # as libraries do around what is optional
    pass
"""


@pytest.mark.parametrize("delay", [0.0, 0.2, 0.5, 1.0, 2.0])
def test_ctrl_c_while_torch_is_imported_is_one_line_and_status_130(delay):
    work = "import torch; time.sleep(60)"
    child = start(IMPORTS_A_LIBRARY.format(work=work))
    assert child.stdout.readline() == "started\n"
    time.sleep(delay)
    assert interrupted(child)


def test_ctrl_c_is_not_lost_in_a_library_that_catches_everything(tmp_path):
    (tmp_path / "greedy_library.py").write_text(LIBRARY)
    work = f"sys.path.insert(0, {str(tmp_path)!r}); import greedy_library; time.sleep(60)"
    child = start(IMPORTS_A_LIBRARY.format(work=work))
    assert child.stdout.readline() == "started\n" and child.stdout.readline() == "importing\n"
    assert interrupted(child)


def test_ctrl_c_in_the_work_lets_it_clean_up(tmp_path):
    work = f"""
    try:
        print("working", flush=True)
        time.sleep(60)
    finally:
        open({str(tmp_path / "cleaned")!r}, "w").close()
"""
    child = start(IMPORTS_A_LIBRARY.format(work=work.strip()))
    assert child.stdout.readline() == "started\n" and child.stdout.readline() == "working\n"
    assert interrupted(child)
    assert (tmp_path / "cleaned").exists()


def test_a_command_that_a_shell_put_in_the_background_ignores_ctrl_c():
    code = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    child = start(code + IMPORTS_A_LIBRARY.format(work="sys.stdin.readline()"))
    assert child.stdout.readline() == "started\n"
    child.send_signal(signal.SIGINT)
    assert child.communicate("go on\n") == ("", "") and child.returncode == 0


def start(code: str) -> subprocess.Popen[str]:
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, text=True, **pipes)


def interrupted(child: subprocess.Popen[str]) -> bool:
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate()
    assert errors == "interrupted\n" and child.returncode == 130, (child.returncode, errors)
    return True


def test_a_closed_pipe_is_status_141_and_says_nothing():
    code = "from tess.cli import run\nrun(lambda argv: print('text\\n' * 100_000))"
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (run.returncode, run.stderr) == (141, "")
