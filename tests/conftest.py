"""Settings that every test runs under; what a test needs it builds in its own file."""

import os
from pathlib import Path

ROOT = str(Path(__file__).resolve().parents[1])
# scripts that a test starts find this checkout too, installed or not
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [ROOT, os.environ.get("PYTHONPATH")]))
# before anything imports the hub client: no test may reach the network
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest  # noqa: E402
import torch  # noqa: E402

# before anything imports a Triton kernel: without a GPU they run in the interpreter
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# the test models are so small that more threads only wait for each other
if "OMP_NUM_THREADS" not in os.environ:
    torch.set_num_threads(min(2, os.cpu_count() or 1))


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """Each test starts from the same global generator, whichever tests ran before it."""
    torch.manual_seed(0)
