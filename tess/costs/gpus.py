"""GPUs by name, and what is written on them: the two things that least times depend on."""

from dataclasses import dataclass

from tess.errors import UserError


@dataclass(frozen=True)
class Gpu:
    """Published peaks: dense bfloat16 FLOP/s, memory bandwidth in bytes/s, memory in bytes."""

    title: str
    flops: float
    bandwidth: float
    memory: float


# NVIDIA's data sheets of each product; of B200, listed with 180 to 192 GB, the smaller figure
GPUS = {
    "a100": Gpu("A100 80GB SXM", 312e12, 2.04e12, 80e9),
    "h100": Gpu("H100 SXM", 989e12, 3.35e12, 80e9),
    "h200": Gpu("H200 SXM", 989e12, 4.8e12, 141e9),
    "b200": Gpu("B200", 2250e12, 8.0e12, 180e9),
    "l40s": Gpu("L40S", 362e12, 0.864e12, 48e9),
    "rtx4090": Gpu("RTX 4090", 165e12, 1.008e12, 24e9),
}


@dataclass(frozen=True)
class Workload:
    """What is written: `target` tokens after `source` tokens, for `batch` texts at once.

    drafts: tokens that the multi-token predictor drafts in a round. acceptance: tokens that a text
    gains in a round, the backbone's own one included; an assumption, from 1 to drafts + 1.

    Raises:
        UserError: a size that is too small, or an acceptance that the drafts do not allow.
    """

    batch: int = 1
    source: int = 512
    target: int = 128
    drafts: int = 3
    acceptance: float = 2.5

    def __post_init__(self) -> None:
        for name, least in (("batch", 1), ("source", 0), ("target", 1), ("drafts", 1)):
            if (value := getattr(self, name)) < least:
                raise UserError(f"{name} must be at least {least}, got {value}")
        if not 1 <= self.acceptance <= self.drafts + 1:
            raise UserError(
                f"acceptance counts the tokens of a round, from 1 to drafts + 1 = "
                f"{self.drafts + 1}, got {self.acceptance}"
            )
