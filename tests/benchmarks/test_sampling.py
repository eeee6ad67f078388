"""Sampling benchmarks: stopping read off a trace, cells that go on, sums, figures, agreement."""

import json
import statistics
import sys
from copy import deepcopy

import pytest
import torch
from transformers import SequenceBiasLogitsProcessor

from tess.backbones.config import HybridConfig
from tess.benchmarks.cache import _joint_twin, _shapes, benchmark_cache
from tess.benchmarks.doors import lengths
from tess.benchmarks.sampling.agreement import benchmark_agreement, compare
from tess.benchmarks.sampling.grid import benchmark_sampling, goals, summarize
from tess.benchmarks.sampling.lengths import benchmark_lengths
from tess.benchmarks.sampling.plot import plot_sampling
from tess.benchmarks.sampling.report import format_sampling
from tess.benchmarks.sampling.trials import Data, Texts, Trials
from tess.config import TessConfig
from tess.data.rows import Example
from tess.denoiser import TessDenoiser
from tess.errors import UserError
from tess.pipeline import TessPipeline
from tess.sampling.writer import target_lengths
from tess.schedulers.renoising import RenoisingScheduler
from tess.schedulers.stopping import StoppingRule
from tess.text.tokenization import train_tokenizer
from tiny import DENOISER

WORDS = "the cat sat on a mat while the small dog slept by an old red door and rain fell".split()
SOURCES = ["the cat sat", "a small dog slept by the old red door while rain fell", "rain", "a dog"]
BIAS = {(2,): 8.0, (20,): 8.0, (30,): 7.0}
FEW_TOKENS = {"logits_processor": [SequenceBiasLogitsProcessor(BIAS)]}
"""Random weights write hardly any `</s>` by themselves, and seldom the same twice."""


def rows(sources=SOURCES) -> Data:
    examples = [Example(source, ("the cat", "a dog slept")) for source in sources]
    return Data(examples, {"file": "rows", "rows": len(examples), "of": len(examples)})


@pytest.fixture(scope="module")
def pipeline():
    torch.manual_seed(5)
    tokenizer = train_tokenizer([" ".join(WORDS)] * 20, 300)
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    backbone = HybridConfig(**DENOISER, **ids, vocab_size=len(tokenizer))
    config = TessConfig(
        backbone_config=backbone, source_encoding="bidirectional", max_source_length=32,
        max_target_length=24, target_length_ratio=0.8, target_length_margin=3,
        num_source_positions=40, num_target_positions=24,
    )
    scheduler = RenoisingScheduler(vocab_size=len(tokenizer), simplex_value=config.simplex_value)
    return TessPipeline(TessDenoiser(config).eval(), scheduler, tokenizer)


@pytest.fixture
def trials(pipeline):
    """In double: random weights have near-ties everywhere."""
    copy = TessPipeline(
        deepcopy(pipeline.denoiser).double(), pipeline.scheduler, pipeline.tokenizer
    )
    return Trials(copy, rows(), batch_size=3)


@pytest.mark.parametrize("variant", ["renoising", "ddim", "ddim_carried"])
@pytest.mark.parametrize("rule", [StoppingRule(1, 4.0), StoppingRule(2, 5.0)])
def test_stopping_read_off_a_trace_is_stopping_for_real(trials, variant, rule):
    trials.use(variant, "uniform")
    full, (read,) = trials.write(8, 0, [rule], **FEW_TOKENS)
    real, _ = trials.write(8, 0, stopping=rule, **FEW_TOKENS)
    assert read == real
    assert full.nfe == [8] * 4 and min(read.nfe) < 8


def test_stopping_at_the_last_step_only_leaves_the_text(trials):
    full, (read,) = trials.write(4, 0, [StoppingRule(9, 0.0)])
    assert read == full


def test_texts_come_in_the_order_of_the_rows_whatever_the_batches(trials):
    by_length, _ = trials.write(3, 0)
    other, _ = trials.write(3, 0, batches=[[2, 0], [3, 1]])
    assert by_length == other and len(set(by_length.texts)) > 1
    given, _ = trials.write(3, 0, batches=[[2, 0], [3, 1]], gen_length=[5, 6, 7, 8])
    assert given.canvases == [5, 6, 7, 8]


def test_a_rerun_goes_on_where_the_file_ends(trials, tmp_path):
    path, lines = tmp_path / "cells.json", []
    grid = {"schedulers": ["renoising"], "spacings": ["uniform"], "path": path}
    first = benchmark_sampling(trials, steps=[1], seeds=[0, 1], report=lines.append, **grid)
    assert len(lines) == 2 and json.loads(path.read_text()) == first
    again = benchmark_sampling(trials, steps=[1, 2], seeds=[0], report=lines.append, **grid)
    assert len(lines) == 3 and "1 of 1: renoising, uniform, 2 steps" in lines[-1]
    assert [c for c in again["cells"] if c["steps"] == 1] == first["cells"]
    assert len(again["cells"]) == 3 == len(json.loads(path.read_text())["cells"])


def test_cells_of_another_setting_are_not_mixed(trials, tmp_path):
    path = tmp_path / "cells.json"
    grid = {"schedulers": ["renoising"], "spacings": ["uniform"], "steps": [1], "seeds": [0]}
    benchmark_sampling(trials, path=path, **grid)
    with pytest.raises(UserError, match="was measured with rules"):
        benchmark_sampling(trials, rules=[StoppingRule(3)], path=path, **grid)
    with torch.no_grad():
        trials.pipeline.denoiser.time_embedding.bias += 1
    with pytest.raises(UserError, match="was measured with weights"):
        benchmark_sampling(trials, path=path, **grid)
    path.write_text("{}")
    with pytest.raises(UserError, match="holds no figures"):
        benchmark_sampling(trials, path=path, **grid)


def cell(scheduler="renoising", steps=8, seed=0, quality=30.0, nfe=None):
    names = ("sari", "bleu", "rougeL", "self_bleu", "distinct2", "repeated_words")
    names += ("length_ratio", "exact_copies")
    figures = dict.fromkeys(names, quality) | {"nfe_mean": steps, "nfe_max": steps}
    stopped = figures | {"patience": 2, "max_entropy": 0.1, "nfe_mean": nfe or steps}
    return {
        "scheduler": scheduler, "spacing": "uniform", "steps": steps, "seed": seed,
        "full": figures, "stopped": [stopped], "seconds": 1.0,
    }


def test_rows_sum_up_the_seeds():
    values = [30.0, 32.0, 37.0]
    (row,) = summarize(cell(seed=seed, quality=value) for seed, value in enumerate(values))
    assert row["seeds"] == [0, 1, 2]
    for figures in (row["full"], row["stopped"][0]):
        assert figures["sari"] == {
            "mean": 33.0, "sd": pytest.approx(statistics.stdev(values)), "min": 30.0, "max": 37.0
        }


def grid_result():
    """Re-noising at 100 steps has 30 ± 1; ddim reaches 29 in 8 steps, dpm_solver does not."""
    spread = 2**-0.5  # of two seeds, for a standard deviation of 1
    cells = [
        cell(steps=100, seed=s, quality=30.0 + (2 * s - 1) * spread, nfe=7.0 + s) for s in (0, 1)
    ]
    cells += [cell("ddim", quality=29.0001), cell("dpm_solver", quality=28.9)]
    cells += [cell("ddim", steps=16, quality=30.0, nfe=8.5)]
    figures = cells[0]["full"]
    setting = {
        "checkpoint": "x", "parameters": 1, "dtype": "float32", "rules": [cells[0]["stopped"][0]],
        "data": {"file": "rows", "rows": 2, "of": 2},
    }
    env = dict.fromkeys(("date", "processor", "threads", "python", "torch", "transformers"), "none")
    return {"setting": setting, "rows": summarize(cells), "copy": figures, "environment": env}


def test_goals_are_within_the_spread_of_the_reference():
    found = goals(grid_result())
    assert found["bar"]["sari"]["mean"] == 30.0
    assert [row["scheduler"] for row in found["few"]] == ["ddim"]
    assert [(r["scheduler"], one["nfe_mean"]) for r, one in found["stopping"]] == [
        ("renoising", 7.5)
    ]
    table = format_sampling(grid_result())
    assert "of that at 8 evaluations, in both metrics: ddim uniform." in table
    assert "| dpm_solver | uniform | 8 | 28.9 ± 0.0 |" in table


def test_the_same_figures_give_the_same_small_file(tmp_path):
    result = grid_result()
    for name in ("a.svg", "b.svg"):
        plot_sampling(result, tmp_path / name)
    first, second = ((tmp_path / name).read_bytes() for name in ("a.svg", "b.svg"))
    assert first == second and len(first) < 200_000
    assert all(name in first.decode() for name in ("dpm_solver", "SARI", "BLEU", "uniform spacing"))
    result["rows"][0]["full"]["sari"]["mean"] += 1
    plot_sampling(result, tmp_path / "b.svg")
    assert (tmp_path / "b.svg").read_bytes() != first


def test_a_figure_without_matplotlib_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"pip install 'tess-diffusion\[plots\]'"):
        plot_sampling(grid_result(), tmp_path / "a.svg")


def test_limited_rows_are_spread_over_all():
    everything, some = Data.load(), Data.load(limit=4)
    assert [everything.examples.index(example) for example in some.examples] == [0, 25, 50, 75]
    assert some.label == everything.label | {"rows": 4}
    with pytest.raises(UserError, match="--limit must be from 1 to the 100 rows, got 101"):
        Data.load(limit=101)


def test_canvases_are_what_they_are_called(trials):
    result = benchmark_lengths(trials, steps=1, seeds=[0])
    found = {row["canvas"]: row for row in result["rows"]}
    assert list(found) == ["rule", "fixed", "gold"]
    rule = target_lengths(trials.pipeline.denoiser.config, trials.rows)
    assert found["rule"]["canvas_mean"] == sum(rule) / 4
    assert found["fixed"]["canvas_mean"] == 24 and found["fixed"]["too_short"] == 0
    gold = len(trials.pipeline.tokenizer("the cat", add_special_tokens=False)["input_ids"]) + 1
    assert found["gold"]["canvas_mean"] == found["rule"]["gold_mean"] == gold
    assert "gold (diagnostic)" in lengths.table(result)
    with pytest.raises(UserError, match="no length head"):
        benchmark_lengths(trials, ["predicted"], steps=1, seeds=[0])


def test_agreement_counts_texts_and_tokens():
    ours = Texts(["", "", ""], [[1, 2], [3], [4, 5, 6, 7]], [], [])
    other = Texts(["", "", ""], [[1, 2], [3, 9], [4, 0, 6, 7]], [], [])
    assert compare(ours, other) == {"texts": 3, "equal_texts": 1, "equal_tokens": 6 / 8}


def test_agreement_compares_all_ways_and_types(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    result = benchmark_agreement(tmp_path, rows(), schedulers=["renoising"], steps=2, batch_size=3)
    ways = ["uncached", "alone", "reordered"]
    found = [(row["dtype"], row["comparison"]) for row in result["rows"]]
    expected = [("float32", way) for way in ways]
    assert found == expected + [("bfloat16", way) for way in [*ways, "float32"]]
    assert all(0 < row["equal_tokens"] <= 1 and row["texts"] == 4 for row in result["rows"])


def test_the_cache_changes_no_token_and_the_joint_layout_has_the_same_weights(pipeline):
    result = benchmark_cache([16, 48], 8, [2], [4], repeats=1)
    assert [row["source"] for row in result["rows"]] == [16, 48]
    small, large = result["rows"]
    assert small["equal_tokens"] == large["equal_tokens"] == 1
    assert large["cache_bytes"] > small["cache_bytes"]
    whole = 4 * large["encoded_ms"] / (large["encoding_ms"] + 4 * large["cached_ms"])
    assert large["generations"][0]["ratio"] == pytest.approx(whole)
    twin = _joint_twin(pipeline.denoiser)
    assert twin.config.source_encoding == "joint"
    assert twin.backbone.embeddings.weight is not None
    for (name, ours), (other, theirs) in zip(
        pipeline.denoiser.state_dict().items(), twin.state_dict().items(), strict=True
    ):
        assert name == other and ours.data_ptr() == theirs.data_ptr()


def test_learned_positions_bound_what_is_measured(pipeline):
    assert _shapes(pipeline.denoiser.config, [32, 40, 41], 128) == [(32, 24), (40, 24)]
