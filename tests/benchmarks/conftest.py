"""The keys of a benchmark's JSON, as documented and as written."""

import re
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "benchmarks" / "keys.md"


def documented(benchmark):
    """The keys that the page gives to a benchmark: those of its section, and those of all."""
    own, shared = set(), set()
    for section in PAGE.read_text().split("\n## ")[1:]:
        heading, *lines = section.split("\n")
        shared_by_all = heading.startswith("every benchmark") and benchmark not in heading.split()
        if heading != benchmark and not shared_by_all:
            continue
        for line in filter(lambda line: line.lstrip().startswith("- "), lines):
            names, meaning = re.findall(r"`([^`]+)`", line.split(": ")[0]), line.partition(": ")[2]
            if not meaning:
                prefix = names[0]
                continue
            inner = [f"{prefix}.{name}" for name in names] if line.startswith("  ") else names
            (shared if shared_by_all else own).update(inner)
    assert own, f"{PAGE} has no section {benchmark}"
    return own | shared


def written(value, path=""):
    """The path of every leaf; a list's elements have the path of the list."""
    if isinstance(value, dict) and value:
        return set().union(*(written(v, f"{path}.{k}".lstrip(".")) for k, v in value.items()))
    if isinstance(value, list) and value:
        return set().union(*(written(element, path) for element in value))
    return {path}


@pytest.fixture
def assert_keys_are_documented():
    """A function of the figures: the page says each of their keys, and none that they lack."""

    def check(figures):
        wanted, found = documented(figures["benchmark"]), written(figures)
        assert not {path for path in found if not any(fnmatchcase(path, key) for key in wanted)}
        assert not {key for key in wanted if not any(fnmatchcase(path, key) for path in found)}

    return check
