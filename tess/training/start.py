"""What a run is made of before its first update; `prepare` is the door.

Tokenizer, model and scheduler come from the settings alone, or from a checkpoint.
"""

import logging
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase, set_seed

from tess.backbones.causal_lm import HybridForCausalLM
from tess.backbones.config import HybridConfig
from tess.backbones.presets import PRESETS
from tess.config import TessConfig
from tess.data.collators import Canvas
from tess.data.texts import Texts, load_data, warn_of_cuts, without_long
from tess.data.token_rows import TokenRows
from tess.denoiser import TessDenoiser
from tess.errors import UserError
from tess.sampling.call import check_scheduler
from tess.schedulers.density import LearnedDensity
from tess.schedulers.presets import DEFAULT_PRESET, SCHEDULER_PRESETS
from tess.schedulers.recoverability import recoverability
from tess.schedulers.renoising import RenoisingScheduler
from tess.storage.hub import local_folder
from tess.storage.parts import Model, Parts, copy_weights, load_parts, own_fields
from tess.text.end_tokens import end_tokens
from tess.text.tokenization import id_count, load_tokenizer, train_tokenizer
from tess.training.losses import ar_loss, tess_loss
from tess.training.settings import SMALL_BACKBONE, Settings
from tess.training.update import Batch, Update

Loss = Callable[[torch.nn.Module, Batch, Update], torch.Tensor]

logger = logging.getLogger(__name__)

DEFAULT_VOCAB_SIZE = 4096
DENSITY_BINS = 64


@dataclass
class Prepared:
    """What is trained, on what, and how it is measured.

    canvas: how long targets are, and what their padding weighs.
    loss: (model, batch, update) -> the batch's part in the update's loss.
    density: the learned one of times, if there is one; the loss learns it.
    """

    parts: Parts
    rows: TokenRows
    eval_rows: TokenRows | None
    canvas: Canvas
    loss: Loss
    density: LearnedDensity | None


def prepare(settings: Settings, checkpoint: Path | None = None) -> Prepared:
    """Read the data, and build the model or read that of the checkpoint of an earlier run.

    Raises:
        UserError: for data that cannot be trained on, and a model that cannot be built.
    """
    args, data = settings.training, settings.data
    train_texts, eval_texts = load_data(data, want_eval=args.eval_strategy != "no")
    set_seed(args.seed)
    init_from = settings.model.init_from
    folder = checkpoint or (local_folder(init_from) if init_from else None)
    given = load_parts(folder) if folder else None
    parts = given if checkpoint else build_parts(settings, train_texts, given)
    rows, eval_rows = (
        TokenRows(parts.tokenizer, *zip(*texts, strict=True), seed=seed) if texts else None
        for texts, seed in ((train_texts, args.seed), (eval_texts, args.seed + 1))
    )
    if data.long_rows == "drop":
        rows = without_long(rows, data)
    if not checkpoint:
        store_limits(parts, settings, rows)
    warn_of_cuts(rows, data)
    canvas, density = make_canvas(settings, parts, rows), None
    if parts.scheduler is not None and settings.diffusion.timestep_density == "learned":
        density = learned_density(parts.scheduler)
    loss = make_loss(settings, parts, density)
    return Prepared(parts, rows, eval_rows, canvas, loss, density)


def build_parts(settings: Settings, texts: Texts, given: Parts | None = None) -> Parts:
    """Tokenizer, model and scheduler of a new run; `given` are those that it starts from."""
    if given is not None:
        return _adapted(settings, given)
    tokenizer = _tokenizer(settings, texts)
    ids = {
        name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")
    }
    sizes = PRESETS[settings.model.preset] if settings.model.preset else SMALL_BACKBONE
    fields = sizes | _direction(settings) | settings.model.backbone_fields
    fields |= {"num_nextn_predict_layers": int(settings.causal.mtp_depth > 0)}
    backbone = HybridConfig(**(fields | ids | {"vocab_size": id_count(tokenizer)}))
    if settings.model.objective == "ar":
        _check_size(HybridForCausalLM, backbone)
        return Parts(HybridForCausalLM(backbone), tokenizer)
    config = TessConfig(
        backbone_config=backbone, **(_new_positions(settings) | _denoiser_fields(settings))
    )
    _check_size(TessDenoiser, config)
    return Parts(TessDenoiser(config), tokenizer, _scheduler(settings, config))


def _check_size(kind: type[Model], config: HybridConfig | TessConfig) -> None:
    """Raises UserError for a model that this machine's memory cannot hold."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            needed = sum(4 * parameter.numel() for parameter in kind(config).parameters())
    except (RuntimeError, OverflowError, MemoryError) as error:
        raise UserError(f"no model has such sizes: {str(error).splitlines()[0]}") from error
    if needed > memory:
        raise UserError(
            f"the model's weights take {needed / 1e9:,.0f} GB in float32, and this machine's "
            f"memory has {memory / 1e9:,.0f}"
        )


def _new_positions(settings: Settings) -> dict[str, int]:
    # From pure noise all target positions look alike: without these a new model takes far longer
    # to learn which source position a target position should copy (docs/experiments.md).
    return {
        "num_source_positions": settings.data.max_source_length,
        "num_target_positions": settings.data.max_target_length,
    }


def _tokenizer(settings: Settings, texts: Texts) -> PreTrainedTokenizerBase:
    size = settings.model.vocab_size
    if settings.model.train_tokenizer:
        lines = (text for row in texts for text in row if text is not None)
        return train_tokenizer(lines, size or DEFAULT_VOCAB_SIZE)
    tokenizer = load_tokenizer(settings.model.tokenizer)
    if size not in (None, id_count(tokenizer)):
        raise UserError(
            f"vocabulary mismatch: the tokenizer has {id_count(tokenizer)} ids and vocab_size is "
            f"{size}; leave vocab_size out"
        )
    return tokenizer


def _direction(settings: Settings) -> dict[str, str]:
    return {"mamba_direction": "forward" if settings.model.objective == "ar" else "bidirectional"}


def _denoiser_fields(settings: Settings) -> dict[str, Any]:
    data = settings.data
    lengths = {name: getattr(data, name) for name in ("max_source_length", "max_target_length")}
    return lengths | settings.diffusion.denoiser_overrides()


def _scheduler(
    settings: Settings, config: TessConfig, given: RenoisingScheduler | None = None
) -> RenoisingScheduler:
    fields = settings.diffusion.scheduler_overrides()
    fields |= {"simplex_value": config.simplex_value, "vocab_size": config.vocab_size}
    try:
        if given is None:
            scheduler = RenoisingScheduler(**SCHEDULER_PRESETS[DEFAULT_PRESET] | fields)
        else:
            scheduler = RenoisingScheduler.from_config(given.config, **fields)
    except ValueError as error:
        raise UserError(str(error)) from error
    check_scheduler(scheduler, config)
    return scheduler


def _adapted(settings: Settings, given: Parts) -> Parts:
    """The model of this run with the weights of another one, of either kind."""
    was = given.model.config
    backbone = was if isinstance(was, HybridConfig) else was.backbone_config
    changes = settings.model.backbone_fields | _predictor(settings, backbone)
    chosen = {} if settings.model.objective == "ar" else _denoiser_fields(settings)
    changes |= own_ends(given.tokenizer)
    backbone = HybridConfig(**(own_fields(backbone) | changes))
    if settings.model.objective == "ar":
        model: Model = HybridForCausalLM(backbone)
    else:
        fields = own_fields(was) if isinstance(was, TessConfig) else {}
        fields |= {"backbone_config": backbone} | chosen
        config = TessConfig(**fields)
        model = TessDenoiser(config)
    new, unused = copy_weights(given.model, model)
    for what, names in (("starts untrained", new), ("is not used", unused)):
        if names:
            logger.warning("of %s, %s %s", settings.model.init_from, ", ".join(names), what)
    if settings.model.objective == "ar":
        return Parts(model, given.tokenizer)
    return Parts(model, given.tokenizer, _scheduler(settings, model.config, given.scheduler))


def own_ends(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What a run here makes of a causal checkpoint: `</s>` after the source, and it comes first
    among the end tokens, as `tess_loss` reads it."""
    first, *others = end_tokens(tokenizer)
    return {"eos_token_id": [first, *others] if others else first, "eos_after_source": True}


def _predictor(settings: Settings, was: HybridConfig) -> dict[str, int]:
    """Whether the new model has a multi-token predictor: no denoiser has, and a given one stays."""
    pattern = settings.model.mtp_hybrid_override_pattern
    if was.num_nextn_predict_layers and pattern not in (None, was.mtp_hybrid_override_pattern):
        raise UserError(
            f"--mtp_hybrid_override_pattern {pattern} is not that of the predictor in --init_from, "
            f"{was.mtp_hybrid_override_pattern}"
        )
    wanted = settings.causal.mtp_depth > 0 or was.num_nextn_predict_layers > 0
    return {"num_nextn_predict_layers": int(wanted and settings.model.objective == "ar")}


def store_limits(parts: Parts, settings: Settings, rows: TokenRows) -> None:
    """Put the default lengths for generation where each kind of checkpoint keeps them."""
    data, tokenizer = settings.data, parts.tokenizer
    tokenizer.model_max_length = data.max_source_length
    if parts.scheduler is None:
        config = parts.model.config
        parts.model.generation_config = GenerationConfig(
            max_new_tokens=data.max_target_length,
            pad_token_id=config.pad_token_id,
            bos_token_id=config.bos_token_id,
            eos_token_id=config.eos_token_id,
        )
    elif "seq2seq" in data.corruptions:
        config = parts.model.config
        ratio, margin = fitted_length_rule(settings, parts, rows)
        config.target_length_ratio = ratio
        config.target_length_margin = 0 if config.length_head else margin
    if parts.scheduler is not None and parts.model.config.length_head:
        parts.model.config.target_length_quantile = _head_quantile(settings, parts)


def fitted_length_rule(settings: Settings, parts: Parts, rows: TokenRows) -> tuple[float, int]:
    """The rows' rule of lengths at the run's quantile."""
    limits = settings.data.max_source_length, settings.data.max_target_length
    return rows.length_rule(*limits, _length_quantile(settings, parts))


def _length_quantile(settings: Settings, parts: Parts) -> float:
    # Without pads in its canvases a model has learnt that the text ends where the canvas does.
    pads = parts.model.config.pad_loss_weight > 0
    return settings.diffusion.length_quantile or (0.99 if pads else 0.5)


def _head_quantile(settings: Settings, parts: Parts) -> float:
    quantile = _length_quantile(settings, parts)
    if not 0 < quantile < 1:
        raise UserError(
            "length_quantile must be above 0 and below 1 with a length head, whose distribution "
            f"ends at max_target_length, got {quantile}"
        )
    return quantile


def make_canvas(settings: Settings, parts: Parts, rows: TokenRows) -> Canvas:
    """The canvas of a run; autoregressive targets have none beyond `</s>`.

    rows: the training rows, by which the canvases of a model with a length head are ruled: its
        config's margin is the head's.
    """
    config = parts.model.config
    if parts.scheduler is None:
        return Canvas()
    ratio, margin = config.target_length_ratio, config.target_length_margin
    if config.length_head and ratio is not None:
        ratio, margin = fitted_length_rule(settings, parts, rows)
    return Canvas(
        pad_loss_weight=config.pad_loss_weight,
        extent=settings.diffusion.canvas,
        length_ratio=ratio,
        length_margin=margin,
    )


def learned_density(scheduler: RenoisingScheduler) -> LearnedDensity:
    """A learned density of times; before it has seen a loss it is even in recoverability."""
    middles = (torch.arange(DENSITY_BINS, dtype=torch.float64) + 0.5) / DENSITY_BINS
    size = scheduler.config.vocab_size
    told = recoverability(scheduler.alpha_bar(middles), size)
    return LearnedDensity(math.log(size) * (1 - told), scheduler.config.timestep_uniform_share)


def make_loss(
    settings: Settings, parts: Parts, density: LearnedDensity | None = None
) -> Loss:
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
