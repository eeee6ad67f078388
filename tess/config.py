"""Configuration of the TESS denoiser: the backbone's, and what simplex diffusion adds to it."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from tess.backbones.config import HybridConfig, without_derived
from tess.schedulers.base import resolve_simplex_value

SOURCE_ENCODINGS = ("causal", "bidirectional", "joint")
CONCATENATING = ("logits", "logits_with_projection")
MIXING = (
    "logits_addition",
    "logits_with_projection_addition",
    "logits_mean",
    "logits_max",
    "logits_multiply",
)
SELF_CONDITIONING = (*CONCATENATING, *MIXING)
MIX_POINTS = ("embeddings", "probabilities", "logits")


@strict
class TessConfig(PreTrainedConfig):
    """Shape and method of a `TessDenoiser` (TESS, arXiv 2305.08379).

    Args:
        backbone_config: a `HybridConfig` or its dict.
        simplex_value: k; a token is +k on its own coordinate and -k on every other one. "auto" is
            (ln V - 0.82) / 2, and kept as that number.
        source_encoding: "causal" (as pretrained and autoregressive models read), "bidirectional"
            (prefix-LM), both encoded once into a cache; or "joint" (TESS's layout: source and
            target in one bidirectional sequence, run through the network in every step).
        label_shift: the hidden state one position earlier predicts a token, as in a causal language
            model, so that the head of a pretrained one goes on working (TESS-2, arXiv 2502.13917);
            for "causal" and "joint".
        self_conditioning: how the previous prediction enters the network's input, or None.
            "logits" and "logits_with_projection" concatenate two embeddings, the others mix.
            The `projection` kinds snap the prediction to its likeliest token first.
        self_conditioning_mix: where the two meet: "embeddings", "probabilities" (before the
            embedding) or "logits" (before the softmax). None means "probabilities" for the mixing
            kinds and "embeddings" for those that concatenate, which allow nothing else.
        self_conditioning_zeros_after_softmax: a missing prediction is a zero vector rather than the
            uniform distribution.
        self_conditioning_mlp: two layers with GELU instead of one after concatenating.
        deepmind_conditional: concatenate noised, clean and predicted embeddings and the mask, and
            project (SED, arXiv 2211.04236, as TESS has it); needs the "embeddings" mix.
        num_source_positions, num_target_positions: rows of learned absolute position embeddings
            added to source and target; 0 for none.
        pad_loss_weight: loss weight of padding; above 0 the canvas covers the padding too.
        length_head: predict a distribution over target lengths from the source's encoding
            (`tess.length`); not for "joint", where the source has no encoding of its own.
        target_length_quantile: with a length head the canvas, when none is asked for, is this
            quantile of the predicted lengths + target_length_margin, at most max_target_length.
        target_length_ratio, target_length_margin: without a head it is ceil(ratio * source length)
            + margin, at most max_target_length; ratio None always takes max_target_length.
        max_source_length, max_target_length: tokens, bos and eos included.
        source_drop_probability: share of training examples with an empty source, without which
            guidance has nothing to compare with; None: not noted.

    Raises:
        ValueError: an unknown setting, or two that exclude each other.
    """

    model_type = "tess_denoiser"
    sub_configs = {"backbone_config": HybridConfig}

    backbone_config: HybridConfig | dict[str, Any] | None = None
    simplex_value: float | int | str = "auto"
    source_encoding: str = "causal"
    label_shift: bool = False
    self_conditioning: str | None = "logits_mean"
    self_conditioning_mix: str | None = None
    self_conditioning_zeros_after_softmax: bool = False
    self_conditioning_mlp: bool = False
    deepmind_conditional: bool = False
    num_source_positions: int = 0
    num_target_positions: int = 0
    pad_loss_weight: float | int = 0.0
    length_head: bool = False
    target_length_quantile: float | int = 0.9
    target_length_ratio: float | int | None = None
    target_length_margin: int = 0
    max_source_length: int = 256
    max_target_length: int = 128
    source_drop_probability: float | int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.backbone_config is None:
            self.backbone_config = HybridConfig()
        elif isinstance(self.backbone_config, dict):
            self.backbone_config = HybridConfig(**self.backbone_config)
        if self.self_conditioning is not None and self.self_conditioning_mix is None:
            joins = self.self_conditioning in CONCATENATING or self.deepmind_conditional
            self.self_conditioning_mix = "embeddings" if joins else "probabilities"
        super().__post_init__(**without_derived(self, kwargs))
        self.simplex_value = resolve_simplex_value(self.simplex_value, self.vocab_size)
        # Not a setting here: the backbone's own field decides, and the base class has one too.
        self.tie_word_embeddings = self.backbone_config.tie_word_embeddings
        self._check()

    @property
    def vocab_size(self) -> int:
        """The backbone's."""
        return self.backbone_config.vocab_size

    @property
    def hidden_size(self) -> int:
        """The backbone's."""
        return self.backbone_config.hidden_size

    @property
    def initializer_range(self) -> float:
        """The backbone's."""
        return self.backbone_config.initializer_range

    @property
    def needs_whole_simplex(self) -> bool:
        """Whether self-conditioning mixes over the vocabulary in a way that no embedding follows.

        Such a model needs dense noise, and logits as its previous prediction.
        """
        if self.self_conditioning is None or self.deepmind_conditional:
            return False
        nonlinear = self.self_conditioning in ("logits_max", "logits_multiply")
        mix = self.self_conditioning_mix
        return mix == "logits" or (nonlinear and mix == "probabilities")

    def _check(self) -> None:
        for name, allowed in (
            ("source_encoding", SOURCE_ENCODINGS),
            ("self_conditioning", (None, *SELF_CONDITIONING)),
            ("self_conditioning_mix", (None, *MIX_POINTS)),
        ):
            if (value := getattr(self, name)) not in allowed:
                known = ", ".join(str(item) for item in allowed)
                raise ValueError(f"{name} must be one of {known}, got {value!r}")
        for name in ("max_source_length", "max_target_length"):
            if getattr(self, name) < 2:
                raise ValueError(f"{name} must be at least 2, got {getattr(self, name)}")
        for side in ("source", "target"):
            rows, longest = (
                getattr(self, f"num_{side}_positions"),
                getattr(self, f"max_{side}_length"),
            )
            if 0 < rows < longest:
                raise ValueError(
                    f"max_{side}_length={longest} is more than num_{side}_positions={rows}"
                )
        if self.length_head and self.source_encoding == "joint":
            raise ValueError(
                "length_head reads the source's own encoding and needs source_encoding 'causal' or "
                "'bidirectional', got 'joint'"
            )
        if not 0 < self.target_length_quantile < 1:
            raise ValueError(
                "target_length_quantile must be above 0 and below 1, got "
                f"{self.target_length_quantile}"
            )
        self._check_label_shift()
        self._check_self_conditioning()

    def _check_label_shift(self) -> None:
        if not self.label_shift:
            return
        if self.source_encoding == "bidirectional":
            raise ValueError(
                "label_shift keeps what a causal checkpoint knows and needs source_encoding "
                "'causal' or 'joint', got 'bidirectional'"
            )
        if self.deepmind_conditional:
            raise ValueError(
                "label_shift needs the word embeddings that a causal checkpoint reads and excludes "
                "deepmind_conditional, which projects them"
            )

    def _check_self_conditioning(self) -> None:
        kind, mix = self.self_conditioning, self.self_conditioning_mix
        if kind is None:
            if self.deepmind_conditional:
                raise ValueError("deepmind_conditional needs self_conditioning, got None")
            return
        joins = kind in CONCATENATING or self.deepmind_conditional
        if joins and mix != "embeddings":
            name = "deepmind_conditional" if self.deepmind_conditional else kind
            raise ValueError(f"{name} needs self_conditioning_mix='embeddings', got {mix!r}")
        if self.self_conditioning_mlp and not joins:
            raise ValueError(
                f"self_conditioning_mlp works with {', '.join(CONCATENATING)} and "
                f"deepmind_conditional, got {kind!r}"
            )
        if self.self_conditioning_zeros_after_softmax and mix == "logits":
            raise ValueError("self_conditioning_zeros_after_softmax excludes the 'logits' mix")
