"""Named shapes of the backbone: NVIDIA's released models, and a ladder of small ones to train.

The released shapes are those of the config.json files that NVIDIA publishes with the models, and of
the technical reports: Nemotron-H (arXiv 2504.03624), Nemotron Nano 2 (arXiv 2508.14444) and
Nemotron 3 (arXiv 2512.20856). A shape is not a checkpoint: nothing is downloaded, and the ids of
padding, start and end are HybridConfig's own (a released chat model may end on another one).

The small ones keep the proportions of Megatron-LM's scaling ladder for the same family: Mamba twice
as wide as the residual stream, a shared expert twice as wide as a routed one, weights of standard
deviation sqrt(0.8 / width) (but for the smallest, which is the shipped checkpoint's shape) and,
from 100 million parameters on, its smallest pattern. Their names say the total, within 15 %;
embeddings are tied. No published result stands behind these sizes.
"""

from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tess.backbones.config import HybridConfig

_H_8B = "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-"
_H_47B = (
    "M-M-M-M-M-M-M-M-M*-M-M-M-M-M-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-M-M---MM---M-M*-"
    "M-M-M-M-M-"
)
_H_56B = "M-M-M-M*-" + 9 * "M-M-M-M-M*-" + "M-M-M-M-M-"
_NANO_9B = "M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-"
_NANO_12B = 6 * "M-M-M-M*-" + "M-M-M-M-"
_NANO_4B = "M-M-M-MM-M-M*-M-M*-M-M-M*-M-M-MM*-MMM-M-M-"
_NANO_30B = 5 * "MEMEM*E" + "MEMEMEM*E" + "MEMEMEME"
_SUPER = 3 * "MEMEMEM*E" + 4 * "MEMEMEMEM*E" + "MEMEMEM*E" + "MEMEMEME"
_ULTRA = "MEMEMEM*E" + 3 * "MEMEM*EMEMEMEM*EMEMEMEM*E" + "MEMEM*EMEMEMEM*E" + "MEMEMEME"
_LADDER = "MEMEM*EMEME*EMEM*EMEME"

_RELEASED = {
    "vocab_size": 131072, "head_dim": 128, "n_groups": 8, "conv_kernel": 4, "chunk_size": 128,
    "tie_word_embeddings": False,
}

_DENSE_COLUMNS = (
    "hybrid_override_pattern", "hidden_size", "num_attention_heads", "num_key_value_heads",
    "mamba_num_heads", "mamba_head_dim", "ssm_state_size", "intermediate_size",
    "max_position_embeddings", "chunk_size",
)
_DENSE = {
    "nemotron-h-4b": (_H_8B, 3072, 32, 8, 112, 64, 128, 12288, 8192, 128),
    "nemotron-h-8b": (_H_8B, 4096, 32, 8, 128, 64, 128, 21504, 8192, 128),
    "nemotron-h-47b": (_H_47B, 8192, 64, 8, 256, 64, 256, 30720, 8192, 128),
    "nemotron-h-56b": (_H_56B, 8192, 64, 8, 256, 64, 256, 32768, 8192, 128),
    "nemotron-nano-9b-v2": (_NANO_9B, 4480, 40, 8, 128, 80, 128, 15680, 131072, 128),
    "nemotron-nano-12b-v2": (_NANO_12B, 5120, 40, 8, 128, 80, 128, 20480, 131072, 128),
    "nemotron-3-nano-4b": (_NANO_4B, 3136, 40, 8, 96, 80, 128, 12544, 262144, 256),
}

_MOE = {"num_key_value_heads": 2, "mamba_head_dim": 64, "ssm_state_size": 128}
_MOE_COLUMNS = (
    "hybrid_override_pattern", "hidden_size", "num_attention_heads", "mamba_num_heads",
    "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size",
    "moe_shared_expert_intermediate_size", "moe_latent_size", "routed_scaling_factor",
    "num_nextn_predict_layers", "max_position_embeddings",
)
_EXPERTS = {
    "nemotron-3-nano":
        (_NANO_30B, 2688, 32, 64, 128, 6, 1856, 3712, None, 2.5, 0, 262144),
    "nemotron-3.5-lightning":
        (_NANO_30B, 2688, 32, 64, 128, 6, 1856, 3712, None, 2.5, 1, 1048576),
    "nemotron-3-super":
        (_SUPER, 4096, 32, 128, 512, 22, 2688, 5376, 1024, 5.0, 1, 262144),
    "nemotron-3-ultra":
        (_ULTRA, 8192, 64, 256, 512, 22, 5120, 10240, 2048, 5.0, 1, 262144),
}

_SMALL = {"tie_word_embeddings": True, "chunk_size": 64, "conv_kernel": 4}
# the shape of the checkpoints that come with the repository
_SMALL_3M = {
    "hybrid_override_pattern": "M*-M*EM*-", "vocab_size": 4096, "hidden_size": 192,
    "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 48, "intermediate_size": 512,
    "mamba_num_heads": 8, "mamba_head_dim": 48, "ssm_state_size": 32, "n_groups": 2,
    "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 96,
    "moe_shared_expert_intermediate_size": 192, "initializer_range": 0.05,
}
_RUNG = {"head_dim": 64, "mamba_head_dim": 64}
_RUNG_COLUMNS = (
    "hybrid_override_pattern", "vocab_size", "hidden_size", "num_attention_heads",
    "num_key_value_heads", "mamba_num_heads", "ssm_state_size", "n_groups", "n_routed_experts",
    "num_experts_per_tok", "moe_intermediate_size", "moe_shared_expert_intermediate_size",
    "initializer_range",
)
_RUNGS = {
    "small-10m": ("MEM*EMEM*EME", 8192, 256, 4, 2, 8, 64, 2, 8, 2, 192, 384, 0.056),
    "small-30m": ("MEMEM*EMEM*EMEME", 32768, 320, 5, 1, 10, 64, 2, 8, 2, 320, 640, 0.05),
    "small-100m": (_LADDER, 32768, 512, 8, 2, 16, 64, 4, 16, 2, 352, 704, 0.04),
    "small-315m": (_LADDER, 32768, 768, 12, 4, 24, 128, 8, 32, 4, 448, 896, 0.0325),
}


def _rows(
    columns: tuple[str, ...], table: dict[str, tuple[Any, ...]], shared: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """The table's rows as fields of HybridConfig, each over the fields that all rows share."""
    return {name: shared | dict(zip(columns, row, strict=True)) for name, row in table.items()}


PRESETS: dict[str, dict[str, Any]] = {
    **_rows(_DENSE_COLUMNS, _DENSE, _RELEASED),
    **_rows(_MOE_COLUMNS, _EXPERTS, _RELEASED | _MOE),
    "small-3m": _SMALL | _SMALL_3M,
    **_rows(_RUNG_COLUMNS, _RUNGS, _SMALL | _RUNG),
}
"""Name -> fields of HybridConfig; what is not named has HybridConfig's default."""


def preset_config(name: str, **changes: Any) -> "HybridConfig":
    """The config of a named shape, with some fields changed.

    A preset with a multi-token predictor loses it with `num_nextn_predict_layers=0`.

    Raises:
        ValueError: an unknown name or field, or changes that do not fit (see `HybridConfig`).
    """
    from tess.backbones.config import HybridConfig  # needs transformers, the names do not

    if name not in PRESETS:
        near = get_close_matches(name, PRESETS)
        hint = f"did you mean {' or '.join(near)}" if near else f"known are {', '.join(PRESETS)}"
        raise ValueError(f"there is no preset {name!r}; {hint}")
    if strange := sorted(set(changes) - set(HybridConfig.__dataclass_fields__)):
        # PreTrainedConfig would keep a misspelt field and do nothing with it
        raise ValueError(f"HybridConfig has no field {', '.join(strange)}")
    return HybridConfig(**(PRESETS[name] | changes))
