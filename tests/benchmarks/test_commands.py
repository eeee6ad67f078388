"""tess-benchmark: every subcommand runs, and says what its figures mean."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tess.benchmarks.commands import BENCHMARKS, benchmark
from tess.commands.benchmark import main
from tess.errors import UserError

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "benchmark.py"


def script(*arguments):
    """Call the script's main in this process."""
    main([str(argument) for argument in arguments])


@pytest.fixture
def measured(tmp_path, capsys, assert_keys_are_documented):
    """Run a subcommand; its figures, whose keys docs/benchmarks/keys.md says, and its table."""

    def run(*arguments):
        out = tmp_path / "figures.json"
        script(*arguments, "--json", out)
        table = capsys.readouterr().out
        figures = json.loads(out.read_text())
        assert_keys_are_documented(figures)
        return figures, table

    return run


def test_backbone_compares_the_same_function(measured):
    figures, table = measured("backbone", "--length", 20, "--repeats", 2)
    assert figures["relative_difference"] < 1e-5
    kinds = [
        (what, dtype)
        for what in ("forward", "forward + backward")
        for dtype in ("float32", "bfloat16")
    ]
    expected = [(part, *kind) for part in ("model", "scan", "wide") for kind in kinds]
    expected += [("block", "denoise", dtype) for dtype in ("float32", "bfloat16")]
    assert [(row["part"], row["what"], row["dtype"]) for row in figures["rows"]] == expected
    for row in figures["rows"]:
        assert row["ours_ms"] > 0 and row["rival_ms"] > 0 and row["pairs"] == 2
        assert (row["products_share"] is None) == (row["part"] == "scan")
        assert (row["difference"] is None) == (row["part"] == "block")
        if row["difference"] is not None:
            assert row["difference"] < (1e-5 if row["dtype"] == "float32" else 3e-2)
    assert "ratio" in table


def test_backbone_measures_the_parts_asked_for(measured):
    figures, _ = measured("backbone", "--length", 70, "--repeats", 1, "--parts", "block")
    assert {row["part"] for row in figures["rows"]} == {"block"}
    assert figures["relative_difference"] is None


def test_decoding_compares_three_systems_that_write_the_same_texts(measured):
    figures, table = measured(
        "decoding", "--rows", 3, "--batch_size", 2, "--num_draft_tokens", 2, "--repeats", 1
    )
    rows = {row["system"]: row for row in figures["rows"]}
    assert list(rows) == ["ar", "ar+mtp, 2 drafted", "transformers"]
    assert figures["checkpoint"] == "checkpoints/default"
    for row in rows.values():
        assert row["ms_per_token"] > 0 and row["new_tokens"] == rows["ar"]["new_tokens"]
        assert row["equal_texts"] == figures["sources"] == 3
        assert f"| {row['system']} |" in table
    assert rows["ar"]["speedup"] == rows["ar"]["tokens_per_forward"] == 1
    drafted = rows["ar+mtp, 2 drafted"]
    assert 1 < drafted["acceptance_length"] <= 3 and 0 < drafted["accepted_share"] <= 1
    assert drafted["tokens_per_forward"] <= drafted["acceptance_length"]


def test_loading_measures_peak_memory_against_the_size_of_the_tensors(measured):
    figures, table = measured("loading", "--megabytes", 60, "--shard_megabytes", 40)
    assert [row["system"] for row in figures["rows"]] == ["ours", "transformers"]
    assert figures["shards"] > 1 and figures["tensor_bytes"] > 60e6
    for row in figures["rows"]:
        assert row["peak"] > 0.9 * figures["tensor_bytes"]  # the weights themselves are in it
        assert row["peak_share"] == pytest.approx(row["peak"] / figures["tensor_bytes"])
    assert "of the tensors' size" in table


def test_vocabulary_compares_the_same_model_with_and_without_its_tensors(measured):
    figures, table = measured("vocabulary", "--vocab_size", 4096, "--repeats", 1)
    rows = {(row["part"], row.get("num_top")): row for row in figures["rows"]}
    tops = [("embedding", num_top) for num_top in (16, 32, 64)]
    assert list(rows) == [*tops, ("training", None), ("denoising", None)]
    for (part, _), row in rows.items():
        unit = "us" if part == "embedding" else "ms"
        assert row[f"ours_{unit}"] > 0 and row[f"rival_{unit}"] > 0 and row["ratio"] > 0
    for part in ("training", "denoising"):
        tensor = 8 * 128 * 4096 * 4  # of the rivals, who hold several
        assert rows[part, None]["official_ms"] > 0 and rows[part, None]["ours_peak"] > 0
        assert min(rows[part, None][f"{name}_peak"] for name in ("rival", "official")) > 2 * tensor
    assert rows["denoising", None]["of_products"] > 1
    assert "| 4096 | 64 |" in table and "training step" in table


def test_law_tells_a_sampler_that_leaves_something_out(measured):
    figures, table = measured("law", "--vocab_size", 300, "--width", 6, "--n", 1000)
    told = {row["sampler"] for row in figures["rows"] if row["rejected"]}
    assert told and all("without" in sampler for sampler in told)
    assert {row["time"] for row in figures["rows"]} >= {0.05, 1.0} and "| t |" in table


def test_a_wrong_request_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="--rows must be from 1 to the 200 packaged"):
        script("decoding", "--rows", 201)
    with pytest.raises(UserError, match="has no decoder .ar.mtp."):
        script("decoding", "--checkpoint", SCRIPT.parents[1] / "checkpoints" / "default" / "tess")
    with pytest.raises(UserError, match="there is no folder"):
        script("loading", "--json", tmp_path / "no" / "x.json")


def test_cache_times_a_step_with_and_without_it(measured):
    figures, table = measured(
        "cache", "--source", 32, 64, "--target", 16, "--batch", 2, "--steps", 4, "--repeats", 1
    )
    shapes = [(row["model"], row["source"], row["target"]) for row in figures["rows"]]
    assert shapes == [(name, n, 16) for name in ("hidden 256", "checkpoint") for n in (32, 64)]
    for row in figures["rows"]:
        assert min(row[f"{name}_ms"] for name in ("cached", "encoded", "joint", "encoding")) > 0
        assert row["equal_tokens"] == 1 and row["cache_bytes"] > 0
    assert "| 4 steps, ratio |" in table and "goal" not in table


def test_sampling_writes_figures_tables_and_a_plot(measured, tmp_path):
    markdown, plot = tmp_path / "sampling.md", tmp_path / "sampling.svg"
    figures, table = measured(
        "sampling", "--limit", 2, "--steps", 1, 3, "--seeds", 0, "--schedulers", "renoising",
        "ddim", "--spacings", "uniform", "--markdown", markdown, "--plot", plot,
    )
    assert [(row["scheduler"], row["steps"]) for row in figures["rows"]] == [
        ("renoising", 1), ("renoising", 3), ("ddim", 1), ("ddim", 3)
    ]
    assert figures["setting"]["checkpoint"] == "checkpoints/default"
    assert table.strip() in markdown.read_text() and "<svg" in plot.read_text()


def test_lengths_and_agreement_measure_what_their_tables_say(measured):
    figures, table = measured("lengths", "--limit", 2, "--steps", 1, "--seeds", 0)
    assert [row["canvas"] for row in figures["rows"]][-3:] == ["rule", "fixed", "gold"]
    assert "gold (diagnostic)" in table
    figures, table = measured(
        "agreement", "--limit", 2, "--steps", 2, "--schedulers", "renoising", "--batch_size", 2
    )
    exact = [row for row in figures["rows"] if row["dtype"] == "float32"]
    assert len(exact) == 3 and all(row["equal_texts"] == row["texts"] == 2 for row in exact)
    assert "| renoising | bfloat16 | alone |" in table


def test_carried_is_told_from_dense_where_its_predictions_are_short(measured):
    figures, table = measured(
        "carried", "--vocab_size", 300, "--width", 6, "--n", 600, "--num_soft_tokens", 2
    )
    assert {row["sampler"] for row in figures["rows"]} == {"dense", "M=2"} and "M=2" in table


def test_drafting_writes_the_texts_of_ar(measured):
    figures, _ = measured(
        "drafting", "--rows", 1, "--batch_size", 1, "--num_inference_steps", 2,
        "--redraft_steps", 1, "--redraft_every", 1,
    )
    assert figures["sources"] == 1 and len(figures["rows"]) >= 3
    assert all(row["equal_texts"] == row["rows"] == 1 for row in figures["rows"])


def test_help_of_every_benchmark_loads_no_library():
    code = (
        "import contextlib, sys\n"
        "from tess.benchmarks.commands import BENCHMARKS\n"
        "from tess.commands.benchmark import main\n"
        "for command in [[], *([name] for name in BENCHMARKS)]:\n"
        "    with contextlib.suppress(SystemExit):\n"
        "        main([*command, '--help'])\n"
        "print(*{name.split('.')[0] for name in sys.modules}, file=sys.stderr)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.count("usage: ") == 1 + len(BENCHMARKS)
    assert not set(run.stderr.split()) & {"torch", "transformers", "diffusers", "numpy"}


def test_every_door_is_listed_and_has_all_three_parts():
    files = {file.stem for file in (SCRIPT.parents[1] / "tess/benchmarks/doors").glob("*.py")}
    assert set(BENCHMARKS) == files - {"__init__", "flags", "cells"}
    for name in BENCHMARKS:
        assert all(callable(getattr(benchmark(name), part)) for part in ("add", "run", "table"))
