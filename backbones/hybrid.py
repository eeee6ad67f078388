"""The hybrid backbone: the stack of mixers, and a causal language model over it.

Letters: B batch, L positions of the block, V vocabulary, H hidden.
"""

import math

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    GenerationMixin,
    initialization,
)
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import MergeModulelist, WeightConverter
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from tess.backbones.attention import Attention
from tess.backbones.cache import HybridCache
from tess.backbones.config import HybridConfig
from tess.backbones.context import BlockContext, make_context
from tess.backbones.feedforward import MLP, MixtureOfExperts, Router, StackedExperts
from tess.backbones.mamba import Mamba2Mixer
from tess.backbones.pretrained import StrictPreTrainedModel
from tess.kernels.norms import rms_norm

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


class RMSNorm(nn.Module):
    """RMS norm in float32 with a learned weight."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis."""
        return rms_norm(x, self.weight, self.eps)


def _build_mixer(config: HybridConfig, layer_idx: int) -> nn.Module:
    letter = config.hybrid_override_pattern[layer_idx]
    if letter == "M":
        return Mamba2Mixer(config, layer_idx)
    if letter == "*":
        return Attention(config, layer_idx)
    if letter == "E":
        return MixtureOfExperts(config)
    return MLP(config, config.intermediate_size)


class HybridBlock(GradientCheckpointingLayer):
    """x + mixer(norm(x)): one mixer per layer."""

    def __init__(self, config: HybridConfig, layer_idx: int) -> None:
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.mixer = _build_mixer(config, layer_idx)

    def forward(self, hidden_BLH: Tensor, context: BlockContext) -> Tensor:
        """One residual step."""
        return hidden_BLH + self.mixer(self.norm(hidden_BLH), context)


class HybridPreTrainedModel(StrictPreTrainedModel):
    """Loading, saving and initialisation shared by the classes below."""

    config_class = HybridConfig
    base_model_prefix = "backbone"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _is_stateful = True
    _no_split_modules = ["HybridBlock"]
    _keep_in_fp32_modules_strict = ["e_score_correction_bias"]

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


class HybridModel(HybridPreTrainedModel):
    """The stack without a head: token ids or embeddings in, normalised hidden states out."""

    def __init__(self, config: HybridConfig) -> None:
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            HybridBlock(config, index) for index in range(config.num_hidden_layers)
        )
        self.norm_f = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        """The token embedding."""
        return self.embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the token embedding."""
        self.embeddings = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: HybridCache | None = None,
        mode: str = "causal",
    ) -> BaseModelOutputWithPast:
        """Run a block of positions.

        Args:
            input_ids: [B, L] token ids, or
            inputs_embeds: [B, L, H] embeddings.
            attention_mask: [B, L] (or [B, cached + L]), 1 at real positions. Blocks that enter a
                cache are left-padded; a denoised block may be padded on either side.
            past_key_values: the state so far.
            mode: "causal" reads and extends the cache; "prefix" reads the block in both directions
                and starts a cache from it; "denoise" reads the block in both directions after the
                cached positions and leaves the cache as it is.

        Raises:
            ValueError: see `make_context`; also when not exactly one input form is given.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        hidden = self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        context = make_context(mode, hidden, attention_mask, past_key_values)
        for layer in self.layers:
            hidden = layer(hidden, context)
        if context.update_cache:
            past_key_values.layers = dict(context.outgoing)
            past_key_values.extend_mask(
                context.position_mask, hidden.shape[0], hidden.shape[1], hidden.device
            )
        return BaseModelOutputWithPast(self.norm_f(hidden), past_key_values)

    def balance_routers(self, rate: float) -> None:
        """One step of auxiliary-loss-free expert balancing in every mixture of experts."""
        for module in self.modules():
            if isinstance(module, Router):
                module.balance(rate)


class HybridForCausalLM(HybridPreTrainedModel, GenerationMixin):
    """Backbone and language-model head; `generate()` is transformers', over the hybrid cache."""

    _tied_weights_keys = {"lm_head.weight": "backbone.embeddings.weight"}

    def __init__(self, config: HybridConfig) -> None:
        super().__init__(config)
        self.backbone = HybridModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        """The head."""
        return self.lm_head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        """Replace the head."""
        self.lm_head = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: HybridCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool = False,
        logits_to_keep: int = 0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Next-token logits [B, L, V] in float32 (the last `logits_to_keep` positions, 0: all).

        `labels` [B, L] are token ids, -100 where no loss is wanted; the shift is done here.
        Remaining keyword arguments are what `generate` and Trainer pass along to every model
        (position ids, output flags); this family has no use for them.
        """
        if use_cache and past_key_values is None:
            past_key_values = HybridCache()
        out = self.backbone(input_ids, inputs_embeds, attention_mask, past_key_values)
        hidden = out.last_hidden_state[:, -logits_to_keep:]
        logits = self.lm_head(hidden).float()
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss, logits, out.past_key_values if use_cache else None)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # transformers' cache cannot be snapshot or selected; ours is made below

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args) -> None:
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args)
        if generation_config.use_cache and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = HybridCache()

AutoConfig.register(HybridConfig.model_type, HybridConfig)
AutoModel.register(HybridConfig, HybridModel)
AutoModelForCausalLM.register(HybridConfig, HybridForCausalLM)
