"""Configuration of the hybrid backbone, with the field names of Nemotron-H's config.json."""

import math
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

MIXERS = {"M": "mamba", "*": "attention", "-": "mlp", "E": "moe"}
MAMBA_DIRECTIONS = ("forward", "bidirectional", "gated")

FLOAT32_MAX = 3.4e38
_SIZES = (
    "vocab_size", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim",
    "intermediate_size", "ssm_state_size", "mamba_num_heads", "mamba_head_dim", "n_groups",
    "conv_kernel", "chunk_size", "n_routed_experts", "num_experts_per_tok", "n_group",
    "topk_group", "moe_intermediate_size", "moe_shared_expert_intermediate_size",
    "moe_latent_size",
)
_LETTERS = {
    "mamba": "M", "linear_attention": "M", "attention": "*", "full_attention": "*",
    "mlp": "-", "moe": "E",
}

# the spelling of some released files -> the field here
_OLD_NAMES = {
    "mamba_n_groups": "n_groups",
    "mamba_d_conv": "conv_kernel",
    "mamba_expand": "expand",
    "mamba_dt_min": "time_step_min",
    "mamba_dt_max": "time_step_max",
    "mamba_dt_limit": "time_step_limit",
    "mamba_dt_init_floor": "time_step_floor",
    "mamba_conv_bias": "use_conv_bias",
    "mamba_chunk_size": "chunk_size",
    "attention_head_dim": "head_dim",
    "rms_norm_eps": "layer_norm_epsilon",
    "norm_eps": "layer_norm_epsilon",
    "num_local_experts": "n_routed_experts",
}


@strict
class HybridConfig(PreTrainedConfig):
    """Shape of a hybrid Mamba-2 / attention / MLP / MoE stack (arXiv 2504.03624, 2512.20856).

    Fields are spelled as in the released Nemotron-H files, old spellings are accepted; only the
    fields below are ours or need a word.

    Args:
        hybrid_override_pattern: one letter per layer: `M` Mamba-2, `*` attention, `-` MLP,
            `E` mixture of experts. `layers_block_type`, the list form, is accepted instead.
        time_step_limit: clamp on the Mamba step sizes at run time; (0, inf) in every release.
        moe_latent_size: width the routed experts work in (LatentMoE, arXiv 2601.18089), or None.
        num_nextn_predict_layers: 1 when the checkpoint has a multi-token predictor (MTP), else 0.
        mtp_hybrid_override_pattern: the predictor's layers, in the same letters;
            `mtp_layers_block_type`, the list form, is accepted instead.
        eos_after_source: the model was trained here, on sources that end with an end token before
            the text goes on; a released one reads a prompt as it stands.
        mtp_after_norm_f: the predictor reads the backbone's state after the final norm (as
            Megatron-LM and vLLM do) or before it.
        mamba_direction: how Mamba layers read a block in denoise and prefix mode: "forward" (from
            the cached state), "bidirectional" (a scan from the block's end is added) or "gated"
            (the same times a per-head gate that starts at zero).

    Raises:
        ValueError: unknown pattern letters or direction, or sizes that do not divide.
    """

    model_type = "tess_hybrid"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]

    vocab_size: int = 131072
    hidden_size: int = 4096
    hybrid_override_pattern: str = "ME*-"
    tie_word_embeddings: bool = False
    use_cache: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    initializer_range: float = 0.02
    layer_norm_epsilon: float = 1e-5
    max_position_embeddings: int = 4096
    rescale_prenorm_residual: bool = True

    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = 128
    attention_bias: bool = False
    attention_dropout: float | int = 0.0

    intermediate_size: int = 21504
    mlp_hidden_act: str = "relu2"
    mlp_bias: bool = False

    ssm_state_size: int = 128
    mamba_num_heads: int = 128
    mamba_head_dim: int = 64
    mamba_hidden_act: str = "silu"
    mamba_direction: str = "forward"
    n_groups: int = 8
    conv_kernel: int = 4
    use_conv_bias: bool = True
    use_bias: bool = False
    chunk_size: int = 128
    time_step_min: float = 0.001
    time_step_max: float = 0.1
    time_step_floor: float = 1e-4
    time_step_limit: list[float | int] | tuple[float | int, ...] = (0.0, math.inf)

    n_routed_experts: int = 8
    num_experts_per_tok: int = 2
    moe_intermediate_size: int = 7688
    moe_shared_expert_intermediate_size: int = 7688
    moe_latent_size: int | None = None
    routed_scaling_factor: float | int = 1.0
    norm_topk_prob: bool = True
    n_group: int = 1
    topk_group: int = 1

    num_nextn_predict_layers: int = 0
    mtp_hybrid_override_pattern: str = "*E"
    mtp_after_norm_f: bool = True
    eos_after_source: bool = True

    def __post_init__(self, **kwargs) -> None:
        kwargs.pop("model_type", None)  # a released file says "nemotron_h"; the class is what it is
        for old, new in _OLD_NAMES.items():
            if old in kwargs:
                setattr(self, new, kwargs.pop(old))
        lists = (kwargs.pop("layers_block_type", None), kwargs.pop("layer_types", None))
        for blocks in lists:
            if blocks is not None:
                self._take_blocks(blocks)
        if (blocks := kwargs.pop("mtp_layers_block_type", None)) is not None:
            self.mtp_hybrid_override_pattern = pattern_from_blocks(blocks)
        depth = kwargs.pop("num_hidden_layers", None)
        # released files write no upper limit as Infinity or as 1e308, which float32 cannot hold
        self.time_step_limit = tuple(
            math.inf if limit > FLOAT32_MAX else float(limit) for limit in self.time_step_limit
        )
        super().__post_init__(**without_derived(self, kwargs))
        self._check()
        if depth not in (None, self.num_hidden_layers):
            raise ValueError(
                f"num_hidden_layers is {depth}, but {self.hybrid_override_pattern!r} has "
                f"{self.num_hidden_layers} layers"
            )

    def _take_blocks(self, blocks: list[str]) -> None:
        pattern = pattern_from_blocks(blocks)
        default = type(self).__dataclass_fields__["hybrid_override_pattern"].default
        if self.hybrid_override_pattern not in (default, pattern):
            raise ValueError(
                f"layers_block_type says {pattern!r} and hybrid_override_pattern "
                f"{self.hybrid_override_pattern!r}; expected one of them, or the same twice"
            )
        self.hybrid_override_pattern = pattern

    @property
    def layers_block_type(self) -> list[str]:
        """Kind of every layer, in words."""
        return [MIXERS[letter] for letter in self.hybrid_override_pattern]

    @property
    def num_hidden_layers(self) -> int:
        """Number of layers, one mixer each."""
        return len(self.hybrid_override_pattern)

    @num_hidden_layers.setter
    def num_hidden_layers(self, value: int) -> None:
        """Ignored: the pattern decides. Released files carry the number, so it must be settable."""

    @property
    def mamba_inner_size(self) -> int:
        """Channels of the Mamba mixer: heads x head width."""
        return self.mamba_num_heads * self.mamba_head_dim

    @property
    def conv_dim(self) -> int:
        """Channels of the Mamba convolution: x, B and C."""
        return self.mamba_inner_size + 2 * self.n_groups * self.ssm_state_size

    def _check(self) -> None:
        self._check_pattern("hybrid_override_pattern")
        self._check_pattern("mtp_hybrid_override_pattern")
        if self.num_nextn_predict_layers not in (0, 1):
            raise ValueError(
                "num_nextn_predict_layers counts the stored MTP blocks, 0 or 1 in every release, "
                f"got {self.num_nextn_predict_layers}"
            )
        if self.mamba_direction not in MAMBA_DIRECTIONS:
            raise ValueError(
                f"mamba_direction must be one of {', '.join(MAMBA_DIRECTIONS)}, "
                f"got {self.mamba_direction!r}"
            )
        for act, expected in ((self.mlp_hidden_act, "relu2"), (self.mamba_hidden_act, "silu")):
            if act != expected:
                raise ValueError(f"activation must be {expected!r}, as released, got {act!r}")
        for name in _SIZES:
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")
        if len(self.time_step_limit) != 2:
            raise ValueError(
                f"time_step_limit must be a lower and an upper limit, got {self.time_step_limit}"
            )
        for name, whole, part in (
            ("num_key_value_heads", self.num_attention_heads, self.num_key_value_heads),
            ("n_groups", self.mamba_num_heads, self.n_groups),
            ("n_group", self.n_routed_experts, self.n_group),
        ):
            if whole % part:
                raise ValueError(f"{name}={part} does not divide the {whole} heads or experts")
        used = self.hybrid_override_pattern
        if self.num_nextn_predict_layers:
            used += self.mtp_hybrid_override_pattern
        if "E" in used and self.num_experts_per_tok > (
            self.n_routed_experts // self.n_group * self.topk_group
        ):
            raise ValueError(
                f"num_experts_per_tok={self.num_experts_per_tok} is more than the "
                f"{self.n_routed_experts // self.n_group * self.topk_group} experts in reach"
            )

    def _check_pattern(self, name: str) -> None:
        pattern = getattr(self, name)
        if strange := sorted(set(pattern) - set(MIXERS)):
            raise ValueError(f"{name} {pattern!r} has {strange}; layers are {sorted(MIXERS)}")
        if not pattern:
            raise ValueError(f"{name} is empty; it needs at least one layer")


def pattern_from_blocks(blocks: list[str]) -> str:
    """`["mamba", "moe", ...]` (or transformers' names) as a pattern string.

    Raises:
        ValueError: a block name that no release uses.
    """
    if strange := sorted(set(blocks) - set(_LETTERS)):
        raise ValueError(f"layers_block_type has {strange}; blocks are {sorted(_LETTERS)}")
    return "".join(_LETTERS[block] for block in blocks)


def without_derived(config: PreTrainedConfig, given: dict[str, Any]) -> dict[str, Any]:
    """What is given for a config, without values that follow from its fields and agree with them.

    Raises ValueError for one that does not agree: such a field cannot be set.
    """
    kept = {}
    for name, value in given.items():
        found = getattr(type(config), name, None)
        if not isinstance(found, property) or found.fset is not None:
            kept[name] = value
        elif value != (own := getattr(config, name)):
            raise ValueError(
                f"{name} cannot be set: it follows from other fields, which make it {own!r}, got "
                f"{value!r}"
            )
    return kept
