"""One training run from its settings: data, tokenizer, model, Trainer, and the final folder."""

import dataclasses
import json
import math
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from transformers import TrainerCallback, set_seed
from transformers.trainer_utils import get_last_checkpoint

from tess.backbones.pretrained import stays_float32
from tess.data.collators import Canvas, Collator, objective_names
from tess.data.texts import load_data, warn_of_cuts, without_long
from tess.data.token_rows import BucketSampler, TokenRows
from tess.errors import UserError
from tess.schedulers.density import LearnedDensity
from tess.schedulers.recoverability import recoverability
from tess.schedulers.renoising import RenoisingScheduler
from tess.storage.files import replaced_folder
from tess.storage.parts import Parts, kind_of, load_parts, save_parts
from tess.training.losses import ar_loss, tess_loss
from tess.training.place import read_state
from tess.training.sample_printer import PrintSamples
from tess.training.settings import Settings, TrainingArguments
from tess.training.sharding import full_state, whole_copy
from tess.training.start import build_parts, fitted_length_rule, store_limits
from tess.training.trainer import TextTrainer
from tess.training.update import Batch, Update

FINAL_FOLDER = "final"
SETTINGS_FILE = "settings.json"
DENSITY_BINS = 64
IN_PLACE = {"span_infilling", "ul2", "ul2_with_unconditional"}


def train(settings: Settings, callbacks: Sequence[TrainerCallback] = ()) -> Path:
    """Run a training, or go on with the one that `output_dir` holds.

    callbacks: of transformers' Trainer, beside its own.

    Returns:
        The final folder, `output_dir/final`.

    Raises:
        UserError: for anything in the settings or the data that cannot be trained on, or a full
        disk.
    """
    args = settings.training
    _check_run(settings)
    train_texts, eval_texts = load_data(settings.data, want_eval=args.eval_strategy != "no")
    output_dir = Path(args.output_dir)
    last = get_last_checkpoint(args.output_dir) if output_dir.is_dir() else None
    with args.main_process_first(local=False, desc="settings"):
        _record_settings(settings, resumed=last is not None)
    final = output_dir / FINAL_FOLDER
    finished = last is not None and _is_finished(Path(last), settings)
    if finished and kind_of(final) and final.stat().st_mtime >= Path(last).stat().st_mtime:
        _print_once(args, f"{final} is the end of this run already")
        return final
    set_seed(args.seed)
    parts = load_parts(last) if last else build_parts(settings, train_texts)
    rows = TokenRows(parts.tokenizer, *zip(*train_texts, strict=True), seed=args.seed)
    eval_rows = None
    if eval_texts:
        eval_rows = TokenRows(parts.tokenizer, *zip(*eval_texts, strict=True), seed=args.seed + 1)
    if settings.data.long_rows == "drop":
        rows = without_long(rows, settings.data)
    if not last:
        store_limits(parts, settings, rows)
    warn_of_cuts(rows, settings.data)
    trainer = make_trainer(settings, parts, rows, eval_rows)
    for callback in callbacks:
        trainer.add_callback(callback)
    if finished:
        _print_once(args, f"{last} is the end of this run already")
        trainer._load_from_checkpoint(str(_result_of(Path(last), settings)))
    else:
        trainer.train(resume_from_checkpoint=last)
    save_final(trainer, final, getattr(torch, settings.run.save_dtype))
    return final


def _print_once(args: TrainingArguments, text: str) -> None:
    if args.process_index == 0:
        print(text)


def _check_run(settings: Settings) -> None:
    sharding = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("true", "1")
    if (sharding or settings.training.fsdp) and settings.training.device.type == "cpu":
        raise UserError(
            "FSDP was asked for, but accelerate shards on GPUs only and would train whole copies "
            "here without a word; on a CPU launch with DDP (scripts/recipes/"
            "accelerate_ddp_cpu.yaml)"
        )
    if settings.training.n_gpu > 1:
        raise UserError(
            "several GPUs in one process are not supported; start with `accelerate launch`"
        )
    if settings.training.world_size > 1 and settings.diffusion.timestep_density == "learned":
        raise UserError(
            "timestep_density learned works in one process, where one density sees all losses"
        )
    names = objective_names(settings.data.conditional_generation)
    if settings.model.objective == "ar" and (inside := sorted(IN_PLACE & set(names))):
        raise UserError(
            f"{inside[0]} has no autoregressive form; take text_infilling, prefix_lm or "
            "unconditional"
        )


def make_trainer(
    settings: Settings, parts: Parts, rows: TokenRows, eval_rows: TokenRows | None
) -> TextTrainer:
    """The trainer of a run, with its loss, its collator and the callback that prints samples."""
    args, run = settings.training, settings.run
    # Our batches are no arguments of the model's forward.
    args.remove_unused_columns = False
    args.label_names = []
    # Routers count their experts' load in buffers, of which DDP would hand out the first process's.
    args.ddp_broadcast_buffers = False
    if getattr(parts.model.config, "length_head", False):
        # The head runs beside the forward pass, where DDP's search would take it for unused.
        args.ddp_find_unused_parameters = False
    collator = make_collator(settings, parts, rows)
    if settings.causal.freeze_backbone:
        for name, parameter in parts.model.named_parameters():
            parameter.requires_grad_(name.startswith("mtp."))
    density = None
    if parts.scheduler is not None and settings.diffusion.timestep_density == "learned":
        density = learned_density(parts.scheduler)
    step_rows = args.per_device_train_batch_size * args.world_size
    trainer = TextTrainer(
        parts=parts,
        loss_function=make_loss(settings, parts, density),
        density=density,
        train_sampler=BucketSampler(
            rows.lengths(),
            step_rows * args.gradient_accumulation_steps,
            args.seed,
            settings.data.bucket_by_length,
            multiple_of=step_rows if args.world_size > 1 else 1,
        ),
        ema_decay=run.ema_decay,
        balance_rate=run.router_balance_rate,
        args=args,
        train_dataset=rows,
        eval_dataset=eval_rows,
        data_collator=collator,
    )
    if run.num_samples_to_print:
        if trainer.is_fsdp_enabled:
            raise UserError(
                "samples are written by one process, which has not all of the weights with FSDP; "
                "set num_samples_to_print to 0"
            )
        trainer.add_callback(PrintSamples(trainer, collator, eval_rows or rows, settings))
    return trainer


def make_collator(settings: Settings, parts: Parts, rows: TokenRows | None = None) -> Collator:
    """The collator of a run; autoregressive targets have no canvas beyond `</s>`.

    rows: the training rows, by which the canvases of a model with a length head are ruled: its
        config's margin is the head's.
    """
    data, diffusion, config = settings.data, settings.diffusion, parts.model.config
    canvas = Canvas()
    if parts.scheduler is not None:
        ratio, margin = config.target_length_ratio, config.target_length_margin
        if config.length_head and ratio is not None and rows is not None:
            ratio, margin = fitted_length_rule(settings, parts, rows)
        canvas = Canvas(
            pad_loss_weight=config.pad_loss_weight,
            extent=diffusion.canvas,
            length_ratio=ratio,
            length_margin=margin,
        )
    return Collator(
        parts.tokenizer,
        data.conditional_generation,
        max_source_length=data.max_source_length,
        max_target_length=data.max_target_length,
        canvas=canvas,
    )


def learned_density(scheduler: RenoisingScheduler) -> LearnedDensity:
    """A learned density of times; before it has seen a loss it is even in recoverability."""
    middles = (torch.arange(DENSITY_BINS, dtype=torch.float64) + 0.5) / DENSITY_BINS
    size = scheduler.config.vocab_size
    told = recoverability(scheduler.alpha_bar(middles), size)
    return LearnedDensity(math.log(size) * (1 - told), scheduler.config.timestep_uniform_share)


def make_loss(
    settings: Settings, parts: Parts, density: LearnedDensity | None = None
) -> Callable[[torch.nn.Module, Batch, Update], torch.Tensor]:
    """(model, batch, update) -> loss; a learned density serves and learns in training mode."""
    if parts.scheduler is None:
        causal = settings.causal
        return partial(
            ar_loss,
            mtp_depth=causal.mtp_depth,
            mtp_loss_scale=causal.mtp_loss_scale,
            next_token=not causal.freeze_backbone,
        )
    diffusion = settings.diffusion

    def loss(model: torch.nn.Module, batch: Batch, update: Update | None = None) -> torch.Tensor:
        return tess_loss(
            model,
            parts.scheduler,
            batch,
            update,
            self_conditioning_probability=diffusion.self_conditioning_probability,
            unroll_probability=diffusion.unroll_probability,
            unroll_steps=diffusion.unroll_steps,
            stratified=diffusion.stratified_timesteps,
            source_drop_probability=diffusion.source_drop_probability if model.training else 0.0,
            length_loss_weight=diffusion.length_loss_weight,
            density=density if model.training else None,
        )

    return loss


def save_final(trainer: TextTrainer, final: Path, dtype: torch.dtype) -> None:
    """Write the (averaged) weights as `dtype`, but what stays float32 in memory as it is.

    In a run of several processes the first one writes; all have to call this.
    """
    parts = trainer.parts
    with trainer.averaged_weights():
        state = full_state(parts.model)
        if not trainer.is_world_process_zero():
            return
        model = whole_copy(parts.model, state)
    for name, parameter in model.named_parameters():
        if not stays_float32(name):
            parameter.data = parameter.data.to(dtype)
    with replaced_folder(final) as folder:
        save_parts(dataclasses.replace(parts, model=model), folder)


# Resuming


def _record_settings(settings: Settings, resumed: bool) -> None:
    """Keep the settings beside the checkpoints; refuse to resume with another model or process."""
    path = Path(settings.training.output_dir) / SETTINGS_FILE
    now = {
        name: dataclasses.asdict(getattr(settings, name))
        for name in ("model", "diffusion", "causal", "data", "run")
    }
    if resumed and path.is_file():
        before = json.loads(path.read_text())
        for group in ("model", "diffusion", "causal"):
            # a setting that the older run did not know had what is its default now
            fields = dataclasses.fields(getattr(settings, group))
            known = {f.name: f.default for f in fields} | before.get(group, {})
            changed = [key for key in now[group] if known[key] != now[group][key]]
            if changed:
                raise UserError(
                    f"{path.parent} holds checkpoints of another run ({changed[0]} was "
                    f"{known[changed[0]]!r} and is {now[group][changed[0]]!r}); "
                    "choose another --output_dir"
                )
    if settings.training.process_index > 0:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(now, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"cannot write to --output_dir {path.parent}: {error.strerror}") from error


def _result_of(checkpoint: Path, settings: Settings) -> Path:
    """The checkpoint that a run which ended with `checkpoint` is to ship."""
    state = read_state(checkpoint)
    best = state.get("best_model_checkpoint")
    if not (settings.training.load_best_model_at_end and best):
        return checkpoint
    return checkpoint.with_name(Path(best).name)


def _is_finished(checkpoint: Path, settings: Settings) -> bool:
    state = read_state(checkpoint)
    args = settings.training
    if args.max_steps > 0:
        return state["global_step"] >= args.max_steps
    return (state["epoch"] or 0) >= args.num_train_epochs
