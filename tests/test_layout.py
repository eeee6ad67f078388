"""The shape of the repository: links, packages, direction of imports, names on disk."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SIDE_FOLDERS = ("backbones", "kernels", "schedulers")
CODE_FOLDERS = (*SIDE_FOLDERS, "tess", "scripts", "tests")
# folder -> the parts of `tess` that its files may import; "" is the package and its own modules
MAY_IMPORT = {
    "kernels": {"kernels"},
    "backbones": {"kernels", "backbones"},
    "schedulers": {"kernels", "schedulers"},
    "tess": {"", *SIDE_FOLDERS},
    "scripts": {"", *SIDE_FOLDERS},
}
# What every room of `tess` may import, of the rooms and of the files at its root.
FOR_ALL = {"errors", "options", "version", "progress"}
MODEL = {"config", "self_conditioning", "length", "denoiser"}
ROOMS = {
    "errors": set(),
    "options": set(),
    "version": set(),
    "progress": set(),
    "cli": set(),
    "config": set(),
    "self_conditioning": {"config"},
    "length": {"config", "self_conditioning"},
    "denoiser": MODEL,
    "text": set(),
    "data": {"text"},
    "metrics": {"text"},
    "sampling": {"text", *MODEL},
    "pipeline": {"text", *MODEL, "sampling"},
    "trace": {"text", "sampling"},
    "storage": {"text", *MODEL, "pipeline"},
    "costs": {"text", *MODEL, "storage"},
    "decoders": {"text", "sampling", "pipeline", "storage", "costs.decoding"},
    "training": {"text", "data", *MODEL, "sampling", "pipeline", "storage", "decoders"},
    "evaluation": {"text", "data", "metrics", "costs.machine", "storage.files", "storage.kept"},
}
BELOW = {"cli", *ROOMS}
ROOMS |= {"comparison": BELOW, "benchmarks": BELOW}
ROOMS |= {"commands": set(ROOMS)}  # and nobody imports them but scripts/
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def python_files(folder: str) -> list[Path]:
    """The files of a top-level folder, each seen once: links are not followed."""
    return [
        file
        for file in sorted((ROOT / folder).rglob("*.py"))
        if not any(parent.is_symlink() for parent in file.parents)
    ]


def imported_modules(source: str, inside_functions: bool = True) -> set[str]:
    """Every module that the source names in an import, also inside functions unless told."""
    modules = set()
    tree = ast.parse(source)
    for node in ast.walk(tree) if inside_functions else tree.body:
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            # `from tess import kernels` names a module too, so the imported names count there
            modules |= {f"tess.{a.name}" for a in node.names} if base == "tess" else {base}
    return modules


def forbidden_imports(source: str, folder: str) -> set[str]:
    """What the source of a file in `folder` imports against the direction of MAY_IMPORT."""
    bad = set()
    for module in imported_modules(source):
        top, _, rest = module.partition(".")
        part = rest.split(".")[0]
        part = part if part in SIDE_FOLDERS else ""
        is_ours = top in ("tess", "scripts", "tests", *SIDE_FOLDERS) or module.startswith(".")
        if is_ours and (top != "tess" or part not in MAY_IMPORT[folder]):
            bad.add(module)
    return bad


def wrong_rooms(source: str, room: str) -> set[str]:
    """What the source of a file in `room` imports of `tess` against the table ROOMS."""
    bad = set()
    for module in imported_modules(source):
        top, *path = module.split(".")
        if top != "tess" or not path or path[0] in SIDE_FOLDERS:
            continue
        allowed = {room} | FOR_ALL | ROOMS[room]
        if not allowed & {path[0], ".".join(path[:2])}:
            bad.add(module)
    return bad


def room_of(file: Path) -> str:
    return file.relative_to(ROOT / "tess").parts[0].removesuffix(".py")


def module_of(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts)


def circles(imports: dict[str, set[str]]) -> set[str]:
    """The modules that are left when all that import nothing that is left are taken away."""
    left = dict(imports)
    while free := [name for name, wanted in left.items() if not wanted & set(left)]:
        for name in free:
            del left[name]
    return set(left)


@pytest.mark.parametrize("name", SIDE_FOLDERS)
def test_side_folder_is_linked_and_has_no_init(name):
    link = ROOT / "tess" / name
    assert link.is_symlink() and not link.readlink().is_absolute()
    assert link.resolve() == ROOT / name
    assert not list((ROOT / name).rglob("__init__.py")), (
        f"an __init__.py in {name}/ would make `import {name}` work from here"
    )


def test_no_test_depends_on_the_clock():
    """A busy machine fails none: no test reads a time, or gives up after one."""
    clocks = {"perf_counter", "perf_counter_ns", "monotonic", "process_time", "time_ns"}
    for file in python_files("tests"):
        for node in ast.walk(ast.parse(file.read_text())):
            assert getattr(node, "attr", None) not in clocks, file
            assert not isinstance(node, ast.keyword) or node.arg != "timeout", file


def test_tests_are_no_package():
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_every_python_folder_is_packaged():
    listed = PROJECT["tool"]["setuptools"]["packages"]
    found = {
        ".".join(("tess", *file.parent.relative_to(ROOT).parts))
        for name in SIDE_FOLDERS
        for file in python_files(name)
    }
    found |= {".".join(file.parent.relative_to(ROOT).parts) for file in python_files("tess")}
    assert set(listed) == found


def test_every_other_file_of_a_package_is_package_data():
    """Or a wheel would lack it."""
    data = PROJECT["tool"]["setuptools"]["package-data"]
    listed = {
        file
        for package, patterns in data.items()
        for pattern in patterns
        for file in ROOT.joinpath(*package.split(".")).glob(pattern)
    }
    found = {
        file
        for folder in ("tess", *SIDE_FOLDERS)
        for file in (ROOT / folder).rglob("*")
        if file.is_file() and file.suffix not in (".py", ".pyc")
    }
    assert found == listed and ROOT / "tess" / "trace" / "page.html" in found


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_imports_point_one_way(folder):
    files = python_files(folder)
    assert files, f"{folder}/ has no Python file"
    wrong = {str(f.relative_to(ROOT)): forbidden_imports(f.read_text(), folder) for f in files}
    assert not {name: modules for name, modules in wrong.items() if modules}


@pytest.mark.parametrize(
    ("folder", "source"),
    [
        ("kernels", "from tess.backbones.config import HybridConfig"),
        ("kernels", "import tess"),
        ("backbones", "from tess import schedulers"),
        ("backbones", "def f():\n    import tess.schedulers.noise"),
        ("schedulers", "from tess.errors import UserError"),
        ("schedulers", "from ..backbones import config"),
        ("tess", "from scripts.train import main"),
        ("tess", "from kernels.ssd import ssd"),
        ("scripts", "import scripts.train"),
    ],
)
def test_a_wrong_import_is_seen(folder, source):
    assert forbidden_imports(source, folder)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_what_lies_below_it(room):
    files = [file for file in python_files("tess") if room_of(file) == room]
    assert files, f"tess/{room} is not there"
    wrong = {str(file.relative_to(ROOT)): wrong_rooms(file.read_text(), room) for file in files}
    assert not {name: modules for name, modules in wrong.items() if modules}


def test_every_room_is_in_the_table():
    assert {room_of(file) for file in python_files("tess")} - {"__init__"} == set(ROOMS)


@pytest.mark.parametrize(
    ("room", "module"),
    [
        ("errors", "tess.cli"),
        ("options", "tess.text.tokenization"),
        ("version", "tess.cli"),
        ("progress", "tess.cli"),
        ("cli", "tess.storage.parts"),
        ("config", "tess.denoiser"),
        ("self_conditioning", "tess.length"),
        ("length", "tess.denoiser"),
        ("denoiser", "tess.sampling.loop"),
        ("text", "tess.data.rows"),
        ("data", "tess.training.settings"),
        ("metrics", "tess.data.rows"),
        ("sampling", "tess.pipeline"),
        ("pipeline", "tess.trace.data"),
        ("trace", "tess.pipeline"),
        ("storage", "tess.decoders.base"),
        ("decoders", "tess.trace.live"),
        ("costs", "tess.training.run"),
        ("training", "tess.evaluation.run"),
        ("evaluation", "tess.decoders.load"),
        ("comparison", "tess.benchmarks.turns"),
        ("benchmarks", "tess.comparison.run"),
        ("commands", "tess.nothing"),
    ],
)
def test_a_wrong_import_of_a_room_is_seen(room, module):
    assert wrong_rooms(f"import {module}", room) == {module}
    assert not wrong_rooms("import tess.errors\nimport tess.kernels.random", room)


def test_no_modules_import_each_other_in_a_circle():
    rooms = {module_of(file): imported_modules(file.read_text()) for file in python_files("tess")}
    del rooms["tess.__init__"]  # lazy: what it names is loaded at first use
    below = {
        f"tess.{module_of(file)}": imported_modules(file.read_text(), inside_functions=False)
        for folder in SIDE_FOLDERS
        for file in python_files(folder)
    }  # a function there loads its Triton twin, or its family, at the first call
    assert not circles(rooms | below)
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}, "e": set()}) == set("abcd")


@pytest.mark.parametrize(
    "folder",
    [file.parent for file in python_files("tess") if file.name == "__init__.py"][1:],
    ids=lambda folder: str(folder.relative_to(ROOT / "tess")),
)
def test_a_room_says_what_it_is_for_and_names_its_files(folder):
    """Its `__init__` is a docstring and nothing else: what it is for, then a line for each file."""
    tree = ast.parse((folder / "__init__.py").read_text())
    assert len(tree.body) == 1 and (text := ast.get_docstring(tree))
    head, *lines = text.split("\n")
    files = {file.stem for file in folder.glob("*.py")} - {"__init__"}
    files |= {file.name for file in folder.glob("*.*") if file.suffix != ".py"}
    rooms = {f"{inner.parent.name}/" for inner in folder.glob("*/__init__.py")}
    assert head.endswith(".") and lines[0] == ""
    assert [line.split(maxsplit=1)[0] for line in lines[1:]] == list(
        dict.fromkeys(line.split(maxsplit=1)[0] for line in lines[1:])
    )
    assert {line.split(maxsplit=1)[0] for line in lines[1:]} == files | rooms


def test_no_file_reaches_through_a_wall():
    """No private name of another file, no logger silenced by its name, no path by counting up."""
    for file in [file for folder in ("tess", *SIDE_FOLDERS) for file in python_files(folder)]:
        nodes = list(ast.walk(ast.parse(file.read_text())))
        ours = [n for n in nodes if isinstance(n, ast.ImportFrom) and n.module.startswith("tess")]
        names = [alias for node in ours for alias in node.names]
        private = [alias.name for alias in names if alias.name.startswith("_")]
        bound = {alias.asname or alias.name for alias in names}
        private += [
            ast.unparse(node)
            for node in nodes
            if isinstance(node, ast.Attribute) and re.match(r"_[^_]", node.attr)
            and isinstance(node.value, ast.Name) and node.value.id in bound
        ]
        assert not private, f"{file} uses {private}"
        assert 'getLogger("tess.' not in file.read_text(), file
        assert "parents[" not in file.read_text(), file


def test_kernels_know_no_model_library():
    for file in python_files("kernels"):
        tops = {module.split(".")[0] for module in imported_modules(file.read_text())}
        assert not tops & {"transformers", "diffusers", "accelerate", "datasets"}, file


def test_every_third_party_import_is_a_declared_dependency():
    project = PROJECT["project"]
    requirements = [*project["dependencies"], *sum(project["optional-dependencies"].values(), [])]
    declared = {re.match(r"[\w-]+", text)[0].replace("-", "_") for text in requirements}
    declared = declared - {"pyyaml"} | {"yaml"}
    used = {
        module.split(".")[0]
        for folder in CODE_FOLDERS
        for file in python_files(folder)
        for module in imported_modules(file.read_text())
    }
    tools = {file.stem for file in python_files("tests/tools")}
    assert used - set(sys.stdlib_module_names) - {"tess"} - tools <= declared


def test_constraints_name_every_dependency_with_a_version():
    project = PROJECT["project"]
    requirements = [*project["dependencies"], *sum(project["optional-dependencies"].values(), [])]
    wanted = {re.match(r"[\w-]+", text)[0] for text in requirements} - {"tess-diffusion"}
    pins = re.findall(r"^([\w-]+)==[\d.]+$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert wanted <= set(pins)


def loaded_after(statement: str) -> set[str]:
    """Top-level modules in memory after a fresh interpreter ran the statement."""
    code = f"{statement}\nimport sys\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return set(run.stdout.split())


def test_import_tess_loads_no_library():
    assert not loaded_after("import tess") & {"torch", "transformers", "diffusers", "numpy"}


def test_kernels_load_without_the_model_libraries():
    modules = [
        ".".join(("tess", *file.relative_to(ROOT).with_suffix("").parts))
        for file in python_files("kernels")
    ]
    loaded = loaded_after("\n".join(f"import {module}" for module in modules))
    assert "torch" in loaded
    assert not loaded & {"transformers", "diffusers", "datasets"}


def test_public_names_are_the_agreed_ones_and_load():
    import tess

    assert sorted(tess.__all__) == sorted(tess._HOME) and set(tess.__all__) <= set(dir(tess))
    for name in tess.__all__:
        assert getattr(tess, name).__name__ == name
    with pytest.raises(AttributeError, match="'Nothing'"):
        tess.Nothing


def test_names_on_disk_are_pinned():
    """Saved pipelines and configs carry these names: changing one breaks every checkpoint."""
    import tess

    assert tess.TessDenoiser.__module__ == "tess.denoiser"
    assert tess.RenoisingScheduler.__module__ == "tess.schedulers.renoising"
    assert tess.HybridConfig.model_type == "tess_hybrid"
    assert tess.TessConfig.model_type == "tess_denoiser"


def test_auto_classes_know_the_backbone_once_it_is_loaded():
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    import tess

    causal_lm = tess.HybridForCausalLM  # the use that loads and registers it
    assert type(AutoConfig.for_model("tess_hybrid")) is tess.HybridConfig
    assert AutoModelForCausalLM._model_mapping[tess.HybridConfig] is causal_lm
    assert AutoModel._model_mapping[tess.HybridConfig] is tess.HybridModel
