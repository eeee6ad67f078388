"""Sizes that `tess-benchmark gpu` runs at, and the least that each operation costs.

A cost is the bytes that have to move once, inputs and outputs, and the operations of the matrix
products; its time on a machine is the larger of the two times (`tess/costs/roofline.py`). A
backward pass has two products for each of the forward pass, reads what the forward pass read and
the gradient from above, and writes a gradient of every input.

Letters: T tokens, H Mamba heads of width P, G groups, N states, D width, K taps, E experts of inner
width F, S experts of a token, V vocabulary; Q positions of a chunk.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

from tess.costs.roofline import FP32, Cost
from tess.errors import UserError

CHUNK = 128  # of the scan's count of operations; the released models' chunk size
CHECK_LENGTH = 197  # three chunks of 64 and a few positions


@dataclass(frozen=True)
class Shape:
    """Sizes of one model and of the block that is run; `tokens` counts that of the expert layer."""

    name: str
    batch: int
    length: int
    hidden: int
    heads: int
    head_width: int
    states: int
    groups: int
    taps: int
    experts: int
    top_k: int
    inner: int
    vocabulary: int
    expert_width: int
    num_top: int = 32
    few_tokens: tuple[int, ...] = (512, 8)

    @property
    def tokens(self) -> int:
        """Positions of the whole batch."""
        return self.batch * self.length

    @property
    def mamba_width(self) -> int:
        """Channels of x: heads times head width."""
        return self.heads * self.head_width

    @property
    def conv_width(self) -> int:
        """Channels of the convolution: x, B and C."""
        return self.mamba_width + 2 * self.groups * self.states


NANO = Shape(
    "nano", batch=8, length=4096, hidden=2688, heads=64, head_width=64, states=128, groups=8,
    taps=4, experts=128, top_k=6, inner=1856, vocabulary=131072, expert_width=2688,
)
"""Nemotron-3-Nano (arXiv 2512.20856), 8 texts of 4096 tokens."""

TINY = Shape(
    "tiny", batch=1, length=6, hidden=24, heads=2, head_width=16, states=16, groups=1, taps=3,
    experts=4, top_k=2, inner=16, vocabulary=70, expert_width=24, num_top=2, few_tokens=(3,),
)
"""Of a dry run: as small as all paths allow."""


def shipped(checkpoint: Path) -> Shape:
    """The denoiser that comes with the repository, at 64 texts of 128 tokens.

    Raises:
        UserError: the checkpoint is not there.
    """
    file = checkpoint / "tess" / "denoiser" / "config.json"
    if not file.is_file():
        raise UserError(f"--shapes shipped reads the sizes from {file}, which is not there")
    config = json.loads(file.read_text())["backbone_config"]
    return Shape(
        "shipped", batch=64, length=128, hidden=config["hidden_size"],
        heads=config["mamba_num_heads"], head_width=config["mamba_head_dim"],
        states=config["ssm_state_size"], groups=config["n_groups"], taps=config["conv_kernel"],
        experts=config["n_routed_experts"], top_k=config["num_experts_per_tok"],
        inner=config["moe_intermediate_size"], vocabulary=config["vocab_size"],
        expert_width=config["hidden_size"],
    )


def for_checks(shape: Shape) -> Shape:
    """A smaller one with the same block sizes, that a float64 reference can be run at.

    Widths of heads, states and rows stay, as they choose the tiles of the kernels; there are fewer
    heads, experts and tokens, narrower experts, and a vocabulary that fills no tile.
    """
    if shape.name == TINY.name:
        return shape
    groups = min(2, shape.groups)
    quarter = 4 if shape.expert_width > 512 else 1
    return replace(
        shape, batch=2, length=CHECK_LENGTH, groups=groups,
        heads=shape.heads // shape.groups * groups, experts=min(16, shape.experts),
        inner=shape.inner // quarter, expert_width=shape.expert_width // quarter,
        vocabulary=min(3001, shape.vocabulary - 95),
    )


@dataclass(frozen=True)
class Costs:
    """The least of the forward pass, and of forward and backward pass; None: no gradient."""

    forward: Cost
    training: Cost | None = None


def _both(forward: Cost, backward_bytes: float, backward_flops: float | None = None) -> Costs:
    flops = 2 * forward.flops if backward_flops is None else backward_flops
    return Costs(forward, forward + Cost(backward_bytes, flops))


def scan_costs(s: Shape, itemsize: int, directions: int = 1) -> Costs:
    """The Mamba-2 scan by chunks (arXiv 2405.21060, section 6).

    Two directions share C B^T and the products inside of a chunk, and both gather and read states.
    """
    x, maps, steps = s.tokens * s.mamba_width, s.tokens * s.groups * s.states, s.tokens * s.heads
    inside = 2 * CHUNK * (maps + x)
    states = 4 * s.states * x
    forward = Cost(itemsize * (2 * x + 2 * maps + steps), inside + directions * states)
    return _both(forward, itemsize * (3 * x + 4 * maps + 2 * steps))


def step_costs(s: Shape, itemsize: int) -> Costs:
    """One position: states are read and written in float32, x, B, C, y and steps once."""
    states = s.batch * s.mamba_width * s.states
    rows = s.batch * (2 * s.mamba_width + 2 * s.groups * s.states + s.heads)
    return Costs(Cost(2 * FP32 * states + itemsize * rows, 6 * states))


def conv_costs(s: Shape, itemsize: int) -> Costs:
    """The depthwise convolution; what it computes is no matrix product and not counted."""
    x, taps = s.tokens * s.conv_width, s.conv_width * (s.taps + 1)
    return _both(Cost(itemsize * (2 * x + taps)), itemsize * (3 * x + 2 * taps))


def norm_costs(s: Shape, itemsize: int, width: int, gated: bool = False) -> Costs:
    """RMS norm of every token, with a gate or without."""
    x, extra = s.tokens * width, int(gated)
    forward = Cost(itemsize * ((2 + extra) * x + width))
    return _both(forward, itemsize * ((3 + 2 * extra) * x + 2 * width))


def router_costs(s: Shape) -> Costs:
    """Logits to ids and weights, float32 and int64."""
    logits, chosen = FP32 * s.tokens * s.experts, s.tokens * s.top_k
    return _both(Cost(logits + (8 + FP32) * chosen), 2 * logits + (8 + FP32) * chosen)


def expert_costs(s: Shape, itemsize: int, tokens: int, touched: int) -> Costs:
    """The routed experts: `touched` of them are used by any of the tokens."""
    matrices = 2 * s.expert_width * s.inner
    rows = itemsize * tokens * s.expert_width
    weights = itemsize * touched * matrices
    forward = Cost(weights + 2 * rows, 2 * tokens * s.top_k * matrices)
    return _both(forward, 2 * weights + 3 * rows)


def embedding_costs(s: Shape, itemsize: int) -> Costs:
    """The noised simplex by order statistics: K + 1 rows of E a token, and L z of all others."""
    row = s.tokens * s.hidden
    gathered = itemsize * (s.num_top + 1) * row
    own = 2 * (s.num_top + 1) * row
    forward = Cost(gathered + itemsize * row, own + 2 * s.hidden * row)
    return _both(forward, gathered + itemsize * s.vocabulary * s.hidden, own)


def head_costs(s: Shape, itemsize: int, products: int = 1) -> Costs:
    """Products of all tokens with the vocabulary; a training step has three of the first one."""
    table, rows = s.vocabulary * s.hidden, s.tokens * s.hidden
    forward = Cost(itemsize * (table + products * rows), 2 * products * rows * s.vocabulary)
    return _both(forward, itemsize * (2 * table + 2 * rows))
