"""How much work each part of a comparison is, by a rough count of rows through the network."""

from collections.abc import Sequence

from tess.comparison.arms import Arm
from tess.comparison.recipe import Recipe, System

UPDATE, SINGLE, AR_ROW, MEMORY = 4.0, 4.0, 16.0, 3000.0
"""A row of an update; a text alone; all tokens of one; a process that measures memory."""


def row_work(system: System) -> float:
    """One text in a batch."""
    beams = system.num_beams or 1
    steps = (system.num_inference_steps or 16) * system.options.get("num_candidates", 1)
    return float(steps) if system.decoder == "tess" else AR_ROW * beams


def timing_work(recipe: Recipe, system: System, rows: int) -> float:
    """Latency, throughput and memory of one system."""
    count = min(recipe.timing_rows, rows)
    texts = sum(size * -(-count // size) for size in recipe.batch_sizes if size > 1)
    work = recipe.timing_repeats * (SINGLE * count + texts) * row_work(system)
    return work + (MEMORY if recipe.memory else 0.0)


def update_work(arm: Arm) -> float:
    """One update of a training."""
    args = arm.parsed.training
    return UPDATE * args.per_device_train_batch_size * args.gradient_accumulation_steps


def arm_work(arm: Arm) -> float:
    """A whole training; one by epochs is taken for 1,000 updates until it is done."""
    steps = arm.parsed.training.max_steps
    return update_work(arm) * (steps if steps > 0 else 1000)


def text_work(arm: Arm) -> float:
    """What a distilled arm's teacher writes."""
    return AR_ROW * (arm.distilled_rows or 0) * arm.distilled_num_beams


def total_work(
    recipe: Recipe, systems: Sequence[System], arms: Sequence[Arm], rows: int, only: str | None
) -> float:
    """The whole plan."""
    total = 0.0
    if only in (None, "train"):
        total += sum(arm_work(arm) + text_work(arm) for arm in arms)
    if only != "train":
        total += rows * len(recipe.seeds) * sum(row_work(system) for system in systems)
        total += sum(timing_work(recipe, system, rows) for system in recipe.systems)
    return max(total, 1.0)
