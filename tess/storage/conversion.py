"""A causal checkpoint made into a TESS pipeline that is ready for adaptation, and back.

The pipeline starts with every weight of the causal model. What is new is a time embedding, and a
second Mamba scan behind gates at zero; so the causal function is the same to the last bit, and
adaptation begins from what the model knows. The head keeps its label shift (TESS-2, arXiv
2502.13917): the state one position earlier predicts a token.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import PreTrainedTokenizerBase

from tess.backbones.causal_lm import HybridForCausalLM
from tess.backbones.checkpoint import (
    GENERATION_FILE,
    load_checkpoint,
    read_generation_config,
    tensor_names,
)
from tess.backbones.config import HybridConfig
from tess.backbones.released import MODEL_TYPE, read_released_config, save_released
from tess.config import TessConfig
from tess.denoiser import TessDenoiser
from tess.errors import UserError
from tess.schedulers.renoising import RenoisingScheduler
from tess.storage.files import replaced_folder
from tess.storage.parts import (
    Parts,
    check_target,
    kind_of,
    load_parts,
    own_fields,
    read_config,
    save_parts,
)
from tess.text.end_tokens import share_end_tokens, union
from tess.text.tokenization import load_tokenizer

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "chat_template.json",
)
CHAT_TEMPLATES = "additional_chat_templates"


def causal_to_tess(
    source: Path,
    target: Path,
    *,
    dtype: torch.dtype | None = None,
    tokenizer: str | None = None,
    denoiser: dict[str, Any] | None = None,
) -> list[str]:
    """Write the pipeline folder `target` from a causal checkpoint, released or saved here.

    Args:
        source: folder of the causal checkpoint.
        target: folder to write; what is in it stays until the new one is whole.
        dtype: of the weights; None keeps that of the config.
        tokenizer: folder of the tokenizer, if `source` has none.
        denoiser: fields of `TessConfig` (lengths, simplex_value, self_conditioning).

    Returns:
        What the causal checkpoint has and a pipeline has no place for, in words.

    Raises:
        UserError: no causal checkpoint there, one that cannot be read, or a target that holds
            something else.
    """
    source, target = Path(source), Path(target)
    if kind_of(source) != "ar":
        raise UserError(f"{source} is no causal checkpoint; expected its config.json and weights")
    _check_target(source, target)
    try:
        was, names = _causal_config(source), tensor_names(source)
        was.tie_word_embeddings = was.tie_word_embeddings and "lm_head.weight" not in names
        fields = own_fields(was)
        fields |= {"mamba_direction": "gated", "num_nextn_predict_layers": 0}
        config = TessConfig(
            backbone_config=HybridConfig(**fields), label_shift=True, **(denoiser or {})
        )
        settings = read_generation_config(source)
        owners = [config.backbone_config] + ([settings] if settings else [])
        given = load_tokenizer(tokenizer or source, *owners)
        share_end_tokens(given, *owners)
        model = load_checkpoint(
            TessDenoiser,
            config,
            source,
            dtype=dtype or was.dtype,
            starts_new=_is_new,
            leaves_out=lambda name: name.startswith("mtp."),
        )
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from error
    scheduler = RenoisingScheduler(vocab_size=config.vocab_size, simplex_value=config.simplex_value)
    with replaced_folder(target) as folder:
        save_parts(Parts(model, given, scheduler), folder)
        _keep_tokenizer(given, Path(tokenizer or source), folder / "tokenizer")
        if settings:  # a pipeline does not read them, the way back does
            shutil.copy(source / GENERATION_FILE, folder / "denoiser")
    has_mtp = any(name.startswith("mtp.") for name in names)
    return ["the multi-token predictor (mtp.*)"] if has_mtp else []


def tess_to_causal(source: Path, target: Path, *, expert_layout: str = "per_expert") -> list[str]:
    """Write a released folder with the causal model that is in `source`, a pipeline or causal one.

    Returns:
        Names of the weights that a causal model has no place for.

    Raises:
        UserError: no checkpoint there, a layout that is unknown, or a target that holds something
            else.
    """
    source, target = Path(source), Path(target)
    _check_target(source, target)
    parts = load_parts(source, dtype=None)
    model, dropped, files, spelling = parts.model, [], source, source
    if isinstance(model, TessDenoiser):
        files, spelling = source / "denoiser", source / "tokenizer"
        model, dropped = _causal_inside(model)
        model.generation_config = read_generation_config(files) or model.generation_config
        share_end_tokens(parts.tokenizer, model.config, model.generation_config)
    stored = read_generation_config(files)
    with replaced_folder(target) as folder:
        try:
            save_released(model, folder, expert_layout=expert_layout)
        except ValueError as error:
            raise UserError(str(error)) from error
        if stored and set(union(stored)) == set(union(model.generation_config)):
            shutil.copy(files / GENERATION_FILE, folder)
        parts.tokenizer.save_pretrained(folder)
        _keep_tokenizer(parts.tokenizer, spelling, folder)
    return dropped


def _keep_tokenizer(tokenizer: PreTrainedTokenizerBase, source: Path, target: Path) -> None:
    """The source's own files in place of those that a tokenizer writes, which differ in form."""
    vocabulary = set(tokenizer.vocab_files_names.values())
    if not any((source / name).is_file() for name in vocabulary):
        return  # from the hub
    for name in vocabulary | set(TOKENIZER_FILES):
        (target / name).unlink(missing_ok=True)
        if (source / name).is_file():
            shutil.copy(source / name, target)
    shutil.rmtree(target / CHAT_TEMPLATES, ignore_errors=True)
    if (source / CHAT_TEMPLATES).is_dir():
        shutil.copytree(source / CHAT_TEMPLATES, target / CHAT_TEMPLATES)


def _check_target(source: Path, target: Path) -> None:
    if source.resolve().is_relative_to(target.resolve()):
        raise UserError(f"{target} holds the source {source}, which writing it would delete")
    check_target(target)


def _causal_inside(denoiser: TessDenoiser) -> tuple[HybridForCausalLM, list[str]]:
    """A causal model that shares the denoiser's weights, and the names that it leaves out."""
    fields = own_fields(denoiser.config.backbone_config) | {"num_nextn_predict_layers": 0}
    config = HybridConfig(**fields)
    with init_empty_weights():
        model = HybridForCausalLM(config)
    model.backbone = denoiser.backbone
    if denoiser.lm_head is not None:
        model.lm_head = denoiser.lm_head
    model.tie_weights()
    kept = set(model.state_dict())
    return model, sorted(
        name for name in denoiser.state_dict() if name not in kept or name.endswith(".reverse_gate")
    )


def _is_new(name: str) -> bool:
    """Whether a denoiser's tensor is one that no causal checkpoint has."""
    return not name.startswith(("backbone.", "lm_head.")) or name.endswith(".reverse_gate")


def _causal_config(folder: Path) -> HybridConfig:
    released = json.loads((folder / "config.json").read_text()).get("model_type") == MODEL_TYPE
    return read_released_config(folder) if released else read_config(folder, HybridConfig)
