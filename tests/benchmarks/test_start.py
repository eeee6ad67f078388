"""tess-benchmark start: two builds take turns, and what each loads is said."""

import subprocess

import pytest

from tess.benchmarks import start
from tess.benchmarks.commands import BENCHMARKS, make_parser
from tess.benchmarks.doors.start import table
from tess.errors import UserError

LOG = "import pathlib\nwith open({!r}, 'a') as log: print({!r}, file=log)\n"


def git(folder, *arguments):
    who = ("-c", "user.name=someone", "-c", "user.email=someone@example.org")
    subprocess.run(["git", "-C", str(folder), *who, *arguments], check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository whose commit's scripts load diffusers (an empty file), and today's do not."""
    root = tmp_path / "repository"
    (root / "scripts").mkdir(parents=True)
    (root / "diffusers.py").touch()
    log = tmp_path / "log"

    def write(who, rest):
        for name in ("generate", "train"):
            (root / "scripts" / f"{name}.py").write_text(LOG.format(str(log), who) + rest)

    write("rival", "import diffusers\n")
    git(tmp_path, "init", "--quiet", str(root))
    git(root, "add", "--all")
    git(root, "commit", "--quiet", "--message", "rival")
    write("ours", "import sys\nif 'fail' in sys.argv: sys.exit('no such thing')\n")
    monkeypatch.setattr(start, "CHECKOUT", root.resolve())
    return root, log


def test_two_builds_take_turns_and_say_what_they_load(
    repository, tmp_path, assert_keys_are_documented
):
    root, log = repository
    figures = start.benchmark_start(tmp_path, "a text", "HEAD", ["train"], repeats=3)
    assert_keys_are_documented(figures)
    assert [row["command"] for row in figures["rows"]] == ["train --help", "generate TEXT"]
    assert log.read_text().split() == ["ours", "rival"] * 2 * (1 + 3)  # the first pair warms up
    for row in figures["rows"]:
        assert (row["loaded"], row["rival_loaded"]) == ([], ["diffusers"])
        assert row["ours_ms"] > 0 and row["rival_ms"] > 0 and row["pairs"] == 3
    helped, share = figures["goals"]
    assert helped["figure"] == figures["rows"][0]["ours_ms"] / 1e3
    assert share["figure"] == 1 / figures["rows"][1]["ratio"]
    assert all(goal["met"] == (goal["figure"] <= goal["at_most"]) for goal in figures["goals"])
    assert "| train --help |" in table(figures) and "| none | diffusers |" in table(figures)
    worktrees = ["git", "-C", str(root), "worktree", "list"]
    assert len(subprocess.check_output(worktrees).splitlines()) == 1


def test_what_cannot_be_compared_is_one_sentence(repository, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="a commit of the git history of .*: no such commit"):
        start.benchmark_start(tmp_path, "a text", "nothing", repeats=1)
    with pytest.raises(UserError, match="ended with status 1: no such thing"):
        start.benchmark_start(tmp_path, "fail", "HEAD", [], repeats=1)
    inner = repository[0] / "scripts"  # as an installed package in somebody's repository
    monkeypatch.setattr(start, "CHECKOUT", inner.resolve())
    with pytest.raises(UserError, match="scripts has no history"):
        start.benchmark_start(tmp_path, "a text", "HEAD", repeats=1)
    monkeypatch.setattr(start, "CHECKOUT", tmp_path)
    with pytest.raises(UserError, match="git history of .*: .*not a git repository"):
        start.benchmark_start(tmp_path, "a text", "HEAD", repeats=1)


def test_every_script_of_a_command_is_started():
    args = make_parser().parse_args(["start"])
    assert args.scripts == list(start.SCRIPTS) and args.rival == "e42b00d" and "start" in BENCHMARKS
