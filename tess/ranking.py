"""Several texts for one source, and the one that is given back."""

# B examples, N candidates of each, L positions

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tess.backbones.causal_lm import HybridForCausalLM
from tess.candidates import CHOICES, choose
from tess.errors import UserError
from tess.tokenization import decode


@dataclass(frozen=True, eq=False)
class Candidates:
    """All candidates of a batch, the first of each being what a single one would have been.

    sequences: [B, N, L] token ids, padded. texts: B lists of N. nfe: the same.
    log_probs: [B, N], mean log-probability of a text's tokens in its last prediction, in nats.
    chosen: B indices. choose_by: how.
    """

    sequences: Tensor
    texts: list[list[str]]
    nfe: list[list[int]]
    log_probs: Tensor
    chosen: list[int]
    choose_by: str

    def chosen_rows(self) -> Tensor:
        """[B] indices into the B N rows."""
        count = self.sequences.shape[1]
        return torch.tensor([row * count + place for row, place in enumerate(self.chosen)])


def check_choice(choose_by: str, count: int, scorer: HybridForCausalLM | None) -> None:
    """Raises UserError for an unknown way to choose, and for a causal model that is missing."""
    if choose_by not in CHOICES:
        raise UserError(f"choose_by must be one of {', '.join(CHOICES)}, got {choose_by!r}")
    if choose_by == "ar" and count > 1 and scorer is None:
        raise UserError("choose_by='ar' needs scorer, a causal model of the same tokenizer")


def choose_candidates(
    sequences: Tensor,
    inside: Tensor,
    log_probs: Tensor,
    nfe: list[int],
    sources: list[list[int]],
    count: int,
    *,
    choose_by: str,
    scorer: HybridForCausalLM | None,
    tokenizer: PreTrainedTokenizerBase,
) -> Candidates:
    """Group the B N rows by source and choose one of each.

    sequences, log_probs: [B N, L], tokens and their log-probabilities. inside: [B N, L] bool, where
    the texts are. nfe: B N. sources: B rows of ids.
    """
    batch = len(sequences) // count
    texts = [decode(tokenizer, row) for row in sequences.tolist()]
    mean_BN = (log_probs.double() * inside).sum(dim=1) / inside.sum(dim=1)
    mean_BN = mean_BN.view(batch, count)
    # padding may stand amid a text, which is read without it; a text of nothing else stays
    padding = {tokenizer.pad_token_id} - {tokenizer.eos_token_id}
    written = [row[kept].tolist() for row, kept in zip(sequences, inside, strict=True)]
    targets = [[token for token in row if token not in padding] or row for row in written]
    grouped = _grouped(texts, count)
    chosen = choose(
        choose_by,
        grouped,
        log_probs=mean_BN,
        sources=sources,
        targets=_grouped(targets, count),
        scorer=scorer,
    )
    return Candidates(
        sequences=sequences.view(batch, count, -1),
        texts=grouped,
        nfe=_grouped(nfe, count),
        log_probs=mean_BN.float(),
        chosen=chosen,
        choose_by=choose_by,
    )


def _grouped(rows: list, count: int) -> list[list]:
    return [rows[start : start + count] for start in range(0, len(rows), count)]
