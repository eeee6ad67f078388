"""Settings of a training run, from a file and flags."""

import dataclasses
import json
import subprocess
import sys

import pytest
import transformers

from tess.backbones.config import HybridConfig
from tess.commands.train import make_parser
from tess.data.collators import DRAWS
from tess.data.settings import CORRUPTIONS, DataArguments
from tess.errors import UserError
from tess.kernels.simplex_embedding import NOISES
from tess.schedulers import base, simplex
from tess.training import diffusion_settings
from tess.training.flags import parse_settings, transformers_names
from tess.training.settings import NOT_OF_THE_BACKBONE, ModelArguments


def test_flags_win_over_the_file_and_json_is_read_too(tmp_path):
    config = {
        "output_dir": str(tmp_path),
        "task": "simplification",
        "train_tokenizer": True,
        "max_steps": 5,
    }
    (tmp_path / "c.json").write_text(json.dumps(config | {"learning_rate": 1e-3}))
    settings = parse_settings(
        [str(tmp_path / "c.json"), "--max_steps", "7", "--bf16", "true", "--use_cpu"]
    )
    assert (settings.training.max_steps, settings.training.learning_rate) == (7, 1e-3)
    assert settings.training.bf16 and settings.model.train_tokenizer


def test_yaml_numbers_without_a_point_are_numbers(tmp_path):
    (tmp_path / "c.yaml").write_text(
        f"output_dir: {tmp_path}\ntask: simplification\ntrain_tokenizer: yes\n"
        "learning_rate: 1e-4\ntrain_file: []\n"
    )
    assert parse_settings([str(tmp_path / "c.yaml")]).training.learning_rate == 1e-4


def test_defaults_are_for_a_small_new_model(tmp_path):
    args = parse_settings(
        ["--train_file", "my.jsonl", "--train_tokenizer", "--output_dir", str(tmp_path)]
    ).training
    assert (args.learning_rate, args.warmup_steps) == (1.5e-3, 100)
    assert args.lr_scheduler_type == "linear"
    assert (args.per_device_train_batch_size, args.num_train_epochs, args.max_steps) == (32, 20, -1)
    assert (args.weight_decay, args.adam_beta2) == (0.01, 0.98)
    assert (args.logging_steps, args.save_steps, args.save_total_limit) == (50, 200, 2)
    assert args.report_to == []


# What is said twice


def test_choices_are_those_of_the_modules_that_carry_them_out():
    assert diffusion_settings.SPACINGS == base.SPACINGS
    assert diffusion_settings.NOISES == NOISES
    top = diffusion_settings.DiffusionArguments.__dataclass_fields__["num_top"]
    assert f"(default: {simplex.NUM_TOP})" in top.metadata["help"]
    assert tuple(DRAWS) == CORRUPTIONS
    names = {field.name for field in dataclasses.fields(ModelArguments)}
    assert names - NOT_OF_THE_BACKBONE <= set(HybridConfig.__dataclass_fields__)
    assert not NOT_OF_THE_BACKBONE & set(HybridConfig.__dataclass_fields__)


def test_the_names_read_off_transformers_source_are_its_fields():
    fields = dataclasses.fields(transformers.TrainingArguments)
    assert list(transformers_names()) == [field.name for field in fields]


def test_a_mixture_is_parsed_once():
    assert DataArguments(conditional_generation="ul2, seq2seq").corruptions == ("ul2", "seq2seq")


# What is seen before torch loads


def loaded_after(*argv):
    """What the command printed, and which heavy libraries it had loaded then."""
    code = (
        "import sys\nfrom tess.commands.train import main\n"
        "try:\n    main(sys.argv[1:])\n"
        "except BaseException as error:\n    print(error)\n"
        "print(*{'torch', 'transformers', 'diffusers', 'datasets', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True)
    *text, last = done.stdout.split("\n")[:-1]
    return "\n".join(text), last


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--help"], "--simplex_value"),
        (["--learning_rat", "1"], "did you mean --learning_rate"),
        (["--learning_rate", "fast"], "invalid float value: 'fast'"),
        (["none.yaml"], "there is no file 'none.yaml'"),
        (["--task", "simplification", "--train_tokenizer"], "with --output_dir"),
        (
            ["--train_file", "no.jsonl", "--train_tokenizer", "--output_dir", "o"],
            "there is no file 'no.jsonl'",
        ),
        (["--hidden_size", "9" * 12, "--output_dir", "o"], "either --task or --train_file"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_help_and_mistakes_load_no_library(argv, message):
    text, loaded = loaded_after(*argv)
    assert message in text and loaded == ""


def test_the_help_explains_our_flags_and_names_transformers_own():
    text = " ".join(make_parser().format_help().split())
    assert "--canvas {batch,rule}" in text and "gradient_checkpointing" in text
    assert "--gradient_checkpointing" not in text


# What cannot be


NEW = ["--task", "simplification", "--train_tokenizer", "--use_cpu", "--output_dir", "o"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--resume_from_checkpoint", "x"], "not supported: the same command goes on"),
        (["--deepspeed", "x.json"], "--deepspeed is not supported: FSDP2"),
        (["--report_to", "wandb"], "--report_to wandb needs a package"),
        (["--report_to", "wandbb"], "no tracker 'wandbb'; did you mean wandb"),
        (["--fp16"], "--fp16 needs a GPU"),
        (["--simplex_value", "3", "--objective", "ar"], "--simplex_value belongs to --objective t"),
        (["--simplex_value", "wide"], "simplex_value must be a number or auto"),
        (["--hidden_size", "9000000000"], "hidden_size must be at most 1,048,576"),
        (["--vocab_size", "9" * 15], "vocab_size must be at most"),
        (["--max_source_length", "9" * 12], "at most 1,048,576"),
        (["--num_diffusion_steps", "0"], "num_diffusion_steps must be at least 1"),
        (["--per_device_train_batch_size", "0"], "train_batch_size must be at least 1, got 0"),
        (["--gradient_accumulation_steps", "0"], "accumulation_steps must be at least 1, got 0"),
        (["--num_train_epochs", "-1"], "num_train_epochs must be above 0"),
        (["--max_steps", "1.5"], "invalid int value: '1.5'"),
        (["--bf16_full_eval"], "an evaluation runs as the training does"),
        (["stray"], "expected a flag"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_what_cannot_be_is_one_sentence(flags, message):
    with pytest.raises(UserError) as caught:
        parse_settings([*NEW, *flags])
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_keys_of_a_file_that_another_objective_reads_are_told(tmp_path, caplog):
    path = tmp_path / "c.yaml"
    path.write_text("canvas: rule\npad_loss_weight: 0.1\n")
    parse_settings([str(path), *NEW, "--objective", "ar"])
    assert "with --objective ar nothing reads canvas, pad_loss_weight" in caplog.text
    path.write_text("objective: ar\ncanvas: rule\n")
    with pytest.raises(UserError, match="--canvas belongs to --objective tess"):
        parse_settings([str(path), *NEW])
