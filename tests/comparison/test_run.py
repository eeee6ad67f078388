"""Comparisons: from a tiny recipe to its report, twice the same; resuming; bad recipes."""

import copy
import json
import re
import shutil
from dataclasses import astuple, replace
from pathlib import Path

import pytest
import yaml

from tess.comparison.arms import ARM_FILE, plan_arms
from tess.comparison.page import interval, markdown
from tess.comparison.recipe import DEFAULT_SYSTEMS, System, read_recipe
from tess.comparison.report import Cost, Figure, Report, Verdict, from_json
from tess.comparison.run import compare
from tess.comparison.scores import costs, over_seeds, verdict
from tess.comparison.state import Models
from tess.comparison.texts import texts_key
from tess.comparison.timing import evenly_spaced, measure_peak, peak_memory
from tess.decoders.base import Generation
from tess.errors import UserError
from tess.metrics.catalog import PROTOCOLS

ROOT = Path(__file__).resolve().parents[2]
SIZES = {
    "task": "simplification",
    "train_tokenizer": True,
    "vocab_size": 300,
    "hybrid_override_pattern": "M*",
    "hidden_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "intermediate_size": 32,
    "ssm_state_size": 8,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "n_groups": 1,
    "chunk_size": 16,
    "n_routed_experts": 2,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 16,
}
RUN = {
    "max_source_length": 24,
    "max_target_length": 12,
    "max_train_samples": 12,
    "per_device_train_batch_size": 4,
    "max_steps": 4,
    "learning_rate": 1e-3,
    "warmup_steps": 0,
    "logging_steps": 100,
    "save_steps": 2,
    "use_cpu": True,
}
RECIPE = {
    "name": "tiny",
    "task": "simplification",
    "test_limit": 3,
    "protocol": "asset",
    "stages": [{"name": "main", "shared": SIZES | RUN, "ar": {"mtp_depth": 1}}],
    "systems": [
        {"name": "tess-2", "decoder": "tess", "num_inference_steps": 2},
        {"name": "tess-best", "decoder": "tess", "num_inference_steps": 1, "num_candidates": 2},
        {"name": "ar", "decoder": "ar"},
        {"name": "beam", "decoder": "ar", "num_beams": 2},
        {"name": "ar+mtp", "decoder": "ar+mtp", "num_draft_tokens": 2},
    ],
    "batch_size": 2,
    "timing_rows": 1,
    "timing_repeats": 1,
    "batch_sizes": [1, 2],
    "memory": False,
    "samples": 2,
}
TESS_ONLY = [{"name": "tess-1", "decoder": "tess", "num_inference_steps": 1}]


def recipe_in(folder, changes=None, **more):
    """RECIPE with changes, read from a file, writing into `folder`/out."""
    folder.mkdir(parents=True, exist_ok=True)
    values = copy.deepcopy(RECIPE) | {"output_dir": str(folder / "out")} | (changes or {}) | more
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in values.items() if v is not None}))
    return read_recipe(path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Two runs of one recipe in two folders, with their reports."""
    folders = [tmp_path_factory.mktemp(name) for name in ("first", "second")]
    lines = []
    reports = [
        json.loads(compare(recipe_in(folder), plots=first, say=lines.append).read_text())
        for folder, first in zip(folders, (True, False), strict=True)
    ]
    return folders, reports, lines


def test_two_runs_give_the_same_results(finished):
    _, (one, other), _ = finished
    assert json.dumps(one["results"]) == json.dumps(other["results"])
    assert one["timings"] != other["timings"]


def test_the_report_has_every_figure_of_every_system(finished):
    (folder, _), (report, _), _ = finished
    results = report["results"]
    names = [system["name"] for system in RECIPE["systems"]]
    assert list(results["systems"]) == [*names, "untrained"]
    assert list(report["timings"]["systems"]) == names
    for name, system in results["systems"].items():
        (one,) = system["seeds"].values()
        assert list(one["measures"]) == list(PROTOCOLS["asset"].measures)
        for figure in one["measures"].values():
            assert figure["low"] <= figure["value"] <= figure["high"]
        assert one["cost"]["flops_per_output_token"] > 0
        assert (one["against_greedy_ar"] is None) == (name == "ar")
        sari = one["measures"]["sari"]["value"]
        copied = results["baselines"]["measures"]["copy"]["sari"]["value"]
        assert one["against_copy"]["sari"]["difference"] == pytest.approx(sari - copied)
    assert results["systems"]["ar+mtp"]["seeds"]["0"]["exact_equal_to_ar"] == 1.0
    assert results["systems"]["ar+mtp"]["seeds"]["0"]["cost"]["acceptance_length"] >= 1
    assert results["systems"]["tess-2"]["seeds"]["0"]["cost"]["nfe_max"] == 2
    assert results["systems"]["tess-best"]["seeds"]["0"]["cost"]["nfe_mean"] == 2
    assert "samples:2-confidence" in results["systems"]["tess-best"]["seeds"]["0"]["signature"]
    assert results["systems"]["untrained"]["seeds"]["0"]["cost"]["nfe_mean"] == 16
    (stage,) = results["training"]["stages"]
    assert {run["decoder"]: run["updates"] for run in stage["runs"]} == {"tess": 4, "ar": 4}
    assert stage["differing"] == {"mtp_depth": [None, 1]}
    assert stage["data"]["training_rows"] == 12
    assert [row["row"] for row in results["samples"]] == [0, 1]
    assert set(results["samples"][0]["texts"]) == set(results["systems"])
    assert str(folder) not in json.dumps(results)


def test_the_page_shows_intervals_samples_and_the_setting(finished):
    (folder, _), (report, _), _ = finished
    page = (folder / "out" / "report.md").read_text()
    sari = report["results"]["systems"]["tess-2"]["seeds"]["0"]["measures"]["sari"]
    assert f"| tess-2 | {interval(Figure(**sari))} |" in page
    assert re.search(r"\| tess-2 \| \d+\.\d+ \[\d+\.\d+, \d+\.\d+\] \|", page)
    assert "asset|sari|tok:13a" in page and "max_steps: 4" in page
    assert page.count("### Row ") == 2 and "](quality_nfe.svg)" in page
    for name in ("quality_nfe", "quality_latency"):
        assert (folder / "out" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "tess-2" in (folder / "out" / f"{name}.svg").read_text()


def test_a_second_call_trains_and_writes_nothing_again(finished, monkeypatch):
    (_, folder), (_, before), _ = finished
    texts = sorted((folder / "out" / "systems").iterdir())
    stamps = [path.stat().st_mtime_ns for path in texts]
    lines = []
    monkeypatch.setattr("tess.comparison.arms.train", lambda *_, **__: pytest.fail("trained"))
    monkeypatch.setattr("tess.comparison.texts.write_texts", lambda *_, **__: pytest.fail("wrote"))
    again = compare(recipe_in(folder), plots=False, say=lines.append)
    assert json.loads(again.read_text())["results"] == before["results"]
    assert [path.stat().st_mtime_ns for path in texts] == stamps
    assert sum("trained already" in line for line in lines) == 2
    assert sum("texts are there already" in line for line in lines) == 6
    assert sum("timings are there already" in line for line in lines) == 5
    assert compare(recipe_in(folder), only="report", plots=False) == again


def test_what_is_missing_or_changed_is_written_anew(finished, tmp_path):
    (_, other), (_, before), _ = finished
    shutil.copytree(other / "out", tmp_path / "out", symlinks=True)
    systems = copy.deepcopy(RECIPE["systems"])
    systems[0]["num_inference_steps"] = 1
    (tmp_path / "out" / "systems" / "beam.seed0.jsonl").unlink()
    lines = []
    report = compare(recipe_in(tmp_path, systems=systems), plots=False, say=lines.append)
    written = [line for line in lines if "texts written" in line]
    assert written[0].startswith("tess-2, seed 0: 3 texts written anew")
    assert written[1].startswith("beam, seed 0: 3 texts written") and len(written) == 2
    found = json.loads(report.read_text())["results"]["systems"]
    assert found["tess-2"]["seeds"]["0"]["cost"]["nfe_max"] == 1
    assert found["beam"] == before["results"]["systems"]["beam"]


def test_a_training_with_other_settings_is_refused(finished, tmp_path):
    (_, other), _, _ = finished
    shutil.copytree(other / "out", tmp_path / "out", symlinks=True)
    stages = copy.deepcopy(RECIPE["stages"])
    stages[0]["shared"]["learning_rate"] = 2e-3
    for only in (None, "decode", "report"):
        with pytest.raises(UserError, match="learning_rate = 0.001.*0.002.*another output_dir"):
            compare(recipe_in(tmp_path, stages=stages), only=only, plots=False)


def test_a_training_that_no_comparison_started_is_refused(finished, tmp_path):
    (_, other), _, _ = finished
    shutil.copytree(other / "out", tmp_path / "out", symlinks=True)
    (tmp_path / "out" / "train" / "main" / "ar.seed0" / ARM_FILE).unlink()
    with pytest.raises(UserError, match="ar.seed0 holds a training that no comparison started"):
        compare(recipe_in(tmp_path), only="train", plots=False)


def test_texts_are_kept_for_the_libraries_that_made_them(monkeypatch):
    def key():
        models = Models(0, Path("x"), {"tess": "a"})
        return texts_key(System("x", "tess"), models, ["a"], batch_size=1, dtype="float32")

    before = key()
    assert key() == before
    monkeypatch.setattr("importlib.metadata.version", lambda name: f"another {name}")
    assert key() != before


def test_an_interrupted_training_goes_on(finished, tmp_path):
    (_, other), (_, before), _ = finished
    shutil.copytree(other / "out", tmp_path / "out", symlinks=True)
    arm = tmp_path / "out" / "train" / "main" / "tess.seed0"
    for name in ("final", "checkpoint-4"):  # as it was after two updates
        shutil.rmtree(arm / name)
    record = json.loads((arm / ARM_FILE).read_text())
    (arm / ARM_FILE).write_text(json.dumps({k: record[k] for k in ("settings", "start")}))
    lines = []
    compare(recipe_in(tmp_path), only="train", say=lines.append)
    assert lines[0].endswith("trained, 2 updates (4 in all)")
    weights = json.loads((arm / ARM_FILE).read_text())["weights"]
    assert weights == before["results"]["weights"]["0"]["tess"]


def test_checkpoints_stages_and_seeds(finished, tmp_path):
    """Checkpoints instead of training, two sampling seeds, and no test rows from a task."""
    (folder, _), (before, _), _ = finished
    train = folder / "out" / "train" / "main"
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        '{"source": "a b c d", "target": ["a b", "c"]}\n{"source": "x y", "target": "x"}\n'
    )
    recipe = recipe_in(
        tmp_path, stages=None, task=None, test_limit=None, test_file=str(rows), seeds=[0, 3],
        checkpoints={arm: str(train / f"{arm}.seed0") for arm in ("tess", "ar")},
        systems=[*TESS_ONLY, {"name": "ar", "decoder": "ar"}], protocol="paraphrase",
        lead_sentences=2, fixed_text="What is it?",
    )
    report = json.loads(compare(recipe, plots=False).read_text())
    results = report["results"]
    assert results["training"]["updates"] == {"tess": 4, "ar": 4}
    assert results["weights"]["3"] == before["results"]["weights"]["0"]
    ours = results["systems"]["tess-1"]
    values = [one["measures"]["bleu"]["value"] for one in ours["seeds"].values()]
    assert len(values) == 2 and ours["over_seeds"]["bleu"]["max"] == max(values)
    page = markdown(from_json(Report, report))
    assert "## Over 2 seeds" in page
    assert results["baselines"]["truncation_words"] == 1
    assert results["baselines"]["lead_sentences"] == 2
    measures = results["baselines"]["measures"]  # of these, the copy alone has read the source
    assert measures["fixed"]["self_bleu"]["value"] < measures["copy"]["self_bleu"]["value"]
    assert "one fixed text (“What is it?”)" in page
    with pytest.raises(UserError, match="fixed_text must have a word"):
        recipe_in(tmp_path, fixed_text=" ")


def test_checkpoints_with_other_numbers_of_updates_are_refused(finished, tmp_path, monkeypatch):
    (folder, _), *_ = finished
    train = folder / "out" / "train" / "main"
    given = {arm: str(train / f"{arm}.seed0") for arm in ("tess", "ar")}
    known = {given["tess"]: 4, given["ar"]: 8}
    monkeypatch.setattr("tess.comparison.arms.updates_of", lambda place: known[str(place)])
    recipe = recipe_in(tmp_path, stages=None, checkpoints=given)
    with pytest.raises(UserError, match="training of tess has 4 updates and that of ar 8"):
        compare(recipe, plots=False)
    known[given["ar"]] = None  # a folder without its training's record
    recipe = recipe_in(tmp_path, stages=None, checkpoints=given)
    assert compare(recipe, only="decode", plots=False) is None


def test_more_steps_than_the_checkpoint_has_are_refused_before_anything_is_written(
    finished, tmp_path
):
    (folder, _), *_ = finished
    given = {arm: str(folder / "out/train/main" / f"{arm}.seed0") for arm in ("tess", "ar")}
    systems = [*TESS_ONLY, {"name": "long", "decoder": "tess", "num_inference_steps": 5001}]
    recipe = recipe_in(tmp_path, stages=None, checkpoints=given, systems=systems)
    with pytest.raises(UserError, match="'long': num_inference_steps must be from 1 to 5000"):
        compare(recipe, plots=False)
    assert not (tmp_path / "out" / "systems").exists()


def test_a_seed_that_no_training_takes_is_refused_with_its_number(tmp_path):
    with pytest.raises(UserError, match=f"seed must be from 0 to .* got {2**40}"):
        plan_arms(recipe_in(tmp_path, seeds=[2**40]))


def test_a_stage_starts_from_the_one_before_and_tokenizers_are_shared(tmp_path):
    stages = [
        {"name": "pre", "shared": SIZES | RUN, "output_dir": str(tmp_path / "shared")},
        {"name": "fine", "shared": RUN | {"task": "simplification", "seed": 5}},
        {"name": "mtp", "arms": ["ar"], "ar": {"mtp_depth": 1, "freeze_backbone": True},
         "shared": RUN | {"task": "simplification"}},
    ]
    arms = plan_arms(recipe_in(tmp_path, stages=stages, seeds=[0, 1]))
    names = [(arm.stage, arm.kind, arm.seed) for arm in arms]
    assert names[:5] == [("pre", "tess", 0), ("pre", "ar", 0), ("fine", "tess", 5),
                         ("fine", "ar", 5), ("mtp", "ar", 0)]
    assert names[5:] == [("pre", "tess", 1), ("pre", "ar", 1), ("mtp", "ar", 1)]
    first = arms[0].final
    assert first == tmp_path / "shared" / "tess.seed0" / "final"
    assert arms[1].settings["tokenizer"] == str(first / "tokenizer")
    assert arms[2].settings["init_from"] == str(first)
    assert arms[4].settings["init_from"] == str(arms[3].final)


@pytest.mark.parametrize(
    ("name", "shared", "ar"),
    [
        ("hidden_size", {}, {"hidden_size": 64}),
        ("max_steps", {}, {"max_steps": 5}),
        ("per_device_train_batch_size", {}, {"per_device_train_batch_size": 8}),
        ("seed", {}, {"seed": 7}),
        ("max_train_samples", {}, {"max_train_samples": 11}),
        ("dataset", {}, {"dataset": "wiki_auto"}),
        ("vocab_size", {"train_tokenizer": None, "tokenizer": "a"}, {"vocab_size": 301}),
    ],
)
def test_arms_that_are_not_alike_are_refused_unless_allowed(tmp_path, name, shared, ar):
    stages = [{"name": "main", "shared": SIZES | RUN | shared, "ar": ar}]
    with pytest.raises(UserError, match=f"{name} is .* for tess and .* for ar.*allow_differences"):
        plan_arms(recipe_in(tmp_path, stages=stages))
    assert plan_arms(recipe_in(tmp_path, stages=stages, allow_differences=[name]))


def test_one_arm_that_starts_trained_is_refused(tmp_path):
    stages = [{"name": "main", "shared": RUN | {"task": "simplification"},
               "tess": {"init_from": "trained"}, "ar": {"tokenizer": "a"}}]
    with pytest.raises(UserError, match="init_from is 'trained' for tess and None for ar"):
        plan_arms(recipe_in(tmp_path, stages=stages))
    assert plan_arms(recipe_in(tmp_path, stages=stages, allow_differences=["init_from"]))
    stages = [*RECIPE["stages"], {"name": "more", "shared": RUN, "tess": {"init_from": "other"}}]
    with pytest.raises(UserError, match="'more': init_from is of the first stage"):
        plan_arms(recipe_in(tmp_path, stages=stages))


def test_more_updates_for_one_arm_alone_are_refused(tmp_path):
    more = {"name": "more", "arms": ["ar"], "shared": RUN | {"task": "simplification"}}
    stages = [*RECIPE["stages"], more]
    with pytest.raises(UserError, match="stage 'more' trains ar alone"):
        plan_arms(recipe_in(tmp_path, stages=stages))
    assert plan_arms(recipe_in(tmp_path, stages=stages, allow_differences=["arms"]))


STAGE = RECIPE["stages"][0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"protocl": "asset"}, "no key 'protocl'; did you mean protocol"),
        ({"protocol": "bleu"}, "unknown protocol 'bleu'; known are"),
        ({"protocol": None}, "expected the key 'protocol'"),
        ({"seeds": "0"}, "seeds must be a list"),
        ({"seeds": [0, 0]}, "seeds has a value twice"),
        ({"seeds": [True]}, "seeds must be of type int, got True"),
        ({"batch_size": 2.5}, "batch_size must be of type int"),
        ({"batch_sizes": [0]}, "batch_sizes must be 1 or more"),
        ({"test_limit": 0}, "test_limit must be at least 1"),
        ({"task": "simplify"}, "unknown task 'simplify'"),
        ({"test_file": "rows.jsonl"}, "either task or test_file"),
        ({"stages": None}, "either stages to train or checkpoints"),
        ({"checkpoints": {"tess": "x", "arr": "y"}, "stages": None}, "no key 'arr'; did you mean"),
        ({"checkpoints": {"tess": "x"}, "stages": None}, "a folder for 'ar', found none"),
        ({"stages": [STAGE, STAGE]}, "two stages are called 'main'"),
        ({"stages": [{"name": "a", "shared": {"hiden_size": 3}}]}, "did you mean hidden_size"),
        ({"stages": [{"name": "a/b"}]}, "stage 1: expected a name of letters"),
        ({"systems": TESS_ONLY * 2}, "two systems are called 'tess-1'"),
        ({"systems": [{"name": "x", "decoder": "mdlm"}]}, "decoder must be one of tess, ar"),
        ({"systems": [{"name": "copy", "decoder": "ar"}]}, "taken by a baseline"),
        ({"systems": [{"name": "x", "decoder": "tess", "step": 4}]}, "no key 'step'"),
        ({"systems": [{"name": "x", "decoder": "tess", "eta": 1.0}]}, "does nothing without"),
        ({"systems": [{"name": "x", "decoder": "tess", "eta": "a"}]}, "eta must be of type float"),
        ({"systems": [{"name": "x", "decoder": "tess", "num_beams": 4}]}, "num_beams belongs to"),
        ({"systems": [{"name": "x", "decoder": "ar", "eta": 0.5}]}, "eta does nothing without"),
        ({"systems": [{"name": "x", "decoder": "ar", "noise": "dense"}]}, "noise belongs to tess"),
        ({"systems": [{"name": "x", "decoder": "ar", "num_draft_tokens": 4}]}, "belongs to ar.mtp"),
    ],
)
def test_a_bad_recipe_is_one_sentence(tmp_path, changes, message):
    with pytest.raises(UserError, match=message) as caught:
        recipe_in(tmp_path, changes)
    assert "\n" not in str(caught.value)


def test_a_difference_that_is_none_is_not_allowed(tmp_path):
    with pytest.raises(UserError, match="no key 'max_step'; did you mean max_steps"):
        compare(recipe_in(tmp_path, allow_differences=["max_step"]), plots=False)


def test_what_only_a_run_can_see_is_one_sentence_too(finished, tmp_path):
    (folder, _), _, _ = finished
    train = folder / "out" / "train" / "main"
    both = {arm: str(train / f"{arm}.seed0" / "final") for arm in ("tess", "ar")}
    given = {"stages": None, "systems": TESS_ONLY}
    wrong = {"tess": both["ar"], "ar": both["ar"]}
    with pytest.raises(
        UserError, match="expected a checkpoint of tess in .* found a checkpoint of"
    ):
        compare(recipe_in(tmp_path / "a", given, checkpoints=wrong), plots=False)
    gone = both | {"ar": str(tmp_path / "gone")}
    with pytest.raises(UserError, match="no folder .*gone' for the ar checkpoint"):
        compare(recipe_in(tmp_path / "b", given, checkpoints=gone), plots=False)
    missing = {"task": None, "test_file": "gone.jsonl", "checkpoints": both}
    with pytest.raises(UserError, match="there is no file 'gone.jsonl'"):
        compare(recipe_in(tmp_path / "c", given | missing), plots=False)
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "out").write_text("a file")
    with pytest.raises(UserError, match="cannot write to output folder"):
        compare(recipe_in(tmp_path / "d", given, checkpoints=both), plots=False)
    for only, message in (("decode", "is not trained yet"), ("report", "is not trained yet")):
        with pytest.raises(UserError, match=message):
            compare(recipe_in(tmp_path / "e"), only=only, plots=False)
    with pytest.raises(UserError, match="nothing to train"):
        compare(recipe_in(tmp_path / "f", given, checkpoints=both), only="train", plots=False)
    with pytest.raises(UserError, match="not written yet; run --only decode"):
        compare(recipe_in(tmp_path / "g", given, checkpoints=both), only="report", plots=False)


def test_without_matplotlib_a_run_ends_before_it_begins(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(UserError, match="need matplotlib: pip install .* --no_plots"):
        compare(recipe_in(tmp_path))
    assert not (tmp_path / "out").exists()


def test_default_systems_are_read(tmp_path):
    recipe = recipe_in(tmp_path, systems=None)
    assert recipe.systems == DEFAULT_SYSTEMS and recipe.default_systems
    names = {system.decoder for system in recipe.systems}
    assert names == {"tess", "ar", "ar+mtp"}


def test_the_shipped_recipe_can_be_planned():
    recipe = read_recipe(ROOT / "scripts" / "recipes" / "compare_smallest.yaml")
    assert [arm.kind for arm in plan_arms(recipe)] == ["tess", "ar"]


def test_costs_and_verdicts_by_hand():
    texts = [
        Generation("a", [], num_new_tokens=10, nfe=4, num_verifications=2),
        Generation("b", [], num_new_tokens=5, nfe=2, num_verifications=1),
    ]
    found = costs(texts, None, "unknown")
    assert found == Cost(3, 4, 7.5, 15 / 6, (15 - 2) / (2 + 1), None, "unknown")
    undrafted = [replace(text, num_verifications=0) for text in texts]
    assert costs(undrafted, 1.0, None).acceptance_length is None
    ours, copy, untrained = Figure(3, 2, 4), Figure(1, 0, 1.9), Figure(2, 1, 2.1)
    assert verdict(ours, copy, untrained, True) == Verdict(True, False)
    assert verdict(ours, copy, untrained, False) == Verdict(False, False)
    assert interval(Figure(32.61, 31.2, 34.04)) == "32.6 [31.2, 34.0]"
    assert evenly_spaced(100, 10) == list(range(0, 100, 10)) and evenly_spaced(2, 5) == [0, 1]


def test_means_over_seeds_are_of_what_all_seeds_have(finished):
    _, (report, _), _ = finished
    one = from_json(Report, report).results.systems["ar"].first
    other = replace(one, measures={"m": Figure(4.0, 3, 5)}, cost=replace(one.cost, nfe_mean=7))
    one = replace(one, measures={"m": Figure(1.0, 0, 2)}, cost=replace(one.cost, nfe_mean=5))
    spread = over_seeds([one, other])
    assert astuple(spread["m"]) == (2.5, 1.0, 4.0) and astuple(spread["nfe_mean"]) == (6, 5, 7)
    assert one.cost.acceptance_length is None and "acceptance_length" not in spread


def test_peak_memory_is_of_a_process_of_its_own(finished, monkeypatch):
    (folder, _), _, _ = finished
    models = Models(0, folder / "out" / "models.seed0", {})
    own = measure_peak({"system": None})
    theirs = peak_memory(System("ar", "ar"), models, ["a b", "c"], 3, "float32")
    if own is not None:
        assert 50e6 < theirs < 5e9 and theirs != own
    monkeypatch.setattr("sys.executable", shutil.which("false"))
    with pytest.raises(UserError, match="memory of system 'ar' failed: no message"):
        peak_memory(System("ar", "ar"), models, ["a"], 1, "float32")
