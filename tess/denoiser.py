"""The TESS denoiser: a noised simplex and a time in, a prediction of the clean tokens out."""

# B examples, S source positions, L target positions, V vocabulary, H hidden

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn
from transformers import PreTrainedModel, initialization  # noqa: F401  diffusers looks for the base class here
from transformers.utils import ModelOutput

from tess.backbones.cache import HybridCache
from tess.backbones.hybrid import HybridModel, init_hybrid_weights
from tess.backbones.pretrained import KEPT_IN_FLOAT32, StrictPreTrainedModel
from tess.config import TessConfig
from tess.kernels.cross_entropy import linear_cross_entropy
from tess.kernels.head import Processors, vocabulary_sweep
from tess.kernels.order_statistics import MomentsCache
from tess.length import LengthHead
from tess.schedulers.simplex import DenseSimplex, NoisedSimplex, SoftTokens
from tess.self_conditioning import Prediction, SelfConditioning

POSITION_SCALE = 0.6
"""Initial size of position embeddings, in that of word embeddings: the soft embedding of a noised
token holds at most about a third of a word embedding (docs/experiments.md)."""


class PositionEmbedding(nn.Embedding):
    """Learned absolute positions."""


@dataclass
class DenoiserOutput(ModelOutput):
    """What one evaluation of the network gives.

    last_hidden_state: [B, L, H], the head's input (`TessDenoiser.predict`, `TessDenoiser.logits`).
    loss: scalar, with labels: weighted mean of the tokens' cross-entropy in nats.
    token_losses: [B, L], with labels: each token's cross-entropy times its weight, no gradient.
    """

    loss: Tensor | None = None
    token_losses: Tensor | None = None
    last_hidden_state: Tensor | None = None


class SourceReading(NamedTuple):
    """What one pass over the source leaves.

    cache: for `TessDenoiser.forward`; None in the joint layout.
    last_state: [B, H], the final state at the source's last position, for
        `TessDenoiser.length_log_probs`; with `label_shift` at the one before, and zeros for a
        source of one token. None in the joint layout.
    """

    cache: HybridCache | None
    last_state: Tensor | None


class TessDenoiser(StrictPreTrainedModel):
    """Predicts the clean target from its noised simplex, a time and the source (arXiv 2305.08379).

    The input of a noised position is softmax(x) W with the word embedding W, mixed with the
    previous prediction, plus a linear embedding of the time. The source has neither, so that its
    encoding holds for all steps. The head is W again when the backbone ties its embeddings. Nothing
    here has a vocabulary dimension beside that of positions, except what `logits` gives, a dense
    sample, and a self-conditioning that mixes over the vocabulary.

    With `label_shift` the hidden state one position earlier predicts a target, as in a causal
    language model: the source's last token, clean as in the source, is read in front of the target,
    and its state predicts the first target. Callers see no shift.
    """

    config_class = TessConfig
    base_model_prefix = "backbone"
    main_input_name = "sample"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["HybridBlock"]
    _keep_in_fp32_modules_strict = KEPT_IN_FLOAT32

    def __init__(self, config: TessConfig) -> None:
        super().__init__(config)
        width = config.hidden_size
        self.backbone = HybridModel(config.backbone_config)
        self.time_embedding = nn.Linear(1, width)
        self.self_conditioning = SelfConditioning(config)
        self.source_positions = _positions(config.num_source_positions, width)
        self.target_positions = _positions(config.num_target_positions, width)
        tied = config.backbone_config.tie_word_embeddings
        self.lm_head = None if tied else nn.Linear(width, config.vocab_size, bias=False)
        self.length_head = None
        if config.length_head:
            self.length_head = LengthHead(width, config.max_target_length)
        self.moments = MomentsCache()
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        """The word embedding, which is the soft embedding's matrix too."""
        return self.backbone.embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the word embedding."""
        self.backbone.embeddings = value

    def get_output_embeddings(self) -> nn.Linear | None:
        """The head; None when it is the word embedding."""
        return self.lm_head

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        init_hybrid_weights(module, self.config.backbone_config)
        if isinstance(module, PositionEmbedding):
            std = POSITION_SCALE * self.config.initializer_range
            initialization.normal_(module.weight, std=std)

    def encode_source(self, source_ids: Tensor, source_mask: Tensor | None) -> HybridCache | None:
        """Read the source once, for any number of denoising steps.

        source_ids, source_mask: [B, S], left-padded, mask 1 at tokens (None: no padding).
        Returns None in the joint layout, where the source has no encoding of its own. With
        `label_shift` the last token is left to `forward`; the cache of one token is empty.
        """
        return self.read_source(source_ids, source_mask).cache

    @apply_forward_hook
    def read_source(self, source_ids: Tensor, source_mask: Tensor | None) -> SourceReading:
        """`encode_source`, with the state that says how long the target will be."""
        if self.config.source_encoding == "joint":
            return SourceReading(None, None)
        cache = HybridCache()
        columns = slice(None)
        if self.config.label_shift:
            columns = slice(None, -1)
            if source_ids.shape[1] == 1:
                shape = (len(source_ids), self.config.hidden_size)
                return SourceReading(cache, self.backbone.embeddings.weight.new_zeros(shape))
        mask = None if source_mask is None else source_mask[:, columns]
        last_BH = self.backbone(
            inputs_embeds=self._embed_source(source_ids, source_mask, columns),
            attention_mask=mask,
            cache=cache,
            mode="causal" if self.config.source_encoding == "causal" else "prefix",
        ).last_hidden_state[:, -1]
        if self.config.label_shift and mask is not None:  # a source of one token beside longer ones
            last_BH = last_BH.masked_fill(~mask[:, -1:].bool(), 0.0)
        return SourceReading(cache, last_BH)

    def length_log_probs(self, last_state_BH: Tensor, source_lengths_B: Tensor) -> Tensor:
        """Log-probabilities [B, max_target_length] of the target lengths 1, 2, ...

        last_state_BH: `read_source`'s. source_lengths_B: tokens, special ones included.
        Raises ValueError where the model has no length head.
        """
        if self.length_head is None:
            raise ValueError("the model has no length head: its config says length_head=False")
        return self.length_head(last_state_BH, source_lengths_B)

    def forward(
        self,
        sample: NoisedSimplex | Tensor,
        timesteps: Tensor,
        previous: Prediction | None = None,
        cache: HybridCache | None = None,
        source_ids: Tensor | None = None,
        source_mask: Tensor | None = None,
        target_mask: Tensor | None = None,
        clean_ids: Tensor | None = None,
        noise_mask: Tensor | None = None,
        labels: Tensor | None = None,
        loss_weights: Tensor | None = None,
    ) -> DenoiserOutput:
        """Evaluate the network at all target positions at once.

        Args:
            sample: the noised target, a `NoisedSimplex` or dense [B, L, V].
            timesteps: [B] or [B, L] in [0, 1].
            previous: the last prediction (`predict`), for self-conditioning; None: there is none
                yet.
            cache: `encode_source`'s result, read and left as it is.
            source_ids, source_mask: [B, S], left-padded: the source. Beside a cache it is not
                read, except with `label_shift`, which needs it there for its last column (and the
                mask for that token's position). Neither cache nor source: the target stands alone,
                with `label_shift` as after the source `<s>`.
            target_mask: [B, L], 1 inside the canvas, right-padded; None: everything.
            clean_ids, noise_mask: [B, L]. Where noise_mask is 0 the position is context: it gets
                the clean word embedding of clean_ids, no time and no self-conditioning.
            labels, loss_weights: [B, L] clean tokens and what each weighs (None: 1); with them the
                output has the loss.

        Raises:
            ValueError: clean_ids without noise_mask, or more positions than were learned; a
                self-conditioning that needs the whole simplex of one that has none; with
                `label_shift` also a cache without source_ids, padding in the source's last column,
                or neither source nor bos_token_id.
        """
        if (clean_ids is None) != (noise_mask is None):
            raise ValueError("clean_ids and noise_mask go together; got only one of them")
        hidden_BLH = self._embed_target(sample, timesteps, previous, clean_ids, noise_mask)
        length = hidden_BLH.shape[1]
        block_BNH, block_mask_BN, cache = self._read_source(
            hidden_BLH, target_mask, cache, source_ids, source_mask
        )
        first = block_BNH.shape[1] - length - int(self.config.label_shift)
        hidden_BLH = self.backbone(
            inputs_embeds=block_BNH,
            attention_mask=block_mask_BN,
            cache=cache,
            mode="denoise",
        ).last_hidden_state[:, first : first + length]
        if labels is None:
            return DenoiserOutput(last_hidden_state=hidden_BLH)
        loss, losses_T = linear_cross_entropy(
            hidden_BLH.flatten(0, 1),
            self.head_weight(),
            labels.flatten(),
            weights_T=None if loss_weights is None else loss_weights.flatten(),
            return_token_losses=True,
        )
        return DenoiserOutput(
            loss=loss, token_losses=losses_T.view(labels.shape), last_hidden_state=hidden_BLH
        )

    def extend_source(
        self, cache: HybridCache, source_ids: Tensor, source_mask: Tensor, count: int
    ) -> None:
        """Read the last `count` columns of a causal source into the cache of those before.

        source_ids, source_mask: [B, S], all of it; each part left-padded.
        Raises ValueError where what comes later changes the encoding of what was read.
        """
        if self.config.source_encoding != "causal" or self.config.label_shift:
            raise ValueError(
                "only a causal source without label_shift can be extended, got source_encoding="
                f"{self.config.source_encoding!r}, label_shift={self.config.label_shift}"
            )
        columns = slice(-count, None)
        self.backbone(
            inputs_embeds=self._embed_source(source_ids, source_mask, columns),
            attention_mask=source_mask[:, columns],
            cache=cache,
            mode="causal",
        )

    def predict(
        self,
        hidden_BLH: Tensor,
        *,
        top_p: float | None = None,
        temperature: float = 1.0,
        uniforms: Tensor | None = None,
        processors: Processors | None = None,
        choice_BLH: Tensor | None = None,
        num_soft_tokens: int | None = None,
    ) -> Prediction:
        """Choose a token at every position, in one sweep over the vocabulary without gradient.

        Args:
            hidden_BLH: `forward`'s last hidden state.
            top_p, temperature, uniforms, processors: None takes the likeliest token, else a token
                is drawn from the nucleus with the position's own number of `uniforms` [B, L]; see
                `tess.kernels.head.vocabulary_sweep`.
            choice_BLH: choose and measure the tokens by this state's logits instead (guidance);
                what self-conditioning reads of the distribution stays hidden_BLH's.
            num_soft_tokens: also give so many of each position's likeliest tokens, for samplers
                that carry soft predictions.

        Returns:
            The tokens with their log-probabilities and entropies, and what this model's
            self-conditioning reads of a previous prediction.

        Raises:
            ValueError: options out of range, hidden states that are not finite.
        """
        kind, shape = self.config.self_conditioning, hidden_BLH.shape[:2]
        rule: dict[str, Any] = {
            "temperature": temperature,
            "processors": processors,
            "num_likeliest": num_soft_tokens,
        }
        if top_p is not None:
            uniform_T = None if uniforms is None else uniforms.flatten()
            rule |= {"choose": "sample", "top_p": top_p, "uniform_T": uniform_T}
        whole = self.config.needs_whole_simplex
        soft = kind is not None and "projection" not in kind and not whole
        table = self.backbone.embeddings.weight if soft else None
        head = self.head_weight()
        if choice_BLH is None:
            out = vocabulary_sweep(
                hidden_BLH.flatten(0, 1), head, expected_embedding_of=table, **rule
            )
        else:
            out = vocabulary_sweep(choice_BLH.flatten(0, 1), head, **rule)
            if soft:
                own = vocabulary_sweep(hidden_BLH.flatten(0, 1), head, expected_embedding_of=table)
                out = out._replace(embedding_TH=own.embedding_TH)
        likeliest = None
        if num_soft_tokens is not None:
            likeliest = SoftTokens(
                out.likeliest_ids_TM.view(*shape, -1), out.likeliest_probs_TM.view(*shape, -1)
            )
        return Prediction(
            token_ids=out.tokens_T.view(shape),
            log_probs=out.log_prob_T.view(shape),
            entropies=out.entropy_T.view(shape),
            log_sum_exp=out.log_sum_exp_T.view(shape),
            embedding=out.embedding_TH.view(*shape, -1) if soft else None,
            logits=self.logits(hidden_BLH).detach() if whole else None,
            soft=likeliest,
        )

    def logits(self, hidden_BLH: Tensor) -> Tensor:
        """The head's logits [B, L, V] in float32, also under autocast: all of them at once."""
        return F.linear(hidden_BLH, self.head_weight()).float()

    def head_weight(self) -> Tensor:
        """The head's matrix [V, H]."""
        return (self.backbone.embeddings if self.lm_head is None else self.lm_head).weight

    def _read_source(
        self,
        target_BLH: Tensor,
        target_mask: Tensor | None,
        cache: HybridCache | None,
        source_ids: Tensor | None,
        source_mask: Tensor | None,
    ) -> tuple[Tensor, Tensor | None, HybridCache | None]:
        """The block that is denoised, its mask, and the cache in front of it."""
        if self.config.label_shift:
            source_ids, source_mask = self._source_or_bos(
                source_ids, source_mask, cache, len(target_BLH)
            )
        if self.config.source_encoding == "joint" and source_ids is not None:
            columns = slice(None)
        else:
            if cache is None and source_ids is not None:
                cache = self.encode_source(source_ids, source_mask)
            if not self.config.label_shift:
                return target_BLH, target_mask, cache
            columns = slice(-1, None)
        block_BNH, block_mask_BN = self._prepend_source(
            target_BLH, target_mask, source_ids, source_mask, columns
        )
        return block_BNH, block_mask_BN, cache

    def _source_or_bos(
        self,
        source_ids: Tensor | None,
        source_mask: Tensor | None,
        cache: HybridCache | None,
        batch: int,
    ) -> tuple[Tensor, Tensor | None]:
        """The source, whose last token stands before the target; without one it is `<s>`."""
        if source_ids is not None:
            if source_mask is not None and not bool(source_mask[:, -1].all()):
                raise ValueError(
                    "label_shift needs a left-padded source with a token in every row, got padding "
                    "in the last column"
                )
            return source_ids, source_mask
        if cache is not None:
            raise ValueError(
                "label_shift needs source_ids beside the cache, for the source's last token; got "
                "none"
            )
        bos = self.config.backbone_config.bos_token_id
        if bos is None:
            raise ValueError("label_shift without a source needs a bos_token_id, got None")
        device = self.backbone.embeddings.weight.device
        return torch.full((batch, 1), bos, device=device), None

    def _embed_source(
        self, source_ids: Tensor, source_mask: Tensor | None, columns: slice = slice(None)
    ) -> Tensor:
        """Embeddings of some columns of the source."""
        hidden_BSH = self.backbone.embeddings(source_ids[:, columns])
        if self.source_positions is None:
            return hidden_BSH
        if source_mask is None:
            source_mask = torch.ones_like(source_ids)
        # counted from the first token, so that left padding does not move the text
        place_BS = (source_mask.long().cumsum(dim=1) - 1).clamp_(min=0)
        if source_ids.shape[1] > self.source_positions.num_embeddings:  # padding does not count
            _check_length("source", int(place_BS.max()) + 1, self.source_positions)
        return hidden_BSH + self.source_positions(place_BS[:, columns])

    def _embed_target(
        self,
        sample: NoisedSimplex | Tensor,
        timesteps: Tensor,
        previous: Prediction | None,
        clean_ids: Tensor | None,
        noise_mask: Tensor | None,
    ) -> Tensor:
        weight_VH = self.backbone.embeddings.weight
        simplex = DenseSimplex(sample) if isinstance(sample, Tensor) else sample
        clean_BLH = None if clean_ids is None else self.backbone.embeddings(clean_ids)
        noised_BL = None if noise_mask is None else noise_mask.bool()
        moments = self.moments.of(weight_VH) if simplex.needs_moments else None
        hidden_BLH = self.self_conditioning(
            simplex, previous, weight_VH, clean_BLH, noised_BL, moments
        )
        time_B11 = timesteps.to(weight_VH.dtype).reshape(len(hidden_BLH), -1, 1)
        # The residual stream keeps the weights' precision, also under autocast.
        timed_BLH = (hidden_BLH + self.time_embedding(time_B11)).to(weight_VH.dtype)
        if noised_BL is None:
            hidden_BLH = timed_BLH
        else:
            # the projected context of deepmind_conditional stands in for the word embedding
            context_BLH = hidden_BLH if self.config.deepmind_conditional else clean_BLH
            hidden_BLH = torch.where(noised_BL[..., None], timed_BLH, context_BLH.to(timed_BLH))
        if self.target_positions is None:
            return hidden_BLH
        length = hidden_BLH.shape[1]
        _check_length("target", length, self.target_positions)
        return hidden_BLH + self.target_positions.weight[:length]

    def _prepend_source(
        self,
        target_BLH: Tensor,
        target_mask: Tensor | None,
        source_ids: Tensor,
        source_mask: Tensor | None,
        columns: slice,
    ) -> tuple[Tensor, Tensor]:
        """[source; target] as one block, left- and right-padded.

        columns: of the source; all of them in TESS's joint layout.
        """
        source_BSH = self._embed_source(source_ids, source_mask, columns)
        if self.config.deepmind_conditional:
            nothing = torch.zeros_like(source_BSH)
            noised_BS = torch.zeros_like(source_ids[:, columns], dtype=torch.bool)
            source_BSH = self.self_conditioning.join(nothing, nothing, source_BSH, noised_BS)
        if source_mask is None:
            source_mask = torch.ones_like(source_ids)
        if target_mask is None:
            target_mask = source_mask.new_ones(target_BLH.shape[:2])
        hidden_BNH = torch.cat([source_BSH.to(target_BLH), target_BLH], dim=1)
        return hidden_BNH, torch.cat([source_mask[:, columns], target_mask.to(source_mask)], dim=1)


def _positions(count: int, width: int) -> PositionEmbedding | None:
    return PositionEmbedding(count, width) if count else None


def _check_length(side: str, length: int, positions: nn.Embedding) -> None:
    if length > positions.num_embeddings:
        raise ValueError(
            f"the {side} has {length} positions, but num_{side}_positions is "
            f"{positions.num_embeddings}"
        )
