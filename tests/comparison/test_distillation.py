"""A distilled arm of a comparison: it learns what the other wrote, and a run goes on."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from tess.comparison.arms import differing, plan_arms, run_arm
from tess.comparison.distillation import distill
from tess.comparison.recipe import read_recipe
from tess.comparison.run import compare
from tess.comparison.timing import evenly_spaced
from tess.data.tasks.catalog import load_task
from tess.data.texts import bare, load_data
from tess.decoders.load import load_decoder
from tess.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
SHARED = {
    "task": "simplification",
    "tokenizer": str(ROOT / "checkpoints" / "default" / "tess" / "tokenizer"),
    "hybrid_override_pattern": "M*",
    "hidden_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "ssm_state_size": 8,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "n_groups": 1,
    "chunk_size": 16,
    "max_source_length": 24,
    "max_target_length": 12,
    "max_train_samples": 12,
    "per_device_train_batch_size": 4,
    "max_steps": 4,
    "warmup_steps": 0,
    "use_cpu": True,
}


def recipe_in(folder, stage, output_dir=None):
    """A comparison of one stage, writing into `folder`/out unless told."""
    values = {
        "output_dir": output_dir or str(folder / "out"),
        "task": "simplification",
        "test_limit": 2,
        "protocol": "asset",
        "stages": [stage],
        "systems": [{"name": "tess-1", "decoder": "tess", "num_inference_steps": 1}],
        "timing_rows": 1,
        "timing_repeats": 1,
        "batch_sizes": [1],
        "memory": False,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return read_recipe(path)


def test_a_distilled_arm_learns_what_the_other_wrote(tmp_path, monkeypatch):
    stage = {"name": "main", "shared": SHARED, "distilled_rows": 9}
    recipe = recipe_in(tmp_path, stage)
    ar, tess = plan_arms(recipe)
    assert (ar.kind, tess.kind, tess.teacher) == ("ar", "tess", ar)
    monkeypatch.setattr("tess.comparison.distillation.CHUNK", 4)
    lines = []
    report = json.loads(compare(recipe, plots=False, say=lines.append).read_text())
    assert any("9 texts written to learn from" in line for line in lines)
    rows = [json.loads(line) for line in tess.texts.read_text().splitlines()]
    decoder = load_decoder(ar.folder, "ar")
    wanted = [row for row in load_task("simplification", "train")][:12]
    chosen = [wanted[i].source for i in evenly_spaced(12, 9)]
    texts = [one.text for one in decoder.generate(chosen)]
    assert [(row["source"], row["target"]) for row in rows] == [
        pair for pair in zip(chosen, texts, strict=True) if pair[1].strip()
    ]
    trained, _ = load_data(tess.parsed.data, want_eval=False)
    assert trained == [
        (r["source"], r["target"]) for r in rows if bare(r["source"]) != bare(r["target"])
    ]
    (found,) = report["results"]["training"]["stages"]
    assert found["differing"] == {
        "training targets": [
            "written by the ar arm for up to 9 training sources, no copies",
            "those of the data",
        ]
    }
    assert found["data"]["training_rows"] == 12  # of the data, not of the texts
    assert str(tmp_path) not in json.dumps(report["results"])
    assert found["shared"]["task"] == "simplification"

    lines.clear()
    compare(recipe, only="train", plots=False, say=lines.append)
    assert any("texts are there already" in line for line in lines)
    assert compare(recipe, only="report", plots=False)
    moved = tmp_path / "moved"
    shutil.copytree(tmp_path / "out", moved, symlinks=True)
    lines.clear()
    compare(recipe_in(tmp_path, stage, str(moved)), only="train", say=lines.append)
    assert sum("is trained already" in line for line in lines) == 2
    more = [{"source": "A copy.", "target": "a copy"}, {"source": "One.", "target": "Two."}]
    tess.texts.write_text(tess.texts.read_text() + "".join(json.dumps(r) + "\n" for r in more))
    assert load_data(tess.parsed.data, want_eval=False)[0] == [*trained, ("One.", "Two.")]
    with pytest.raises(UserError, match="learned other texts than those in"):
        compare(recipe, only="train")


def test_an_interrupted_distillation_goes_on(tmp_path, monkeypatch):
    stage = {"name": "main", "shared": SHARED, "distilled_rows": 12}
    ar, tess = plan_arms(recipe_in(tmp_path, stage))
    run_arm(ar)
    monkeypatch.setattr("tess.comparison.distillation.CHUNK", 4)

    def stop(rows, seen=[]):  # noqa: B006
        seen.append(rows)
        if len(seen) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        distill(tess, stop)
    assert not tess.texts.exists()
    assert distill(tess) == 4  # 8 were kept
    first = tess.texts.read_text()
    assert distill(tess) == 0
    tess.texts.unlink()
    assert distill(tess) == 12
    assert tess.texts.read_text() == first


def test_the_texts_can_be_written_with_beams(tmp_path):
    stage = {"name": "main", "shared": SHARED, "distilled_rows": 5}
    greedy = plan_arms(recipe_in(tmp_path, stage))[1]
    ar, tess = plan_arms(recipe_in(tmp_path, stage | {"distilled_num_beams": 3}))
    assert tess.texts != greedy.texts
    run_arm(ar)
    assert distill(tess) == 5
    rows = [json.loads(line) for line in tess.texts.read_text().splitlines()]
    wanted = [row.source for row in load_task("simplification", "train")][:12]
    chosen = [wanted[i] for i in evenly_spaced(12, 5)]
    texts = [one.text for one in load_decoder(ar.folder, "ar", num_beams=3).generate(chosen)]
    assert [r["target"] for r in rows] == [text for text in texts if text.strip()]
    assert texts != [one.text for one in load_decoder(ar.folder, "ar").generate(chosen)]
    (what, _) = differing(tess, ar)["training targets"]
    assert what == "written by the ar arm for up to 5 training sources with 3 beams, no copies"
    for values in ({"distilled_num_beams": 0}, {"distilled_num_beams": 2, "distilled_rows": None}):
        with pytest.raises(UserError, match="distilled_num_beams must be at least 1, and above"):
            recipe_in(tmp_path, stage | values)


def test_distillation_needs_both_arms_and_a_tokenizer(tmp_path):
    tokenizer = {"tokenizer": None, "train_tokenizer": True, "vocab_size": 300}
    stage = {"name": "main", "shared": SHARED | tokenizer, "distilled_rows": 5}
    with pytest.raises(UserError, match="'main': distilled_rows needs a tokenizer that is there"):
        plan_arms(recipe_in(tmp_path, stage))
    with pytest.raises(UserError, match="distilled_rows needs both arms"):
        recipe_in(tmp_path, stage | {"arms": ["tess"]})
    with pytest.raises(UserError, match="distilled_rows must be at least 1, got 0"):
        recipe_in(tmp_path, stage | {"distilled_rows": 0})
