"""Autoregressive decoding with and without drafts, beside transformers' on the same weights."""

import math
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tess.backbones.causal_lm import HybridForCausalLM
from tess.backbones.released import save_released
from tess.benchmarks.turns import checkpoint_label
from tess.costs.machine import environment
from tess.data.tasks.catalog import load_task
from tess.decoders.autoregressive import ArDecoder
from tess.decoders.load import load_decoder
from tess.errors import UserError
from tess.text.end_tokens import end_tokens, through_end
from tess.text.padding import pad_left

TASK = "simplification"
SPLITS = ("test", "train")  # of the packaged rows, in that order; 200 sources together
Writes = Callable[[Tensor, Tensor], tuple[list[list[int]], dict[str, int]]]


def benchmark_decoding(
    checkpoint: str | Path,
    *,
    rows: int = 200,
    batch_sizes: Sequence[int] = (1, 8),
    drafts: Sequence[int] = (1, 2, 3, 4, 6),
    repeats: int = 3,
    dtype: str = "float32",
) -> dict[str, Any]:
    """Greedy decoding of packaged sources: `ar`, `ar+mtp` and transformers, batch by batch in turn.

    transformers' model holds the same weights, its step-size floor opened, and decodes without
    drafts, which it refuses for this family. Every figure of a batch size comes from one run in
    which the systems take turns on each batch.

    Returns, per batch size and system: milliseconds per token (all batches, best of `repeats`
    passes each), the median over batches of the time of plain `ar` divided by the system's (above
    1: the system is faster), how many texts equal those of `ar`, and for drafts the acceptance
    length, the share of drafts that stay and the tokens per evaluation.

    Raises:
        UserError: no predictor in the checkpoint, or more rows than are packaged.
    """
    decoder = load_decoder(checkpoint, "ar+mtp", getattr(torch, dtype))
    sources = packaged_sources(decoder, rows)
    systems: dict[str, Writes] = {"ar": partial(_plain, decoder)}
    for k in drafts:
        systems[f"ar+mtp, {k} drafted"] = partial(_drafted, decoder, k)
    systems["transformers"] = partial(_plain, _Rival(decoder))
    with torch.no_grad():
        figures = [
            figure
            for size in batch_sizes
            for figure in _compare(decoder, systems, sources, size, repeats)
        ]
    return {
        "benchmark": "decoding",
        "checkpoint": checkpoint_label(checkpoint),
        "rival": "transformers NemotronHForCausalLM.generate",
        "rows": figures,
        "sources": rows,
        "dtype": dtype,
        "repeats": repeats,
        "parameters": sum(p.numel() for p in decoder.model.parameters()),
        "environment": environment(),
    }


class _Rival:
    """transformers' model with the decoder's weights, where `_plain` looks for a model."""

    def __init__(self, decoder: ArDecoder) -> None:
        self.model = rival_model(decoder.model)
        self.tokenizer = decoder.tokenizer


def rival_model(model: HybridForCausalLM) -> nn.Module:
    """transformers' Nemotron-H with the same weights, by way of a released folder."""
    from transformers import NemotronHForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        save_released(model, folder)
        dtype = model.lm_head.weight.dtype
        rival = NemotronHForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    for module in rival.modules():
        if hasattr(module, "time_step_limit"):
            module.time_step_limit = (0.0, math.inf)
    return rival.to(model.device)


def packaged_sources(decoder: ArDecoder, rows: int) -> list[list[int]]:
    """So many packaged sources as ids, by rising length.

    Raises:
        UserError: for more than there are.
    """
    texts = [example.source for split in SPLITS for example in load_task(TASK, split)]
    if not 1 <= rows <= len(texts):
        raise UserError(f"--rows must be from 1 to the {len(texts)} packaged sources, got {rows}")
    return sorted(decoder.encode(texts[:rows]).rows, key=len)


def _compare(
    decoder: ArDecoder,
    systems: dict[str, Writes],
    sources: list[list[int]],
    size: int,
    repeats: int,
) -> list[dict[str, Any]]:
    batches = [
        pad_left(sources[i : i + size], decoder.tokenizer.pad_token_id)
        for i in range(0, len(sources), size)
    ]
    device = decoder.model.device
    times = {name: [math.inf] * len(batches) for name in systems}
    texts: dict[str, list[list[int]]] = {name: [] for name in systems}
    counts = {name: {"forwards": 0, "drafted": 0, "accepted": 0} for name in systems}
    for write in systems.values():
        _run(write, batches[0], device)  # warm-up
    for i, batch in enumerate(batches):
        for pass_ in range(repeats):
            for name, write in systems.items():
                seconds, written, counted = _run(write, batch, device)
                times[name][i] = min(times[name][i], seconds)
                if pass_ == 0:
                    texts[name] += written
                    for key, value in counted.items():
                        counts[name][key] += value
    return [_figures(name, size, times, texts, counts[name], len(sources)) for name in systems]


def _run(
    write: Writes, batch: dict[str, Tensor], device: torch.device
) -> tuple[float, list[list[int]], dict[str, int]]:
    ids, mask = batch["source_ids"].to(device), batch["source_mask"].to(device)
    start = time.perf_counter()
    written, counted = write(ids, mask)
    return time.perf_counter() - start, written, counted


def _figures(
    name: str,
    size: int,
    times: dict[str, list[float]],
    texts: dict[str, list[list[int]]],
    counted: dict[str, int],
    rows: int,
) -> dict[str, Any]:
    tokens = sum(map(len, texts[name]))
    checks = counted["forwards"] - rows
    speedups = [plain / own for plain, own in zip(times["ar"], times[name])]
    drafting = counted["drafted"] > 0
    return {
        "system": name,
        "batch_size": size,
        "new_tokens": tokens,
        "ms_per_token": 1e3 * sum(times[name]) / tokens,
        "speedup": statistics.median(speedups),
        "equal_texts": sum(a == b for a, b in zip(texts["ar"], texts[name])),
        "acceptance_length": (tokens - rows) / checks if drafting and checks else None,
        "accepted_share": counted["accepted"] / counted["drafted"] if drafting else None,
        "tokens_per_forward": tokens / counted["forwards"] if counted["forwards"] else None,
    }


def _most_tokens(model: nn.Module) -> int:
    return model.generation_config.max_new_tokens or 128


def _options(decoder: Any, ids: Tensor, mask: Tensor) -> dict[str, Any]:
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "max_new_tokens": _most_tokens(decoder.model),
        "pad_token_id": decoder.tokenizer.pad_token_id,
        "eos_token_id": list(end_tokens(decoder.tokenizer)),
        "do_sample": False,
    }


def _new_tokens(decoder: Any, sequences: Tensor, width: int) -> list[list[int]]:
    ends = end_tokens(decoder.tokenizer)
    return [through_end(row, ends) for row in sequences[:, width:].tolist()]


def _plain(decoder: Any, ids: Tensor, mask: Tensor) -> tuple[list[list[int]], dict[str, int]]:
    sequences = decoder.model.generate(**_options(decoder, ids, mask))
    rows = _new_tokens(decoder, sequences, ids.shape[1])
    return rows, {"forwards": sum(map(len, rows))}


def _drafted(
    decoder: ArDecoder, k: int, ids: Tensor, mask: Tensor
) -> tuple[list[list[int]], dict[str, int]]:
    out = decoder.model.generate(
        **_options(decoder, ids, mask),
        use_mtp=True,
        num_assistant_tokens=k,
        return_dict_in_generate=True,
    )
    return _new_tokens(decoder, out.sequences, ids.shape[1]), {
        "forwards": int(out.num_forwards.sum()),
        "drafted": int(out.num_drafted.sum()),
        "accepted": int(out.num_accepted.sum()),
    }
