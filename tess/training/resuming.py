"""What an output folder holds of an earlier run, and where that stopped.

It is counted in rows, so that a run goes on with other batches or processes too.
"""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from transformers.trainer_utils import get_last_checkpoint

from tess.errors import UserError
from tess.training.settings import Settings

SETTINGS_FILE = "settings.json"
PLACE_FILE = "place.json"
TRAINER_STATE_FILE = "trainer_state.json"


@dataclass(frozen=True)
class Place:
    """Where a checkpoint stopped.

    updates: of the optimizer.
    epoch: in epochs; a part of one is counted in the batches that all processes read at a time.
    batch: rows of such a batch.
    order_batch: rows of those by which that epoch was put in order.
    """

    updates: int = 0
    epoch: float = 0.0
    batch: int = 1
    order_batch: int = 1

    def save(self, folder: Path) -> None:
        """Write it into a checkpoint."""
        (folder / PLACE_FILE).write_text(json.dumps(asdict(self)) + "\n")

    def rows(self, num_rows: int) -> int:
        """Rows that were read of the epoch, of `num_rows`."""
        batches = -(-num_rows // self.batch)
        return round((self.epoch - int(self.epoch)) * batches) * self.batch


@dataclass(frozen=True)
class Earlier:
    """What an output folder holds of this run.

    checkpoint: the last one; None for a new run.
    finished: whether the run ended with it.
    result: the checkpoint to ship then, it or the best one.
    """

    checkpoint: Path | None = None
    finished: bool = False
    result: Path | None = None
    place: Place = Place()


def begin(settings: Settings) -> Earlier:
    """Look for an earlier part of the run in `output_dir`, and keep the settings there.

    Raises:
        UserError: it has checkpoints of another model or process, or cannot be written to.
    """
    args = settings.training
    folder = Path(args.output_dir)
    last = get_last_checkpoint(args.output_dir) if folder.is_dir() else None
    if last is not None:
        _check_same_run(settings, folder / SETTINGS_FILE)
    if args.process_index == 0:
        _record(settings, folder / SETTINGS_FILE)
    if last is None:
        return Earlier()
    checkpoint, state = Path(last), read_state(Path(last))
    if args.max_steps > 0:
        finished = state["global_step"] >= args.max_steps
    else:
        finished = (state["epoch"] or 0) >= args.num_train_epochs
    best = args.load_best_model_at_end and state.get("best_model_checkpoint")
    result = checkpoint.with_name(Path(best).name) if best else checkpoint
    return Earlier(checkpoint, finished, result, _place(checkpoint, state))


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What transformers' trainer wrote of its state."""
    return json.loads((checkpoint / TRAINER_STATE_FILE).read_text())


def _place(checkpoint: Path, state: dict[str, Any]) -> Place:
    path = checkpoint / PLACE_FILE
    if path.is_file():
        return Place(**json.loads(path.read_text()))
    # of before there was a record: each epoch was in the order of its batches
    batch = state["train_batch_size"] * len(list(checkpoint.glob("rng_state*.pth")))
    return Place(state["global_step"], state["epoch"], batch, batch)


def _check_same_run(settings: Settings, path: Path) -> None:
    if not path.is_file():
        return
    before, now = json.loads(path.read_text()), _recorded(settings)
    for group in ("model", "diffusion", "causal"):
        # a setting that the older run did not know had what is its default now
        known = {f.name: f.default for f in fields(getattr(settings, group))}
        known |= before.get(group, {})
        changed = [key for key in now[group] if known[key] != now[group][key]]
        if changed:
            raise UserError(
                f"{path.parent} holds checkpoints of another run ({changed[0]} was "
                f"{known[changed[0]]!r} and is {now[group][changed[0]]!r}); "
                "choose another --output_dir"
            )


def _record(settings: Settings, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(_recorded(settings), indent=2) + "\n")
    except OSError as error:
        raise UserError(f"cannot write to --output_dir {path.parent}: {error.strerror}") from error


def _recorded(settings: Settings) -> dict[str, Any]:
    groups = ("model", "diffusion", "causal", "data", "run")
    return {name: asdict(getattr(settings, name)) for name in groups}
