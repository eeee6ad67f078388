"""What the exact source cache saves: a denoising step with it, and two rivals without.

"encoded" reads the source again in every step, for the same text (`use_cache=False` of the
pipeline). "joint" is TESS's layout: source and target are one sequence that goes through the
network in every step; the same weights, another function.
"""

# B examples, S source positions, L target positions, V vocabulary

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tess.backbones.config import HybridConfig
from tess.benchmarks.turns import HIDDEN_256, summarize_turns, time_turns
from tess.config import TessConfig
from tess.costs.machine import environment
from tess.denoiser import TessDenoiser
from tess.errors import UserError
from tess.schedulers.base import SimplexScheduler
from tess.schedulers.renoising import RenoisingScheduler
from tess.self_conditioning import Prediction

PATTERN = "M*-EM*-E"
VOCABULARY = 4_096
SYSTEMS = ("cached", "encoded", "joint")


def benchmark_cache(
    sources: Sequence[int] = (128, 256, 512, 1_024, 2_048),
    target: int = 128,
    batches: Sequence[int] = (1, 8),
    steps: Sequence[int] = (8, 16),
    repeats: int = 7,
    seed: int = 0,
    checkpoint: str | Path | None = None,
) -> dict[str, Any]:
    """Time a step of the three systems in turn, at every source length and batch size.

    A step is what the pipeline does in one: evaluate the network, choose tokens, move on. Encoding
    the source by itself is a fourth in the turns; a whole generation of N steps is the encoding and
    N steps of the same turn with the cache, N steps without.

    Args:
        checkpoint: also measure the model of this folder, at the sources and targets its learned
            positions allow.

    Raises:
        UserError: a checkpoint that has no encoding of the source by itself.
    """
    models = {"hidden 256": _random_model(max(sources), target, seed)}
    if checkpoint is not None:
        models["checkpoint"] = _shipped(checkpoint)
    rows = []
    for name, (denoiser, scheduler) in models.items():
        for source, length in _shapes(denoiser.config, sources, target):
            for batch in batches:
                case = _Case(denoiser, scheduler, batch, source, length, seed)
                found = case.measure(steps, repeats)
                rows.append({"model": name, "source": source, "target": length} | found)
    return {
        "benchmark": "cache",
        "rival": "the source encoded in every step; source and target as one sequence (joint)",
        "pattern": PATTERN,
        "hidden_size": HIDDEN_256["hidden_size"],
        "vocab_size": VOCABULARY,
        "parameters": sum(p.numel() for p in models["hidden 256"][0].parameters()),
        "seed": seed,
        "rows": rows,
        "environment": environment(),
    }


def _random_model(source: int, target: int, seed: int) -> tuple[TessDenoiser, SimplexScheduler]:
    torch.manual_seed(seed)
    options = HIDDEN_256 | {"vocab_size": VOCABULARY, "hybrid_override_pattern": PATTERN}
    backbone = HybridConfig(
        **options, chunk_size=64, tie_word_embeddings=True, mamba_direction="bidirectional"
    )
    config = TessConfig(
        backbone_config=backbone,
        source_encoding="bidirectional",
        max_source_length=source,
        max_target_length=target,
    )
    return TessDenoiser(config).eval(), RenoisingScheduler(vocab_size=VOCABULARY)


def _shipped(folder: Path) -> tuple[TessDenoiser, SimplexScheduler]:
    from tess.decoders.load import load_decoder

    parts = load_decoder(folder, "tess").parts
    if parts.model.config.source_encoding == "joint":
        raise UserError(
            f"{folder} reads source and target as one sequence (source_encoding 'joint'), which "
            "leaves no source to cache"
        )
    return parts.model.eval(), parts.scheduler


def _shapes(config: TessConfig, sources: Sequence[int], target: int) -> list[tuple[int, int]]:
    """The pairs of source and target lengths that the model's learned positions allow."""
    most, longest = config.num_source_positions, config.num_target_positions
    length = min(target, longest) if longest else target
    return [(source, length) for source in sources if not most or source <= most]


class _Case:
    """A batch in the middle of its generation."""

    @torch.no_grad()
    def __init__(
        self,
        denoiser: TessDenoiser,
        scheduler: SimplexScheduler,
        batch: int,
        source: int,
        target: int,
        seed: int,
    ) -> None:
        torch.manual_seed(seed)
        size = denoiser.config.vocab_size
        self.batch = batch
        self.denoiser, self.scheduler = denoiser, scheduler
        self.joint = _joint_twin(denoiser)
        self.source_BS = torch.randint(5, size, (batch, source))
        self.mask_BL = torch.ones(batch, target, dtype=torch.long)
        self.cache = self._encode()
        scheduler.set_timesteps(16)
        self.time = scheduler.timesteps[8]
        ids_BL = torch.randint(5, size, (batch, target))
        first = scheduler.initial((batch, target), torch.arange(batch))
        self.sample = scheduler.step(ids_BL, scheduler.timesteps[7], first).prev_sample
        self.previous = denoiser.predict(torch.randn(batch, target, denoiser.config.hidden_size))

    def _encode(self) -> Any:
        return self.denoiser.encode_source(self.source_BS, torch.ones_like(self.source_BS))

    @torch.no_grad()
    def step(self, system: str) -> Prediction:
        """One step of the loop; the prediction, of which the tokens go into the next sample."""
        model = self.joint if system == "joint" else self.denoiser
        context: dict[str, Any] = {"cache": self.cache}
        if system != "cached":
            mask_BS = torch.ones_like(self.source_BS)
            context = {"source_ids": self.source_BS, "source_mask": mask_BS}
        elif self.denoiser.config.label_shift:
            context["source_ids"] = self.source_BS
        times_B = self.time.expand(self.batch)
        out = model(self.sample, times_B, self.previous, target_mask=self.mask_BL, **context)
        prediction = model.predict(out.last_hidden_state)
        self.scheduler.step(prediction.token_ids, self.time, self.sample)
        return prediction

    @torch.no_grad()
    def measure(self, steps: Sequence[int], repeats: int) -> dict[str, Any]:
        """The figures of one row."""
        calls: dict[str, Any] = {name: lambda name=name: self.step(name) for name in SYSTEMS}
        times = time_turns(calls | {"encoding": self._encode}, repeats)
        row: dict[str, Any] = {"batch": self.batch, "cache_bytes": self.cache.num_bytes()}
        row |= {f"{name}_ms": statistics.median(times[name]) for name in times}
        row["pairs"] = repeats
        row |= _ratios(times["cached"], times["encoded"], "")
        row |= _ratios(times["cached"], times["joint"], "joint_")
        row["generations"] = [_generation(times, number) for number in steps]
        ours, theirs = (self.step(name).token_ids for name in ("cached", "encoded"))
        row["equal_tokens"] = float((ours == theirs).float().mean())
        return row


def _joint_twin(denoiser: TessDenoiser) -> TessDenoiser:
    """The same weights in the joint layout."""
    config = type(denoiser.config).from_dict(
        denoiser.config.to_dict() | {"source_encoding": "joint", "length_head": False}
    )
    with torch.device("meta"):
        twin = TessDenoiser(config)
    twin.load_state_dict(denoiser.state_dict(), assign=True, strict=False)
    if strays := [name for name, p in twin.named_parameters() if p.is_meta]:
        raise RuntimeError(f"the joint layout has parameters of its own: {', '.join(strays)}")
    return twin.eval()


def _ratios(ours: list[float], rival: list[float], prefix: str) -> dict[str, float]:
    figures = summarize_turns(ours, rival)
    return {f"{prefix}{name}": figures[name] for name in ("ratio", "ratio_q1", "ratio_q3")}


def _generation(times: dict[str, list[float]], steps: int) -> dict[str, float]:
    """A whole generation, from the parts of each turn."""
    ours = [
        once + steps * step for once, step in zip(times["encoding"], times["cached"], strict=True)
    ]
    whole = {name: [steps * step for step in times[name]] for name in ("encoded", "joint")}
    figures: dict[str, float] = {"steps": steps, "cached_ms": statistics.median(ours)}
    figures |= _ratios(ours, whole["encoded"], "")
    return figures | _ratios(ours, whole["joint"], "joint_")
