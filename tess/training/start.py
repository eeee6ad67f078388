"""A new run's tokenizer, model and scheduler: from the settings alone, or from a checkpoint."""

import logging
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase

from tess.backbones.causal_lm import HybridForCausalLM
from tess.backbones.config import HybridConfig
from tess.backbones.presets import PRESETS
from tess.config import TessConfig
from tess.data.collators import objective_names
from tess.data.texts import Texts
from tess.data.token_rows import TokenRows, length_rule
from tess.denoiser import TessDenoiser
from tess.errors import UserError
from tess.pipeline import check_scheduler
from tess.schedulers.presets import DEFAULT_PRESET, SCHEDULER_PRESETS
from tess.schedulers.renoising import RenoisingScheduler
from tess.storage.hub import local_folder
from tess.storage.parts import Parts, copy_weights, load_parts, own_fields
from tess.text.end_tokens import end_tokens
from tess.text.tokenization import id_count, load_tokenizer, source_layout, train_tokenizer
from tess.training.settings import SMALL_BACKBONE, Settings

logger = logging.getLogger(__name__)

DEFAULT_VOCAB_SIZE = 4096


def build_parts(settings: Settings, texts: Texts) -> Parts:
    """Tokenizer, model and scheduler of a new run."""
    if settings.model.init_from:
        given = load_parts(local_folder(settings.model.init_from))
        return _adapted(settings, given)
    tokenizer = _tokenizer(settings, texts)
    ids = {
        name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")
    }
    sizes = PRESETS[settings.model.preset] if settings.model.preset else SMALL_BACKBONE
    fields = sizes | _direction(settings) | settings.model.backbone_overrides()
    fields |= {"num_nextn_predict_layers": int(settings.causal.mtp_depth > 0)}
    backbone = HybridConfig(**(fields | ids | {"vocab_size": id_count(tokenizer)}))
    if settings.model.objective == "ar":
        return Parts(HybridForCausalLM(backbone), tokenizer)
    config = TessConfig(
        backbone_config=backbone, **(_new_positions(settings) | _denoiser_fields(settings))
    )
    return Parts(TessDenoiser(config), tokenizer, _scheduler(settings, config))


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
    changes = settings.model.backbone_overrides() | _predictor(settings, backbone)
    changes |= own_ends(given.tokenizer)
    backbone = HybridConfig(**(own_fields(backbone) | changes))
    if settings.model.objective == "ar":
        parts = Parts(HybridForCausalLM(backbone), given.tokenizer)
    else:
        fields = own_fields(was) if isinstance(was, TessConfig) else {}
        fields |= {"backbone_config": backbone} | _denoiser_fields(settings)
        config = TessConfig(**fields)
        scheduler = _scheduler(settings, config, given.scheduler)
        parts = Parts(TessDenoiser(config), given.tokenizer, scheduler)
    new, unused = copy_weights(given.model, parts.model)
    for what, names in (("starts untrained", new), ("is not used", unused)):
        if names:
            logger.warning("of %s, %s %s", settings.model.init_from, ", ".join(names), what)
    return parts


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
    elif "seq2seq" in objective_names(data.conditional_generation):
        config = parts.model.config
        ratio, margin = fitted_length_rule(settings, parts, rows)
        config.target_length_ratio = ratio
        config.target_length_margin = 0 if config.length_head else margin
    if parts.scheduler is not None and parts.model.config.length_head:
        parts.model.config.target_length_quantile = _head_quantile(settings, parts)


def fitted_length_rule(settings: Settings, parts: Parts, rows: TokenRows) -> tuple[float, int]:
    """`length_rule` of the rows, which all have a source, at the run's quantile."""
    data = settings.data
    sources = [
        len(source_layout(parts.tokenizer, ids, data.max_source_length)) for ids in rows.sources
    ]
    targets = [min(len(ids) + 1, data.max_target_length) for ids in rows.targets]
    return length_rule(sources, targets, _length_quantile(settings, parts))


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
