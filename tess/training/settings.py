"""Settings of a training run: dataclasses filled from a YAML or JSON file and flags, flags winning.

The file's keys are the flags' names, in one flat mapping. A key or flag that does not exist is an
error that names the nearest ones.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import transformers
from transformers import HfArgumentParser

from tess.backbones.config import HybridConfig
from tess.backbones.presets import PRESETS
from tess.data.settings import DataArguments
from tess.errors import UserError
from tess.options import flags_from_file, option, unknown_name
from tess.training.diffusion_settings import DiffusionArguments


@dataclass
class ModelArguments:
    """The backbone and the tokenizer; sizes left out are the preset's, or `SMALL_BACKBONE`'s."""

    objective: str = option(
        "tess",
        "What to train: tess (simplex diffusion) or ar (next-token prediction).",
        choices=["tess", "ar"],
    )
    init_from: str | None = option(
        None,
        "Start from the weights of this checkpoint folder, tess or ar; its tokenizer is used too.",
    )
    tokenizer: str | None = option(
        None, "Folder or hub name of a Hugging Face tokenizer with pad and eos."
    )
    train_tokenizer: bool = option(
        False, "Train a byte-level BPE of vocab_size on the training texts."
    )
    vocab_size: int | None = option(
        None,
        "Ids of the model; default: 4096 for a trained tokenizer, else the tokenizer's own size.",
    )
    preset: str | None = option(
        None,
        "Sizes of a new model by name (scripts/model_info.py --help lists them); given sizes "
        "win, and the vocabulary is the tokenizer's.",
    )
    hybrid_override_pattern: str | None = option(
        None, "One letter per layer: M Mamba-2, * attention, - MLP, E mixture of experts."
    )
    hidden_size: int | None = option(None, "Width of the model.")
    num_attention_heads: int | None = option(None, "Query heads.")
    num_key_value_heads: int | None = option(None, "Key and value heads.")
    head_dim: int | None = option(None, "Width of an attention head.")
    intermediate_size: int | None = option(None, "Inner width of the MLP layers.")
    ssm_state_size: int | None = option(None, "State size of a Mamba head.")
    mamba_num_heads: int | None = option(None, "Mamba heads.")
    mamba_head_dim: int | None = option(None, "Width of a Mamba head.")
    n_groups: int | None = option(None, "Groups of Mamba heads that share B and C.")
    conv_kernel: int | None = option(None, "Width of the causal convolution.")
    chunk_size: int | None = option(None, "Positions per chunk of the Mamba scan.")
    n_routed_experts: int | None = option(None, "Experts of an E layer.")
    num_experts_per_tok: int | None = option(None, "Experts that a token is sent to.")
    moe_intermediate_size: int | None = option(None, "Inner width of a routed expert.")
    moe_shared_expert_intermediate_size: int | None = option(
        None, "Inner width of the shared expert."
    )
    moe_latent_size: int | None = option(None, "Width that the routed experts work in (LatentMoE).")
    initializer_range: float | None = option(
        None, "Standard deviation of new weights (default: 0.02)."
    )
    tie_word_embeddings: bool | None = option(
        None, "Share the embedding and the head (default: true)."
    )
    mtp_hybrid_override_pattern: str | None = option(
        None,
        "Layers of the multi-token predictor, in the same letters (default: *E); see --mtp_depth.",
    )
    mamba_direction: str | None = option(
        None,
        "Mamba layers in denoise mode: forward, bidirectional or gated "
        "(default: bidirectional for tess).",
    )

    def backbone_overrides(self) -> dict[str, Any]:
        """The backbone's fields that were set."""
        names = [
            f.name for f in dataclasses.fields(self) if f.name in HybridConfig.__dataclass_fields__
        ]
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


SMALL_BACKBONE: dict[str, Any] = {
    "hybrid_override_pattern": "M*E-",
    "hidden_size": 192,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 384,
    "ssm_state_size": 32,
    "mamba_num_heads": 12,
    "mamba_head_dim": 32,
    "n_groups": 2,
    "chunk_size": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 192,
    "moe_shared_expert_intermediate_size": 192,
    "tie_word_embeddings": True,
    "initializer_range": 0.05,
}
"""The model that is trained where no size is given."""

CHANGEABLE = {"mamba_direction", "mtp_hybrid_override_pattern"}
"""Fields of the backbone that do not follow from the weights that --init_from names."""


@dataclass
class CausalArguments:
    """Next-token prediction (objective ar)."""

    mtp_depth: int = option(
        0,
        "Train a multi-token predictor to look this many tokens further (0: none): one block, used "
        "again for each of them.",
    )
    mtp_loss_scale: float = option(
        0.3, "Weight of the predictor's mean loss beside the next-token loss."
    )
    freeze_backbone: bool = option(
        False,
        "Train the multi-token predictor alone; the text that the model writes stays the same.",
    )


@dataclass
class RunArguments:
    """What this project adds to transformers' own settings."""

    save_dtype: str = option(
        "float32",
        "Type of the weights in the final folder.",
        choices=["float32", "bfloat16", "float16"],
    )
    ema_decay: float = option(
        0.0, "Decay of the weights' moving average (0: none); evaluated and saved instead."
    )
    router_balance_rate: float = option(
        0.001, "Step of the experts' load-balancing bias after each update (0: none)."
    )
    num_samples_to_print: int = option(
        3, "Generated texts to print before training and at each evaluation."
    )
    num_inference_steps: int | None = option(
        None, "Sampling steps for the printed texts (default: 16, or T where that is less)."
    )


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    """transformers' own settings, with defaults that train a small new model from scratch."""

    per_device_train_batch_size: int = option(
        32, "Rows per device and step (default: %(default)s)."
    )
    num_train_epochs: float = option(
        20.0, "Passes over the training rows (default: %(default)s); --max_steps overrides it."
    )
    learning_rate: float = option(
        1.5e-3,
        "Highest learning rate (default: %(default)s). The defaults suit a small new model and are "
        "the same with --init_from, where a lower rate keeps more of the given weights.",
    )
    warmup_steps: float = option(
        100,
        "Steps in which the learning rate rises from 0 (default: %(default)s); below 1, their "
        "share of all steps.",
    )
    weight_decay: float = option(
        0.01, "Weight decay, of all but biases and norms (default: %(default)s)."
    )
    adam_beta2: float = option(
        0.98, "Decay of Adam's mean of squared gradients (default: %(default)s)."
    )
    logging_steps: float = option(50, "Steps between two lines of the log (default: %(default)s).")
    save_steps: float = option(200, "Steps between two checkpoints (default: %(default)s).")
    save_total_limit: int | None = option(
        2, "Newest checkpoints to keep (default: %(default)s); 0 keeps all."
    )


@dataclass
class Settings:
    """All settings of a run."""

    model: ModelArguments
    diffusion: DiffusionArguments
    causal: CausalArguments
    data: DataArguments
    run: RunArguments
    training: TrainingArguments


class _Parser(HfArgumentParser):
    """HfArgumentParser whose errors are `UserError`s, without the usage of two hundred flags."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def make_parser(description: str) -> HfArgumentParser:
    """The parser of `scripts/train.py`."""
    return _Parser(
        (
            ModelArguments,
            DiffusionArguments,
            CausalArguments,
            DataArguments,
            RunArguments,
            TrainingArguments,
        ),
        prog="scripts/train.py",
        usage="scripts/train.py [CONFIG.yaml|json] [--flag value ...]",
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.HelpFormatter,
    )


def parse_settings(argv: Sequence[str] | None = None, description: str = "") -> Settings:
    """Read `[CONFIG] [--flag value ...]`; a flag wins over the file.

    Raises:
        UserError: unreadable file, unknown key or flag (with near matches), or a value of the wrong
        type.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = make_parser(description)
    known = {action.dest: action for action in parser._actions if action.dest != "help"}
    if argv and not argv[0].startswith("-"):
        argv = flags_from_file(Path(argv[0]), known) + argv[1:]
    *parts, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    if unknown:
        raise UserError(unknown_name(unknown[0], [f"--{name}" for name in known], "flag"))
    settings = Settings(*parts)
    _check(settings)
    return settings


def _check_causal(settings: Settings) -> None:
    causal = settings.causal
    if causal.mtp_depth < 0:
        raise UserError(f"mtp_depth must be 0 or more, got {causal.mtp_depth}")
    if causal.mtp_depth and settings.model.objective != "ar":
        raise UserError("--mtp_depth belongs to --objective ar")
    if causal.mtp_depth == 0 and causal.freeze_backbone:
        raise UserError("--freeze_backbone leaves nothing to train without --mtp_depth")
    if causal.mtp_loss_scale <= 0:
        raise UserError(f"mtp_loss_scale must be above 0, got {causal.mtp_loss_scale}")


def _check_unrolling(diffusion: DiffusionArguments) -> None:
    if diffusion.unroll_steps < 1:
        raise UserError(f"unroll_steps must be at least 1, got {diffusion.unroll_steps}")
    if diffusion.unroll_steps > 1 and not diffusion.unroll_probability:
        raise UserError("--unroll_steps does nothing without --unroll_probability")
    without = diffusion.self_conditioning == "none" or not diffusion.self_conditioning_probability
    if diffusion.unroll_probability and without:
        raise UserError(
            "--unroll_probability is a share of the batches with a first pass, and without "
            "self-conditioning there are none"
        )


def _check(settings: Settings) -> None:
    model, data, run = settings.model, settings.data, settings.run
    if settings.training.output_dir in (None, "trainer_output"):
        raise UserError("name the folder to write to with --output_dir")
    if bool(data.task) == bool(data.train_file):
        raise UserError("give the training data by either --task or --train_file")
    if data.dataset and not data.task:
        raise UserError("--dataset belongs to a --task")
    if sum((bool(model.tokenizer), model.train_tokenizer, bool(model.init_from))) != 1:
        raise UserError("give exactly one of --tokenizer, --train_tokenizer and --init_from")
    if model.init_from and (sizes := sorted(set(model.backbone_overrides()) - CHANGEABLE)):
        raise UserError(f"--{sizes[0]} is fixed by the checkpoint that --init_from names")
    if model.preset and model.init_from:
        raise UserError("--preset is for a new model, and --init_from names one that is there")
    if model.preset and model.preset not in PRESETS:
        raise UserError(unknown_name(model.preset, list(PRESETS), "preset"))
    _check_causal(settings)
    settings.diffusion.denoiser_overrides()  # names a simplex value that is no number
    for name in ("max_source_length", "max_target_length"):
        if getattr(data, name) < 3:
            raise UserError(
                f"{name} must be at least 3 (special tokens and text), got {getattr(data, name)}"
            )
    for owner, name in (
        (run, "ema_decay"),
        (settings.diffusion, "self_conditioning_probability"),
        (settings.diffusion, "unroll_probability"),
        (settings.diffusion, "source_drop_probability"),
    ):
        if not 0 <= getattr(owner, name) <= 1:
            raise UserError(f"{name} must be between 0 and 1, got {getattr(owner, name)}")
    if settings.diffusion.length_loss_weight < 0:
        raise UserError(
            f"length_loss_weight must not be negative, got {settings.diffusion.length_loss_weight}"
        )
    _check_unrolling(settings.diffusion)
    for name in ("max_train_samples", "max_eval_samples"):
        if getattr(data, name) is not None and getattr(data, name) < 1:
            raise UserError(f"{name} must be at least 1, got {getattr(data, name)}")
    if run.ema_decay == 1:
        raise UserError("ema_decay must be below 1, or the average never moves")
