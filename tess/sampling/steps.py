"""One step of the denoising, as it is kept and shown."""

from dataclasses import dataclass

from torch import Tensor


@dataclass
class StepTrace:
    """One reverse step of a batch, on the CPU.

    timestep: the time in (0, 1] that the prediction was made at.
    token_ids: [B, L] int64, the text as it stands after the step.
    log_probs: [B, L] float, natural-log probability of those tokens.
    entropies: [B, L] float, entropy in nats of the distributions they were chosen from.
    active: [B] bool, whether the example was evaluated in this step. A finished example keeps its
        last values.
    """

    timestep: float
    token_ids: Tensor
    log_probs: Tensor
    entropies: Tensor
    active: Tensor
