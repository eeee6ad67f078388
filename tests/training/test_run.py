"""Training runs: learning, exact resuming, settings, safe saving, bad input."""

import json
import os
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tess.backbones.pretrained import stays_float32
from tess.data.token_rows import TokenRows
from tess.decoders.load import load_decoder
from tess.errors import UserError
from tess.schedulers.recoverability import auto_simplex_value
from tess.schedulers.simplex import NUM_TOP
from tess.storage.parts import load_parts
from tess.text.tokenization import train_tokenizer
from tess.training.flags import parse_settings
from tess.training.run import train
from tess.training.start import make_canvas

TINY = {
    "task": "simplification",
    "train_tokenizer": True,
    "vocab_size": 300,
    "hybrid_override_pattern": "M*E-",
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
    "max_source_length": 24,
    "max_target_length": 24,
    "per_device_train_batch_size": 4,
    "max_train_samples": 24,
    "max_eval_samples": 4,
    "learning_rate": 1e-3,
    "warmup_steps": 0,
    "logging_steps": 1,
    "save_strategy": "no",
    "save_total_limit": 0,
    "num_samples_to_print": 0,
    "disable_tqdm": True,
    "use_cpu": True,
    "report_to": "none",
}


def run(tmp_path, name="run", **changes):
    """Train with TINY and `changes`; the folder and the log by step."""
    config = TINY | {"output_dir": str(tmp_path / name)} | changes
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    final = train(parse_settings([str(path)]))
    checkpoints = sorted(final.parent.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
    history = (
        json.loads((checkpoints[-1] / "trainer_state.json").read_text())["log_history"]
        if checkpoints
        else []
    )
    return final, {entry["step"]: entry["loss"] for entry in history if "loss" in entry}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"objective": "ar"},
        {
            "conditional_generation": "seq2seq,ul2,text_infilling",
            "pad_loss_weight": 0.1,
            "canvas": "rule",
        },
        {
            "gradient_accumulation_steps": 2,
            "ema_decay": 0.9,
            "eval_strategy": "steps",
            "eval_steps": 2,
        },
        {"timestep_density": "learned", "eval_strategy": "steps", "eval_steps": 2},
    ],
    ids=["tess", "ar", "mixture", "accumulation and average", "learned density"],
)
def test_a_killed_run_goes_on_to_the_same_losses(tmp_path, changes):
    # 6 steps an epoch (3 with accumulation): the break is in the middle of the second one.
    changes = {"save_strategy": "steps", "save_steps": 4, "max_steps": 12, **changes}
    final, straight = run(tmp_path, "straight", **changes)
    shutil.copytree(tmp_path / "straight", tmp_path / "killed")
    for folder in ("checkpoint-8", "checkpoint-12", "final"):
        shutil.rmtree(tmp_path / "killed" / folder)
    resumed_final, resumed = run(tmp_path, "killed", **changes)
    assert sorted(straight) == list(range(1, 13))
    assert resumed == straight
    one, other = load_parts(final).model.state_dict(), load_parts(resumed_final).model.state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    "changes",
    [
        {"objective": "ar", "mtp_depth": 2},
        {"length_head": True, "pad_loss_weight": 0.1, "canvas": "rule"},
        {"conditional_generation": "seq2seq,ul2,text_infilling", "source_drop_probability": 0.3},
    ],
    ids=["ar", "tess", "mixture"],
)
def test_accumulating_is_the_same_training(tmp_path, changes):
    # 22 rows: the last update of an epoch has 6, and the last of its micro-batches of 4 has 2
    common = {
        "max_steps": 4, "max_train_samples": 22, "adam_epsilon": 1e-4, "save_strategy": "steps",
        "save_steps": 4, "eval_strategy": "steps", "eval_steps": 4, **changes,
    }
    runs = {}
    for batch, accumulation, eval_batch in ((8, 1, 4), (4, 2, 1), (1, 8, 3)):
        sizes = {
            "per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation,
            "per_device_eval_batch_size": eval_batch,
        }
        final, losses = run(tmp_path, f"batch {batch}", **common | sizes)
        state = json.loads((final.parent / "checkpoint-4" / "trainer_state.json").read_text())
        evaluation = [entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry]
        runs[batch] = losses, evaluation, load_parts(final).model.state_dict()
    (losses, evaluation, weights), *others = runs.values()
    for other_losses, other_evaluation, other_weights in others:
        assert other_losses == pytest.approx(losses, abs=1e-4)
        if "," not in changes.get("conditional_generation", ""):  # there it is one draw per batch
            assert other_evaluation == pytest.approx(evaluation, abs=1e-4)
        for name, tensor in weights.items():
            torch.testing.assert_close(other_weights[name], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("batch", "accumulation", "want"), [(8, 1, 15), (2, 2, 18), (2, 1, 24), (6, 1, 16)]
)
def test_a_run_goes_on_by_rows_where_batches_have_another_size(
    tmp_path, monkeypatch, batch, accumulation, want
):
    """24 rows in batches of 4, three epochs: killed after 12 updates, at the end of the second."""
    common = {"objective": "ar", "num_train_epochs": 3, "save_strategy": "steps"}
    first, _ = run(tmp_path, save_steps=2, max_steps=12, **common)
    shutil.rmtree(first)
    seen = []
    read = TokenRows.__getitem__
    monkeypatch.setattr(
        TokenRows, "__getitem__", lambda self, key: seen.append(key) or read(self, key)
    )
    sizes = {
        "per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation,
        "save_steps": 1,
    }
    for stop, rows in ((12, 0), (10, 16)):
        for folder in (tmp_path / "run").glob("checkpoint-*"):
            if int(folder.name.split("-")[1]) > stop:
                shutil.rmtree(folder)
        shutil.copytree(tmp_path / "run", tmp_path / f"from {stop}")
        seen.clear()
        final, losses = run(tmp_path, f"from {stop}", **common | sizes)
        per_update = batch * accumulation
        left = (24 - rows // per_update * per_update if rows else 0, 24)
        updates = sum(-(-part // per_update) for part in left)
        assert max(losses) == stop + updates
        if stop == 12:
            assert max(losses) == want
        trained = [key for key in seen if isinstance(key, tuple)]
        assert len(trained) == sum(left)
        # an epoch that is gone on with gives no row twice that it had given before that update
        assert sorted(index for epoch, index, _ in trained if epoch == 2) == list(range(24))
        of_second = [index for epoch, index, _ in trained if epoch == 1]
        assert len(set(of_second)) == len(of_second) == left[0]


def test_resuming_at_the_end_of_an_epoch_is_exact_too(tmp_path):
    changes = {"save_strategy": "steps", "save_steps": 6, "max_steps": 12}
    _, straight = run(tmp_path, "straight", **changes)
    shutil.rmtree(tmp_path / "straight" / "checkpoint-12")
    _, resumed = run(tmp_path, "straight", **changes)
    assert resumed == straight


def test_a_finished_run_is_not_trained_again(tmp_path, capsys):
    changes = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    final, _ = run(tmp_path, **changes)
    before = (final / "denoiser" / "model.safetensors").read_bytes()
    run(tmp_path, **changes)
    assert "is the end of this run already" in capsys.readouterr().out
    assert (final / "denoiser" / "model.safetensors").read_bytes() == before


def test_a_finished_run_whose_result_is_lost_or_old_writes_it_again(tmp_path):
    changes = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    final, _ = run(tmp_path, **changes)
    shutil.rmtree(final)
    run(tmp_path, **changes)
    assert load_parts(final)
    os.utime(final, (0, 0))  # of an earlier, shorter run
    run(tmp_path, **changes)
    assert final.stat().st_mtime > 0


@pytest.mark.parametrize("objective", ["tess", "ar"])
def test_the_loss_falls_and_the_result_generates(tmp_path, objective, capsys):
    final, losses = run(
        tmp_path, objective=objective, max_steps=40, learning_rate=1e-2, save_strategy="steps",
        save_steps=40, max_train_samples=8, num_samples_to_print=1, eval_strategy="steps",
        eval_steps=20, num_inference_steps=2,
    )
    assert losses[40] < losses[1] - 1
    output = capsys.readouterr().out
    assert [f"samples at step {step} " in output for step in (0, 20, 40)] == [True] * 3
    decoder = load_decoder(final)
    assert decoder.name == objective
    (generation,) = decoder.generate(["A cat sat ."])
    assert 0 < generation.num_new_tokens <= 24


def test_length_rule_follows_the_data(tmp_path):
    path = tmp_path / "rows.jsonl"
    row = {"source": "abcdefghij klmnopqrst", "target": ["abcdefghij", "other"]}
    path.write_text((json.dumps(row) + "\n") * 4)
    data = {"task": None, "train_file": [str(path)], "max_steps": 1, "vocab_size": 261}
    config = load_parts(run(tmp_path, **data)[0]).model.config
    assert (config.target_length_ratio, config.target_length_margin) == (round(11 / 23, 4), 0)
    assert (config.max_source_length, config.max_target_length) == (24, 24)


def test_weights_pass_between_the_decoders(tmp_path):
    ar, _ = run(tmp_path, "ar", objective="ar", max_steps=1)
    tess, _ = run(tmp_path, "tess", max_steps=1, learning_rate=0.0, init_from=str(ar), **NO_SIZES)
    again, _ = run(
        tmp_path, "again", max_steps=1, learning_rate=0.0, init_from=str(tess), **NO_SIZES
    )
    back, _ = run(
        tmp_path,
        "back",
        objective="ar",
        max_steps=1,
        learning_rate=0.0,
        init_from=str(tess),
        **NO_SIZES,
    )
    one, other = load_parts(ar).model, load_parts(back).model
    first, second = load_parts(tess).model, load_parts(again).model
    configs = [json.loads((p / "denoiser" / "config.json").read_text()) for p in (tess, again)]
    assert configs[0] == configs[1]
    assert str(tmp_path) not in "".join(
        path.read_text() for path in tmp_path.glob("*/final/**/*.json")
    )
    assert torch.equal(first.time_embedding.weight, second.time_embedding.weight)
    for name, tensor in one.state_dict().items():
        if (
            "e_score_correction_bias" not in name
        ):  # balanced in every step, whatever the learning rate
            assert torch.equal(tensor, other.state_dict()[name]), name


NO_SIZES = {name: None for name in list(TINY)[1 : list(TINY).index("max_source_length")]}


def test_saved_type_and_router_bias(tmp_path):
    final, _ = run(tmp_path, max_steps=2, save_dtype="bfloat16")
    model = load_parts(final, dtype=torch.bfloat16).model
    assert model.backbone.embeddings.weight.dtype == torch.bfloat16
    bias = model.backbone.layers[2].mixer.gate.e_score_correction_bias
    assert bias.dtype == torch.float32 and bias.abs().max() > 0
    stored = load_file(final / "denoiser" / "model.safetensors")
    kinds = {tensor.dtype for name, tensor in stored.items() if not stays_float32(name)}
    assert kinds == {torch.bfloat16}
    assert stored["backbone.layers.0.mixer.A_log"].dtype == torch.float32


def test_a_predictor_is_trained_behind_a_frozen_model_and_changes_no_text(tmp_path):
    ar, _ = run(tmp_path, "ar", objective="ar", max_steps=4, learning_rate=1e-2)
    options = {"objective": "ar", "mtp_depth": 2, "freeze_backbone": True, "init_from": str(ar)}
    final, losses = run(
        tmp_path,
        "mtp",
        max_steps=30,
        learning_rate=1e-2,
        max_train_samples=8,
        save_strategy="steps",
        save_steps=30,
        **options | NO_SIZES,
    )
    assert losses[30] < losses[1] - 0.5
    before, after = load_parts(ar).model, load_parts(final).model
    assert before.mtp is None and after.config.num_nextn_predict_layers == 1
    for name, tensor in before.state_dict().items():
        assert torch.equal(tensor, after.state_dict()[name]), name
    balanced = after.mtp.layers[1].mixer.gate.e_score_correction_bias
    assert balanced.any()
    texts = ["A cat sat .", "The dog ran after the cat ."]
    plain, drafted = (load_decoder(final, name) for name in ("ar", "ar+mtp"))
    want = [generation.token_ids for generation in plain.generate(texts)]
    assert [generation.token_ids for generation in drafted.generate(texts)] == want
    assert want == [generation.token_ids for generation in load_decoder(ar).generate(texts)]


def test_a_predictor_is_trained_with_the_model_and_stays_when_training_goes_on(tmp_path):
    first, losses = run(
        tmp_path, "first", objective="ar", mtp_depth=1, max_steps=30, learning_rate=1e-2,
        max_train_samples=8, mtp_hybrid_override_pattern="*-", save_strategy="steps", save_steps=30,
    )
    assert losses[30] < losses[1] - 1
    assert load_parts(first).model.config.mtp_hybrid_override_pattern == "*-"
    second, _ = run(
        tmp_path, "second", objective="ar", max_steps=1, learning_rate=0.0, init_from=str(first),
        **NO_SIZES,
    )
    one, other = load_parts(first).model.state_dict(), load_parts(second).model.state_dict()
    assert all(torch.equal(one[n], other[n]) for n in one if n.startswith("mtp."))
    tess, _ = run(tmp_path, "tess", max_steps=1, init_from=str(first), **NO_SIZES)
    assert load_parts(tess).model.config.backbone_config.num_nextn_predict_layers == 0


def test_bf16_autocast_trains(tmp_path):
    final, losses = run(
        tmp_path,
        max_steps=3,
        bf16=True,
        self_conditioning_probability=1.0,
        save_strategy="steps",
        save_steps=3,
    )
    assert len(losses) == 3 and load_parts(final).model.dtype == torch.float32


def test_a_text_file_trains_without_sources(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("one line of text\nanother line of text\n" * 4)
    data = {
        "task": None,
        "train_file": ["texts.txt"],
        "data_root": str(tmp_path),
        "vocab_size": 270,
    }
    final, _ = run(tmp_path, max_steps=2, conditional_generation="ul2_with_unconditional", **data)
    assert load_parts(final).model.config.target_length_ratio is None


def test_the_best_checkpoint_is_kept_and_becomes_the_result(tmp_path):
    # The rate is absurd after the first step, so the first checkpoint is the best one.
    changes = {
        "max_steps": 6, "save_strategy": "steps", "eval_strategy": "steps", "save_steps": 2,
        "eval_steps": 2, "learning_rate": 30.0, "warmup_steps": 100,
        "load_best_model_at_end": True, "metric_for_best_model": "loss", "save_total_limit": 2,
    }
    final, _ = run(tmp_path, **changes)
    names = sorted(path.name for path in final.parent.glob("checkpoint-*"))
    assert names == ["checkpoint-2", "checkpoint-6"]
    state = json.loads((final.parent / "checkpoint-6" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(final.parent / "checkpoint-2")
    one, other = load_parts(final).model, load_parts(final.parent / "checkpoint-2").model
    assert torch.equal(one.backbone.embeddings.weight, other.backbone.embeddings.weight)
    # The same command again leaves it alone, and writes the same where it is gone.
    for lost in (False, True):
        if lost:
            shutil.rmtree(final)
        run(tmp_path, **changes)
        again = load_parts(final).model.backbone.embeddings.weight
        assert torch.equal(again, other.backbone.embeddings.weight)


def test_unset_settings_of_the_process_are_those_of_the_checkpoint(tmp_path):
    process = {
        "num_diffusion_steps": 7, "beta_schedule": "squaredcos_cap_v2", "cosine_s": 0.008,
        "pad_loss_weight": 0.25, "simplex_value": 3.0, "timestep_spacing": "uniform",
        "timestep_density": "uniform", "noise": "dense", "num_top": 9,
    }
    first, _ = run(tmp_path, "first", max_steps=1, **process)
    flags = {"init_from": str(first), "max_steps": 1, **NO_SIZES}
    kept, _ = run(tmp_path, "kept", **flags)
    changed, _ = run(tmp_path, "changed", cosine_s=0.1, pad_loss_weight=0.0, **flags)
    named, _ = run(tmp_path, "named", diffusion_preset="tess", noise="order_statistics", **flags)
    new, _ = run(tmp_path, "new", max_steps=1)
    published, _ = run(tmp_path, "published", max_steps=1, diffusion_preset="tess", cosine_s=0.2)

    def values(folder):
        parts = load_parts(folder)
        own = parts.scheduler.config
        assert own.simplex_value == parts.model.config.simplex_value
        assert own.vocab_size == parts.model.config.vocab_size
        names = ("num_train_timesteps", "beta_schedule", "cosine_s", "simplex_value")
        more = ("timestep_spacing", "timestep_density", "noise", "num_top")
        return [getattr(own, name) for name in names + more], parts.model.config.pad_loss_weight

    flat = ["uniform", "uniform"]
    assert values(kept) == ([7, "squaredcos_cap_v2", 0.008, 3.0, *flat, "dense", 9], 0.25)
    assert values(changed) == ([7, "squaredcos_cap_v2", 0.1, 3.0, *flat, "dense", 9], 0.0)
    cosine = "squaredcos_improved_ddpm"
    process = [5000, cosine, 1e-4, 5.0, *flat, "order_statistics", 9]
    assert values(named) == (process, 0.25)
    k = auto_simplex_value(load_parts(new).model.config.vocab_size)
    even = ["recoverability", "recoverability"]
    assert values(new) == ([5000, cosine, 1e-4, k, *even, "order_statistics", NUM_TOP], 0.0)
    process = [5000, cosine, 0.2, 5.0, *flat, "order_statistics", NUM_TOP]
    assert values(published) == (process, 0.0)
    parts = load_parts(kept)
    settings = parse_settings(["--init_from", "x", "--task", "simplification", "--output_dir", "o"])
    assert make_canvas(settings, parts, None).pad_loss_weight == 0.25


def test_a_checkpoint_whose_tokenizer_does_not_fit_cannot_be_gone_on_from(tmp_path):
    final, _ = run(tmp_path, max_steps=1)
    large = train_tokenizer(["a b c"] * 5, 262)
    large.add_tokens([f"word{i}" for i in range(300)])
    large.save_pretrained(final / "tokenizer")
    with pytest.raises(UserError, match=r"vocabulary mismatch: the tokenizer has 56\d ids"):
        run(tmp_path, "next", init_from=str(final), max_steps=1, **NO_SIZES)


# Settings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rat": 1}, "no key 'learning_rat'; did you mean learning_rate"),
        ({"learning_rate": "fast"}, ": invalid float value: 'fast'"),
        ({"objective": "mask"}, "invalid choice: 'mask'"),
        ({"task": "translation"}, "unknown task 'translation'; known are"),
        ({"task": None}, "either --task or --train_file"),
        ({"task": None, "train_file": ["nowhere.jsonl"]}, "no file 'nowhere.jsonl'"),
        ({"conditional_generation": "seq2seq,ul3"}, "no 'ul3'; the known ones are seq2seq"),
        ({"objective": "ar", "conditional_generation": "ul2"}, "ul2 has no autoregressive form"),
        ({"output_dir": None}, "--output_dir"),
        ({"train_tokenizer": False}, "exactly one of --tokenizer"),
        ({"vocab_size": 100}, "at least 261"),
        ({"max_target_length": 1}, "max_target_length must be at least 3"),
        ({"ema_decay": 1.5}, "ema_decay must be between 0 and 1"),
        ({"max_train_samples": 0}, "max_train_samples must be at least 1, got 0"),
        ({"max_eval_samples": -1}, "max_eval_samples must be at least 1, got -1"),
        ({"mamba_direction": "sideways"}, "mamba_direction must be one of"),
        ({"beta_schedule": "linearr"}, "unknown beta_schedule 'linearr'"),
        ({"self_conditioning": "logits_median"}, "self_conditioning must be one of"),
        ({"mtp_depth": 1}, "--mtp_depth belongs to --objective ar"),
        ({"preset": "small-3"}, "there is no preset 'small-3'; did you mean small-3"),
        ({"objective": "ar", "mtp_depth": -1}, "mtp_depth must be 0 or more, got -1"),
        ({"objective": "ar", "freeze_backbone": True}, "leaves nothing to train without"),
        (
            {"objective": "ar", "mtp_depth": 1, "mtp_loss_scale": 0.0},
            "mtp_loss_scale must be above 0, got 0.0",
        ),
        (
            {"train_tokenizer": False, "init_from": "nowhere"},
            "--chunk_size is fixed by the checkpoint",
        ),
    ],
)
def test_bad_settings_are_one_sentence(tmp_path, changes, message):
    with pytest.raises(ValueError) as caught:
        run(tmp_path, max_steps=1, **changes)
    assert message in str(caught.value)


def test_a_preset_gives_the_sizes_that_are_not_given(tmp_path):
    final, _ = run(
        tmp_path, objective="ar", preset="small-3m", max_steps=1,
        **NO_SIZES | {"vocab_size": 300, "train_tokenizer": True, "hidden_size": 96},
    )
    config = load_parts(final).model.config
    assert config.hybrid_override_pattern == "M*-M*EM*-" and config.mamba_num_heads == 8
    assert (config.hidden_size, config.vocab_size) == (96, 300)
    with pytest.raises(UserError, match="--preset is for a new model"):
        run(tmp_path, "b", preset="small-3m", init_from=str(final), **NO_SIZES)


def test_a_missing_column_names_what_is_there(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"complex": "a b", "simple": "a"}\n')
    with pytest.raises(UserError, match=r"no column 'source'.*\['complex', 'simple'\]"):
        run(tmp_path, task=None, train_file=[str(tmp_path / "rows.jsonl")])


def test_unknown_flag_and_missing_file_name_the_problem(tmp_path):
    with pytest.raises(UserError, match="no flag '--hidden'.*--hidden_size"):
        parse_settings(["--hidden", "3"])
    with pytest.raises(UserError, match="there is no file"):
        parse_settings([str(tmp_path / "none.yaml")])
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(UserError, match="broken.json is not readable"):
        parse_settings([str(tmp_path / "broken.json")])


def test_vocabulary_mismatch_is_refused(tmp_path):
    train_tokenizer(["a b c"] * 5, 262).save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(UserError, match=r"the tokenizer has 26\d ids and vocab_size is 300"):
        run(tmp_path, train_tokenizer=False, tokenizer=str(tmp_path / "tokenizer"))


def test_another_model_in_the_same_folder_is_refused(tmp_path):
    changes = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    run(tmp_path, **changes)
    with pytest.raises(UserError, match="another run .intermediate_size was 32 and is 48"):
        run(tmp_path, intermediate_size=48, **changes)


# Saving


def test_a_final_folder_with_other_files_is_refused_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr("tess.training.run.prepare", lambda *_: pytest.fail("went on"))
    (tmp_path / "run" / "final").mkdir(parents=True)
    notes = tmp_path / "run" / "final" / "notes.txt"
    notes.write_text("mine")
    with pytest.raises(UserError, match="final holds something else than a checkpoint.*notes.txt"):
        run(tmp_path)
    notes.rename(notes.with_name("config.json"))  # of another model
    with pytest.raises(UserError, match="final holds something else than a checkpoint"):
        run(tmp_path)
    assert notes.with_name("config.json").read_text() == "mine"


def test_a_full_disk_leaves_the_previous_checkpoint_loadable(tmp_path, monkeypatch):
    written = torch.save
    calls = []

    def full(value, file, *args, **kwargs):
        calls.append(str(file))
        if "checkpoint-4" in str(file) and "optimizer" in str(file):
            raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")
        written(value, file, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    changes = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}
    with pytest.raises(
        UserError, match="could not save .*checkpoint-4 .*earlier checkpoints are untouched"
    ):
        run(tmp_path, **changes)
    monkeypatch.undo()
    assert any("optimizer" in file for file in calls)
    assert [p.name for p in sorted((tmp_path / "run").iterdir())] == [
        "checkpoint-2",
        "settings.json",
    ]
    load_parts(tmp_path / "run" / "checkpoint-2")
    _, losses = run(tmp_path, **changes)
    assert sorted(losses) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("objective", ["tess", "ar"])
def test_missing_and_unknown_tensors_are_refused_by_name(tmp_path, objective):
    from safetensors.torch import load_file, save_file

    final, _ = run(tmp_path, max_steps=1, objective=objective)
    weights = next(final.rglob("model.safetensors"))
    tensors = load_file(weights)
    first = next(name for name in tensors if name.endswith("in_proj.weight"))
    save_file(
        {("stranger" if n == first else n): t for n, t in tensors.items()},
        weights,
        {"format": "pt"},
    )
    with pytest.raises(UserError, match="in_proj.weight|stranger"):
        load_parts(final)
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(UserError, match="is truncated or no safetensors file"):
        load_parts(final)
