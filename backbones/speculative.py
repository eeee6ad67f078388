"""Self-speculative decoding: the multi-token predictor drafts, the backbone checks the whole draft.

One round for every row of the batch: the predictor reads the tokens that the last round added and
drafts K more; the backbone reads the last token and the drafts in one causal block; each row keeps
the drafts it agrees with and one token of its own, and the cache moves past exactly those.

Letters: B rows of the batch, A rows not finished, L = K + 1 positions of a block, N positions that
the predictor reads, H hidden, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria
from transformers.utils import ModelOutput

from tess.backbones.cache import HybridCache
from tess.kernels.speculative import accept_drafts, draw_tokens, match_drafts

ROUNDS_BETWEEN_COMPACTIONS = 16
"""Rows that keep fewer drafts than others leave padding in the caches; so often it is dropped."""


@dataclass
class MtpGenerateOutput(ModelOutput):
    """What `generate(use_mtp=True, return_dict_in_generate=True)` returns.

    sequences: [B, S] prompt and new tokens, padded on the right.
    num_forwards: [B] evaluations of the backbone for this row, the one of the prompt included.
    num_drafted, num_accepted: [B] tokens drafted, and those of them that are in the text.
    """

    sequences: Tensor | None = None
    num_forwards: Tensor | None = None
    num_drafted: Tensor | None = None
    num_accepted: Tensor | None = None


class _Texts:
    """The tokens of all rows: appending, stopping, and what processors and criteria are shown."""

    def __init__(
        self, input_ids: Tensor, criteria: StoppingCriteriaList, pad: int, streamer: Any
    ) -> None:
        self.rows = input_ids.tolist()
        self.width, self.device = input_ids.shape[1], input_ids.device
        self.pad, self.streamer = pad, streamer
        # the two that nearly every call has are checked token by token without building tensors
        self.ends: set[int] = set()
        self.max_length: int | None = None
        self.others = StoppingCriteriaList()
        for criterion in criteria:
            if type(criterion) is EosTokenCriteria:
                self.ends |= set(criterion.eos_token_id.tolist())
            elif type(criterion) is MaxLengthCriteria:
                self.max_length = min(self.max_length or criterion.max_length, criterion.max_length)
            else:
                self.others.append(criterion)

    def append(self, row: int, tokens: list[int]) -> tuple[int, bool]:
        """Append until a stop: how many tokens were taken, and whether the row is finished."""
        for count, token in enumerate(tokens, start=1):
            self.rows[row].append(token)
            if self.streamer is not None:
                self.streamer.put(torch.tensor([token]))
            length = len(self.rows[row])
            done = token in self.ends or length == self.max_length
            if not done and self.others:
                done = bool(self.others(self.matrix(length), None)[row])
            if done:
                return count, True
        return len(tokens), False

    def matrix(self, length: int, rows: list[list[int]] | None = None) -> Tensor:
        """All rows [B, length], cut or padded on the right: the shape that plain decoding has."""
        rows = self.rows if rows is None else rows
        padded = [row[:length] + [self.pad] * (length - len(row)) for row in rows]
        return torch.tensor(padded, device=self.device)


def decode_with_mtp(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    *,
    num_draft_tokens: int,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    do_sample: bool,
    pad_token_id: int,
    streamer: Any = None,
) -> MtpGenerateOutput:
    """Write with drafts; greedily the tokens are those of plain decoding, sampled their law is.

    Args:
        model: a `HybridForCausalLM` with a multi-token predictor.
        input_ids: [B, S], left-padded.
        attention_mask: [B, S], 1 at tokens; None: no padding.
        num_draft_tokens: K, at least 1.
        logits_processor: functions of (input_ids, scores) alone, row by row; each row sees what
            plain decoding shows it, drafts included, beside other rows that may be cut or padded.
        stopping_criteria: asked after every token.
        do_sample: speculative rejection sampling in place of the greedy choice.
        pad_token_id: fills finished rows (transformers goes on writing them where no end token is
            set and another criterion stopped them).
        streamer: gets every token once it is certain.

    With bfloat16 weights two tokens with nearly the same logit may change places, because products
    of one and of several positions are rounded differently.
    """
    texts = _Texts(input_ids, stopping_criteria, pad_token_id, streamer)
    rounds = _Rounds(model, texts, logits_processor, num_draft_tokens, do_sample)
    rounds.start(input_ids, attention_mask)
    while rounds.active:
        rounds.advance()
    if streamer is not None:
        streamer.end()
    return MtpGenerateOutput(
        sequences=texts.matrix(max(map(len, texts.rows))),
        num_forwards=torch.tensor(rounds.num_forwards),
        num_drafted=torch.tensor(rounds.num_drafted),
        num_accepted=torch.tensor(rounds.num_accepted),
    )


class _Rounds:
    """The state between two rounds: both caches, and what the predictor has not read yet."""

    def __init__(
        self,
        model: Any,
        texts: _Texts,
        processors: LogitsProcessorList,
        num_draft_tokens: int,
        do_sample: bool,
    ) -> None:
        self.model, self.texts, self.processors = model, texts, processors
        self.num_draft_tokens, self.do_sample = num_draft_tokens, do_sample
        self.cache, self.mtp_cache = HybridCache(), HybridCache()
        batch = len(texts.rows)
        self.active = list(range(batch))
        self.num_forwards, self.num_drafted, self.num_accepted = ([0] * batch for _ in range(3))
        self.finished_rounds = 0

    def start(self, input_ids: Tensor, attention_mask: Tensor | None) -> None:
        """Read the prompt and write the first token."""
        out = self.model.backbone(
            input_ids, attention_mask=attention_mask, cache=self.cache
        )
        logits_AV = self._logits(out.last_hidden_state[:, -1])
        token_A, _ = self._choose(logits_AV, self.texts.rows)
        self.unread_ids = torch.cat([input_ids[:, 1:], token_A[:, None]], dim=1)
        self.unread_states = self.model.mtp_input(out)
        self.unread_mask = attention_mask
        self._append([[token] for token in token_A.tolist()])

    def advance(self) -> None:
        """One round: draft, check, keep."""
        drafts_AK, draft_probs = self._draft()
        last_A1 = self.unread_ids[:, -1:]
        block_AL = torch.cat([last_A1, drafts_AK], dim=1)
        out = self.model.backbone(block_AL, cache=self.cache, mode="verify")
        counts_A, next_A = self._check(drafts_AK, draft_probs, out.last_hidden_state)
        self.cache.advance(out.record, counts_A + 1)

        counts, following = counts_A.tolist(), next_A.tolist()
        self._set_unread(block_AL, next_A, self.model.mtp_input(out), counts_A, max(counts) + 1)
        for row in self.active:
            self.num_drafted[row] += self.num_draft_tokens
        self._append(
            [kept[:count] + [token] for kept, count, token in zip(
                drafts_AK.tolist(), counts, following, strict=True
            )]
        )
        self.finished_rounds += 1
        if self.active and self.finished_rounds % ROUNDS_BETWEEN_COMPACTIONS == 0:
            self.cache.compact()
            self.mtp_cache.compact()

    def _draft(self) -> tuple[Tensor, Tensor | None]:
        """K tokens per row [A, K], and with sampling the distributions they came from [A, K, V]."""
        embed, mtp = self.model.backbone.embeddings, self.model.mtp
        state = mtp(
            embed(self.unread_ids), self.unread_states, self.unread_mask, self.mtp_cache
        )[:, -1:]
        # what follows rests on drafts, so it goes into a copy
        scratch = self.mtp_cache.snapshot()
        rows = [list(self.texts.rows[row]) for row in self.active] if self.processors else []
        drafts, probs = [], []
        for index in range(self.num_draft_tokens):
            if index:
                state = mtp(embed(drafts[-1][:, None]), state, None, scratch)
            token_A, probs_AV = self._choose(self._logits(state[:, 0]), self._among_all(rows))
            drafts.append(token_A)
            probs.append(probs_AV)
            for row, token in zip(rows, token_A.tolist()):
                row.append(token)
        return torch.stack(drafts, dim=1), torch.stack(probs, dim=1) if self.do_sample else None

    def _check(
        self, drafts_AK: Tensor, draft_probs: Tensor | None, hidden_ALH: Tensor
    ) -> tuple[Tensor, Tensor]:
        scores_ALV = self._logits(hidden_ALH)
        if self.processors:
            before = [self.texts.rows[row] for row in self.active]
            scores = []
            for i, logits_AV in enumerate(scores_ALV.unbind(1)):
                rows = [row + kept[:i] for row, kept in zip(before, drafts_AK.tolist())]
                scores.append(self._process(logits_AV, self._among_all(rows)))
            scores_ALV = torch.stack(scores, dim=1)
        if not self.do_sample:
            return match_drafts(drafts_AK, scores_ALV.argmax(dim=-1))
        accept_AK = torch.rand(drafts_AK.shape, device=drafts_AK.device)
        choose_A = torch.rand(len(drafts_AK), device=drafts_AK.device)
        return accept_drafts(
            drafts_AK, draft_probs, scores_ALV.softmax(dim=-1), accept_AK, choose_A
        )

    def _set_unread(
        self, block_AL: Tensor, next_A: Tensor, states_ALH: Tensor, counts_A: Tensor, width: int
    ) -> None:
        """What the predictor reads next: each new token beside the state before it, left-padded."""
        end_A1 = counts_A[:, None] + 1
        place_AN = torch.arange(width, device=end_A1.device) + end_A1 - width
        real_AN = place_AN >= 0
        place_AN = place_AN.clamp(min=0)
        following_AL = torch.cat([block_AL[:, 1:], next_A[:, None]], dim=1)
        following_AL = following_AL.scatter(1, counts_A[:, None], next_A[:, None])
        self.unread_ids = following_AL.gather(1, place_AN)
        self.unread_states = states_ALH.gather(
            1, place_AN[..., None].expand(-1, -1, states_ALH.shape[-1])
        )
        self.unread_mask = real_AN

    def _append(self, tokens: list[list[int]]) -> None:
        """Add each active row's tokens, the last of which is no draft; let finished rows go."""
        staying = []
        for index, (row, added) in enumerate(zip(self.active, tokens, strict=True)):
            taken, done = self.texts.append(row, added)
            self.num_forwards[row] += 1
            self.num_accepted[row] += min(taken, len(added) - 1)
            if not done:
                staying.append(index)
        if len(staying) == len(self.active):
            return
        self.active = [self.active[index] for index in staying]
        rows = torch.tensor(staying, dtype=torch.long, device=self.unread_ids.device)
        self.cache, self.mtp_cache = self.cache.select(rows), self.mtp_cache.select(rows)
        self.unread_ids, self.unread_states = self.unread_ids[rows], self.unread_states[rows]
        if self.unread_mask is not None:
            self.unread_mask = self.unread_mask[rows]

    def _logits(self, hidden: Tensor) -> Tensor:
        return self.model.lm_head(hidden).float()

    def _choose(self, logits_AV: Tensor, rows: list[list[int]]) -> tuple[Tensor, Tensor | None]:
        """The next token [A], and with sampling the distribution it was drawn from [A, V]."""
        scores_AV = self._process(logits_AV, rows)
        if not self.do_sample:
            return scores_AV.argmax(dim=-1), None
        probs_AV = scores_AV.softmax(dim=-1)
        uniform_A = torch.rand(len(probs_AV), device=probs_AV.device)
        return draw_tokens(probs_AV, uniform_A), probs_AV

    def _process(self, logits_AV: Tensor, rows: list[list[int]]) -> Tensor:
        """Apply the logits processors; `rows` are all rows' tokens before the position.

        Plain decoding shows a processor all rows at one length. Here lengths differ, so it is
        called once per length, with all rows in their places, and only rows of that length count.
        """
        if not self.processors:
            return logits_AV
        scores_AV = logits_AV.clone()
        where = {row: index for index, row in enumerate(self.active)}
        full_BV = logits_AV.new_zeros(len(rows), logits_AV.shape[-1])
        full_BV[self.active] = logits_AV
        for length in sorted({len(rows[row]) for row in self.active}):
            seen = self.texts.matrix(length, rows)
            processed_BV = self.processors(seen, full_BV.clone())
            for row, index in where.items():
                if len(rows[row]) == length:
                    scores_AV[index] = processed_BV[row]
        return scores_AV

    def _among_all(self, rows: list[list[int]]) -> list[list[int]]:
        """The active rows' tokens in the places they have among all rows."""
        if not rows:
            return []
        everything = list(self.texts.rows)
        for row, tokens in zip(self.active, rows, strict=True):
            everything[row] = tokens
        return everything
