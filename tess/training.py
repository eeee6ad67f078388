"""One training run from its settings: data, tokenizer, model, Trainer, and the final folder."""

import dataclasses
import json
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase, TrainerCallback, set_seed
from transformers.trainer_utils import get_last_checkpoint

from tess.arguments import SMALL_BACKBONE, DataArguments, Settings
from tess.backbones.config import HybridConfig
from tess.backbones.hybrid import HybridForCausalLM
from tess.collators import Canvas, Collator, objective_names
from tess.config import TessConfig
from tess.decoders import make_decoder
from tess.denoiser import TessDenoiser
from tess.detokenize import detokenize
from tess.errors import UserError
from tess.loading import load_rows, load_texts
from tess.objectives import ar_loss, tess_loss
from tess.saving import Parts, copy_weights, load_parts, replaced_folder, save_parts
from tess.schedulers.renoising import RenoisingScheduler
from tess.tasks import get_task, load_task
from tess.tokenization import check_tokenizer, load_tokenizer, source_layout, train_tokenizer
from tess.trainer import TRAINER_STATE_FILE, TextTrainer
from tess.training_data import BucketSampler, TokenRows, length_rule

logger = logging.getLogger(__name__)

DEFAULT_VOCAB_SIZE = 4096
FINAL_FOLDER = "final"
SETTINGS_FILE = "settings.json"
Texts = list[tuple[str | None, str]]  # (source or None, target)
IN_PLACE = {"span_infilling", "ul2", "ul2_with_unconditional"}


def train(settings: Settings) -> Path:
    """Run a training, or go on with the one that `output_dir` holds.

    Returns:
        The final folder, `output_dir/final`.

    Raises:
        UserError: for anything in the settings or the data that cannot be trained on, or a full disk.
    """
    args = settings.training
    _check_run(settings)
    train_texts, eval_texts = load_data(settings.data, want_eval=args.eval_strategy != "no")
    output_dir = Path(args.output_dir)
    last = get_last_checkpoint(args.output_dir) if output_dir.is_dir() else None
    _record_settings(settings, resumed=last is not None)
    set_seed(args.seed)
    parts = load_parts(last) if last else build_parts(settings, train_texts)
    rows = TokenRows(parts.tokenizer, *zip(*train_texts, strict=True), seed=args.seed)
    eval_rows = None
    if eval_texts:
        eval_rows = TokenRows(parts.tokenizer, *zip(*eval_texts, strict=True), seed=args.seed + 1)
    if not last:
        _store_limits(parts, settings, rows)
    _warn_of_cuts(rows, settings.data)
    trainer = make_trainer(settings, parts, rows, eval_rows)
    if last and _is_finished(Path(last), settings):
        print(f"{last} is the end of this run already")
        trainer._load_from_checkpoint(last)
    else:
        trainer.train(resume_from_checkpoint=last)
    final = output_dir / FINAL_FOLDER
    if trainer.is_world_process_zero():
        save_final(trainer, final, getattr(torch, settings.run.save_dtype))
    return final


def _check_run(settings: Settings) -> None:
    if settings.training.n_gpu > 1:
        raise UserError("several GPUs in one process are not supported; start with `accelerate launch`")
    names = objective_names(settings.data.conditional_generation)
    if settings.model.objective == "ar" and (inside := sorted(IN_PLACE & set(names))):
        raise UserError(f"{inside[0]} has no autoregressive form; use text_infilling, prefix_lm or unconditional")


# Data


def load_data(data: DataArguments, want_eval: bool) -> tuple[Texts, Texts]:
    """Training and evaluation texts; the latter are empty when there are none and none are wanted."""
    if data.task:
        train_texts = _task_texts(data, "train")
        has_eval = "validation" in get_task(data.task).splits(data.dataset or "samples")
        eval_texts = _task_texts(data, "validation") if has_eval and not data.validation_file else []
    else:
        train_texts, eval_texts = _file_texts(data, data.train_file), []
    if data.validation_file:
        eval_texts = _file_texts(data, data.validation_file)
    if want_eval and not eval_texts:
        raise UserError("evaluation during training needs --validation_file (or a task with a validation split)")
    if "seq2seq" in objective_names(data.conditional_generation):
        for name, texts in (("training", train_texts), ("evaluation", eval_texts)):
            if any(source is None for source, _ in texts):
                raise UserError(f"seq2seq needs {name} rows with a source and a target, got raw text")
    return train_texts[: data.max_train_samples], eval_texts[: data.max_eval_samples]


def _task_texts(data: DataArguments, split: str) -> Texts:
    return [(row.source, row.target) for row in load_task(data.task, split, data.dataset)]


def _file_texts(data: DataArguments, files: list[str]) -> Texts:
    texts: Texts = []
    for name in files:
        path = Path(data.data_root or "", name)
        if data.text_column or name.removesuffix(".gz").endswith(".txt"):
            texts += [(None, text) for text in load_texts(path, data.text_column or "text")]
        else:
            rows = load_rows(path, data.source_column, data.target_column)
            texts += [(row.source, row.target) for row in rows]
    if data.detokenize:
        texts = [(source and detokenize(source), detokenize(target)) for source, target in texts]
    return texts


def _warn_of_cuts(rows: TokenRows, data: DataArguments) -> None:
    cut = sum(
        len(target) + 1 > data.max_target_length or len(source or ()) + 2 > data.max_source_length
        for source, target in zip(rows.sources, rows.targets, strict=True)
    )
    if cut:
        logger.warning("%d of %d training rows are longer than the maximum lengths and are cut", cut, len(rows))


# Model


def build_parts(settings: Settings, texts: Texts) -> Parts:
    """Tokenizer, model and scheduler of a new run."""
    if settings.model.init_from:
        given = load_parts(settings.model.init_from)
        return _adapted(settings, given)
    tokenizer = _tokenizer(settings, texts)
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    fields = SMALL_BACKBONE | _direction(settings) | settings.model.backbone_overrides()
    backbone = HybridConfig(**(fields | ids | {"vocab_size": len(tokenizer)}))
    if settings.model.objective == "ar":
        return Parts(HybridForCausalLM(backbone), tokenizer)
    config = TessConfig(backbone_config=backbone, **_denoiser_fields(settings))
    return Parts(TessDenoiser(config), tokenizer, _scheduler(settings, config))


def _tokenizer(settings: Settings, texts: Texts) -> PreTrainedTokenizerBase:
    size = settings.model.vocab_size
    if settings.model.train_tokenizer:
        lines = (text for row in texts for text in row if text is not None)
        return train_tokenizer(lines, size or DEFAULT_VOCAB_SIZE)
    tokenizer = load_tokenizer(settings.model.tokenizer, size)
    if size is not None and len(tokenizer) != size:
        raise UserError(f"vocabulary mismatch: the tokenizer has {len(tokenizer)} ids and --vocab_size is {size}")
    return tokenizer


def _direction(settings: Settings) -> dict[str, str]:
    return {"mamba_direction": "forward" if settings.model.objective == "ar" else "bidirectional"}


def _denoiser_fields(settings: Settings) -> dict[str, Any]:
    data = settings.data
    lengths = {name: getattr(data, name) for name in ("max_source_length", "max_target_length")}
    return {
        "pad_loss_weight": settings.diffusion.pad_loss_weight,
        **lengths,
        **settings.diffusion.denoiser_overrides(),
    }


def _scheduler(settings: Settings, config: TessConfig) -> RenoisingScheduler:
    return RenoisingScheduler(
        num_train_timesteps=settings.diffusion.num_diffusion_steps,
        simplex_value=config.simplex_value,
        beta_schedule=settings.diffusion.beta_schedule,
        cosine_s=settings.diffusion.cosine_s,
    )


def _adapted(settings: Settings, given: Parts) -> Parts:
    """The model of this run with the weights of another one, of either kind."""
    check_tokenizer(given.tokenizer, given.model.config.vocab_size)
    was = given.model.config
    backbone = was if isinstance(was, HybridConfig) else was.backbone_config
    backbone = HybridConfig(**(backbone.to_dict() | settings.model.backbone_overrides()))
    if settings.model.objective == "ar":
        parts = Parts(HybridForCausalLM(backbone), given.tokenizer)
    else:
        fields = was.to_dict() if isinstance(was, TessConfig) else {}
        fields |= {"backbone_config": backbone} | _denoiser_fields(settings)
        config = TessConfig(**fields)
        parts = Parts(TessDenoiser(config), given.tokenizer, _scheduler(settings, config))
    new, unused = copy_weights(given.model, parts.model)
    for what, names in (("starts untrained", new), ("is not used", unused)):
        if names:
            logger.warning("of %s, %s %s", settings.model.init_from, ", ".join(names), what)
    return parts


def _store_limits(parts: Parts, settings: Settings, rows: TokenRows) -> None:
    """Put the default lengths for generation where each kind of checkpoint keeps them."""
    data, diffusion, tokenizer = settings.data, settings.diffusion, parts.tokenizer
    tokenizer.model_max_length = data.max_source_length
    if parts.scheduler is None:
        config = parts.model.config
        parts.model.generation_config = GenerationConfig(
            max_new_tokens=data.max_target_length,
            pad_token_id=config.pad_token_id,
            bos_token_id=config.bos_token_id,
            eos_token_id=config.eos_token_id,
        )
    elif "seq2seq" in objective_names(data.conditional_generation):
        # Without pads in its canvases a model has learnt that the text ends where the canvas does.
        quantile = diffusion.length_quantile or (0.99 if diffusion.pad_loss_weight else 0.5)
        sources = [len(source_layout(tokenizer, ids, data.max_source_length)) for ids in rows.sources]
        targets = [min(len(ids) + 1, data.max_target_length) for ids in rows.targets]
        ratio, margin = length_rule(sources, targets, quantile)
        parts.model.config.target_length_ratio = ratio
        parts.model.config.target_length_margin = margin


# Run


def make_trainer(settings: Settings, parts: Parts, rows: TokenRows, eval_rows: TokenRows | None) -> TextTrainer:
    """The trainer of a run, with its loss, its collator and the callback that prints samples."""
    args, run = settings.training, settings.run
    # Our batches are no arguments of the model's forward.
    args.remove_unused_columns = False
    args.label_names = []
    collator = make_collator(settings, parts)
    trainer = TextTrainer(
        parts=parts,
        loss_function=make_loss(settings, parts),
        train_sampler=BucketSampler(
            rows.lengths(), args.per_device_train_batch_size, args.seed, settings.data.bucket_by_length
        ),
        ema_decay=run.ema_decay,
        balance_rate=run.router_balance_rate,
        args=args,
        train_dataset=rows,
        eval_dataset=eval_rows,
        data_collator=collator,
    )
    if run.num_samples_to_print:
        trainer.add_callback(PrintSamples(trainer, collator, eval_rows or rows, settings))
    return trainer


def make_collator(settings: Settings, parts: Parts) -> Collator:
    """The collator of a run; autoregressive targets have no canvas beyond `</s>`."""
    data, diffusion, config = settings.data, settings.diffusion, parts.model.config
    canvas = Canvas()
    if parts.scheduler is not None:
        canvas = Canvas(
            pad_loss_weight=diffusion.pad_loss_weight,
            extent=diffusion.canvas,
            length_ratio=config.target_length_ratio,
            length_margin=config.target_length_margin,
        )
    return Collator(
        parts.tokenizer,
        data.conditional_generation,
        max_source_length=data.max_source_length,
        max_target_length=data.max_target_length,
        canvas=canvas,
    )


def make_loss(settings: Settings, parts: Parts) -> Callable[[torch.nn.Module, dict[str, torch.Tensor]], torch.Tensor]:
    """(model, batch) -> loss."""
    if parts.scheduler is None:
        return ar_loss
    diffusion = settings.diffusion

    def loss(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return tess_loss(
            model,
            parts.scheduler,
            batch,
            self_conditioning_probability=diffusion.self_conditioning_probability,
            stratified=diffusion.stratified_timesteps,
            source_drop_probability=diffusion.source_drop_probability if model.training else 0.0,
        )

    return loss


class PrintSamples(TrainerCallback):
    """Prints what the model writes for a few fixed sources: before training, at evaluations, at the end."""

    def __init__(self, trainer: TextTrainer, collator: Collator, rows: TokenRows, settings: Settings) -> None:
        self.trainer = trainer
        self.num_inference_steps = settings.run.num_inference_steps
        self.tokenizer = collator.tokenizer
        with_source = {"seq2seq": "seq2seq", "ul2": "prefix_lm", "ul2_with_unconditional": "prefix_lm"}
        names = [with_source.get(name, name) for name in collator.objectives]
        self.objective = next((n for n in names if n in ("seq2seq", "prefix_lm", "text_infilling")), None)
        self.batch: dict[str, torch.Tensor] = {}
        if self.objective:
            count = min(settings.run.num_samples_to_print, len(rows))
            self.batch = collator([rows[i * len(rows) // count] for i in range(count)], self.objective)
        self.printed_at: int | None = None

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        with self.trainer.averaged_weights():
            self._print(state.global_step)

    def on_evaluate(self, args, state, control, **kwargs) -> None:
        self._print(state.global_step)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        with self.trainer.averaged_weights():
            self._print(state.global_step)

    def _print(self, step: int) -> None:
        if not self.objective or step == self.printed_at or not self.trainer.is_world_process_zero():
            return
        self.printed_at = step
        model = self.trainer.model
        was_training = model.training
        sources = [
            row[mask.bool()].tolist()
            for row, mask in zip(self.batch["source_ids"], self.batch["source_mask"], strict=True)
        ]
        decoder = make_decoder(self.trainer.parts)
        steps = self.num_inference_steps if decoder.name == "tess" else None
        generations = decoder.generate_ids(sources, num_inference_steps=steps)
        model.train(was_training)
        show = partial(self.tokenizer.decode, skip_special_tokens=self.objective != "text_infilling")
        print(f"--- samples at step {step} ({self.objective}) ---")
        for source, target, generation in zip(sources, self.batch["target_ids"], generations, strict=True):
            print(f"  source: {show(source)}")
            print(f"  target: {self.tokenizer.decode(target, skip_special_tokens=True)}")
            print(f"  output: {generation.text}", flush=True)


def save_final(trainer: TextTrainer, final: Path, dtype: torch.dtype) -> None:
    """Write the (averaged) weights as `dtype`; buffers, such as the router's bias, stay as they are."""
    parts = trainer.parts
    model = type(parts.model)(parts.model.config)
    if model.can_generate():
        model.generation_config = parts.model.generation_config
    with trainer.averaged_weights():
        model.load_state_dict(parts.model.state_dict())
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    with replaced_folder(final) as folder:
        save_parts(dataclasses.replace(parts, model=model), folder)


# Resuming


def _record_settings(settings: Settings, resumed: bool) -> None:
    """Keep the settings beside the checkpoints; refuse to resume a run with another model or process."""
    path = Path(settings.training.output_dir) / SETTINGS_FILE
    now = {name: dataclasses.asdict(getattr(settings, name)) for name in ("model", "diffusion", "data", "run")}
    if resumed and path.is_file():
        before = json.loads(path.read_text())
        for group in ("model", "diffusion"):
            changed = [key for key in now[group] if before[group].get(key) != now[group][key]]
            if changed:
                raise UserError(
                    f"{path.parent} holds checkpoints of another run ({changed[0]} was {before[group].get(changed[0])!r}"
                    f" and is {now[group][changed[0]]!r}); choose another --output_dir"
                )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(now, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"cannot write to --output_dir {path.parent}: {error.strerror}") from error


def _is_finished(checkpoint: Path, settings: Settings) -> bool:
    state = json.loads((checkpoint / TRAINER_STATE_FILE).read_text())
    args = settings.training
    if args.max_steps > 0:
        return state["global_step"] >= args.max_steps
    return (state["epoch"] or 0) >= args.num_train_epochs
