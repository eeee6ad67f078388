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
DOCUMENTS = (
    "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/architecture.md", "docs/kernels.md",
    "docs/sampling.md", "docs/comparison.md", "docs/recipes.md", "docs/results.md",
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
    words = command_with("scripts/generate.py")
    assert words[:7] == "pip install -c constraints.txt -e . &&".split()
    assert words[7:9] == ["python", "scripts/generate.py"]
    (sentence,) = words[9:]
    assert len(sentence.split()) > 20


def test_second_command_installs_and_tests():
    want = "pip install -c constraints.txt -e .[test] && python -m pytest"
    assert command_with("pytest") == want.split()


def test_the_commands_come_first():
    first_screen = README.split("\n## ")[0]
    assert "scripts/generate.py" in first_screen and "-m pytest" in first_screen


def test_generate_command_prints_a_text_and_its_evaluations(tmp_path):
    """The README's own sentence, with the shipped checkpoint."""
    script, sentence = command_with("scripts/generate.py")[8:]
    run = subprocess.run(
        [sys.executable, ROOT / script, sentence], cwd=tmp_path, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert re.search(r"[a-z]{3,}", run.stdout)
    assert re.search(r"evaluation|NFE", run.stdout)


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


SCRIPTS = ("generate", "evaluate", "compare", "train", "convert_checkpoint", "model_info")


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_that_the_readme_shows_is_in_the_help(script):
    shown = set()
    for block in code_blocks(""):
        for line in block.splitlines():
            if f"scripts/{script}.py" in line:
                shown |= set(re.findall(r"--\w+", line.split(f"scripts/{script}.py")[1]))
    assert shown and shown <= flags_of(script)


def test_every_flag_in_the_readme_belongs_to_a_script():
    known = set().union(*(flags_of(script) for script in SCRIPTS))
    known |= {"--config_file"}  # of accelerate launch
    assert set(re.findall(r"--\w+", README)) <= known


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
