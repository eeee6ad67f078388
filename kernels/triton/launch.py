"""Launching kernels: a fixed configuration per architecture, and a record instead of a launch.

Every kernel of this folder is launched by `Table.run` and `launch`. A `Table` holds what was chosen
for each architecture; block sizes, warps and stages come from nowhere else, so that what is
compiled ahead of time (`ahead_of_time.py`) is what runs. With TESS_AUTOTUNE=1 the candidates are
timed instead, once per key, and the fastest is kept for the process; the choice can then differ
between processes, and with it the last bits of a result.
"""

import os
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tess.kernels.dispatch import is_interpreted

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
AUTOTUNE_VARIABLE = "TESS_AUTOTUNE"

POINTER_TYPES = {
    torch.float64: "*fp64", torch.float32: "*fp32", torch.bfloat16: "*bf16",
    torch.float16: "*fp16", torch.int64: "*i64", torch.int32: "*i32", torch.int8: "*i8",
    torch.uint8: "*u8", torch.bool: "*i1",
}

_forced_architecture: list[str] = []
_records: list[list["Launch"]] = []


class Config(NamedTuple):
    """One way to run a kernel: constexpr block sizes by name, warps, software pipeline stages."""

    blocks: dict[str, int]
    num_warps: int = 4
    num_stages: int = 2


class Launch(NamedTuple):
    """A launch that was recorded: all that the compiler would have been told."""

    kernel: Any
    signature: dict[str, str]
    """Argument -> Triton type, "constexpr" for what is in `constants`."""
    constants: dict[str, Any]
    aligned: frozenset[str]
    """Pointers and sizes known to be divisible by 16."""
    num_warps: int
    num_stages: int


@dataclass
class Table:
    """The configurations of one kernel.

    Attributes:
        name: what it is called in the table of compiled kernels.
        fixed: one configuration per architecture; one that is missing has that of the one before.
        others: more candidates for autotuning.
        float32: the same as `fixed` for float32 inputs, where those need smaller blocks: a product
            of float32 operands takes three times the registers.
    """

    name: str
    fixed: dict[str, Config]
    others: tuple[Config, ...] = ()
    float32: dict[str, Config] = field(default_factory=dict)
    _tuned: dict[Hashable, Config] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for fixed in filter(None, (self.fixed, self.float32)):
            if "sm_80" not in fixed or not set(fixed) <= set(ARCHITECTURES):
                raise ValueError(f"{self.name}: needs sm_80 and no other than {ARCHITECTURES}")

    def config(self, like: Tensor) -> Config:
        """What is run on the device of a tensor when nothing is tuned."""
        wanted = ARCHITECTURES.index(architecture(like))
        fixed = self.float32 if self.float32 and like.dtype == torch.float32 else self.fixed
        return next(fixed[a] for a in ARCHITECTURES[wanted::-1] if a in fixed)

    def candidates(self) -> list[Config]:
        """All configurations that may run, each once."""
        listed = (*self.fixed.values(), *self.float32.values(), *self.others)
        return list({repr(c): c for c in listed}.values())

    def run(self, like: Tensor, key: Hashable, run: Callable[[Config], None]) -> None:
        """Call `run` with the configuration for this device, or with the fastest for this key.

        `run` launches kernels and writes each of its results in full, so that it can be repeated.
        """
        if not _autotunes() or _records or is_interpreted():
            run(self.config(like))
            return
        key = (like.device, like.dtype, key)
        if key not in self._tuned:
            timed = [(_milliseconds(run, config), i) for i, config in enumerate(self.candidates())]
            self._tuned[key] = self.candidates()[min(timed)[1]]
        run(self._tuned[key])


def launch(
    kernel: Any, grid: tuple[int, ...], *args: Any, config: Config, **constants: Any
) -> None:
    """Run a kernel: positional arguments are tensors and numbers, keywords its other constexprs.

    A program grid with a zero launches nothing.
    """
    constants = {**config.blocks, **constants}
    if _records:
        _records[-1].append(_describe(kernel, args, constants, config))
        return
    if 0 in grid:
        return
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    if args and isinstance(args[0], Tensor) and args[0].device.type == "cuda":
        with torch.cuda.device(args[0].device):
            kernel[grid](*args, **constants, **options)
    else:
        kernel[grid](*args, **constants, **options)


def architecture(like: Tensor) -> str:
    """The newest of `ARCHITECTURES` that the tensor's device has (sm_80 where there is no GPU)."""
    if _forced_architecture:
        return _forced_architecture[-1]
    if like.device.type != "cuda":
        return ARCHITECTURES[0]
    number = 10 * torch.cuda.get_device_capability(like.device)[0]
    return next((a for a in ARCHITECTURES[::-1] if int(a[3:]) <= number), ARCHITECTURES[0])


@contextmanager
def as_architecture(name: str) -> Iterator[None]:
    """Choose configurations as on that architecture, whatever the device."""
    if name not in ARCHITECTURES:
        raise ValueError(f"architecture must be one of {', '.join(ARCHITECTURES)}, got {name!r}")
    _forced_architecture.append(name)
    try:
        yield
    finally:
        _forced_architecture.pop()


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Collect launches instead of doing them; the tensors may be on the meta device."""
    _records.append([])
    try:
        yield _records[-1]
    finally:
        _records.pop()


def wide_type(like: Tensor) -> tl.dtype:
    """What sums, exponentials and states have: float64 for float64 (tests), or else float32."""
    return tl.float64 if like.dtype == torch.float64 else tl.float32


def dot_precision(like: Tensor) -> str:
    """`input_precision` of products: float32 operands keep (nearly) all their digits.

    Three TF32 products by default, one where torch's own products may use TF32.
    """
    if like.dtype == torch.float64:
        return "ieee"
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def _autotunes() -> bool:
    return os.environ.get(AUTOTUNE_VARIABLE) == "1"


def _milliseconds(run: Callable[[Config], None], config: Config) -> float:
    try:
        return triton.testing.do_bench(lambda: run(config))
    except triton.runtime.errors.OutOfResources:  # this candidate does not fit this device
        return float("inf")


def _describe(kernel: Any, args: tuple, constants: dict[str, Any], config: Config) -> Launch:
    names = [name for name in kernel.arg_names if name not in constants]
    if len(names) != len(args):
        raise TypeError(f"{kernel.__name__} takes {names}, got {len(args)} arguments")
    signature, aligned, constants = {}, set(), dict(constants)
    for name, value in zip(names, args):
        if value is None or (isinstance(value, int) and value == 1):
            constants[name] = value  # Triton compiles ones and absent pointers in
        elif isinstance(value, Tensor):
            signature[name] = POINTER_TYPES[value.dtype]
            if value.storage_offset() * value.element_size() % 16 == 0:
                aligned.add(name)
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                aligned.add(name)
    signature |= {name: "constexpr" for name in constants}
    ordered = {name: signature[name] for name in kernel.arg_names}
    return Launch(
        kernel, ordered, constants, frozenset(aligned), config.num_warps, config.num_stages
    )
