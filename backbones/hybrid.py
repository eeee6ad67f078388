"""The hybrid backbone: the stack of mixers and its initialisation.

Letters: B batch, L positions of the block, H hidden.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, initialization
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import MergeModulelist, WeightConverter

from tess.backbones.block import HybridBlock, RMSNorm, run_layers
from tess.backbones.cache import HybridCache, KeyValues, MambaInputs
from tess.backbones.cache_names import CachedOutput, takes_either_name
from tess.backbones.config import HybridConfig
from tess.backbones.feedforward import Router, StackedExperts
from tess.backbones.mamba import Mamba2Mixer
from tess.backbones.pretrained import KEPT_IN_FLOAT32, StrictPreTrainedModel

# released files hold one tensor per expert, the grouped products want them stacked
register_checkpoint_conversion_mapping(
    HybridConfig.model_type,
    [
        WeightConverter(
            source_patterns=[f"mixer.experts.*.{name}.weight"],
            target_patterns=f"mixer.experts.{name}",
            operations=[MergeModulelist(dim=0)],
        )
        for name in ("up_proj", "down_proj")
    ],
    overwrite=True,
)


class HybridPreTrainedModel(StrictPreTrainedModel):
    """Loading, saving and initialisation shared by the classes below."""

    config_class = HybridConfig
    base_model_prefix = "backbone"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _is_stateful = True
    _no_split_modules = ["HybridBlock"]
    _keep_in_fp32_modules_strict = KEPT_IN_FLOAT32

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        init_hybrid_weights(module, self.config)


def init_hybrid_weights(module: nn.Module, config: HybridConfig) -> None:
    """Nemotron-H's initialisation of one module; transformers' guarded `init` skips loaded weights.

    Normal with `initializer_range`, Mamba output projections as nn.Linear's default over sqrt of
    the depth, A = 1..heads, D = 1, softplus(dt_bias) log-uniform in [time_step_min, time_step_max].
    """
    init = initialization
    if isinstance(module, Mamba2Mixer):
        init.copy_(module.A_log, torch.arange(1, module.heads + 1).float().log())
        init.ones_(module.D)
        low, high = math.log(config.time_step_min), math.log(config.time_step_max)
        dt = (torch.rand(module.heads) * (high - low) + low).exp().clamp(config.time_step_floor)
        init.copy_(module.dt_bias, dt + torch.log(-torch.expm1(-dt)))  # inverse of softplus
        if config.rescale_prenorm_residual:  # after its own nn.Linear turn: children come first
            bound = 1 / math.sqrt(module.inner * config.num_hidden_layers)
            init.uniform_(module.out_proj.weight, -bound, bound)
        if module.direction == "gated":
            init.zeros_(module.reverse_gate)
    elif isinstance(module, Router):
        init.normal_(module.weight, std=config.initializer_range)
        init.zeros_(module.e_score_correction_bias)
        init.zeros_(module.load)
    elif isinstance(module, StackedExperts):
        init.normal_(module.up_proj, std=config.initializer_range)
        init.normal_(module.down_proj, std=config.initializer_range)
    elif isinstance(module, nn.Linear):
        init.normal_(module.weight, std=config.initializer_range)
        if module.bias is not None:
            init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        init.normal_(module.weight, std=config.initializer_range)
    elif isinstance(module, nn.Conv1d):
        bound = 1 / math.sqrt(module.weight.shape[-1])
        init.uniform_(module.weight, -bound, bound)
        if module.bias is not None:
            init.uniform_(module.bias, -bound, bound)
    elif hasattr(module, "eps") and hasattr(module, "weight"):
        init.ones_(module.weight)


@dataclass
class HybridModelOutput(CachedOutput):
    """last_hidden_state: [B, L, H] after the final norm. pre_norm_state: [B, L, H] before it.

    record: of "verify" mode, else None; see `HybridCache.advance`.
    """

    last_hidden_state: Tensor | None = None
    cache: HybridCache | None = None
    pre_norm_state: Tensor | None = None
    record: dict[int, MambaInputs | KeyValues] | None = None


class HybridModel(HybridPreTrainedModel):
    """The stack without a head: token ids or embeddings in, normalised hidden states out."""

    def __init__(self, config: HybridConfig) -> None:
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            HybridBlock(config, letter, index)
            for index, letter in enumerate(config.hybrid_override_pattern)
        )
        self.norm_f = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        """The token embedding."""
        return self.embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the token embedding."""
        self.embeddings = value

    @takes_either_name()
    def forward(
        self,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: HybridCache | None = None,
        mode: str = "causal",
    ) -> HybridModelOutput:
        """Run a block of positions.

        Args:
            input_ids: [B, L] token ids, or
            inputs_embeds: [B, L, H] embeddings.
            attention_mask: [B, L] (or [B, cached + L]), 1 at real positions. Blocks that enter a
                cache are left-padded; a denoised block may be padded on either side.
            cache: the state so far.
            mode: "causal" reads and extends the cache; "prefix" reads the block in both directions
                and starts a cache from it; "denoise" reads the block in both directions after the
                cached positions and leaves the cache as it is; "verify" reads it causally, leaves
                the cache as it is too, and gives the record with which `HybridCache.advance` moves
                past as many positions of each row as turn out right.

        Raises:
            ValueError: see `make_context`; also when not exactly one input form is given.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        hidden = self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        hidden, context = run_layers(self.layers, hidden, attention_mask, cache, mode)
        return HybridModelOutput(self.norm_f(hidden), cache, hidden, context.record)


AutoConfig.register(HybridConfig.model_type, HybridConfig)
AutoModel.register(HybridConfig, HybridModel)
