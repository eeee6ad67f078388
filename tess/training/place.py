"""Where a run stopped, counted in rows, so that it goes on with other batches or processes too."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

PLACE_FILE = "place.json"
TRAINER_STATE_FILE = "trainer_state.json"


@dataclass(frozen=True)
class Place:
    """What a checkpoint has seen.

    updates: of the optimizer.
    epoch: the one that it stopped in.
    rows: of that epoch, in all processes; those that complete its last batch included.
    order_batch: rows of the batches by which that epoch was put in order.
    """

    updates: int
    epoch: int
    rows: int
    order_batch: int

    def save(self, folder: Path) -> None:
        """Write it into a checkpoint."""
        (folder / PLACE_FILE).write_text(json.dumps(asdict(self)) + "\n")


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What transformers' trainer wrote of its state."""
    return json.loads((checkpoint / TRAINER_STATE_FILE).read_text())


def place_of(checkpoint: Path, num_rows: int) -> Place:
    """Where a checkpoint stopped; one without a record had no order of its own.

    num_rows: of the training data.
    """
    path = checkpoint / PLACE_FILE
    if path.is_file():
        return Place(**json.loads(path.read_text()))
    state = read_state(checkpoint)
    processes = len(list(checkpoint.glob("rng_state*.pth")))
    batch = state["train_batch_size"] * processes
    epoch, rows = rows_at(state["epoch"], num_rows, batch)
    return Place(state["global_step"], epoch, rows, batch)


def rows_at(epoch: float, num_rows: int, batch: int) -> tuple[int, int]:
    """(whole epochs, rows of the next one) of an epoch that Trainer counts in parts of batches."""
    batches = -(-num_rows // batch)
    return int(epoch), round((epoch - int(epoch)) * batches) * batch
