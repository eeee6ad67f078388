"""Which of several texts for one source to give back.

Three judges: how much the candidates agree with each other (minimum Bayes risk), how sure the
denoiser was of its last prediction, and what a causal model thinks of the text.
"""

# C targets, D distinct sources, L target positions, H hidden

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from sacrebleu.metrics import BLEU, CHRF
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tess.backbones.cache import HybridCache
from tess.backbones.causal_lm import HybridForCausalLM
from tess.errors import UserError
from tess.kernels.cross_entropy import linear_cross_entropy
from tess.sampling.options import CHOICES
from tess.text.padding import pad_left, right_mask
from tess.text.tokenization import decode, padding_ids

UTILITIES = {"bleu": BLEU(effective_order=True), "chrf": CHRF()}
"""Of minimum Bayes risk: sacrebleu's for sentences (13a, exponential smoothing; chrF2)."""


class TargetLogProbs(NamedTuple):
    """Log-probabilities of C targets, in nats, float32 or wider, on the CPU.

    mean: [C], per token. total: [C].
    """

    mean: Tensor
    total: Tensor


def choose(
    choose_by: str,
    texts: Sequence[Sequence[str]],
    *,
    log_probs: Tensor | None = None,
    sources: Sequence[Sequence[int]] | None = None,
    targets: Sequence[Sequence[Sequence[int]]] | None = None,
    scorer: HybridForCausalLM | None = None,
    batch_size: int = 32,
) -> list[int]:
    """For each of B sources the place of the best of its candidates, the first among equals.

    Args:
        choose_by: "confidence": the highest of `log_probs`; "mbr_bleu", "mbr_chrf":
            `choose_by_mbr`; "ar": the highest mean of `ar_log_probs` under `scorer`.
        texts: the candidates, B lists.
        log_probs: [B, N], the denoiser's mean log-probability of each candidate's tokens.
        sources: B rows of ids, `<s>` and `</s>` included.
        targets: ids of the candidates, `</s>` included where there is one, without padding.
        scorer: a causal model of the same tokenizer, in eval mode.
        batch_size: targets that the scorer reads at once.

    Raises:
        UserError: an unknown `choose_by`, or what it needs is missing.
    """
    if choose_by not in CHOICES:
        raise UserError(f"choose_by must be one of {', '.join(CHOICES)}, got {choose_by!r}")
    if choose_by.startswith("mbr_"):
        return [choose_by_mbr(row, choose_by.removeprefix("mbr_")) for row in texts]
    if choose_by == "confidence":
        if log_probs is None:
            raise UserError("choose_by 'confidence' needs log_probs, got none")
        return [choose_by_confidence(row) for row in log_probs.tolist()]
    if sources is None or targets is None or scorer is None:
        raise UserError("choose_by 'ar' needs sources, targets and scorer")
    counts = [len(row) for row in targets]
    flat_sources = [
        source for source, count in zip(sources, counts, strict=True) for _ in range(count)
    ]
    flat_targets = [target for row in targets for target in row]
    means_C = ar_log_probs(scorer, flat_sources, flat_targets, batch_size).mean
    return [choose_by_confidence(row.tolist()) for row in means_C.split(counts)]


def choose_by_mbr(texts: Sequence[str], utility: str = "bleu") -> int:
    """The candidate with the highest mean utility against the others as references.

    Minimum Bayes risk decoding with samples in place of all texts (arXiv 2108.04718), the
    candidate itself left out. An empty text is taken only where all are empty.

    Args:
        texts: at least one.
        utility: "bleu" or "chrf".

    Raises:
        UserError: no candidate, or an unknown utility.
    """
    if utility not in UTILITIES:
        raise UserError(f"utility must be one of {', '.join(UTILITIES)}, got {utility!r}")
    if not texts:
        raise UserError("expected at least one candidate, got none")
    score = UTILITIES[utility].sentence_score
    written = [place for place, text in enumerate(texts) if text.strip()]
    best = written[0] if written else 0
    if len(written) < 2:
        return best
    highest = -math.inf
    for place in written:
        # Empty references would give the same, zero, to all. fsum does not depend on the order, so
        # that neither does the choice.
        others = [other for other in written if other != place]
        total = math.fsum(score(texts[place], [texts[other]]).score for other in others)
        if total > highest:
            best, highest = place, total
    return best


def choose_by_confidence(log_probs: Sequence[float]) -> int:
    """The place of the highest mean log-probability, the first among equals.

    Raises:
        UserError: no candidate, or a log-probability that is not a number.
    """
    values = list(log_probs)
    if not values:
        raise UserError("expected at least one candidate, got none")
    if any(math.isnan(value) for value in values):
        raise UserError(f"log-probabilities of candidates must be numbers, got {values}")
    return values.index(max(values))


@torch.no_grad()
def ar_log_probs(
    model: HybridForCausalLM,
    sources: Sequence[Sequence[int]],
    targets: Sequence[Sequence[int]],
    batch_size: int = 32,
) -> TargetLogProbs:
    """log p(target | source) under a causal model, token by token as in
    `tess.training.losses.ar_loss`.

    Sources that are equal are read once per batch, and their targets go on from that cache. No
    logits are kept.

    Args:
        model: in eval mode.
        sources: C rows of ids, `<s>` and `</s>` included: one for each target.
        targets: C rows of ids, `</s>` included where it is part of the text.
        batch_size: targets at once.

    Raises:
        UserError: another number of sources than of targets, an empty row, an id outside the
            model's vocabulary, or a batch size under 1.
    """
    _check(model, sources, targets, batch_size)
    totals = [
        _batch_totals(
            model, sources[start : start + batch_size], targets[start : start + batch_size]
        )
        for start in range(0, len(targets), batch_size)
    ]
    total_C = torch.cat(totals).cpu() if totals else torch.zeros(0)
    return TargetLogProbs(total_C / torch.tensor([len(row) for row in targets]), total_C)


def _batch_totals(
    model: HybridForCausalLM,
    sources: Sequence[Sequence[int]],
    targets: Sequence[Sequence[int]],
) -> Tensor:
    distinct = {row: place for place, row in enumerate(dict.fromkeys(map(tuple, sources)))}
    device = model.device
    rows_C = torch.tensor([distinct[tuple(row)] for row in sources], device=device)
    source = pad_left(list(distinct), pad_token_id=0, device=device)
    cache = HybridCache()
    read_DSH = model.backbone(
        source["source_ids"], attention_mask=source["source_mask"], cache=cache
    ).last_hidden_state
    # A source's last state predicts the first token, and every token's state the next one.
    states_CLH = read_DSH[rows_C, -1:]
    counted_CL = right_mask([len(row) for row in targets]).bool().to(device)
    ids_CL = torch.zeros_like(counted_CL, dtype=torch.long)
    ids_CL[counted_CL] = torch.tensor([token for row in targets for token in row], device=device)
    if ids_CL.shape[1] > 1:
        # No mask is needed: padding at the right is read by nobody, and this cache is thrown away.
        written_CLH = model.backbone(
            ids_CL[:, :-1], cache=cache.select(rows_C)
        ).last_hidden_state
        states_CLH = torch.cat([states_CLH, written_CLH], dim=1)
    losses_T = linear_cross_entropy(
        states_CLH[counted_CL], model.lm_head.weight, ids_CL[counted_CL], reduction="none"
    )
    losses_CL = losses_T.new_zeros(ids_CL.shape).masked_scatter(counted_CL, losses_T)
    return -losses_CL.sum(dim=1)


def _check(
    model: HybridForCausalLM,
    sources: Sequence[Sequence[int]],
    targets: Sequence[Sequence[int]],
    batch_size: int,
) -> None:
    if batch_size < 1:
        raise UserError(f"batch_size must be at least 1, got {batch_size}")
    if len(sources) != len(targets):
        raise UserError(
            f"expected a source for every target, got {len(sources)} sources and {len(targets)} "
            "targets"
        )
    for name, rows in (("source", sources), ("target", targets)):
        for place, row in enumerate(rows):
            if not row:
                raise UserError(f"{name} {place} has no token")
            if min(row) < 0 or max(row) >= model.config.vocab_size:
                strange = min(row) if min(row) < 0 else max(row)
                raise UserError(
                    f"token id {strange} of {name} {place} is outside the causal model's "
                    f"vocabulary of {model.config.vocab_size}"
                )


# ---- the candidates of a batch ----


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
    padding = padding_ids(tokenizer)
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
