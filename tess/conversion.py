"""A causal checkpoint made into a TESS pipeline that is ready for adaptation, and back.

The pipeline starts with every weight of the causal model. What is new is a time embedding, and a
second Mamba scan behind gates at zero; so the causal function is the same to the last bit, and
adaptation begins from what the model knows. The head keeps its label shift (TESS-2, arXiv
2502.13917): the state one position earlier predicts a token.
"""

import json
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights

from tess.backbones.checkpoint import load_checkpoint
from tess.backbones.config import HybridConfig
from tess.backbones.hybrid import HybridForCausalLM
from tess.backbones.released import MODEL_TYPE, read_released_config, save_released
from tess.config import TessConfig
from tess.denoiser import TessDenoiser
from tess.errors import UserError
from tess.saving import Parts, kind_of, load_parts, read_config, replaced_folder, save_parts
from tess.schedulers.renoising import RenoisingScheduler
from tess.tokenization import check_tokenizer, load_tokenizer


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
        UserError: no causal checkpoint there, or one that cannot be read.
    """
    source, target = Path(source), Path(target)
    if kind_of(source) != "ar":
        raise UserError(f"{source} is no causal checkpoint; expected its config.json and weights")
    try:
        was = _causal_config(source)
        fields = _own_fields(was)
        fields |= {"mamba_direction": "gated", "num_nextn_predict_layers": 0}
        config = TessConfig(
            backbone_config=HybridConfig(**fields), label_shift=True, **(denoiser or {})
        )
        given = load_tokenizer(tokenizer or source)
        check_tokenizer(given, config.vocab_size)
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
    scheduler = RenoisingScheduler(simplex_value=config.simplex_value)
    with replaced_folder(target) as folder:
        save_parts(Parts(model, given, scheduler), folder)
    return ["the multi-token predictor (mtp.*)"] if was.num_nextn_predict_layers else []


def tess_to_causal(source: Path, target: Path, *, expert_layout: str = "per_expert") -> list[str]:
    """Write a released folder with the causal model that is in `source`, a pipeline or causal one.

    Returns:
        Names of the weights that a causal model has no place for.

    Raises:
        UserError: no checkpoint there, or a layout that is unknown.
    """
    parts = load_parts(source, dtype=None)
    model, dropped = parts.model, []
    if isinstance(model, TessDenoiser):
        model, dropped = _causal_inside(model)
    with replaced_folder(Path(target)) as folder:
        try:
            save_released(model, folder, expert_layout=expert_layout)
        except ValueError as error:
            raise UserError(str(error)) from error
        parts.tokenizer.save_pretrained(folder)
    return dropped


def _causal_inside(denoiser: TessDenoiser) -> tuple[HybridForCausalLM, list[str]]:
    """A causal model that shares the denoiser's weights, and the names that it leaves out."""
    config = HybridConfig(**_own_fields(denoiser.config.backbone_config))
    with init_empty_weights():
        model = HybridForCausalLM(config)
    model.backbone = denoiser.backbone
    if denoiser.lm_head is not None:
        model.lm_head = denoiser.lm_head
    model.tie_weights()
    kept = set(model.state_dict())
    return model, sorted(
        name
        for name in denoiser.state_dict()
        if name not in kept or name.endswith(".reverse_gate")
    )


def _is_new(name: str) -> bool:
    """Whether a denoiser's tensor is one that no causal checkpoint has."""
    return not name.startswith(("backbone.", "lm_head.")) or name.endswith(".reverse_gate")


def _causal_config(folder: Path) -> HybridConfig:
    released = json.loads((folder / "config.json").read_text()).get("model_type") == MODEL_TYPE
    return read_released_config(folder) if released else read_config(folder, HybridConfig)


def _own_fields(config: HybridConfig) -> dict[str, Any]:
    history = ("_name_or_path", "architectures", "dtype", "transformers_version")
    return {name: value for name, value in config.to_dict().items() if name not in history}
