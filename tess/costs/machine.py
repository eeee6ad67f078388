"""What machine and which versions a figure belongs to, and how much memory a process took."""

import os
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from datetime import date
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from tess.version import VERSION


def accelerator() -> str | None:
    """The name of the GPU that torch uses."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


_FACTS: dict[str, Callable[[], Any]] = {
    "date": lambda: date.today().isoformat(),
    "processor": lambda: platform.processor() or platform.machine(),
    "threads": torch.get_num_threads,
    "torch_threads": torch.get_num_threads,
    "python": platform.python_version,
    "cpu_count": os.cpu_count,
    "accelerator": accelerator,
    "system": platform.system,
    "architecture": platform.machine,
    "tess-diffusion": lambda: VERSION,
}

TIMING = ("processor", "threads", "python", "torch", "transformers", "accelerator")
"""What a time depends on beside what was timed."""

BENCHMARK = ("date", *TIMING[:-1])
COMPARISON = (
    *BENCHMARK, "cpu_count", "accelerator", "tess-diffusion",
    "diffusers", "accelerate", "tokenizers", "numpy", "sacrebleu", "rouge-score",
)  # fmt: skip
VERSIONS = (
    "python", "tess-diffusion", "torch", "transformers", "diffusers", "sacrebleu", "rouge-score"
)  # fmt: skip
MACHINE = ("system", "architecture", "cpu_count", "torch_threads", "accelerator")
"""The last two are of an evaluation."""


def environment(names: Sequence[str] = BENCHMARK) -> dict[str, Any]:
    """The facts of these names, in their order; a name of none is a package, and gives its version.

    Raises:
        PackageNotFoundError: such a package is not installed.
    """
    return {name: _FACTS[name]() if name in _FACTS else version(name) for name in names}


def gpu_environment(device: torch.device) -> dict[str, Any]:
    """What a figure of one device has to name; there may be neither driver nor transformers."""
    found: dict[str, Any] = environment(["date"]) | {
        "device": platform.processor() or platform.machine(),
        "driver": None, "capability": None, "memory_bytes": None, "cuda": torch.version.cuda,
        "python": platform.python_version(), "torch": torch.__version__,
        "triton": import_module("triton").__version__,
        "autotuned": os.environ.get("TESS_AUTOTUNE") == "1",
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "device": properties.name, "memory_bytes": properties.total_memory,
            "capability": f"{properties.major}.{properties.minor}", "driver": _driver(),
        }
    try:
        found["transformers"] = version("transformers")
    except PackageNotFoundError:
        found["transformers"] = None
    return found


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        out = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return None
    return out.stdout.splitlines()[0].strip() if out.stdout.strip() else None


def resident_peak() -> int | None:
    """Most bytes that this process has had resident; None on a system other than Linux."""
    if sys.platform != "linux":
        return None
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def forget_resident_peak() -> None:
    """Let `resident_peak` begin anew (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")
