"""Which of its two paths an operation takes: PyTorch operations or Triton kernels.

The rule: Triton for tensors on a CUDA device of compute capability 8.0 or newer where the package
is installed, in float32, bfloat16 or float16; PyTorch otherwise. One argument (`backend=`) and one
environment variable (`TESS_KERNELS`) override it, the argument before the variable. Where a path
that was asked for cannot run, that is an error.
"""

import os
from importlib.util import find_spec

import torch
from torch import Tensor

BACKENDS = ("auto", "torch", "triton")
VARIABLE = "TESS_KERNELS"
LEAST_CAPABILITY = (8, 0)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class BackendError(ValueError):
    """A backend was asked for that is unknown or cannot run here."""


def use_triton(like: Tensor, backend: str | None = None, *, unsupported: str | None = None) -> bool:
    """Whether an operation on a tensor runs Triton kernels.

    Args:
        like: the tensor whose device and dtype decide.
        backend: "torch", "triton" or "auto"; None reads the environment variable (default "auto").
        unsupported: why this operation's kernels cannot do what is asked, or None if they can.
            "auto" then takes PyTorch; "triton" is an error.

    Raises:
        BackendError: unknown backend, or "triton" where it cannot run.
    """
    asked = backend if backend is not None else _environment()
    if asked not in BACKENDS:
        source = "backend" if backend is not None else f"the environment variable {VARIABLE}"
        raise BackendError(f"{source} must be one of {', '.join(BACKENDS)}, got {asked!r}")
    if asked == "torch":
        return False
    if asked == "auto" and like.device.type != "cuda":
        return False
    obstacle = unsupported or _obstacle(like)
    if obstacle is not None and asked == "triton":
        raise BackendError(f"the Triton path was asked for and cannot run: {obstacle}")
    return obstacle is None


@torch.compiler.assume_constant_result
def _environment() -> str:
    return os.environ.get(VARIABLE) or "auto"


def _obstacle(like: Tensor) -> str | None:
    if not _installed():
        return "the package triton is not installed"
    interpreted = is_interpreted()
    if like.dtype not in DTYPES and not (interpreted and like.dtype == torch.float64):
        got = str(like.dtype).removeprefix("torch.")
        return f"it takes float32, bfloat16 and float16, got {got}"
    if interpreted:
        return None
    if like.device.type != "cuda":
        return f"it needs a CUDA device or TRITON_INTERPRET=1, got a tensor on {like.device.type}"
    if torch.version.hip is not None:
        return "it needs an NVIDIA GPU, this is ROCm"
    capability = _capability(like.device.index or 0)
    if capability < LEAST_CAPABILITY:
        return f"it needs compute capability 8.0 or newer, got {capability[0]}.{capability[1]}"
    return None


@torch.compiler.assume_constant_result
def _installed() -> bool:
    return find_spec("triton") is not None


@torch.compiler.assume_constant_result
def is_interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels: slowly, on any device (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@torch.compiler.assume_constant_result
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)
