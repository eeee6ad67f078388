"""What machine and which versions a figure belongs to."""

import importlib.metadata
import os
import platform
import subprocess
from datetime import date
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from tess.version import VERSION

EVALUATION_PACKAGES = ("torch", "transformers", "diffusers", "sacrebleu", "rouge-score")


def evaluation_versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "tess-diffusion": VERSION,
        **{package: importlib.metadata.version(package) for package in EVALUATION_PACKAGES},
    }


def machine() -> dict[str, Any]:
    return {
        "system": platform.system(),
        "architecture": platform.machine(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def gpu_environment(device: torch.device) -> dict[str, Any]:
    """What a figure has to name: date, device, driver, versions."""
    found: dict[str, Any] = {
        "date": date.today().isoformat(), "device": platform.processor() or platform.machine(),
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


COMPARISON_PACKAGES = ("diffusers", "accelerate", "tokenizers", "numpy", "sacrebleu", "rouge-score")


def comparison_environment() -> dict[str, Any]:
    versions = {name: importlib.metadata.version(name) for name in COMPARISON_PACKAGES}
    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        **environment(),
        "cpu_count": os.cpu_count(),
        "accelerator": accelerator,
        "tess-diffusion": VERSION,
        **versions,
    }


def timing_setting() -> dict[str, Any]:
    """What a time depends on beside the system."""
    found = environment()
    found.pop("date")
    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return found | {"accelerator": accelerator}


def environment() -> dict[str, Any]:
    """What a figure has to name: date, machine, threads, versions."""
    packages = ("torch", "transformers")
    return {
        "date": date.today().isoformat(),
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }
