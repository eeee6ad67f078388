"""One training run from its settings: prepare, run, save."""

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import TrainerCallback

from tess.data.collators import Collator
from tess.data.token_rows import BucketSampler
from tess.errors import UserError
from tess.storage.parts import check_target, kind_of
from tess.training.resuming import Place, begin
from tess.training.sample_printer import PrintSamples
from tess.training.settings import Settings
from tess.training.start import Prepared, prepare
from tess.training.trainer import TextTrainer

FINAL_FOLDER = "final"


def train(settings: Settings, callbacks: Sequence[TrainerCallback] = ()) -> Path:
    """Run a training, or go on with the one that `output_dir` holds.

    callbacks: of transformers' Trainer, beside its own.

    Returns:
        The final folder, `output_dir/final`.

    Raises:
        UserError: for anything in the settings or the data that cannot be trained on, a final
        folder that holds something else, or a full disk.
    """
    args = settings.training
    _check_processes(settings)
    final = Path(args.output_dir) / FINAL_FOLDER
    check_target(final)
    with args.main_process_first(local=False, desc="settings"):
        earlier = begin(settings)
    last, tells = earlier.checkpoint, args.process_index == 0
    if earlier.finished and kind_of(final) and final.stat().st_mtime >= last.stat().st_mtime:
        if tells:
            print(f"{final} is the end of this run already")
        return final
    trainer = make_trainer(settings, prepare(settings, last), earlier.place)
    for callback in callbacks:
        trainer.add_callback(callback)
    if earlier.finished:
        if tells:
            print(f"{last} is the end of this run already")
        trainer.load_weights(earlier.result)
    else:
        trainer.train(resume_from_checkpoint=last and str(last))
    trainer.save_final(final, getattr(torch, settings.run.save_dtype))
    return final


def _check_processes(settings: Settings) -> None:
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


def make_trainer(settings: Settings, prepared: Prepared, place: Place) -> TextTrainer:
    """The trainer of a run, with its collator and the callback that prints samples."""
    args, run, data = settings.training, settings.run, settings.data
    parts, rows, eval_rows = prepared.parts, prepared.rows, prepared.eval_rows
    # Our batches are no arguments of the model's forward.
    args.remove_unused_columns = False
    args.label_names = []
    # Routers count their experts' load in buffers, of which DDP would hand out the first process's.
    args.ddp_broadcast_buffers = False
    if getattr(parts.model.config, "length_head", False):
        # The head runs beside the forward pass, where DDP's search would take it for unused.
        args.ddp_find_unused_parameters = False
    collator = Collator(
        parts.tokenizer,
        data.corruptions,
        max_source_length=data.max_source_length,
        max_target_length=data.max_target_length,
        canvas=prepared.canvas,
    )
    if settings.causal.freeze_backbone:
        for name, parameter in parts.model.named_parameters():
            parameter.requires_grad_(name.startswith("mtp."))
    step_rows = args.per_device_train_batch_size * args.world_size
    trainer = TextTrainer(
        parts=parts,
        loss_function=prepared.loss,
        density=prepared.density,
        place=place,
        train_sampler=BucketSampler(
            rows.lengths(),
            step_rows * args.gradient_accumulation_steps,
            args.seed,
            data.bucket_by_length,
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
