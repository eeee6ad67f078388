"""The schedulers by the names that flags and reports use."""

from tess.schedulers.base import SimplexScheduler
from tess.schedulers.ddim import SimplexDDIMScheduler
from tess.schedulers.dpm_solver import SimplexDPMSolverScheduler
from tess.schedulers.euler import SimplexEulerScheduler
from tess.schedulers.renoising import RenoisingScheduler

SAMPLERS: dict[str, type[SimplexScheduler]] = {
    "renoising": RenoisingScheduler,
    "ddim": SimplexDDIMScheduler,
    "euler": SimplexEulerScheduler,
    "dpm_solver": SimplexDPMSolverScheduler,
}


def name_of(scheduler: SimplexScheduler) -> str:
    """The short name of a scheduler's class."""
    return next(name for name, kind in SAMPLERS.items() if type(scheduler) is kind)
