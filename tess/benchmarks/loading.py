"""Peak memory and time of reading a released folder, beside transformers' `from_pretrained`."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from tess.backbones.causal_lm import HybridForCausalLM
from tess.backbones.presets import preset_config
from tess.backbones.released import save_released
from tess.costs.machine import environment
from tess.errors import UserError

# Run in a process of its own, so that nothing but the load moves its peak.
_CHILD = """
import json, sys, time
import torch
from transformers import NemotronHForCausalLM
from transformers.utils import logging
from tess.backbones.released import load_released
from tess.costs.machine import forget_resident_peak, resident_peak
logging.set_verbosity_error()
logging.disable_progress_bar()
torch.ones(64, 64) @ torch.ones(64, 64)
forget_resident_peak()  # that of the imports
before, start = resident_peak(), time.perf_counter()
if sys.argv[1] == "ours":
    model = load_released(sys.argv[2])
else:
    model = NemotronHForCausalLM.from_pretrained(sys.argv[2], dtype=torch.bfloat16)
seconds = time.perf_counter() - start
print(json.dumps({"peak": resident_peak() - before, "seconds": seconds}))
"""


def benchmark_loading(megabytes: int = 400, shard_megabytes: int = 100) -> dict[str, Any]:
    """Write a random bfloat16 checkpoint of about `megabytes`, and read it in fresh processes.

    A shape of the ladder with experts, one tensor per expert, widened to the size. Peak memory is
    the highest resident size of the process while it reads, less its size before, with mapped
    files counted.

    Raises:
        UserError: a system other than Linux, whose memory counters are read.
    """
    if sys.platform != "linux":
        raise UserError(f"the benchmark reads Linux's memory counters, and this is {sys.platform}")
    config = preset_config("small-30m", tie_word_embeddings=False)
    per_width = 2 * 2 * config.n_routed_experts * config.hidden_size  # bytes of up and down
    per_width *= config.hybrid_override_pattern.count("E")
    config.moe_intermediate_size = max(64, int(megabytes * 1e6) // per_width // 64 * 64)
    model = HybridForCausalLM(config).to(torch.bfloat16)
    held = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        save_released(model, folder, max_shard_bytes=shard_megabytes * 10**6)
        shards = len(list(Path(folder).glob("*.safetensors")))
        del model
        for name in ("ours", "transformers"):
            command = [sys.executable, "-c", _CHILD, name, folder]
            out = subprocess.run(command, capture_output=True, text=True, check=True)
            figures = json.loads(out.stdout.splitlines()[-1])
            rows.append({"system": name, **figures, "peak_share": figures["peak"] / held})
    return {
        "benchmark": "loading",
        "tensor_bytes": held,
        "shards": shards,
        "rows": rows,
        "environment": environment(),
    }
