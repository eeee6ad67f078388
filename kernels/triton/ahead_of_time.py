"""Compile every kernel in every shipped configuration without a GPU, and say what it needs.

The modules below list calls at shipped shapes (`cases`); here the calls are made with tensors that
have no data, the launches are recorded (`launch.py`) and handed to Triton's compiler for each
architecture. ptxas and cuobjdump come with the triton package.
"""

import multiprocessing
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tess.kernels.dispatch import is_interpreted
from tess.kernels.triton.launch import ARCHITECTURES, Launch, as_architecture, recording

MODULES = (
    "norms", "conv", "ssd", "ssd_step", "routing", "experts",
    "random", "order_statistics", "simplex_embedding", "cross_entropy", "head",
)
# Up to four registers of a thread: the assembler trades them for a second
# program on the multiprocessor, and which kernels it does it to changes with Triton's version.
STACK_BYTES = 16
TENSOR_CORE_INSTRUCTIONS = ("HGMMA", "HMMA", "UTCHMMA", "DMMA")

_work: list[tuple[Launch, str]] = []


class Compiled(NamedTuple):
    """What one kernel needs on one architecture, as the assembler reports it."""

    case: str
    kernel: str
    architecture: str
    hot: bool
    """Whether it may not spill registers to memory."""
    warps: int
    stages: int
    registers: int
    shared_bytes: int
    stack_bytes: int
    """Local memory of a thread: above 0, registers are spilled."""
    tensor_core_instructions: int
    error: str = ""
    """What the compiler said if it gave up; the numbers are then 0."""

    @property
    def failed(self) -> bool:
        """Whether a check of all kernels has to fail: no code, or a hot kernel that spills."""
        return bool(self.error) or self.spills

    @property
    def spills(self) -> bool:
        """Whether this is a hot kernel with more than `STACK_BYTES` of spilled registers."""
        return self.hot and self.stack_bytes > STACK_BYTES


def compile_all(
    architectures: Sequence[str] = ARCHITECTURES,
    modules: Sequence[str] = MODULES,
    processes: int = 2,
) -> list[Compiled]:
    """Compile all cases of the modules; a launch that several cases share is compiled once.

    Raises:
        RuntimeError: in Triton's interpreter, where nothing is compiled.
    """
    if is_interpreted():
        raise RuntimeError("TRITON_INTERPRET=1 replaces the compiler; unset it to compile kernels")
    labels: dict[tuple, tuple[str, bool, str, Launch]] = {}
    for name, hot, architecture, recorded in _recorded(architectures, modules):
        key = (architecture, recorded.kernel.__name__, repr(recorded[1:]))
        known = labels.get(key)
        if known is None or (hot and not known[1]):
            labels[key] = (name, hot, architecture, recorded)
    _work[:] = [(recorded, architecture) for _, _, architecture, recorded in labels.values()]
    # forked, so that the children have the kernels, which cannot be sent to them
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        needs = list(pool.map(_compile, range(len(_work))))
    return [
        Compiled(
            name, recorded.kernel.__name__, architecture, hot, recorded.num_warps,
            recorded.num_stages, *need,
        )
        for (name, hot, architecture, recorded), need in zip(labels.values(), needs)
    ]


def _recorded(architectures: Sequence[str], modules: Sequence[str]):
    def make(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    for module in modules:
        for name, hot, call in import_module(f"tess.kernels.triton.{module}").cases(make):
            for architecture in architectures:
                with as_architecture(architecture), recording() as launches:
                    call()
                for recorded in launches:
                    yield name, hot, architecture, recorded


def _compile(index: int) -> tuple[int, int, int, int, str]:
    """Registers, shared and stack bytes, tensor core instructions, error."""
    try:
        with _quiet():
            return *_compile_one(*_work[index]), ""
    except Exception as error:  # whatever a compiler pass raises: the others still compile
        return 0, 0, 0, 0, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


@contextmanager
def _quiet() -> Iterator[None]:
    """The compiler prints whole modules to stderr when a pass fails."""
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _compile_one(recorded: Launch, architecture: str) -> tuple[int, int, int, int]:
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(recorded.kernel.arg_names)
        if name in recorded.aligned
    }
    source = ASTSource(
        fn=recorded.kernel, signature=recorded.signature, constexprs=recorded.constants,
        attrs=attributes,
    )
    target = GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)
    options = {"num_warps": recorded.num_warps, "num_stages": recorded.num_stages}
    compiled = triton.compile(source, target=target, options=options)
    usage, assembly = _disassemble(compiled.asm["cubin"])
    numbers = {name: int(value) for name, value in re.findall(r"(REG|STACK):(\d+)", usage)}
    tensor_core = re.findall(rf"\b({'|'.join(TENSOR_CORE_INSTRUCTIONS)})\b", assembly)
    return numbers["REG"], compiled.metadata.shared, numbers["STACK"], len(tensor_core)


def _disassemble(cubin: bytes) -> tuple[str, str]:
    """Resource usage and machine code of a compiled kernel, as NVIDIA's tools print them."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        commands = ([tools / "cuobjdump", "-res-usage"], [tools / "nvdisasm", "-c"])
        return tuple(
            subprocess.run([*c, file.name], capture_output=True, text=True, check=True).stdout
            for c in commands
        )


def format_table(results: Sequence[Compiled]) -> str:
    """A line per kernel and architecture, and the number of hot kernels that spill."""
    width = max(len(result.case) for result in results)
    lines = [
        f"{'case':{width}}  {'kernel':26} {'arch':7}{'hot':4}{'warps':>6}{'stages':>7}"
        f"{'registers':>10}{'shared':>9}{'stack':>7}{'tensor core':>13}"
    ]
    for r in results:
        lines.append(
            f"{r.case:{width}}  {r.kernel:26} {r.architecture:7}{'yes' if r.hot else '':4}"
            f"{r.warps:6}{r.stages:7}{r.registers:10}{r.shared_bytes:9}{r.stack_bytes:7}"
            f"{r.tensor_core_instructions:13}{'  ' + r.error if r.error else ''}"
        )
    spilled = sum(r.spills for r in results)
    lines.append(
        f"triton {triton.__version__}: {len(results)} kernels, "
        f"{sum(bool(r.error) for r in results)} do not compile, {spilled} hot ones spill"
    )
    return "\n".join(lines)
