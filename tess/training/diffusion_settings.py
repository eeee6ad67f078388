"""Settings of the diffusion process and the denoiser in a training run."""

from dataclasses import dataclass
from typing import Any

from tess.errors import UserError
from tess.options import option
from tess.schedulers.presets import SCHEDULER_PRESETS

SPACINGS = ("recoverability", "uniform")
NOISES = ("order_statistics", "dense")


@dataclass
class DiffusionArguments:
    """The diffusion process and the denoiser (objective tess).

    None is the value of the checkpoint that `init_from` names, else the preset's or the standard
    one.
    """

    diffusion_preset: str | None = option(
        None,
        "Settings of the process by name: vocab_aware (simplex value, training times and sampling "
        "steps follow the vocabulary) or tess (as published); given flags win (default: that of "
        "the --init_from checkpoint, else vocab_aware).",
        choices=list(SCHEDULER_PRESETS),
    )
    simplex_value: str | None = option(
        None,
        "k, a token being +k on its own coordinate and -k elsewhere; a number, or auto for "
        "(ln vocab_size - 0.82) / 2.",
    )
    timestep_density: str | None = option(
        None,
        "Density of training times: recoverability (equal mass for equal steps of the chance to "
        "tell the noised token), uniform, or learned (for equal steps of the loss, CDCD).",
        choices=[*SPACINGS, "learned"],
    )
    timestep_spacing: str | None = option(
        None, "Spacing of sampling steps: recoverability or uniform.", choices=list(SPACINGS)
    )
    timestep_uniform_share: float | None = option(
        None,
        "Share of training times and sampling steps that stays uniform in time where they follow "
        "recoverability or a learned density, in (0, 1] (default: 0.5).",
    )
    noise: str | None = option(
        None,
        "How noise is drawn: order_statistics, whose cost does not grow with the vocabulary, or "
        "dense, the reference, which draws all of it.",
        choices=list(NOISES),
    )
    num_top: int | None = option(
        None, "Order statistics that are drawn exactly (default: 32)."
    )
    num_diffusion_steps: int | None = option(
        None,
        "T, and so the most sampling steps (default: the --init_from checkpoint's, else 5000).",
    )
    beta_schedule: str | None = option(
        None,
        "Noise schedule (default: the --init_from checkpoint's, else squaredcos_improved_ddpm).",
    )
    cosine_s: float | None = option(
        None,
        "Offset s of the cosine schedule (default: the --init_from checkpoint's, else 1e-4).",
    )
    source_encoding: str | None = option(
        None, "How the source is read: causal, bidirectional, or joint with the target."
    )
    label_shift: bool | None = option(
        None,
        "Predict each token one position earlier, as a causal language model does; keeps the head "
        "of one that --init_from names.",
    )
    self_conditioning: str | None = option(None, "Self-conditioning variant, or none.")
    self_conditioning_mix: str | None = option(
        None, "Where it is mixed in: probabilities, embeddings or logits."
    )
    self_conditioning_zeros_after_softmax: bool | None = option(
        None, "Without a previous prediction use zeros, not the uniform distribution."
    )
    self_conditioning_mlp: bool | None = option(
        None, "An MLP in the variants that have a projection."
    )
    self_conditioning_probability: float = option(
        0.5, "Share of training batches with a first pass."
    )
    unroll_probability: float = option(
        0.0,
        "Share of these batches whose noised text is the model's own prediction from a noisier "
        "time, so that it learns to mend its mistakes (SUNDAE).",
    )
    unroll_steps: int = option(
        1, "Most steps of the sampler in such a batch, evenly likely from 1 to this number."
    )
    deepmind_conditional: bool | None = option(
        None, "The SED variant of conditioning on the clean context."
    )
    num_source_positions: int | None = option(
        None,
        "Learned absolute positions for the source (0: none; default for a new model: "
        "max_source_length).",
    )
    num_target_positions: int | None = option(
        None,
        "Learned absolute positions for the target (0: none; default for a new model: "
        "max_target_length).",
    )
    source_drop_probability: float = option(
        0.0, "Share of examples with an empty source, for guidance."
    )
    stratified_timesteps: bool = option(
        True, "One time from each of B equal parts of (0, 1] per batch."
    )
    pad_loss_weight: float | None = option(
        None,
        "Above 0: the canvas goes on over padding, with this loss weight (default: the --init_from "
        "checkpoint's, else 0).",
    )
    canvas: str = option(
        "batch",
        "With pad_loss_weight: the canvas ends with the batch's longest, or by the length rule.",
        choices=["batch", "rule"],
    )
    length_quantile: float | None = option(
        None,
        "Share of training targets that fit the default generation length; default 0.99 with "
        "pad_loss_weight, and 0.5 without it (such a model fills its canvas).",
    )
    length_head: bool | None = option(
        None,
        "Predict target lengths from the source's encoding, trained jointly; length_quantile is "
        "then that of the predicted lengths.",
    )
    length_loss_weight: float = option(
        0.1, "Weight of the length head's cross-entropy beside the tokens' loss."
    )

    def denoiser_overrides(self) -> dict[str, Any]:
        """The denoiser config's fields that were set."""
        names = [
            "source_encoding", "label_shift", "self_conditioning",
            "self_conditioning_mix", "self_conditioning_zeros_after_softmax",
            "self_conditioning_mlp", "deepmind_conditional", "num_source_positions",
            "num_target_positions", "pad_loss_weight", "length_head", "source_drop_probability",
        ]
        chosen = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if self.simplex_value is not None:
            chosen["simplex_value"] = self._simplex_value()
        elif self.diffusion_preset is not None:
            chosen["simplex_value"] = SCHEDULER_PRESETS[self.diffusion_preset]["simplex_value"]
        if chosen.get("self_conditioning") == "none":
            chosen["self_conditioning"] = None
        return chosen

    def _simplex_value(self) -> float | str:
        if self.simplex_value == "auto":
            return "auto"
        try:
            return float(self.simplex_value)
        except ValueError:
            raise UserError(
                f"simplex_value must be a number or auto, got {self.simplex_value!r}"
            ) from None

    def scheduler_overrides(self) -> dict[str, Any]:
        """The scheduler's settings that were set, by the preset or one by one."""
        learned = self.timestep_density == "learned"  # it starts as the density it departs from
        names = {
            "num_train_timesteps": self.num_diffusion_steps,
            "beta_schedule": self.beta_schedule,
            "cosine_s": self.cosine_s,
            "timestep_spacing": self.timestep_spacing,
            "timestep_density": "recoverability" if learned else self.timestep_density,
            "timestep_uniform_share": self.timestep_uniform_share,
            "noise": self.noise,
            "num_top": self.num_top,
        }
        preset = SCHEDULER_PRESETS.get(self.diffusion_preset or "", {})
        return preset | {name: value for name, value in names.items() if value is not None}
