"""What the documentation shows is run, and what it names is there."""

import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from tess.training.flags import parse_settings

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
DOCUMENTS = sorted(
    ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "checkpoints/default/README.md"]
    + [f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")]
)


def code_blocks(language: str) -> list[str]:
    """Contents of the README's fenced blocks in a language ("" for plain ones)."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    return [text for name, text in blocks if name == language]


def command_with(part: str) -> list[str]:
    """Words of the README's one-line command block that contains `part`."""
    (block,) = [text for text in code_blocks("") if part in text and text.count("\n") == 1]
    return shlex.split(block)


def test_first_command_installs_and_generates():
    words = command_with("pip install -c constraints.txt -e . && tess-generate")
    assert words[:8] == "pip install -c constraints.txt -e . && tess-generate".split()
    (sentence,) = words[8:]
    assert len(sentence.split()) > 20


def test_second_command_installs_and_tests():
    want = "pip install -c constraints.txt -e .[test] && python -m pytest"
    assert command_with("pytest") == want.split()


def test_the_commands_come_first():
    first_screen = README.split("\n## ")[0]
    assert "tess-generate" in first_screen and "-m pytest" in first_screen


def test_generate_command_prints_a_text_and_its_evaluations(tmp_path):
    """The README's own sentence, with the shipped checkpoint, and what the README says it gives."""
    sentence = command_with("pip install -c constraints.txt -e . && tess-generate")[-1]
    script = ROOT / "scripts" / "generate.py"
    run = subprocess.run(
        [sys.executable, script, sentence], cwd=tmp_path, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    text, figures = run.stdout.splitlines()
    assert any(block.startswith(f"{text}\n[tess] network ev") for block in code_blocks(""))
    assert re.search(r"network evaluations: \d+", figures)


def test_the_readme_fits_a_few_screens():
    assert len(README.splitlines()) <= 150


def sentences(text: str) -> list[str]:
    """Of a document's prose: no code, formulas, tables, headings or pictures."""
    text = re.sub(r"```.*?```|<!--.*?-->|\$\$.*?\$\$", "", text, flags=re.DOTALL)
    text = re.sub(r"\$[^$\n]*\$", "X", text)
    lines = [line for line in text.split("\n") if not line.lstrip().startswith(("|", "#", "!["))]
    blocks = re.split(r"\n\s*\n|\n(?=\s*[-*] )|\n(?=\d+\. )", "\n".join(lines))
    found = []
    for block in blocks:
        block = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", block)
        block = " ".join(re.sub(r"`[^`]*`", "X", block).split())
        found += re.split(r"(?<=[.!?:])\s+(?=[A-Z*(`\"0-9])", block)
    return [one for one in found if num_words(one) >= 3]


def num_words(sentence: str) -> int:
    return len(re.findall(r"[A-Za-z0-9][\w'’.,%-]*", sentence))


@pytest.mark.parametrize("name", DOCUMENTS)
def test_sentences_are_short(name):
    """18 words on average and none above 35: a longer one belongs into a table or in two."""
    counts = {one: num_words(one) for one in sentences((ROOT / name).read_text())}
    assert not [one for one, count in counts.items() if count > 35]
    assert sum(counts.values()) <= 18 * len(counts)


def test_python_example_runs(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    (example,) = code_blocks("python")
    exec(compile(example, "README.md", "exec"), {"__name__": "readme"})
    assert capsys.readouterr().out.count("evaluations: ") == 2


def test_no_placeholder_is_left():
    assert not re.findall(r"\w+-PLACEHOLDER", README)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_file_that_a_document_names_exists(name):
    text = (ROOT / name).read_text()
    folders = "kernels|backbones|schedulers|tess|scripts|tests|checkpoints|docs"
    named = set(re.findall(rf"`((?:{folders})/[\w./-]*)`", text))
    named |= {
        str((ROOT / name).parent.relative_to(ROOT) / link)
        for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", text)
    }
    missing = sorted(path for path in named if not (ROOT / path).exists())
    assert not missing


def test_the_tree_names_every_room_and_nothing_else():
    """The files of a room stand in its own docstring, which tests/test_layout.py reads."""
    (tree,) = [text for text in code_blocks("") if "kernels/ " in text]
    shown = {line.split(maxsplit=1)[0] for line in tree.splitlines()}
    assert all(line.split(maxsplit=1)[1] for line in tree.splitlines())
    rooms = {
        f"tess/{path.name}/"
        for path in (ROOT / "tess").iterdir()
        if path.is_dir() and not path.is_symlink() and path.name != "__pycache__"
    }
    tops = {f"{path.name}/" for path in ROOT.iterdir() if path.is_dir() and path.name[0] != "."}
    tops -= {name for name in tops if name in ("runs/", "outputs/", "build/", "dist/")}
    tops -= {name for name in tops if name.endswith(".egg-info/")}
    assert {name for name in shown if name.startswith("tess/")} - {"tess/"} == rooms
    assert {name for name in shown if not name.startswith("tess/")} | {"tess/"} >= tops
    assert all((ROOT / path).exists() for path in shown)


@cache
def flags_of(script: str) -> set[str]:
    command = [sys.executable, ROOT / "scripts" / f"{script}.py", "--help"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return set(re.findall(r"--\w+", run.stdout))


COMMANDS = {
    "generate": "generate",
    "evaluate": "evaluate",
    "compare": "compare",
    "train": "train",
    "convert": "convert_checkpoint",
    "info": "model_info",
    "benchmark": "benchmark",
}
"""A command's name after `tess-`, and its script."""


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_flag_that_a_command_of_a_document_shows_is_in_its_help(name):
    text = (ROOT / name).read_text()
    commands = re.findall(r"^tess-(\w+) (.*)$|`tess-(\w+) ([^`]*)`", text, re.MULTILINE)
    for block, block_words, inline, inline_words in commands:
        command, words = block or inline, block_words or inline_words
        flags = set(re.findall(r"--\w+", words)) - {"--help"}
        if command == "benchmark" and flags:
            continue  # of its subcommands, which tests/benchmarks runs
        assert flags <= flags_of(COMMANDS[command]), (command, words)


def test_every_flag_in_the_readme_belongs_to_a_command():
    known = set().union(*(flags_of(script) for script in COMMANDS.values()))
    assert set(re.findall(r"--\w+", README)) <= known | {"--help"}


RECIPES = sorted(
    path.name
    for path in (ROOT / "scripts" / "recipes").glob("*.yaml")
    if not path.name.startswith(("compare_", "accelerate_"))  # not scripts/train.py's
)


@pytest.mark.parametrize("name", RECIPES)
def test_the_command_in_a_recipe_is_complete(name):
    """It is accepted as it stands, and evaluates on the repository's rows or its dataset's own."""
    lines = (ROOT / "scripts" / "recipes" / name).read_text().splitlines()
    head = [line.removeprefix("#") for line in lines if line.startswith("#")]
    start = next(i for i, line in enumerate(head) if "scripts/train.py" in line)
    command = re.match(r"(.*\\\n)*.*", "\n".join(head[start:]))[0]
    words = shlex.split(command.replace("\\\n", " ").replace("$PWD", str(ROOT)))
    script = words.index("scripts/train.py")
    launcher = "accelerate launch --config_file scripts/recipes/accelerate_fsdp2.yaml"
    assert " ".join(words[:script]) == (launcher if "_paper" in name else "python")
    assert words[script + 1] == f"scripts/recipes/{name}"
    # transformers takes bfloat16 on a CPU only where the CPU was asked for
    flags = [*words[script + 2 :], "--use_cpu", "true"]
    data = parse_settings([str(ROOT / words[script + 1]), *flags]).data
    assert data.task or (data.data_root == "DATA" and data.validation_file)
    own = {Path(file).parent for file in data.train_file}
    others = [file for file in data.validation_file if Path(file).parent not in own]
    assert all(Path(file).is_relative_to(ROOT / "tess") for file in others)
    assert all(Path(file).is_file() for file in others)
