"""What has to hold between the settings of a run; every mistake is one sentence."""

from pathlib import Path
from typing import TYPE_CHECKING

from tess.backbones.presets import PRESETS
from tess.data.settings import IN_PLACE, DataArguments
from tess.errors import UserError
from tess.options import unknown_name
from tess.training.diffusion_settings import DiffusionArguments
from tess.training.settings import CHANGEABLE, CausalArguments, ModelArguments, RunArguments

if TYPE_CHECKING:
    from tess.training.arguments import TrainingArguments


MOST = 2**20
"""The largest size that is taken for one, not for a slip: no vocabulary or width comes near it."""


def check_settings(
    model: ModelArguments,
    diffusion: DiffusionArguments,
    causal: CausalArguments,
    data: DataArguments,
    run: RunArguments,
) -> None:
    """Raises UserError for the first setting that cannot be, alone or beside another one."""
    _check_rows(model, data)
    _check_start(model)
    _check_causal(model.objective, causal)
    diffusion.denoiser_overrides()  # names a simplex value that is no number
    _check_numbers(diffusion, data, run)
    _check_unrolling(diffusion)


def check_files(data: DataArguments) -> None:
    """Raises UserError for a file of rows that is not there."""
    for name in (*data.train_file, *data.validation_file):
        path = Path(data.data_root or "", name)
        if not path.exists():
            raise UserError(f"there is no file {str(path)!r}")


def _check_rows(model: ModelArguments, data: DataArguments) -> None:
    if bool(data.task) == bool(data.train_file):
        raise UserError("give the training data by either --task or --train_file")
    if data.dataset and not data.task:
        raise UserError("--dataset belongs to a --task")
    if model.objective == "ar" and (inside := sorted(IN_PLACE & set(data.corruptions))):
        raise UserError(
            f"{inside[0]} has no autoregressive form; take text_infilling, prefix_lm or "
            "unconditional"
        )


def _check_start(model: ModelArguments) -> None:
    if sum((bool(model.tokenizer), model.train_tokenizer, bool(model.init_from))) != 1:
        raise UserError("give exactly one of --tokenizer, --train_tokenizer and --init_from")
    if model.init_from and (sizes := sorted(set(model.backbone_fields) - CHANGEABLE)):
        raise UserError(f"--{sizes[0]} is fixed by the checkpoint that --init_from names")
    for name, size in model.backbone_fields.items():
        if isinstance(size, int) and size > MOST:
            raise UserError(f"{name} must be at most {MOST:,}, got {size}")
    if model.preset and model.init_from:
        raise UserError("--preset is for a new model, and --init_from names one that is there")
    if model.preset and model.preset not in PRESETS:
        raise UserError(unknown_name(model.preset, list(PRESETS), "preset"))


def _check_numbers(
    diffusion: DiffusionArguments, data: DataArguments, run: RunArguments
) -> None:
    for name in ("max_source_length", "max_target_length"):
        if not 3 <= getattr(data, name) <= MOST:
            raise UserError(
                f"{name} must be at least 3 (special tokens and text) and at most {MOST:,}, got "
                f"{getattr(data, name)}"
            )
    for owner, name in (
        (run, "ema_decay"),
        (diffusion, "self_conditioning_probability"),
        (diffusion, "unroll_probability"),
        (diffusion, "source_drop_probability"),
    ):
        if not 0 <= getattr(owner, name) <= 1:
            raise UserError(f"{name} must be between 0 and 1, got {getattr(owner, name)}")
    if diffusion.length_loss_weight < 0:
        raise UserError(
            f"length_loss_weight must not be negative, got {diffusion.length_loss_weight}"
        )
    for owner, name in (
        (data, "max_train_samples"),
        (data, "max_eval_samples"),
        (run, "num_inference_steps"),
        (diffusion, "num_diffusion_steps"),
        (diffusion, "num_top"),
    ):
        value = getattr(owner, name)
        if value is not None and not 1 <= value < 2**63:
            raise UserError(f"{name} must be at least 1, got {value}")
    if run.ema_decay == 1:
        raise UserError("ema_decay must be below 1, or the average never moves")
    for name, least in (("num_samples_to_print", 0), ("router_balance_rate", 0)):
        if getattr(run, name) < least:
            raise UserError(f"{name} must be at least {least}, got {getattr(run, name)}")


def _check_causal(objective: str, causal: CausalArguments) -> None:
    if causal.mtp_depth < 0:
        raise UserError(f"mtp_depth must be 0 or more, got {causal.mtp_depth}")
    if causal.mtp_depth and objective != "ar":
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


def check_training(args: "TrainingArguments") -> None:
    """Raises UserError for what transformers would find out late, or not at all."""
    from transformers.integrations import get_available_reporting_integrations
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    for name in (
        "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps",
    ):
        if getattr(args, name) < 1:
            raise UserError(f"{name} must be at least 1, got {getattr(args, name)}")
    if args.max_steps == 0 or args.max_steps < -1:
        raise UserError(f"max_steps must be at least 1, or -1 for none, got {args.max_steps}")
    if args.max_steps < 0 and not 0 < args.num_train_epochs < float("inf"):
        raise UserError(f"num_train_epochs must be above 0, got {args.num_train_epochs}")
    if args.fp16 and args.device.type == "cpu":
        raise UserError("--fp16 needs a GPU, and this run is on the CPU; take --bf16, or neither")
    for name in args.report_to:
        if name not in INTEGRATION_TO_CALLBACK:
            raise UserError(unknown_name(name, list(INTEGRATION_TO_CALLBACK), "tracker"))
        if name not in get_available_reporting_integrations():
            raise UserError(f"--report_to {name} needs a package of that name, which is not here")
