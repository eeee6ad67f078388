"""What a vocabulary costs: the noised simplex, a training step and a denoising step.

The rival is the same model with materialised tensors: noise, simplex, probabilities, previous
prediction and logits of [batch, target, vocabulary]. "official" has them as TESS's official
implementation does: source and target are one sequence, and all of these tensors go over both. It
is spared the graph that the official code builds in the first pass and does not use.
"""

# B examples, L positions, S source positions, V vocabulary, H hidden, T = B L

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tess.backbones.config import HybridConfig
from tess.benchmarks.turns import HIDDEN_256, time_pairs
from tess.config import TessConfig
from tess.costs.machine import environment, forget_resident_peak, resident_peak
from tess.denoiser import TessDenoiser
from tess.kernels.order_statistics import MomentsCache, embedding_moments
from tess.kernels.simplex_embedding import simplex_embedding
from tess.schedulers.renoising import RenoisingScheduler
from tess.self_conditioning import Prediction
from tess.training.losses import sample_uniforms, tess_loss

SYSTEMS = ("ours", "rival", "official")
PATTERN = "M*-EM*-E"
BATCH, LENGTH, SOURCE, WIDTH = 8, 128, 64, 256
TOPS = (16, 32, 64)
DENSE_ROWS = 256
"""Positions of the materialised embedding, whose time is given per position."""


def benchmark_vocabulary(
    vocab_sizes: Sequence[int],
    parts: Sequence[str],
    repeats: int = 5,
    dtype: str = "float32",
    seed: int = 0,
) -> dict[str, Any]:
    """Run the parts at every vocabulary size; peak memory in processes of their own (Linux)."""
    measure = {"embedding": _embedding, "training": _step, "denoising": _step}
    rows = []
    for part in parts:
        for vocab_size in vocab_sizes:
            torch.manual_seed(seed)
            found = measure[part](part, vocab_size, repeats, dtype, seed)
            rows += found if isinstance(found, list) else [found]
    return {
        "benchmark": "vocabulary",
        "rival": "the same model with materialised tensors",
        "official": "the same, over source and target in one sequence",
        "pattern": PATTERN,
        "hidden_size": WIDTH,
        "batch": BATCH,
        "length": LENGTH,
        "source": SOURCE,
        "dtype": dtype,
        "seed": seed,
        "rows": rows,
        "environment": environment(),
    }


# ---- the noised simplex ----


def _embedding(
    part: str, vocab_size: int, repeats: int, dtype: str, seed: int
) -> list[dict[str, Any]]:
    """Microseconds per position; both sides in float32, whatever `dtype` is."""
    weight = torch.randn(vocab_size, WIDTH)
    moments = embedding_moments(weight)
    ids = torch.randint(vocab_size, (BATCH, LENGTH))
    share = torch.rand(BATCH, 1)
    scales = 5 * share.sqrt(), 5 * (1 - share).sqrt()
    keys = torch.arange(BATCH)
    few = ids.flatten()[None, :DENSE_ROWS]

    def rival() -> Tensor:
        x = torch.randn(1, DENSE_ROWS, vocab_size).mul_(scales[1][0])
        x.scatter_add_(-1, few[..., None], (2 * scales[0][:1, :, None]).expand(1, DENSE_ROWS, 1))
        return x.softmax(dim=-1) @ weight

    rows = []
    for num_top in TOPS:

        def ours() -> Tensor:
            return simplex_embedding(
                ids, *scales, weight, keys_B=keys, num_top=num_top, moments=moments
            )

        with torch.no_grad():
            figures = time_pairs(ours, rival, repeats)
        per_position = {
            "ours_us": 1e3 * figures["ours_ms"] / ids.numel(),
            "rival_us": 1e3 * figures["rival_ms"] / few.numel(),
        }
        scale = ids.numel() / few.numel()
        ratios = {name: figures[name] * scale for name in ("ratio", "ratio_q1", "ratio_q3")}
        rows.append(
            {"part": part, "vocab_size": vocab_size, "num_top": num_top}
            | per_position
            | ratios
            | {"pairs": repeats}
        )
    return rows


# ---- whole steps ----


class _Model:
    """A denoiser of eight layers with a batch; steps of both systems."""

    def __init__(self, vocab_size: int, dtype: str, seed: int) -> None:
        torch.manual_seed(seed)
        self.vocab_size = vocab_size
        options = HIDDEN_256 | {"vocab_size": vocab_size, "hybrid_override_pattern": PATTERN}
        backbone = HybridConfig(
            **options, chunk_size=64, tie_word_embeddings=True, mamba_direction="bidirectional"
        )
        config = TessConfig(backbone_config=backbone, max_target_length=SOURCE + LENGTH)
        self.denoiser = TessDenoiser(config)
        self.scheduler = RenoisingScheduler(vocab_size=vocab_size)
        self.dtype = getattr(torch, dtype)
        mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
        source = torch.randint(5, vocab_size, (BATCH, SOURCE))
        self.batch = {
            "source_ids": source, "source_mask": torch.ones_like(source),
            "target_ids": torch.randint(5, vocab_size, (BATCH, LENGTH)), "target_mask": mask,
            "noise_mask": mask, "loss_weights": mask.float(),
        }

    def run(self, part: str, system: str) -> Callable[[], None]:
        """A function that runs one step."""
        step = getattr(self, f"_{part}_{system}")

        def whole() -> None:
            with torch.autocast("cpu", self.dtype, enabled=self.dtype != torch.float32):
                loss = step()
            if loss is not None:
                self.denoiser.zero_grad(set_to_none=True)
                loss.backward()

        return whole

    def _training_ours(self) -> Tensor:
        self.denoiser.moments = MomentsCache()  # as after an optimizer's step
        return tess_loss(
            self.denoiser, self.scheduler, self.batch, self_conditioning_probability=1.0
        )

    def _training_rival(self) -> Tensor:
        source = {name: self.batch[name] for name in ("source_ids", "source_mask")}
        context = {"cache": self.denoiser.encode_source(**source)}
        ids = self.batch["target_ids"]
        logits = self._two_passes(ids, context)
        return F.cross_entropy(logits.flatten(0, 1), ids.flatten())

    def _training_official(self) -> Tensor:
        ids, context = self._one_sequence()
        logits = self._two_passes(ids, context)
        return F.cross_entropy(logits[:, SOURCE:].flatten(0, 1), self.batch["target_ids"].flatten())

    def _one_sequence(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Source and target as one sequence, in which the source is clean context."""
        ids = torch.cat([self.batch["source_ids"], self.batch["target_ids"]], dim=1)
        noised = torch.ones_like(ids)
        noised[:, :SOURCE] = 0
        return ids, {"clean_ids": ids, "noise_mask": noised}

    def _two_passes(self, ids: Tensor, context: dict[str, Any]) -> Tensor:
        """Logits of the second pass, conditioned on those of the first at the same noise."""
        times = self.scheduler.training_timesteps(sample_uniforms(BATCH))
        sample = self._dense_sample(ids, times)
        with torch.no_grad():
            logits = self._dense_logits(sample, times, None, context)
        torch.clear_autocast_cache()
        return self._dense_logits(sample, times, Prediction(ids, logits=logits), context)

    def _dense_sample(self, ids: Tensor, times: Tensor) -> Tensor:
        return self.scheduler.add_noise(ids, times, torch.randn(*ids.shape, self.vocab_size))

    def _dense_logits(
        self, sample: Tensor, times: Tensor, previous: Prediction | None, context: dict[str, Any]
    ) -> Tensor:
        mask = torch.ones(sample.shape[:2], dtype=torch.long)
        out = self.denoiser(sample, times, previous, target_mask=mask, **context)
        return self.denoiser.logits(out.last_hidden_state)

    @torch.no_grad()
    def prepare_denoising(self, *systems: str) -> None:
        """What a step in the middle of a generation starts from, for the systems named."""
        source = {name: self.batch[name] for name in ("source_ids", "source_mask")}
        self.cache = self.denoiser.encode_source(**source)
        self.scheduler.set_timesteps(16)
        self.time = self.scheduler.timesteps[8]
        keys = torch.arange(BATCH)
        self.sample = self.scheduler.initial((BATCH, LENGTH), keys)
        hidden = torch.randn(BATCH, LENGTH, WIDTH)
        self.previous = {}
        if "ours" in systems:
            self.previous["ours"] = self.denoiser.predict(hidden)
        if "rival" in systems:
            self.previous["rival"] = self._random_logits(hidden)
        if "official" in systems:
            hidden = torch.randn(BATCH, SOURCE + LENGTH, WIDTH)
            self.previous["official"] = self._random_logits(hidden)

    def _random_logits(self, hidden: Tensor) -> Prediction:
        ids = torch.zeros(hidden.shape[:2], dtype=torch.long)
        return Prediction(ids, logits=self.denoiser.logits(hidden))

    @torch.no_grad()
    def _denoising_ours(self) -> None:
        times = self.time.expand(BATCH)
        previous = self.previous["ours"]
        mask = self.batch["target_mask"]
        out = self.denoiser(self.sample, times, previous, cache=self.cache, target_mask=mask)
        tokens = self.denoiser.predict(out.last_hidden_state).token_ids
        self.scheduler.step(tokens, self.time, self.sample)

    def _denoising_rival(self) -> None:
        self._dense_step("rival", self.batch["target_ids"], {"cache": self.cache})

    def _denoising_official(self) -> None:
        self._dense_step("official", *self._one_sequence())

    @torch.no_grad()
    def _dense_step(self, system: str, ids: Tensor, context: dict[str, Any]) -> None:
        times = self.time.expand(BATCH)
        sample = self._dense_sample(ids, times)  # every step has fresh noise
        logits = self._dense_logits(sample, times, self.previous[system], context)
        logits.argmax(dim=-1)

    def head_products(self) -> Callable[[], None]:
        """The two products of a denoising step with the vocabulary, bare, in one buffer."""
        weight = self.denoiser.backbone.embeddings.weight.detach().to(self.dtype)
        hidden = torch.randn(BATCH * LENGTH, WIDTH, dtype=self.dtype)
        logits = torch.empty(len(hidden), len(weight), dtype=self.dtype)

        def run() -> None:
            torch.mm(hidden, weight.T, out=logits)
            torch.mm(logits, weight)

        return run


def _step(part: str, vocab_size: int, repeats: int, dtype: str, seed: int) -> dict[str, Any]:
    """Milliseconds and peak bytes of one step."""
    peaks = {name: _peak(part, name, vocab_size, dtype, seed) for name in SYSTEMS}
    model = _Model(vocab_size, dtype, seed)
    if part == "denoising":
        model.prepare_denoising(*SYSTEMS)
    ours = model.run(part, "ours")
    row = {"part": part, "vocab_size": vocab_size}
    row |= time_pairs(ours, model.run(part, "rival"), repeats)
    official = time_pairs(ours, model.run(part, "official"), repeats)
    row |= {"official_ms": official["rival_ms"], "official_ratio": official["ratio"]}
    row |= {f"{name}_peak": peak for name, peak in peaks.items()}
    for name, ratio in (("rival", "peak_ratio"), ("official", "official_peak_ratio")):
        row[ratio] = None if None in peaks.values() else peaks[name] / peaks["ours"]
    if part == "denoising":
        row["products_ms"] = _median_ms(model.head_products(), repeats)
        row["of_products"] = row["ours_ms"] / row["products_ms"]
    return row


def _median_ms(function: Callable[[], None], repeats: int) -> float:
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def _peak(part: str, system: str, vocab_size: int, dtype: str, seed: int) -> int | None:
    """Most resident bytes while one step runs in a new process, less those before it."""
    if sys.platform != "linux":
        return None
    call = f"measure_peak({part!r}, {system!r}, {vocab_size}, {dtype!r}, {seed})"
    command = [sys.executable, "-c", f"from tess.benchmarks.vocabulary import *; {call}"]
    out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(out.stdout.splitlines()[-1])


def measure_peak(part: str, system: str, vocab_size: int, dtype: str, seed: int) -> None:
    """Print the peak of one step of this process, in bytes (Linux).

    A small step before it loads what is loaded once; the model itself is there before.
    """
    small = _Model(512, dtype, seed)
    model = _Model(vocab_size, dtype, seed)
    for one in (small, model):
        if part == "denoising":
            one.prepare_denoising(system)
    small.run(part, system)()
    if part == "training":  # the gradients are there in every step but the first
        for parameter in model.denoiser.parameters():
            parameter.grad = torch.zeros_like(parameter)

    forget_resident_peak()
    before = resident_peak()
    model.run(part, system)()
    print(json.dumps(resident_peak() - before))
