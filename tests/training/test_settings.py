"""Settings of a training run, from a file and flags."""

import json

from tess.training.flags import parse_settings


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
