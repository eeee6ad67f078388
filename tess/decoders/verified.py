"""Draft and verify: diffusion drafts a whole text, the autoregressive model checks it in one pass.

One round for every row of the batch: the causal model reads the last certain token and the draft of
what follows in one block; the longest prefix that it would have written itself stays, and one token
of its own; the cache moves past exactly those, and what is left is drafted again. The first draft
is read whole; of a later one twice as many tokens as stayed in the last, and two. The text is that
of the causal model alone, whatever the drafts are; drafts change the number of passes.

Letters: B rows of the batch, A rows not finished, K drafted tokens, L = K + 1 positions of a block,
S source positions, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from tess.backbones.cache import HybridCache
from tess.backbones.causal_lm import HybridForCausalLM
from tess.backbones.speculative import ROUNDS_BETWEEN_COMPACTIONS
from tess.costs.decoding import verified_flops
from tess.decoders.autoregressive import ArDecoder, longest_source
from tess.decoders.base import Decoder, Description, Generation, Sources
from tess.decoders.diffusion import TessDecoder
from tess.decoders.drafts import REDRAFTS, DiffusionDrafts
from tess.errors import UserError
from tess.kernels.speculative import match_drafts
from tess.sampling.options import SamplerOptions
from tess.sampling.request import Request
from tess.storage.parts import Parts
from tess.text.end_tokens import through_end

DRAFT_STEPS = 1
"""Of a draft. With more, fewer of its tokens stay: see docs/benchmarks/drafting-cpu.json."""


class Drafter(Protocol):
    """What proposes texts: wrong ones cost passes and change nothing."""

    def __call__(
        self, rows: list[int], prefixes: list[list[int]], budgets: list[int]
    ) -> list[list[int]]:
        """A draft for each of the rows (places in the batch), to follow its certain prefix.

        A prefix is never empty. Of a draft, tokens beyond its budget and those behind `</s>` are
        left out; it may be empty.
        """


@dataclass(frozen=True)
class Verified:
    """One text that was written from drafts.

    token_ids: up to and including the end token, or as many as were allowed.
    num_forwards: evaluations of the causal model, that of the source included.
    num_drafted, num_accepted: tokens drafted, and those of them that stayed.
    num_first_accepted: those of the first draft that stayed.
    """

    token_ids: list[int]
    num_forwards: int = 1
    num_drafted: int = 0
    num_accepted: int = 0
    num_first_accepted: int = 0


@torch.no_grad()
def decode_with_drafts(
    model: HybridForCausalLM,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    draft: Drafter,
    **model_kwargs: Any,
) -> list[Verified]:
    """Write as greedy search of `model` does.

    A `custom_generate` of transformers' `generate`: `model.generate(ids, draft=...,
    custom_generate=decode_with_drafts)`.

    Args:
        model: over the hybrid cache.
        input_ids: [B, S], left-padded.
        logits_processor: functions of (input_ids, scores), row by row.
        stopping_criteria: a longest length, end tokens and stop strings.
        draft: what proposes the texts.
        model_kwargs: "attention_mask" [B, S], None: no padding; and what `generate` passes besides.

    Returns the B texts without their sources.

    Raises:
        UserError: another stopping criterion.
    """
    rounds = _Rounds(model, input_ids, logits_processor, stopping_criteria, draft)
    rounds.start(model_kwargs.get("attention_mask"))
    while rounds.active:
        rounds.advance()
    return rounds.texts


class _Rounds:
    """The state between two rounds: the cache, and the texts as far as they are certain."""

    def __init__(
        self,
        model: HybridForCausalLM,
        input_ids: Tensor,
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        draft: Drafter,
    ) -> None:
        self.model, self.input_ids = model, input_ids
        self.processors, self.draft = processors, draft
        self.ends, self.limit, self.strings = _stops(criteria, input_ids.shape[1])
        self.cache = HybridCache()
        self.texts = [Verified([], 0) for _ in range(len(input_ids))]
        self.active = list(range(len(input_ids)))
        self.spans = [self.limit] * len(input_ids)
        self.finished_rounds = 0

    def start(self, attention_mask: Tensor | None) -> None:
        """Read the sources; that gives the first token."""
        out = self.model.backbone(
            self.input_ids, attention_mask=attention_mask, cache=self.cache
        )
        drafts = [[] for _ in self.active]
        targets_A1 = self._targets(out.last_hidden_state[:, -1:], drafts)
        self._append(drafts, [0] * len(drafts), targets_A1[:, 0].tolist())

    def advance(self) -> None:
        """One round: draft, verify, keep."""
        drafts = self._drafts()
        width = max(map(len, drafts))
        # -1 is no token: no choice of the model agrees with it
        drafts_AK = torch.tensor(
            [row + [-1] * (width - len(row)) for row in drafts],
            dtype=torch.long, device=self.input_ids.device,
        )
        last = [[self.texts[row].token_ids[-1]] for row in self.active]
        block_AL = torch.cat([drafts_AK.new_tensor(last), drafts_AK.clamp(min=0)], dim=1)
        out = self.model.backbone(block_AL, cache=self.cache, mode="verify")
        targets_AL = self._targets(out.last_hidden_state, drafts)
        counts_A, next_A = match_drafts(drafts_AK, targets_AL)
        self.cache.advance(out.record, counts_A + 1)
        self._append(drafts, counts_A.tolist(), next_A.tolist())
        self.finished_rounds += 1
        if self.active and self.finished_rounds % ROUNDS_BETWEEN_COMPACTIONS == 0:
            self.cache.compact()

    def _drafts(self) -> list[list[int]]:
        prefixes = [list(self.texts[row].token_ids) for row in self.active]
        budgets = [
            min(self.limit - len(prefix), self.spans[row])
            for row, prefix in zip(self.active, prefixes)
        ]
        drafts = self.draft(list(self.active), prefixes, budgets)
        rooms = zip(drafts, budgets, strict=True)
        return [through_end(row[:budget], self.ends) for row, budget in rooms]

    def _targets(self, hidden_ALH: Tensor, drafts: list[list[int]]) -> Tensor:
        """The model's own choice [A, L] at every position, given what stands before it."""
        scores_ALV = self.model.lm_head(hidden_ALH).float()
        if self.processors:
            scores_ALV = self._process(scores_ALV, drafts)
        return scores_ALV.argmax(dim=-1)

    def _process(self, scores_ALV: Tensor, drafts: list[list[int]]) -> Tensor:
        """Apply the processors: one call per length of text, with all rows of the batch in it.

        A processor may know the rows by their places, so those that are not asked about are there
        too, with arbitrary tokens.
        """
        out_ALV = scores_ALV.clone()
        rows = [self.texts[row].token_ids + own for row, own in zip(self.active, drafts)]
        starts = [len(self.texts[row].token_ids) for row in self.active]
        batch, size = len(self.texts), scores_ALV.shape[-1]
        for length in sorted({n for row, s in zip(rows, starts) for n in range(s, len(row) + 1)}):
            asked = [i for i, s in enumerate(starts) if s <= length <= len(rows[i])]
            places = [self.active[i] for i in asked]
            offsets = [length - starts[i] for i in asked]
            seen_BN = self.input_ids.new_zeros(batch, length)
            seen_BN[places] = self.input_ids.new_tensor([rows[i][:length] for i in asked])
            scores_BV = scores_ALV.new_zeros(batch, size)
            scores_BV[places] = scores_ALV[asked, offsets]
            done_BV = self.processors(torch.cat([self.input_ids, seen_BN], dim=1), scores_BV)
            out_ALV[asked, offsets] = done_BV[places]
        return out_ALV

    def _until_string(
        self, row: int, before: list[int], added: list[int]
    ) -> tuple[list[int], bool]:
        """The added tokens through the first with which a stop string is complete."""
        for count in range(1, len(added) + 1) if self.strings else ():
            own = self.input_ids.new_tensor(before + added[:count])
            read = torch.cat([self.input_ids[row], own])[None]
            if bool(self.strings(read, None)[0]):
                return added[:count], True
        return added, False

    def _append(self, drafts: list[list[int]], counts: list[int], following: list[int]) -> None:
        """Keep each row's agreeing drafts and the model's own token; let finished rows go."""
        staying = []
        for index, (row, drafted, count) in enumerate(zip(self.active, drafts, counts)):
            text = self.texts[row]
            added = through_end(drafted[:count] + [following[index]], self.ends)
            added, done = self._until_string(row, text.token_ids, added)
            count = min(count, len(added))
            written = (text.token_ids + added)[: self.limit]
            self.texts[row] = Verified(
                written,
                text.num_forwards + 1,
                text.num_drafted + len(drafted),
                text.num_accepted + count,
                count if text.num_forwards == 1 else text.num_first_accepted,
            )
            # Reading far beyond the likely end of agreement costs more than a round now and then.
            self.spans[row] = 2 * count + 2 if drafted else self.limit
            if not done and written[-1] not in self.ends and len(written) < self.limit:
                staying.append(index)
        if len(staying) == len(self.active):
            return
        self.active = [self.active[index] for index in staying]
        self.cache = self.cache.select(torch.tensor(staying, dtype=torch.long))


def _stops(
    criteria: StoppingCriteriaList, width: int
) -> tuple[set[int], int, StoppingCriteriaList]:
    """The end tokens, the most new tokens, and the strings that end a text."""
    ends: set[int] = set()
    lengths, strings = [], StoppingCriteriaList()
    for criterion in criteria:
        if type(criterion) is EosTokenCriteria:
            ends |= set(criterion.eos_token_id.tolist())
        elif type(criterion) is MaxLengthCriteria:
            lengths.append(criterion.max_length - width)
        elif type(criterion) is StopStringCriteria:
            strings.append(criterion)
        else:
            raise UserError(
                "tess+ar stops at end tokens, at strings and at a length, got "
                f"{type(criterion).__name__}"
            )
    if not lengths:
        raise UserError("tess+ar needs a longest length, got none")
    return ends, min(lengths), strings


class _Verifier(ArDecoder):
    """`ar` over one batch, with drafts."""

    draft: Drafter

    def _write(self, width: int, **options: Any) -> list[Generation]:
        written = self.model.generate(
            custom_generate=decode_with_drafts, draft=self.draft, **options
        )
        return [
            self._generation(
                text.token_ids,
                text.num_forwards,
                num_drafted=text.num_drafted,
                num_accepted=text.num_accepted,
                num_first_accepted=text.num_first_accepted,
                num_verifications=text.num_forwards - 1,
            )
            for text in written
        ]


class DraftVerifyDecoder(Decoder):
    """The texts of `ar`, sampled ones too, drafted by `tess` and verified by `ar`.

    Args:
        tess_parts, ar_parts: two models of one vocabulary.
        num_inference_steps: of a draft, where a call names none.
        redraft: see `DiffusionDrafts`.
        options: of the diffusion sampler.
        chat: see `ArDecoder`.

    `Generation.nfe` counts the diffusion evaluations over the target and the causal model's, of
    which there are `num_verifications` and that of the source. `gen_length` is the longest text, as
    for `ar`; a draft has the canvas that `tess` gives it. `top_p` and `temperature` are those of
    the text; drafts are the likeliest tokens.

    Raises:
        UserError: vocabularies that differ, or an unknown redraft.
    """

    name = "tess+ar"

    def __init__(
        self,
        tess_parts: Parts,
        ar_parts: Parts,
        *,
        num_inference_steps: int = DRAFT_STEPS,
        redraft: str = REDRAFTS[0],
        options: SamplerOptions | None = None,
        chat: bool = False,
    ) -> None:
        super().__init__(ar_parts)
        _check_vocabularies(tess_parts.tokenizer, ar_parts.tokenizer)
        if redraft not in REDRAFTS:
            raise UserError(f"redraft must be one of {', '.join(REDRAFTS)}, got {redraft!r}")
        options = SamplerOptions() if options is None else options
        of_texts = {"forbid", "no_repeat_ngram", "block_length"}
        if useless := sorted(of_texts & set(options.changed())):
            raise UserError(
                f"{', '.join(useless)} would change the drafts alone, and the texts of {self.name} "
                "are those of ar; leave it out"
            )
        self.writer = TessDecoder(tess_parts, options)
        self.verifier = _Verifier(ar_parts, chat=chat)
        self.redraft = redraft
        most = tess_parts.scheduler.config.num_train_timesteps
        self.default_num_inference_steps = min(num_inference_steps, most)
        self.num_parameters += self.writer.num_parameters

    @property
    def max_source_length(self) -> int | None:
        return longest_source(self.tokenizer)

    def encode(self, texts: Sequence[str], strict: bool = False, warn: bool = True) -> Sources:
        """As the causal model reads them."""
        return self.verifier.encode(texts, strict, warn)

    def describe(self) -> Description:
        drafts = self.writer.describe()
        names = ("scheduler", "timestep_spacing", "stopping", "sampler")
        return replace(self.verifier.describe(), **{name: getattr(drafts, name) for name in names})

    def _flops(self, source_length: int, text: Generation) -> float:
        drafts = text.nfe - text.num_verifications - 1
        drafting = self.writer.flops(source_length, text.canvas_length, drafts)
        return drafting + verified_flops(
            self.model.config,
            source_length,
            text.num_new_tokens,
            text.num_drafted,
            text.num_verifications,
        )

    def _batch(
        self, rows: list[list[int]], keys: Tensor, request: Request
    ) -> list[Generation]:
        steps = request.num_inference_steps
        if steps is None:
            steps = self.default_num_inference_steps
        sources = rows
        if not self.verifier.closes_sources:  # the denoiser knows sources that end
            sources = [[*row, self.tokenizer.eos_token_id] for row in rows]
        drafts = DiffusionDrafts(self.writer, sources, keys, steps, self.redraft)
        self.verifier.draft = drafts
        written = self.verifier._batch(rows, keys, replace(request, num_inference_steps=None))
        return [
            replace(text, nfe=text.nfe + drafted, canvas_length=length)
            for text, drafted, length in zip(written, drafts.nfe, drafts.lengths, strict=True)
        ]


def _check_vocabularies(tess: PreTrainedTokenizerBase, ar: PreTrainedTokenizerBase) -> None:
    if tess.get_vocab() != ar.get_vocab() or tess.eos_token_id != ar.eos_token_id:
        raise UserError(
            f"tess+ar needs two models of one vocabulary, and that of tess ({len(tess)} tokens) is "
            f"not that of ar ({len(ar)} tokens)"
        )
