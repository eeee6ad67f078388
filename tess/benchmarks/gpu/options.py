"""What the GPU benchmark can be asked for; loads no torch, as `--help` says these names."""

import os
from dataclasses import dataclass

SHAPES = ("nano", "shipped")
OPERATIONS = (
    "ssd_scan", "ssd_step", "causal_conv1d", "rms_norm", "gated_group_rms_norm", "route_tokens",
    "experts", "simplex_embedding", "linear_cross_entropy", "vocabulary_sweep", "mamba_mixer",
)
"""In the order in which they are checked; `cases` and `tokens` build them."""

DTYPES = ("float32", "bfloat16", "float16")
PACKAGES = {
    "mamba-ssm": "mamba_ssm", "flash-linear-attention": "fla", "causal-conv1d": "causal_conv1d",
    "transformers": "transformers", "liger-kernel": "liger_kernel",
    "cut-cross-entropy": "cut_cross_entropy", "torch": "torch",
}
"""Names on PyPI and of the modules."""

MOST_WORKERS = 12  # compiling is what takes the time of the checks


@dataclass(frozen=True)
class Options:
    """What is run; batch and length replace those of every shape, peers are packages."""

    shapes: tuple[str, ...] = SHAPES
    ops: tuple[str, ...] = OPERATIONS
    peers: tuple[str, ...] = tuple(PACKAGES)
    dtype: str = "bfloat16"
    repeats: int = 20
    batch: int | None = None
    length: int | None = None
    seed: int = 0
    workers: int = min(MOST_WORKERS, os.cpu_count() or 1)
    dry_run: bool = False
