"""Inputs and calls of the operations over sequences: scan, step, convolution, norms.

A case holds its tensors and three functions of them: the public operation on either backend, and
the float64 reference. The operations over tokens are in `tokens.py`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tess.benchmarks.gpu.shapes import Costs, Shape, conv_costs, norm_costs, scan_costs, step_costs
from tess.kernels import conv, norms, reference, ssd

Leaves = dict[str, Tensor]
Outputs = dict[str, Tensor]

EPS = 1e-5
WIDE_ROWS = 5000  # columns of a row that fills no tile of the norms


@dataclass
class Case:
    """One operation at one size.

    Attributes:
        variant: which of its options, as in `VARIANTS` of this file and of the other.
        leaves: float tensors, those that get gradients if any output does.
        run: leaves and backend -> named outputs of the public function.
        exact: float64 leaves -> the same outputs by the reference; None for what is only timed.
        costs: the least it takes on a machine.
        given: what peers need beside the leaves.
        loose: gradients that are sums of terms of both signs over all positions and lose digits.
    """

    op: str
    variant: str
    shape: Shape
    leaves: Leaves
    run: Callable[[Leaves, str], Outputs]
    exact: Callable[[Leaves], Outputs] | None
    costs: Costs
    given: dict[str, Any] = field(default_factory=dict)
    loose: frozenset[str] = frozenset()


class Maker:
    """Random tensors of one dtype on one device, from one seed."""

    def __init__(self, device: torch.device, dtype: torch.dtype, seed: int) -> None:
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator(device).manual_seed(seed)

    @property
    def itemsize(self) -> int:
        """Bytes of a number."""
        return self.dtype.itemsize

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        """Normal values times `scale`."""
        dtype = self.dtype if dtype is None else dtype
        out = torch.empty(shape, dtype=dtype, device=self.device)
        return out.normal_(generator=self.generator).mul_(scale)

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """float32 values in [low, high)."""
        out = torch.empty(shape, dtype=torch.float32, device=self.device)
        return out.uniform_(low, high, generator=self.generator)

    def integers(self, *shape: int, high: int) -> Tensor:
        """int64 values in [0, high)."""
        return torch.randint(high, shape, generator=self.generator, device=self.device)


def evaluate(
    function: Callable[[Leaves], Outputs], leaves: Leaves, upstream: Outputs | None
) -> Outputs:
    """Outputs, and with gradients from above also "d NAME" of every leaf."""
    if upstream is None:
        with torch.no_grad():
            return function(leaves)
    out = function(leaves)
    differentiable = [name for name, tensor in out.items() if tensor.requires_grad]
    if not differentiable:
        return out
    gradients = torch.autograd.grad(
        [out[name] for name in differentiable],
        list(leaves.values()),
        [upstream[name].to(out[name].dtype) for name in differentiable],
        allow_unused=True,
        materialize_grads=True,
    )
    found = {name: tensor.detach() for name, tensor in out.items()}
    return found | {f"d {name}": gradient for name, gradient in zip(leaves, gradients)}


# ---- the scan ----


def scan_inputs(s: Shape, make: Maker) -> Leaves:
    """x, dt, B and C in the dtype that is run, what belongs to a head in float32.

    Rates and step sizes are spread as Mamba-2 initialises them: a from -16 to -1, steps from 0.001
    to 0.1 after the softplus.
    """
    steps = make.uniform(s.heads, low=math.log(1e-3), high=math.log(0.1)).exp()
    return {
        "x": make.normal(s.batch, s.length, s.heads, s.head_width),
        "dt": make.normal(s.batch, s.length, s.heads),
        "a": make.uniform(s.heads, low=-16.0, high=-1.0),
        "b": make.normal(s.batch, s.length, s.groups, s.states),
        "c": make.normal(s.batch, s.length, s.groups, s.states),
        "d": make.normal(s.heads, dtype=torch.float32),
        "bias": steps + torch.log(-torch.expm1(-steps)),
    }


def scan_case(s: Shape, variant: str, make: Maker) -> Case:
    """Directions as they are timed, with D, bias and softplus; bare; or with all options."""
    direction, _, extent = variant.partition(", ")
    leaves = scan_inputs(s, make)
    options: dict[str, Any] = {"direction": direction, "dt_softplus": extent != "bare"}
    if extent == "bare":
        leaves["dt"] = leaves["dt"].abs().mul_(0.1)
        del leaves["d"], leaves["bias"]
    if extent == "all options":
        leaves["initial"] = make.normal(
            s.batch, s.heads, s.head_width, s.states, dtype=torch.float32
        )
        if direction == "bidirectional":
            leaves["scale"] = make.normal(s.heads, dtype=torch.float32)
        ids = (make.uniform(s.batch, s.length) < 2 / s.length).cumsum(dim=1)
        mask = torch.ones(s.batch, s.length, dtype=torch.bool, device=make.device)
        mask[0, : s.length // 3] = False
        mask[-1, s.length - s.length // 4 :] = False
        options |= {"sequence_ids_BL": ids, "mask_BL": mask, "dt_limits": (1e-4, 2.0)}

    def call(function: Callable[..., Any], leaves: Leaves, **more: Any) -> Outputs:
        y, state = function(
            *(leaves[name] for name in ("x", "dt", "a", "b", "c")),
            d_H=leaves.get("d"), dt_bias_H=leaves.get("bias"),
            reverse_scale_H=leaves.get("scale"), initial_state_BHPN=leaves.get("initial"),
            **options, **more,
        )
        return {"y": y, "state": state} if extent == "all options" else {"y": y}

    def run(leaves: Leaves, backend: str) -> Outputs:
        final = extent == "all options"
        return call(ssd.ssd_scan, leaves, return_final_state=final, backend=backend)

    directions = 2 if direction == "bidirectional" else 1
    return Case(
        "ssd_scan", variant, s, leaves, run, lambda leaves: call(reference.ssd_scan, leaves),
        scan_costs(s, make.itemsize, directions), {"direction": direction},
        frozenset(("d a", "d bias", "d d", "d scale")),
    )


def step_case(s: Shape, variant: str, make: Maker) -> Case:
    """One position for every text, from float32 states; there are no gradients."""
    inputs = scan_inputs(s, make)
    leaves = {
        name: tensor[:, 0].contiguous() if name in ("x", "dt", "b", "c") else tensor
        for name, tensor in inputs.items()
    }
    leaves["state"] = make.normal(s.batch, s.heads, s.head_width, s.states, dtype=torch.float32)
    mask = None
    if variant == "mask":
        mask = torch.arange(s.batch, device=make.device) % 2 == 1

    def run(leaves: Leaves, backend: str) -> Outputs:
        y, state = ssd.ssd_step(
            *(leaves[name] for name in ("x", "dt", "a", "b", "c", "state")), d_H=leaves["d"],
            dt_bias_H=leaves["bias"], dt_softplus=True, mask_B=mask, backend=backend,
        )
        return {"y": y, "state": state}

    def exact(leaves: Leaves) -> Outputs:
        block = (leaves[name][:, None] for name in ("x", "dt", "b", "c"))
        x, dt, b, c = block
        y, state = reference.ssd_scan(
            x, dt, leaves["a"], b, c, d_H=leaves["d"], dt_bias_H=leaves["bias"], dt_softplus=True,
            mask_BL=None if mask is None else mask[:, None], initial_state_BHPN=leaves["state"],
        )
        return {"y": y[:, 0], "state": state}

    return Case("ssd_step", variant, s, leaves, run, exact, step_costs(s, make.itemsize))


# ---- convolution and norms ----


def conv_case(s: Shape, variant: str, make: Maker) -> Case:
    """The convolution of x, B and C, which are a slice of the input projection."""
    wide = make.normal(s.batch, s.length, s.conv_width + s.mamba_width)
    leaves = {
        "x": wide[..., s.mamba_width :],
        "weight": make.normal(s.conv_width, s.taps, scale=0.5),
        "bias": make.normal(s.conv_width, scale=0.5),
    }
    if variant == "window":
        leaves["window"] = make.normal(s.batch, s.taps - 1, s.conv_width)

    def call(function: Callable[..., Tensor], leaves: Leaves, **more: Any) -> Outputs:
        tensors = (leaves["x"], leaves["weight"], leaves["bias"], leaves.get("window"))
        return {"y": function(*tensors, **more)}

    return Case(
        "causal_conv1d", variant, s, leaves,
        lambda leaves, backend: call(conv.causal_conv1d, leaves, backend=backend),
        lambda leaves: call(reference.causal_conv1d, leaves), conv_costs(s, make.itemsize),
    )


def rms_norm_case(s: Shape, variant: str, make: Maker) -> Case:
    """Rows of the residual stream, or ones that are wider than any model's here."""
    width = WIDE_ROWS if variant == "wide rows" else s.hidden
    leaves = {"x": make.normal(s.batch, s.length, width), "weight": make.normal(width)}

    def run(leaves: Leaves, backend: str) -> Outputs:
        return {"y": norms.rms_norm(leaves["x"], leaves["weight"], EPS, backend=backend)}

    def exact(leaves: Leaves) -> Outputs:
        return {"y": reference.rms_norm(leaves["x"], leaves["weight"], EPS)}

    costs = norm_costs(s, make.itemsize, width)
    return Case("rms_norm", variant, s, leaves, run, exact, costs)


def gated_norm_case(s: Shape, variant: str, make: Maker) -> Case:
    """The Mamba layer's output norm; the gate is a slice of the input projection."""
    width = s.mamba_width
    projection = make.normal(s.batch, s.length, width + s.conv_width + s.heads)
    leaves = {
        "x": make.normal(s.batch, s.length, width), "gate": projection[..., :width],
        "weight": make.normal(width),
    }

    def call(function: Callable[..., Tensor], leaves: Leaves, **more: Any) -> Outputs:
        tensors = (leaves["x"], leaves["gate"], leaves["weight"])
        return {"y": function(*tensors, s.groups, EPS, **more)}

    return Case(
        "gated_group_rms_norm", variant, s, leaves,
        lambda leaves, backend: call(norms.gated_group_rms_norm, leaves, backend=backend),
        lambda leaves: call(reference.gated_group_rms_norm, leaves),
        norm_costs(s, make.itemsize, width, gated=True),
    )


DIRECTIONS = ("forward", "reverse", "bidirectional")
BUILDERS = {
    "ssd_scan": scan_case, "ssd_step": step_case, "causal_conv1d": conv_case,
    "rms_norm": rms_norm_case, "gated_group_rms_norm": gated_norm_case,
}
VARIANTS = {
    "ssd_scan": (
        *DIRECTIONS, "bidirectional, bare", *(f"{name}, all options" for name in DIRECTIONS),
    ),
    "ssd_step": ("plain", "mask"),
    "causal_conv1d": ("plain", "window"),
    "rms_norm": ("plain", "wide rows"),
    "gated_group_rms_norm": ("plain",),
}
"""What is checked; the names that `TIMED` has are also timed."""
TIMED = {
    "ssd_scan": ("forward", "bidirectional"),
    "ssd_step": ("plain",), "causal_conv1d": ("plain",), "rms_norm": ("plain",),
    "gated_group_rms_norm": ("plain",),
}
