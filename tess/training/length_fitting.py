"""Fit a length head behind frozen weights, and measure it beside what needs no network.

The sources are encoded once; the head then learns from the cached states in seconds.
"""

# R rows, H hidden, N lengths

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tess.data.token_rows import length_rule
from tess.denoiser import TessDenoiser
from tess.errors import UserError
from tess.length import LengthHead, length_loss, median_lengths, quantile_lengths
from tess.storage.files import replaced_folder
from tess.storage.parts import Parts, load_parts
from tess.text.padding import pad_left
from tess.text.tokenization import encode_texts, source_layout

ENCODED_AT_ONCE = 64
WARMUP_UPDATES = 30
GUESSES = {
    "head": "length head, median",
    "mean": "mean length of the training targets",
    "ratio": "ratio times source length",
    "linear": "least-squares line in source length",
}
"""The point predictions that `length_report` compares."""


@dataclass(frozen=True, eq=False)
class LengthRows:
    """What the head reads and predicts: states [R, H], lengths [R] in tokens, special ones
    included, both cut to the model's limits as in generation."""

    states: Tensor
    source_lengths: Tensor
    target_lengths: Tensor

    def __len__(self) -> int:
        return len(self.states)

    def select(self, rows: Tensor) -> "LengthRows":
        """The rows (int64), in that order."""
        return LengthRows(*(value[rows] for value in vars(self).values()))


@torch.no_grad()
def encode_rows(
    denoiser: TessDenoiser,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[tuple[str, str]],
) -> LengthRows:
    """Read the source of every (source, target) pair once.

    Raises:
        UserError: where the source has no encoding of its own.
    """
    config = denoiser.config
    if config.source_encoding == "joint":
        raise UserError(
            "a length head needs source_encoding 'causal' or 'bidirectional', the checkpoint has "
            "'joint'"
        )
    sources = [
        source_layout(tokenizer, ids, config.max_source_length)
        for ids in encode_texts(tokenizer, [source for source, _ in texts])
    ]
    targets = [
        min(len(ids) + 1, config.max_target_length)
        for ids in encode_texts(tokenizer, [target for _, target in texts])
    ]
    states_RH = torch.zeros(len(texts), config.hidden_size)
    order = sorted(range(len(texts)), key=lambda row: len(sources[row]))
    for start in range(0, len(order), ENCODED_AT_ONCE):
        rows = order[start : start + ENCODED_AT_ONCE]
        batch = pad_left([sources[row] for row in rows], tokenizer.pad_token_id, denoiser.device)
        reading = denoiser.read_source(**batch)
        states_RH[rows] = reading.last_state.float().cpu()
    lengths = torch.tensor([len(source) for source in sources])
    return LengthRows(states_RH, lengths, torch.tensor(targets))


def split_rows(rows: LengthRows, share: float, seed: int) -> tuple[LengthRows, LengthRows]:
    """(training rows, held-out rows): a random `share` is held out, at least one row.

    Raises:
        UserError: with fewer than two rows.
    """
    if len(rows) < 2:
        raise UserError(f"fitting a length head needs at least 2 rows, got {len(rows)}")
    order_R = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    held_out = min(max(1, round(share * len(rows))), len(rows) - 1)
    return rows.select(order_R[held_out:]), rows.select(order_R[:held_out])


def fit_length_head(
    rows: LengthRows,
    max_length: int,
    *,
    updates: int = 800,
    batch_size: int = 256,
    learning_rate: float = 1e-3,
    dropout: float = 0.3,
    seed: int = 0,
) -> LengthHead:
    """A new head for target lengths 1 .. `max_length`, trained on these rows (AdamW, linear decay).

    dropout: of the states' entries: an encoder that was trained on the same rows knows them better
        than it will know others.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = LengthHead(rows.states.shape[1], max_length)
        optimizer = torch.optim.AdamW(head.parameters(), learning_rate, betas=(0.9, 0.98))
        for update in range(updates):
            for group in optimizer.param_groups:
                warm = min(1.0, (update + 1) / WARMUP_UPDATES)
                group["lr"] = learning_rate * warm * (1 - update / updates)
            batch = rows.select(torch.randint(len(rows), (batch_size,), generator=generator))
            log_probs_BN = head(F.dropout(batch.states, dropout), batch.source_lengths)
            loss = length_loss(log_probs_BN, batch.target_lengths)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return head.eval()


@torch.no_grad()
def length_report(
    head: LengthHead, fitted_on: LengthRows, rows: LengthRows, quantile: float, margin: int
) -> dict[str, Any]:
    """Mean absolute errors in tokens of `GUESSES`, and what canvases the quantile gives.

    fitted_on: the rows from which the guesses without a network are taken.
    coverage: share of the targets below N, which were not cut, that fit into `quantile` + `margin`.
    canvas: the mean of that, at most N.
    loss: the head's cross-entropy in nats.
    """
    source_R, target_R = rows.source_lengths.double(), rows.target_lengths.double()
    log_probs_RN = head(rows.states, rows.source_lengths)
    slope, offset = _line(fitted_on)
    ratio, _ = length_rule(
        fitted_on.source_lengths.tolist(), fitted_on.target_lengths.tolist(), 0.5
    )
    guesses = {
        "head": median_lengths(log_probs_RN).double(),
        "mean": fitted_on.target_lengths.double().mean().expand(len(rows)),
        "ratio": (ratio * source_R).ceil(),
        "linear": slope * source_R + offset,
    }
    whole_R = rows.target_lengths < head.max_length
    canvas_R = (quantile_lengths(log_probs_RN, quantile) + margin).clamp(max=head.max_length)
    errors = {
        name: float((guess_R.round().clamp(1, head.max_length) - target_R).abs().mean())
        for name, guess_R in guesses.items()
    }
    return {
        "rows": len(rows),
        "mean_absolute_error": errors,
        "loss": float(length_loss(log_probs_RN, rows.target_lengths)),
        "coverage": float((canvas_R >= target_R)[whole_R].double().mean()),
        "canvas": float(canvas_R.double().mean()),
        "target": float(target_R.mean()),
    }


def _line(rows: LengthRows) -> tuple[float, float]:
    source_R = rows.source_lengths.double()
    design = torch.stack([source_R, torch.ones_like(source_R)], dim=1)
    solution = torch.linalg.lstsq(design, rows.target_lengths.double()[:, None], driver="gelsd")
    slope, offset = solution.solution.flatten().tolist()
    return slope, offset


def load_denoiser(checkpoint: Path, dtype: torch.dtype | None = torch.float32) -> Parts:
    """`load_parts` of a checkpoint that must be a diffusion one; `dtype` None keeps its own type.

    Raises:
        UserError: also for an `ar` checkpoint.
    """
    parts = load_parts(checkpoint, dtype=dtype)
    if parts.scheduler is None:
        raise UserError(
            f"a length head belongs to a tess checkpoint, and {checkpoint} is an ar one"
        )
    return parts


def as_saved(head: LengthHead, checkpoint: Path) -> LengthHead:
    """The head with its weights rounded to the type in which the checkpoint's are saved."""
    dtype = load_denoiser(checkpoint, dtype=None).model.dtype
    return head.to(dtype).float()


def save_length_head(
    checkpoint: Path, output_dir: Path, head: LengthHead, quantile: float, margin: int
) -> None:
    """Write the checkpoint with the head; all its other weights and files stay as they are.

    `output_dir` may be the checkpoint itself.
    """
    model = load_denoiser(checkpoint, dtype=None).model
    config = model.config
    config.length_head = True
    config.target_length_quantile = quantile
    config.target_length_margin = margin
    model.length_head = head.to(model.dtype)
    in_place = output_dir.resolve() == checkpoint.resolve()
    with replaced_folder(output_dir, keeps_all=in_place) as folder:
        ignored = shutil.ignore_patterns("model*.safetensors*")
        shutil.copytree(checkpoint, folder, dirs_exist_ok=True, ignore=ignored)
        model.save_pretrained(folder / "denoiser")
