"""Settings of a training run, as dataclasses, and what has to hold between them.

Nothing heavy is imported: `tess-train --help` prints them, and most mistakes are seen, before torch
loads. The choices that torch modules define are therefore repeated here; a test compares them.
"""

from collections.abc import Collection
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from tess.data.settings import DataArguments
from tess.options import option
from tess.training.diffusion_settings import DiffusionArguments

if TYPE_CHECKING:
    import transformers


@dataclass
class ModelArguments:
    """The backbone and the tokenizer; sizes left out are the preset's, or `SMALL_BACKBONE`'s."""

    objective: str = option(
        "tess",
        "What to train: tess (simplex diffusion) or ar (next-token prediction).",
        choices=["tess", "ar"],
    )
    init_from: str | None = option(
        None,
        "Start from the weights of this checkpoint folder, tess or ar; its tokenizer is used too.",
    )
    tokenizer: str | None = option(
        None, "Folder or hub name of a Hugging Face tokenizer with pad and eos."
    )
    train_tokenizer: bool = option(
        False, "Train a byte-level BPE of vocab_size on the training texts."
    )
    vocab_size: int | None = option(
        None,
        "Ids of the model; default: 4096 for a trained tokenizer, else the tokenizer's own size.",
    )
    preset: str | None = option(
        None,
        "Sizes of a new model by name (scripts/model_info.py --help lists them); given sizes "
        "win, and the vocabulary is the tokenizer's.",
    )
    hybrid_override_pattern: str | None = option(
        None, "One letter per layer: M Mamba-2, * attention, - MLP, E mixture of experts."
    )
    hidden_size: int | None = option(None, "Width of the model.")
    num_attention_heads: int | None = option(None, "Query heads.")
    num_key_value_heads: int | None = option(None, "Key and value heads.")
    head_dim: int | None = option(None, "Width of an attention head.")
    intermediate_size: int | None = option(None, "Inner width of the MLP layers.")
    ssm_state_size: int | None = option(None, "State size of a Mamba head.")
    mamba_num_heads: int | None = option(None, "Mamba heads.")
    mamba_head_dim: int | None = option(None, "Width of a Mamba head.")
    n_groups: int | None = option(None, "Groups of Mamba heads that share B and C.")
    conv_kernel: int | None = option(None, "Width of the causal convolution.")
    chunk_size: int | None = option(None, "Positions per chunk of the Mamba scan.")
    n_routed_experts: int | None = option(None, "Experts of an E layer.")
    num_experts_per_tok: int | None = option(None, "Experts that a token is sent to.")
    moe_intermediate_size: int | None = option(None, "Inner width of a routed expert.")
    moe_shared_expert_intermediate_size: int | None = option(
        None, "Inner width of the shared expert."
    )
    moe_latent_size: int | None = option(None, "Width that the routed experts work in (LatentMoE).")
    initializer_range: float | None = option(
        None, "Standard deviation of new weights (default: 0.02)."
    )
    tie_word_embeddings: bool | None = option(
        None, "Share the embedding and the head (default: true)."
    )
    mtp_hybrid_override_pattern: str | None = option(
        None,
        "Layers of the multi-token predictor, in the same letters (default: *E); see --mtp_depth.",
    )
    mamba_direction: str | None = option(
        None,
        "Mamba layers in denoise mode: forward, bidirectional or gated "
        "(default: bidirectional for tess).",
    )

    def __post_init__(self) -> None:
        """`backbone_fields`: those of the backbone's config that were set."""
        names = [f.name for f in fields(self) if f.name not in NOT_OF_THE_BACKBONE]
        chosen = {name: getattr(self, name) for name in names}
        self.backbone_fields = {name: v for name, v in chosen.items() if v is not None}


NOT_OF_THE_BACKBONE = {"objective", "init_from", "tokenizer", "train_tokenizer", "preset"}
"""What `ModelArguments` has beside fields of the backbone's config."""

SMALL_BACKBONE: dict[str, Any] = {
    "hybrid_override_pattern": "M*E-",
    "hidden_size": 192,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 384,
    "ssm_state_size": 32,
    "mamba_num_heads": 12,
    "mamba_head_dim": 32,
    "n_groups": 2,
    "chunk_size": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 192,
    "moe_shared_expert_intermediate_size": 192,
    "tie_word_embeddings": True,
    "initializer_range": 0.05,
}
"""The model that is trained where no size is given."""

CHANGEABLE = {"mamba_direction", "mtp_hybrid_override_pattern"}
"""Fields of the backbone that do not follow from the weights that --init_from names."""


@dataclass
class CausalArguments:
    """Next-token prediction (objective ar)."""

    mtp_depth: int = option(
        0,
        "Train a multi-token predictor to look this many tokens further (0: none): one block, used "
        "again for each of them.",
    )
    mtp_loss_scale: float = option(
        0.3, "Weight of the predictor's mean loss beside the next-token loss."
    )
    freeze_backbone: bool = option(
        False,
        "Train the multi-token predictor alone; the text that the model writes stays the same.",
    )


@dataclass
class RunArguments:
    """What this project adds to transformers' own settings."""

    save_dtype: str = option(
        "float32",
        "Type of the weights in the final folder.",
        choices=["float32", "bfloat16", "float16"],
    )
    ema_decay: float = option(
        0.0, "Decay of the weights' moving average (0: none); evaluated and saved instead."
    )
    router_balance_rate: float = option(
        0.001, "Step of the experts' load-balancing bias after each update (0: none)."
    )
    num_samples_to_print: int = option(
        3, "Generated texts to print before training and at each evaluation."
    )
    num_inference_steps: int | None = option(
        None, "Sampling steps for the printed texts (default: 16, or T where that is less)."
    )


@dataclass
class TrainingDefaults:
    """Those of transformers' `TrainingArguments` whose defaults are others here.

    They train a small new model from scratch.
    """

    per_device_train_batch_size: int = option(
        32, "Rows per device and step (default: %(default)s)."
    )
    num_train_epochs: float = option(
        20.0, "Passes over the training rows (default: %(default)s); --max_steps overrides it."
    )
    learning_rate: float = option(
        1.5e-3,
        "Highest learning rate (default: %(default)s). The defaults suit a small new model and are "
        "the same with --init_from, where a lower rate keeps more of the given weights.",
    )
    warmup_steps: float = option(
        100,
        "Steps in which the learning rate rises from 0 (default: %(default)s); below 1, their "
        "share of all steps.",
    )
    weight_decay: float = option(
        0.01, "Weight decay, of all but biases and norms (default: %(default)s)."
    )
    adam_beta2: float = option(
        0.98, "Decay of Adam's mean of squared gradients (default: %(default)s)."
    )
    logging_steps: float = option(50, "Steps between two lines of the log (default: %(default)s).")
    save_steps: float = option(200, "Steps between two checkpoints (default: %(default)s).")
    save_total_limit: int | None = option(
        2, "Newest checkpoints to keep (default: %(default)s); 0 keeps all."
    )


@dataclass
class Settings:
    """All settings of a run."""

    model: ModelArguments
    diffusion: DiffusionArguments
    causal: CausalArguments
    data: DataArguments
    run: RunArguments
    training: "transformers.TrainingArguments | None"


OWN = (ModelArguments, DiffusionArguments, CausalArguments, DataArguments, RunArguments)
"""The groups of settings that are not transformers', in the order in which `Settings` has them."""

ONLY_FOR = {
    "tess": {f.name for f in fields(DiffusionArguments)},
    "ar": {f.name for f in fields(CausalArguments)} | {"mtp_hybrid_override_pattern"},
}
"""Settings that nothing reads with the other objective."""


def without_effect(objective: str, given: Collection[str]) -> list[str]:
    """Which of the settings that were given belong to the other objective, in their order."""
    other = "ar" if objective == "tess" else "tess"
    return [name for name in given if name in ONLY_FOR[other]]
