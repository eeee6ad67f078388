"""A causal language model over the backbone, with multi-token prediction where the config has it.

Letters: B batch, L positions, N positions that have a token ahead, V vocabulary, H hidden.
"""

from dataclasses import dataclass

from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LogitsProcessorList,
    StoppingCriteriaList,
)
from transformers.generation import GenerationMode

from tess.backbones.cache import HybridCache
from tess.backbones.cache_names import (
    GENERATION_NAME,
    CachedGenerationMixin,
    CachedOutput,
    takes_either_name,
)
from tess.backbones.config import HybridConfig
from tess.backbones.hybrid import HybridModel, HybridModelOutput, HybridPreTrainedModel
from tess.backbones.mtp import MultiTokenPredictor
from tess.backbones.speculative import MtpGenerateOutput, decode_with_mtp
from tess.kernels.cross_entropy import linear_cross_entropy

DRAFT_TOKENS = 3
"""Tokens that `generate(use_mtp=True)` drafts at a time when it is not told."""


@dataclass
class HybridCausalLMOutput(CachedOutput):
    """loss, logits and cache as in transformers.

    mtp_losses: per distance the mean cross-entropy of tokens further ahead, when asked for.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    cache: HybridCache | None = None
    mtp_losses: tuple[Tensor, ...] | None = None


class HybridForCausalLM(HybridPreTrainedModel, CachedGenerationMixin):
    """Backbone and language-model head, and a multi-token predictor where the config has one.

    `generate()` is transformers', over the hybrid cache. With `use_mtp=True` the predictor drafts
    `num_assistant_tokens` tokens (3 unless given) and the backbone checks them in one block; see
    `backbones/speculative.py`. Greedily that gives the same tokens in fewer evaluations.
    """

    _tied_weights_keys = {"lm_head.weight": "backbone.embeddings.weight"}

    def __init__(self, config: HybridConfig) -> None:
        super().__init__(config)
        self.backbone = HybridModel(config)
        self.mtp = MultiTokenPredictor(config) if config.num_nextn_predict_layers else None
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        """The head."""
        return self.lm_head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        """Replace the head."""
        self.lm_head = value

    @takes_either_name()
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: HybridCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool = False,
        logits_to_keep: int = 0,
        loss_weights: Tensor | None = None,
        mtp_depth: int = 0,
        **kwargs,
    ) -> HybridCausalLMOutput:
        """Next-token logits [B, L, V] in float32 (the last `logits_to_keep` positions, 0: all).

        For training there are two ways. `labels` [B, L] are token ids, -100 where no loss is wanted
        (the shift is done here), as in transformers. With `loss_weights` [B, L] instead the loss is
        the mean of the tokens' cross-entropy under these weights, and no logits are returned: they
        pass in slabs, and only those of tokens with a weight are computed. `mtp_depth` then adds
        `mtp_losses` of as many distances, see `look_ahead`.

        Remaining keyword arguments are what `generate` and Trainer pass along to every model
        (position ids, output flags); this family has no use for them.
        """
        if mtp_depth and (loss_weights is None or input_ids is None):
            raise ValueError("mtp_depth needs input_ids and loss_weights")
        if loss_weights is not None and labels is not None:
            raise ValueError("loss_weights and labels exclude each other; got both")
        if use_cache and cache is None:
            cache = HybridCache()
        out = self.backbone(input_ids, inputs_embeds, attention_mask, cache)
        cache = cache if use_cache else None
        if loss_weights is not None:
            ahead = self.look_ahead(input_ids, self.mtp_input(out), attention_mask, mtp_depth)
            loss, *mtp_losses = (
                self._mean_loss(states, input_ids, loss_weights, attention_mask, distance)
                for distance, states in enumerate((out.last_hidden_state, *ahead), start=1)
            )
            return HybridCausalLMOutput(loss, None, cache, tuple(mtp_losses))
        logits = self.lm_head(out.last_hidden_state[:, -logits_to_keep:]).float()
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
        return HybridCausalLMOutput(loss, logits, cache)

    def _mean_loss(
        self,
        states_BLH: Tensor,
        ids_BL: Tensor,
        weights_BL: Tensor,
        mask_BL: Tensor | None,
        distance: int,
    ) -> Tensor:
        """Mean cross-entropy of the tokens that lie `distance` after the states, in nats."""
        weights_BN, ids_BN = weights_BL[:, distance:], ids_BL[:, distance:]
        if mask_BL is not None:  # what would be predicted from padding is not
            weights_BN = weights_BN * mask_BL[:, : weights_BN.shape[1]]
        counted = weights_BN > 0
        return linear_cross_entropy(
            states_BLH[:, : weights_BN.shape[1]][counted],
            self.lm_head.weight,
            ids_BN[counted],
            weights_T=weights_BN[counted],
        )

    def mtp_input(self, out: HybridModelOutput) -> Tensor:
        """The backbone's state [B, L, H] that the multi-token predictor reads."""
        return out.last_hidden_state if self.config.mtp_after_norm_f else out.pre_norm_state

    def look_ahead(
        self, input_ids: Tensor, state_BLH: Tensor, attention_mask: Tensor | None, depth: int
    ) -> tuple[Tensor, ...]:
        """The predictor's states for tokens further ahead, with the true tokens in between.

        Entry d - 1 is [B, L - 1 - d, H]: under the head its position t predicts the token d + 1
        after it. Depth 1 reads the backbone's states, every further one those of the one before.

        Raises:
            ValueError: no predictor in this model, or a text too short for the depth.
        """
        if depth == 0:
            return ()
        self._need_mtp()
        length = input_ids.shape[1]
        if depth > length - 2:
            raise ValueError(f"mtp_depth {depth} needs {depth + 2} tokens or more, got {length}")
        ahead = []
        for d in range(1, depth + 1):
            keep = length - 1 - d
            mask = None if attention_mask is None else attention_mask[:, :keep]
            embeds = self.backbone.embeddings(input_ids[:, d : d + keep])
            state_BLH = self.mtp(embeds, state_BLH[:, :keep], mask)
            ahead.append(state_BLH)
        return tuple(ahead)

    def _need_mtp(self) -> None:
        if self.mtp is None:
            raise ValueError(
                "this checkpoint has no multi-token predictor (num_nextn_predict_layers is 0), "
                "which MTP needs"
            )

    # what transformers' generate() asks for

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # transformers' cache cannot be snapshot or selected; ours is made below

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args) -> None:
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args)
        if generation_config.use_cache and model_kwargs.get(GENERATION_NAME) is None:
            model_kwargs[GENERATION_NAME] = HybridCache()

    def _prepare_generation_config(self, generation_config, **kwargs):
        places = (kwargs.get("num_assistant_tokens"), generation_config, self.generation_config)
        given = [getattr(place, "num_assistant_tokens", place) for place in places]
        prepared, rest = super()._prepare_generation_config(generation_config, **kwargs)
        if given == [None] * 3:  # transformers' own default, 20, is meant for n-gram lookup
            prepared.num_assistant_tokens = DRAFT_TOKENS
        return prepared, rest

    def _validate_generation_mode(self, generation_mode, generation_config, mode_kwargs) -> None:
        config = generation_config
        if not config.use_mtp:
            return super()._validate_generation_mode(generation_mode, config, mode_kwargs)
        self._need_mtp()
        if generation_mode != GenerationMode.ASSISTED_GENERATION:
            raise ValueError(f"use_mtp goes with greedy search and sampling, not {generation_mode}")
        drafts = config.num_assistant_tokens
        if not isinstance(drafts, int) or drafts < 1:
            raise ValueError(f"num_assistant_tokens must be 1 or more with use_mtp, got {drafts!r}")
        for name, value in (
            ("assistant_model", mode_kwargs.get("assistant_model")),
            ("prompt_lookup_num_tokens", config.prompt_lookup_num_tokens),
            ("guidance_scale", None if config.guidance_scale == 1 else config.guidance_scale),
        ):
            if value is not None:
                raise ValueError(f"{name} does not go with use_mtp, which drafts by itself")
        for name in ("output_scores", "output_logits", "output_attentions", "output_hidden_states"):
            if config.return_dict_in_generate and getattr(config, name):
                raise ValueError(f"{name} is not available with use_mtp, which keeps none of them")
        if config.use_cache is False:
            raise ValueError("use_mtp needs the cache; got use_cache=False")

    @takes_either_name()
    def _assisted_decoding(
        self,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        streamer=None,
        cache: HybridCache | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **unused,
    ) -> MtpGenerateOutput | Tensor:
        if inputs_embeds is not None or (cache and cache.get_seq_length()):
            raise ValueError("use_mtp reads the prompt as input_ids, got embeddings or a cache")
        pad = generation_config._pad_token_tensor  # transformers falls back to the end token here
        out = decode_with_mtp(
            self,
            input_ids,
            attention_mask,
            num_draft_tokens=generation_config.num_assistant_tokens,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            do_sample=bool(generation_config.do_sample),
            pad_token_id=0 if pad is None else int(pad),
            streamer=streamer,
        )
        return out if generation_config.return_dict_in_generate else out.sequences


AutoModelForCausalLM.register(HybridConfig, HybridForCausalLM)
