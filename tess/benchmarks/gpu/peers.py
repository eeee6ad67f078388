"""Other projects' ways to compute the cases over sequences, as their users would call them.

A contender is built when it is its turn: whatever an import or a call raises becomes its line in
the table. Packages are imported by name, since none of them is a dependency. The contenders over
tokens are in `token_peers.py`.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tess.benchmarks.gpu.cases import EPS, Case, Leaves, Outputs
from tess.benchmarks.gpu.options import PACKAGES
from tess.errors import UserError

Function = Callable[[Leaves], Outputs]


class Absent(UserError):
    """A package or a function that this machine does not have."""


@dataclass(frozen=True)
class Contender:
    """A system of one comparison.

    Attributes:
        make: gives the function from leaves to outputs; raises what keeps it from running.
        comparable: it computes the values of the case; False for what is only a measure.
        forward_only: it has no gradient.
        reset: restores what a run changes, outside of the measured time.
    """

    name: str
    package: str
    make: Callable[[], Function]
    comparable: bool = True
    forward_only: bool = False
    reset: Callable[[], None] | None = None


def installed() -> list[dict[str, str | None]]:
    """Every package that is compared with, and its version or None."""
    return [
        {"package": package, "version": None if find_spec(module) is None else _version(package)}
        for package, module in PACKAGES.items()
    ]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # on the path, but not installed
        return "of unknown version"


def load(package: str, module: str, name: str) -> Any:
    """A function or class of a package.

    Raises:
        Absent: the package is not installed, or its version has no such name.
    """
    if find_spec(PACKAGES[package]) is None:
        raise Absent(f"absent: package {package}")
    if package == "mamba-ssm":
        _stand_in("selective_scan_cuda")
    found = getattr(import_module(module), name, None)
    if found is None:
        raise Absent(f"{package} {_version(package)} has no {module}.{name}")
    return found


def _stand_in(extension: str) -> None:
    """An empty module where the extension is not built: mamba-ssm's import asks for it.

    Its Triton kernels do not need it.
    """
    if extension not in sys.modules and find_spec(extension) is None:
        sys.modules[extension] = ModuleType(extension)


def contenders(case: Case) -> Iterator[Contender]:
    """All that this case is compared with."""
    yield from {
        "ssd_scan": _scans, "ssd_step": _steps, "causal_conv1d": _convolutions,
        "rms_norm": _norms, "gated_group_rms_norm": _gated_norms,
    }[case.op](case)


# ---- the scan ----


def _scans(case: Case) -> Iterator[Contender]:
    both = case.given["direction"] == "bidirectional"
    for chunk in (128, 256):
        name = f"mamba-ssm, chunks of {chunk}"
        if both:
            yield Contender(
                f"{name}, two passes", "mamba-ssm", lambda chunk=chunk: _mamba_both(chunk)
            )
        label = f"{name}, one causal pass" if both else name
        yield Contender(label, "mamba-ssm", lambda chunk=chunk: _mamba(chunk), not both)
    if both:
        return
    yield Contender("fla, simple GLA", "flash-linear-attention", _simple_gla)
    yield Contender("transformers", "transformers", _transformers_scan)


def _mamba(chunk: int) -> Function:
    scan = load("mamba-ssm", "mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined")

    def run(t: Leaves) -> Outputs:
        y = scan(
            t["x"], t["dt"], t["a"], t["b"], t["c"], chunk_size=chunk, D=t["d"],
            dt_bias=t["bias"], dt_softplus=True,
        )
        return {"y": y}

    return run


def _mamba_both(chunk: int) -> Function:
    """Two causal passes, the second one over flipped inputs, less the token that both count."""
    scan = load("mamba-ssm", "mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined")

    def run(t: Leaves) -> Outputs:
        block = [t[name] for name in ("x", "dt", "b", "c")]
        passes = []
        for (x, dt, b, c), d in ((block, t["d"]), ([tensor.flip(1) for tensor in block], None)):
            passes.append(
                scan(
                    x, dt, t["a"], b, c, chunk_size=chunk, D=d, dt_bias=t["bias"],
                    dt_softplus=True,
                )
            )
        dt = F.softplus(t["dt"] + t["bias"])
        cb = (t["b"] * t["c"]).sum(-1).repeat_interleave(
            t["x"].shape[2] // t["b"].shape[2], dim=-1
        )
        own = (dt * cb).to(t["x"].dtype)[..., None] * t["x"]
        return {"y": passes[0] + passes[1].flip(1) - own}

    return run


def _simple_gla() -> Function:
    """Gated linear attention with q = C, k = B, v = dt x, g = dt a; maps repeated per head."""
    attend = load("flash-linear-attention", "fla.ops.simple_gla", "chunk_simple_gla")

    def run(t: Leaves) -> Outputs:
        heads = t["x"].shape[2] // t["b"].shape[2]
        dt = F.softplus(t["dt"].float() + t["bias"])
        q, k = (t[name].repeat_interleave(heads, dim=2) for name in ("c", "b"))
        v = (dt[..., None] * t["x"]).to(t["x"].dtype)
        y, _ = attend(q, k, v, dt * t["a"], scale=1.0)
        return {"y": y + t["d"].to(y.dtype)[:, None] * t["x"]}

    return run


def _transformers_scan() -> Function:
    """The function of its Nemotron-H mixer: mamba-ssm's kernels if it finds them, or PyTorch."""
    home = "transformers.models.nemotron_h.modeling_nemotron_h"
    scan = load("transformers", home, "mamba2_chunk_scan")

    def run(t: Leaves) -> Outputs:
        y = scan(
            t["x"], t["dt"], t["a"], t["b"], t["c"], chunk_size=128, D=t["d"], dt_bias=t["bias"],
            dt_softplus=True,
        )
        return {"y": y.to(t["x"].dtype)}

    return run


def _steps(case: Case) -> Iterator[Contender]:
    state = torch.empty_like(case.leaves["state"])

    def make() -> Function:
        home = "mamba_ssm.ops.triton.selective_state_update"
        update = load("mamba-ssm", home, "selective_state_update")
        per_channel = case.leaves["x"].shape

        def run(t: Leaves) -> Outputs:
            wide = lambda per_head: per_head[:, None].expand(per_channel[1:])  # noqa: E731
            y = update(
                state, t["x"], t["dt"][..., None].expand(per_channel),
                t["a"][:, None, None].expand(state.shape[1:]), t["b"], t["c"], wide(t["d"]),
                dt_bias=wide(t["bias"]), dt_softplus=True,
            )
            return {"y": y, "state": state}

        return run

    yield Contender(
        "mamba-ssm, in place", "mamba-ssm", make, reset=lambda: state.copy_(case.leaves["state"])
    )


# ---- convolution and norms ----


def _convolutions(case: Case) -> Iterator[Contender]:
    def cuda() -> Function:
        convolve = load("causal-conv1d", "causal_conv1d", "causal_conv1d_fn")

        def run(t: Leaves) -> Outputs:
            y = convolve(t["x"].transpose(1, 2), t["weight"], t["bias"], activation="silu")
            return {"y": y.transpose(1, 2)}

        return run

    def fla() -> Function:
        convolve = load("flash-linear-attention", "fla.modules.convolution", "causal_conv1d")
        return lambda t: {"y": convolve(t["x"], t["weight"], t["bias"], activation="silu")[0]}

    def cudnn(t: Leaves) -> Outputs:
        x, taps = t["x"], t["weight"].shape[1]
        y = F.conv1d(
            x.transpose(1, 2), t["weight"][:, None], t["bias"], padding=taps - 1,
            groups=x.shape[2],
        )
        return {"y": F.silu(y[..., : x.shape[1]]).transpose(1, 2)}

    yield Contender("causal-conv1d", "causal-conv1d", cuda)
    yield Contender("fla", "flash-linear-attention", fla)
    yield Contender("torch, F.conv1d", "torch", lambda: cudnn)


def _norms(case: Case) -> Iterator[Contender]:
    def liger() -> Function:
        operation = load("liger-kernel", "liger_kernel.ops.rms_norm", "LigerRMSNormFunction")
        # not in place: that would overwrite the gradient from above
        return lambda t: {"y": operation.apply(t["x"], t["weight"], EPS, 0.0, "llama", False)}

    def fla() -> Function:
        norm = load("flash-linear-attention", "fla.modules.layernorm", "rms_norm")
        return lambda t: {"y": norm(t["x"], t["weight"], None, eps=EPS)}

    def torch_norm(t: Leaves) -> Outputs:
        return {"y": F.rms_norm(t["x"], t["weight"].shape, t["weight"], EPS)}

    yield Contender("Liger", "liger-kernel", liger)
    yield Contender("fla", "flash-linear-attention", fla)
    yield Contender("torch, F.rms_norm", "torch", lambda: torch_norm)
    yield Contender("transformers", "transformers", lambda: _transformers_norm(case))


def _gated_norms(case: Case) -> Iterator[Contender]:
    def mamba() -> Function:
        norm = load("mamba-ssm", "mamba_ssm.ops.triton.layernorm_gated", "rmsnorm_fn")
        size = case.shape.mamba_width // case.shape.groups

        def run(t: Leaves) -> Outputs:
            y = norm(
                t["x"], t["weight"], None, z=t["gate"], eps=EPS, group_size=size,
                norm_before_gate=False,
            )
            return {"y": y}

        return run

    yield Contender("mamba-ssm", "mamba-ssm", mamba)
    yield Contender("transformers", "transformers", lambda: _transformers_gated_norm(case))


def _transformers_norm(case: Case) -> Function:
    home = "transformers.models.nemotron_h.modeling_nemotron_h"
    norm = _weightless(load("transformers", home, "NemotronHRMSNorm"), case.shape.hidden, eps=EPS)
    return lambda t: {"y": _with_weight(norm, t["weight"], t["x"])}


def _transformers_gated_norm(case: Case) -> Function:
    home, width = "transformers.models.nemotron_h.modeling_nemotron_h", case.shape.mamba_width
    try:
        kind = load("transformers", home, "NemotronHRMSNormGated")
    except Absent:  # what it was before it had a class of its own
        kind = load("transformers", home, "Zamba2RMSNormGated")
    norm = _weightless(kind, width, group_size=width // case.shape.groups, eps=EPS)
    return lambda t: {"y": _with_weight(norm, t["weight"], t["x"], t["gate"])}


def _weightless(kind: type, *args: Any, **options: Any) -> torch.nn.Module:
    with torch.device("meta"):
        return kind(*args, **options)


def _with_weight(norm: torch.nn.Module, weight: Tensor, *inputs: Tensor) -> Tensor:
    return torch.func.functional_call(norm, {"weight": weight}, inputs)
