"""Simplex diffusion for text on a hybrid backbone.

The names below are loaded at first use (PEP 562): `import tess` loads nothing else, so that the
kernels can be used and tested where neither transformers nor diffusers is installed.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from tess.version import VERSION as __version__  # noqa: F401

if TYPE_CHECKING:  # what editors and type checkers read
    from tess.backbones.cache import HybridCache
    from tess.backbones.causal_lm import HybridForCausalLM
    from tess.backbones.config import HybridConfig
    from tess.backbones.hybrid import HybridModel
    from tess.backbones.released import load_released, save_released
    from tess.config import TessConfig
    from tess.decoders.load import load_decoder
    from tess.denoiser import TessDenoiser
    from tess.pipeline import TessPipeline
    from tess.schedulers.base import SimplexScheduler
    from tess.schedulers.ddim import SimplexDDIMScheduler
    from tess.schedulers.dpm_solver import SimplexDPMSolverScheduler
    from tess.schedulers.euler import SimplexEulerScheduler
    from tess.schedulers.renoising import RenoisingScheduler
    from tess.schedulers.simplex import DenseSimplex, NoisedSimplex

__all__ = [
    "DenseSimplex",
    "HybridCache",
    "HybridConfig",
    "HybridForCausalLM",
    "HybridModel",
    "NoisedSimplex",
    "RenoisingScheduler",
    "SimplexDDIMScheduler",
    "SimplexDPMSolverScheduler",
    "SimplexEulerScheduler",
    "SimplexScheduler",
    "TessConfig",
    "TessDenoiser",
    "TessPipeline",
    "load_decoder",
    "load_released",
    "save_released",
]

_HOME = {
    "DenseSimplex": "tess.schedulers.simplex",
    "HybridCache": "tess.backbones.cache",
    "HybridConfig": "tess.backbones.config",
    "HybridForCausalLM": "tess.backbones.causal_lm",
    "HybridModel": "tess.backbones.hybrid",
    "NoisedSimplex": "tess.schedulers.simplex",
    "RenoisingScheduler": "tess.schedulers.renoising",
    "SimplexDDIMScheduler": "tess.schedulers.ddim",
    "SimplexDPMSolverScheduler": "tess.schedulers.dpm_solver",
    "SimplexEulerScheduler": "tess.schedulers.euler",
    "SimplexScheduler": "tess.schedulers.base",
    "TessConfig": "tess.config",
    "TessDenoiser": "tess.denoiser",
    "TessPipeline": "tess.pipeline",
    "load_decoder": "tess.decoders.load",
    "load_released": "tess.backbones.released",
    "save_released": "tess.backbones.released",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'tess' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
