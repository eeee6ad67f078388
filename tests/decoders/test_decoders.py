"""Both decoders behind one call, and scripts/generate.py and scripts/train.py from the outside."""

import dataclasses
import json
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tess.backbones.causal_lm import HybridForCausalLM
from tess.backbones.config import HybridConfig
from tess.config import TessConfig
from tess.decoders.autoregressive import _KeyedNucleus
from tess.decoders.base import Description
from tess.decoders.load import load_decoder, make_decoder
from tess.decoders.options import SamplerOptions
from tess.denoiser import TessDenoiser
from tess.errors import UserError
from tess.sampling.call import TessPipelineOutput
from tess.schedulers.renoising import RenoisingScheduler
from tess.storage.parts import Parts, load_parts, save_parts
from tess.text.tokenization import train_tokenizer
from tiny import DECODER as SIZES

SCRIPTS = Path(__file__).parents[2] / "scripts"
TEXTS = ["a cat", "the dog ran after the cat and the cat ran away", "naïve 東京", "a cat sat"]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A folder with tess/ and ar/; weights are random and large, so that texts differ."""
    root = tmp_path_factory.mktemp("checkpoints")
    torch.manual_seed(0)
    tokenizer = train_tokenizer(TEXTS * 3, 270)
    tokenizer.model_max_length = 16
    sizes = SIZES | {"vocab_size": len(tokenizer), "initializer_range": 0.3}
    limits = {"max_source_length": 16, "max_target_length": 12, "target_length_ratio": 1.0}
    denoiser = TessDenoiser(TessConfig(backbone_config=HybridConfig(**sizes), **limits))
    scheduler = RenoisingScheduler(vocab_size=len(tokenizer))
    save_parts(Parts(denoiser, tokenizer, scheduler), root / "tess")
    causal = HybridForCausalLM(HybridConfig(**sizes))
    causal.generation_config.max_new_tokens = 12
    save_parts(Parts(causal, tokenizer), root / "ar")
    return root


@pytest.mark.parametrize("name", ["tess", "ar"])
def test_texts_do_not_depend_on_batch_or_order(checkpoints, name):
    decoder = load_decoder(checkpoints, name)
    together = decoder.generate(TEXTS, batch_size=4)
    assert [decoder.generate([text])[0] for text in TEXTS] == together
    assert decoder.generate(TEXTS[::-1], batch_size=3)[::-1] == together
    assert len({generation.text for generation in together}) > 1
    assert (decoder.name, decoder.num_parameters) == (
        name,
        sum(p.numel() for p in decoder.model.parameters()),
    )


@pytest.mark.parametrize("name", ["tess", "ar"])
def test_seeds_lengths_and_counts(checkpoints, name):
    decoder = load_decoder(checkpoints / name)
    sampled = [decoder.generate(TEXTS, top_p=0.95, seed=seed) for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]
    for generation in decoder.generate(TEXTS, gen_length=5):
        assert generation.num_new_tokens == len(generation.token_ids) <= 5
        assert 2 not in generation.token_ids[:-1]
        assert generation.nfe == (16 if name == "tess" else generation.num_new_tokens)
    assert max(generation.num_new_tokens for generation in decoder.generate(TEXTS)) <= 12
    state = torch.random.get_rng_state()
    decoder.generate(TEXTS[:1], top_p=0.5)
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize("name", ["tess", "ar"])
def test_sampled_texts_do_not_depend_on_batch_or_order(checkpoints, name):
    decoder = load_decoder(checkpoints, name)
    # products of another batch size round otherwise; in float32 that is another token in 1 of 25
    decoder.model.double()
    texts = [*TEXTS, "a cat", "a cat"]
    options = {"top_p": 0.9, "temperature": 1.5}
    together = decoder.generate(texts, **options)
    assert len({generation.text for generation in (together[0], *together[4:])}) > 1
    for batch_size in (1, 2, 5):
        assert decoder.generate(texts, batch_size=batch_size, **options) == together
    assert decoder.generate(TEXTS[::-1], **options)[::-1] == together[:4]


@pytest.mark.parametrize("options", [{}, {"top_p": 0.9, "temperature": 1.5}])
@pytest.mark.parametrize("drafts", [1, 4])
def test_drafts_change_no_text_greedy_or_sampled_and_are_counted(drafting, options, drafts):
    plain = load_decoder(drafting, "ar").generate(TEXTS, **options)
    decoder = load_decoder(drafting, "ar+mtp", num_draft_tokens=drafts)
    assert (decoder.name, decoder.describe()) == ("ar+mtp", Description(num_draft_tokens=drafts))
    for batch_size in (1, 4):
        drafted = decoder.generate(TEXTS, batch_size=batch_size, **options)
        assert [g.token_ids for g in drafted] == [g.token_ids for g in plain]
        for one, other in zip(plain, drafted):
            assert other.num_verifications == other.nfe - 1
            assert other.num_drafted == other.num_verifications * drafts
            assert one.nfe <= other.nfe + other.num_accepted
            assert other.nfe <= one.nfe
    assert len({generation.text for generation in plain}) > 1


@pytest.fixture(scope="module")
def drafting(checkpoints, tmp_path_factory):
    """As the `ar` checkpoint, with a predictor of random weights."""
    folder = tmp_path_factory.mktemp("drafting")
    parts = load_parts(checkpoints / "ar")
    fields = parts.model.config.to_dict() | {"num_nextn_predict_layers": 1}
    torch.manual_seed(5)
    model = HybridForCausalLM(HybridConfig(**fields))
    model.load_state_dict(parts.model.state_dict(), strict=False)
    model.generation_config.max_new_tokens = 12
    save_parts(Parts(model, parts.tokenizer), folder)
    return folder


def test_the_text_of_an_equal_source_does_not_depend_on_the_batches(checkpoints):
    decoder = load_decoder(checkpoints, "tess")
    together = decoder.generate(["a cat"] * 5, batch_size=5)
    assert len({generation.text for generation in together}) > 1
    assert decoder.generate(["a cat"] * 5, batch_size=2) == together


def test_keyed_sampling_has_the_nucleus_distribution():
    probabilities = torch.tensor([0.1, 0.4, 0.2, 0.3])
    rows = 4000
    keys = torch.randint(2**62, (rows,))
    scores = probabilities.log().expand(rows, -1)
    left = _KeyedNucleus(keys, 3, top_p=0.8, temperature=1.0)(torch.zeros(rows, 5), scores)
    assert torch.equal(left.isfinite().sum(dim=1), torch.ones(rows, dtype=torch.long))
    share = left.argmax(dim=1).bincount(minlength=4) / rows
    torch.testing.assert_close(share, torch.tensor([0, 4, 2, 3]) / 9, atol=0.03, rtol=0)


def test_padding_is_not_counted_wherever_it_stands(checkpoints, monkeypatch):
    decoder = load_decoder(checkpoints, "tess")
    rows = torch.tensor([[5, 0, 6, 2, 0, 0], [0, 5, 0, 6, 0, 0]])
    output = TessPipelineOutput(sequences=rows, texts=None, nfe=[3, 3], lengths=[6, 4])

    class Fixed:
        def __call__(self, **options):
            return output

    decoder.pipeline = Fixed()
    written = decoder.generate(["a cat", "a cat"], num_inference_steps=3)
    assert [g.token_ids for g in written] == [[5, 6, 2], [5, 6]]
    assert [(g.num_new_tokens, g.nfe) for g in written] == [(3, 3), (2, 3)]
    # With one token for both roles the first is the end and what follows the canvas is not.
    decoder.tokenizer.pad_token = decoder.tokenizer.eos_token
    output.sequences = torch.tensor([[5, 6, 2, 2, 2, 2], [5, 6, 7, 8, 2, 2]])
    written = decoder.generate(["a cat", "a cat"], num_inference_steps=3)
    assert [g.token_ids for g in written] == [[5, 6, 2], [5, 6, 7, 8]]


def test_default_steps_fit_a_scheduler_with_few(checkpoints):
    parts = load_parts(checkpoints / "tess")
    scheduler = RenoisingScheduler.from_config(parts.scheduler.config, num_train_timesteps=5)
    few = dataclasses.replace(parts, scheduler=scheduler)
    decoder = make_decoder(few)
    assert decoder.default_num_inference_steps == 5
    assert decoder.generate(["a cat"])[0].nfe == 5
    assert make_decoder(parts).default_num_inference_steps == 16
    assert load_decoder(checkpoints, "ar").default_num_inference_steps is None


def test_the_right_decoder_is_found(checkpoints, tmp_path):
    assert load_decoder(checkpoints).name == "tess"
    assert load_decoder(checkpoints / "ar").name == "ar"
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "final").symlink_to(checkpoints / "ar")
    assert load_decoder(tmp_path / "run").name == "ar"
    for folder, wanted, message in (
        (checkpoints / "ar", "tess", "has no decoder 'tess'; it has ar"),
        (checkpoints / "tess", "ar", "has no decoder 'ar'; it has tess"),
        (tmp_path, None, "is not a checkpoint"),
        (tmp_path / "none", None, "there is no folder"),
        (checkpoints, "mtp", r"unknown decoder 'mtp'; known are tess, ar, ar\+mtp"),
        (checkpoints / "tess", "ar+mtp", r"has no decoder 'ar\+mtp'; it has tess"),
        (checkpoints / "ar", "ar+mtp", r"ar\+mtp needs a checkpoint with a multi-token predictor"),
    ):
        with pytest.raises(UserError, match=message):
            load_decoder(folder, wanted)
    with pytest.raises(UserError, match=r"num_draft_tokens belongs to the ar\+mtp decoder"):
        load_decoder(checkpoints, "ar", num_draft_tokens=2)


def test_a_number_of_drafts_out_of_range_is_refused(drafting):
    with pytest.raises(UserError, match="num_draft_tokens must be at least 1, got 0"):
        load_decoder(drafting, "ar+mtp", num_draft_tokens=0)


@pytest.mark.parametrize("name", ["tess", "ar"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gen_length": 0}, "gen_length must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"top_p": 1.5}, "top_p must be above 0 and at most 1"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"temperature": 0.7}, "temperature 0.7 does nothing without top_p"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"num_inference_steps": 5001}, "num_inference_steps"),
    ],
)
def test_options_out_of_range_are_refused(checkpoints, name, options, message):
    with pytest.raises(ValueError, match=message):
        load_decoder(checkpoints, name).generate(["a cat"], **options)


@pytest.mark.parametrize("name", ["tess", "ar"])
def test_empty_and_long_texts(checkpoints, name, caplog):
    decoder = load_decoder(checkpoints, name)
    with pytest.raises(UserError, match="empty"):
        decoder.generate(["a cat", " \n"])
    long = "the dog ran " * 30
    with pytest.raises(UserError, match="the model takes 16"):
        decoder.generate([long], strict=True)
    assert len(decoder.generate([long])) == 1
    assert "cut off" in caplog.text


def test_a_tokenizer_that_does_not_fit_is_refused(checkpoints, tmp_path):
    parts = load_parts(checkpoints / "ar")
    larger = train_tokenizer(TEXTS * 3, 270)
    larger.add_tokens(["more"])
    save_parts(dataclasses.replace(parts, tokenizer=larger), tmp_path)
    with pytest.raises(UserError, match="vocabulary mismatch: the tokenizer has 2.. ids"):
        load_decoder(tmp_path)
    save_parts(dataclasses.replace(parts, tokenizer=train_tokenizer(TEXTS, 261)), tmp_path)
    texts = load_decoder(tmp_path).generate(TEXTS)  # fewer ids than rows fit
    assert max(max(text.token_ids) for text in texts) < 261


@pytest.mark.parametrize(
    ("file", "key", "value", "message"),
    [
        ("model_index.json", "scheduler", ["diffusers", "DDIMScheduler"], "unknown scheduler 'DDI"),
        ("scheduler/scheduler_config.json", "_class_name", "None", "unknown scheduler 'None'"),
        ("denoiser/config.json", "model_type", "bert", "unknown model_type 'bert'; known"),
        ("denoiser/config.json", "max_source_length", "16", "'max_source_length' expected int"),
        ("denoiser/config.json", "source_encoding", "odd", "source_encoding must be one of"),
        ("denoiser/config.json", "vocab_size", 5, "vocab_size cannot be set: it follows from"),
        ("denoiser/config.json", "use_return_dict", "x", "use_return_dict cannot be set: it"),
        ("scheduler/scheduler_config.json", "num_top", "x", "num_top must be an integer, got 'x'"),
    ],
)
def test_what_a_tess_folder_names_must_be_known(checkpoints, tmp_path, file, key, value, message):
    shutil.copytree(checkpoints / "tess", tmp_path / "tess")
    path = tmp_path / "tess" / file
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(UserError) as caught:
        load_decoder(tmp_path / "tess")
    assert message in str(caught.value) and str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    if "scheduler" in message:
        assert "known are RenoisingScheduler" in str(caught.value)


@pytest.mark.parametrize("value", [5, "wide", None])
def test_a_wrong_typed_field_of_an_ar_folder_is_named(checkpoints, tmp_path, value):
    shutil.copytree(checkpoints / "ar", tmp_path / "ar")
    path = tmp_path / "ar" / "config.json"
    key = "hybrid_override_pattern" if value == 5 else "hidden_size"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(UserError, match="ar/config.json cannot be used: .*") as caught:
        load_decoder(tmp_path / "ar")
    assert key in str(caught.value) and "\n" not in str(caught.value)


# Scripts


def script(name, *args):
    """Run a script as a user does."""
    command = [sys.executable, str(SCRIPTS / f"{name}.py"), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture
def refused(monkeypatch, capsys):
    """Run a script through its door in this process; the one sentence that it ends with."""

    def run(name, *args):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, args)])
        with pytest.raises(SystemExit) as caught:
            runpy.run_path(str(SCRIPTS / f"{name}.py"), run_name="__main__")
        output = capsys.readouterr()
        assert caught.value.code == 2 and output.out == ""
        last = output.err.strip().splitlines()[-1]
        assert "error: " in last
        return last

    return run


def test_generate_prints_text_evaluations_and_times(checkpoints, tmp_path):
    (tmp_path / "in.txt").write_text("a cat\n\nthe dog ran\n")
    shared = ["--checkpoint", checkpoints, "--num_inference_steps", 3]
    result = script("generate", "naïve 東京", "--input", tmp_path / "in.txt", *shared, "--json")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert list(report) == [
        "decoder", "checkpoint", "num_parameters", "num_inference_steps", "gen_length", "seed",
        "top_p", "temperature", "load_seconds", "generate_seconds", "results",
    ]
    sources = [row["source"] for row in report["results"]]
    assert sources == ["naïve 東京", "a cat", "", "the dog ran"]
    for row in report["results"]:
        assert list(row) == [
            "source", "text", "num_new_tokens", "nfe", "num_drafted", "num_accepted",
        ]
        assert row["nfe"] == (3 if row["source"] else 0)

    plain = script("generate", "a cat", *shared)
    assert plain.returncode == 0 and plain.stderr == ""
    text, _, summary = plain.stdout.rstrip("\n").rpartition("\n")
    assert text == report["results"][1]["text"]
    assert summary.startswith("[tess] network evaluations: 3") and "loading" in summary


def test_a_refusal_has_status_2_and_no_traceback(checkpoints):
    result = script("generate", "a", "--checkpoint", checkpoints, "--num_inference_steps", "0")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == (
        "error: num_inference_steps must be from 1 to 5000, the number of training steps, got 0\n"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give a text"),
        ([" "], "empty"),
        (["a", "--num_inference_steps", "5001"], "num_inference_steps must be from 1 to 5000"),
        (["the dog ran " * 30, "--strict"], "the model takes 16"),
        (["a", "--input", "nowhere.txt"], "no file 'nowhere.txt'"),
        (["a", "--decoder", "mtp"], "invalid choice: 'mtp'"),
        (["a", "--checkpoint", "nowhere"], "no folder 'nowhere'"),
    ],
)
def test_generate_refuses_in_one_sentence(checkpoints, refused, arguments, message):
    assert message in refused("generate", "--checkpoint", checkpoints, *arguments)


def test_outside_a_checkout_a_checkpoint_must_be_named(tmp_path, monkeypatch, refused):
    monkeypatch.setattr("tess.cli.DEFAULT_CHECKPOINT", tmp_path / "checkpoints" / "default")
    assert "give a folder or a hub id with --checkpoint" in refused("generate", "a")


def test_train_runs_from_a_recipe(tmp_path):
    recipe = SCRIPTS / "recipes" / "smallest.yaml"
    flags = ["--output_dir", tmp_path / "run", "--max_steps", 2, "--num_samples_to_print", 1]
    result = script("train", recipe, *flags)
    assert result.returncode == 0, result.stderr
    assert f"saved {tmp_path / 'run' / 'final'}" in result.stdout
    assert "samples at step 0" in result.stdout
    load_decoder(tmp_path / "run")


def test_train_refuses_in_one_sentence(tmp_path, refused):
    recipe = SCRIPTS / "recipes" / "smallest.yaml"
    assert "did you mean --max_steps" in refused("train", recipe, "--max_step", 2)
    assert "no file 'nowhere.yaml'" in refused("train", "nowhere.yaml")
    rows = tmp_path / "broken.jsonl"
    rows.write_text('{"source": "a", "target": "b"}\n{"source": "a"')
    flags = ["--train_file", rows, "--output_dir", tmp_path / "run", "--train_tokenizer"]
    assert "broken.jsonl, line 2" in refused("train", *flags)


@pytest.mark.parametrize("name", ["generate", "train"])
def test_help_is_useful(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(SCRIPTS / f"{name}.py"), run_name="__main__")
    shown = capsys.readouterr().out
    assert caught.value.code == 0 and re.search(r"\bseed\b", shown)
    if name == "generate":
        for key in ("load_seconds", "generate_seconds", "results"):
            assert re.search(rf"^  {key} +\w", shown, re.MULTILINE), key


def test_generate_warns_of_a_long_text(checkpoints):
    result = script("generate", "the dog ran " * 30, "--checkpoint", checkpoints, "--decoder", "ar")
    assert result.returncode == 0 and "cut off" in result.stderr


def test_a_decoder_describes_how_it_writes_under_the_keys_of_reports(checkpoints):
    plain = load_decoder(checkpoints, "tess").describe()
    assert (plain.scheduler, plain.timestep_spacing) == ("renoising", "recoverability")
    assert (plain.length, plain.stopping, plain.sampler) == ("rule", None, {})
    options = SamplerOptions(scheduler="ddim", stop_patience=2, num_candidates=3)
    asked = load_decoder(checkpoints, "tess", options=options).describe()
    assert (asked.scheduler, asked.num_candidates, asked.choose_by) == ("ddim", 3, "confidence")
    assert asked.stopping == {"patience": 2, "max_entropy": None}  # JSON has no infinity
    beams = load_decoder(checkpoints, "ar", num_beams=2).describe()
    assert beams == Description(num_beams=2, length_penalty=1.0)


@pytest.mark.parametrize("name", ["tess", "ar"])
def test_each_batch_is_told_and_finished_batches_are_not_written_again(checkpoints, name):
    decoder = load_decoder(checkpoints, name)
    told = []
    whole = decoder.generate([*TEXTS, "a cat"], batch_size=2, on_batch=told.append)
    assert [len(batch) for batch in told] == [2, 2, 1]
    assert {i: text for batch in told for i, text in batch.items()} == dict(enumerate(whole))
    later = []
    finished = told[0] | told[2]
    again = decoder.generate(
        [*TEXTS, "a cat"], batch_size=2, on_batch=later.append, finished=finished
    )
    assert again == whole and later == [told[1]]
    torn = told[0].keys() - {next(iter(told[0]))}  # half a batch is written anew as a whole
    later.clear()
    decoder.generate(
        [*TEXTS, "a cat"], batch_size=2, on_batch=later.append, finished={i: whole[i] for i in torn}
    )
    assert later == told


def test_cut_sources_are_a_result_and_no_warning_where_that_is_asked_for(checkpoints, caplog):
    decoder = load_decoder(checkpoints, "tess")
    told = decoder.encode(["a cat", "the dog ran " * 30], warn=False)
    assert told.num_cut == 1 and [len(row) <= 16 for row in told.rows] == [True, True]
    assert not caplog.records
    assert decoder.encode(["the dog ran " * 30]).rows == told.rows[1:]
    assert "1 of 1 sources have up to" in caplog.text
