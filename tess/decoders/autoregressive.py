"""The `ar` and `ar+mtp` decoders: token by token, or several checked at a time."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
    StopStringCriteria,
    SuppressTokensLogitsProcessor,
)

from tess.backbones.causal_lm import DRAFT_TOKENS
from tess.costs.decoding import ar_flops, mtp_flops
from tess.decoders.base import Decoder, Description, Generation, Sources
from tess.decoders.generation_settings import GenerationSettings, only_given_options
from tess.errors import UserError
from tess.kernels import random
from tess.options import check_count
from tess.sampling.request import Request
from tess.schedulers.renoising import sample_nucleus
from tess.storage.parts import Parts
from tess.text.end_tokens import end_tokens
from tess.text.padding import pad_left
from tess.text.prompts import check_chat, encode_chats, encode_prompts
from tess.text.tokenization import surplus_ids

logger = logging.getLogger(__name__)

MOST_DRAFT_TOKENS = 2**10


class _KeyedNucleus(LogitsProcessor):
    """Leaves only the token that an example's own random number draws from the nucleus.

    Greedy search then takes it, so that a text does not depend on the rest of its batch.
    """

    def __init__(self, keys: Tensor, width: int, top_p: float, temperature: float) -> None:
        self.keys, self.width = keys, width
        self.top_p, self.temperature = top_p, temperature

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        step = input_ids.shape[1] - self.width
        draw_B1 = random.uniform(self.keys, step, 1)
        token_B1 = sample_nucleus(scores.unsqueeze(1), draw_B1, self.top_p, self.temperature)
        return torch.full_like(scores, -torch.inf).scatter_(1, token_B1, 0.0)


def longest_source(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Tokens, by what the tokenizer says of its causal model; None: any.

    transformers writes a huge number for "no limit".

    Raises:
        UserError: no length at all.
    """
    longest = tokenizer.model_max_length
    if not isinstance(longest, int | float) or longest < 1:
        raise UserError(
            f"model_max_length of the tokenizer must be a number of at least 1, got {longest!r}"
        )
    return None if longest > 10**6 else int(longest)


class ArDecoder(Decoder):
    """One token per network evaluation, through the cache: greedy, or sampled with `top_p`.

    What was trained here reads `<s> source </s>` and writes the target. A released model goes on
    with the text as it stands, or with `chat` answers it, laid out by the tokenizer's template.

    Raises:
        UserError: `chat` without a template.
    """

    name = "ar"

    def __init__(self, parts: Parts, *, chat: bool = False) -> None:
        super().__init__(parts)
        if chat:
            check_chat(self.tokenizer)
        self.chat = chat
        self.settings = GenerationSettings.of(self.model.generation_config)
        if notice := self.settings.notice():
            logger.warning("%s", notice)

    @property
    def max_source_length(self) -> int | None:
        return longest_source(self.tokenizer)

    def encode(self, texts: Sequence[str], strict: bool = False, warn: bool = True) -> Sources:
        """As `Decoder.encode`; a chat that is too long is refused, its template would be cut."""
        return super().encode(texts, strict or self.chat, warn)

    @property
    def closes_sources(self) -> bool:
        """So in what was trained here, and in no other causal model."""
        return self.model.config.eos_after_source and not self.chat

    def _lay_out(self, texts: Sequence[str]) -> list[list[int]]:
        if self.closes_sources:
            return super()._lay_out(texts)
        return (encode_chats if self.chat else encode_prompts)(self.tokenizer, texts)

    def describe(self) -> Description:
        return Description(generation_config=self.settings.report())

    def _flops(self, source_length: int, text: Generation) -> float:
        return ar_flops(self.model.config, source_length, text.nfe)

    def _batch(
        self, rows: list[list[int]], keys: Tensor, request: Request
    ) -> list[Generation]:
        longest = request.gen_length
        if longest is not None and not isinstance(longest, Integral):
            raise UserError(
                "decoders that go token by token take one gen_length for all sources, got one each"
            )
        if request.num_inference_steps is not None:
            raise UserError(
                "num_inference_steps belongs to the tess decoder; ar takes one evaluation per "
                "token, and ar+mtp fewer"
            )
        source = pad_left(rows, self.tokenizer.pad_token_id)
        device = self.model.device
        width = source["source_ids"].shape[1]
        choice = LogitsProcessorList()
        if surplus := surplus_ids(self.tokenizer, self.model.config.vocab_size):
            choice.append(SuppressTokensLogitsProcessor(surplus, device=device))
        if request.top_p is not None:
            choice.append(
                _KeyedNucleus(keys.to(device), width, request.top_p, request.temperature)
            )
        longest = longest or self.model.generation_config.max_new_tokens or 128
        settings = dict(self.settings.honoured)
        strings, stops = settings.pop("stop_strings", None), StoppingCriteriaList()
        with only_given_options(self.model), self.settings.checked():
            if strings:
                stops.append(StopStringCriteria(self.tokenizer, strings))
            return self._write(
                width,
                input_ids=source["source_ids"].to(device),
                attention_mask=source["source_mask"].to(device),
                max_new_tokens=longest,
                pad_token_id=self.tokenizer.pad_token_id,
                eos_token_id=list(end_tokens(self.tokenizer)),
                do_sample=False,
                logits_processor=choice,
                stopping_criteria=stops,
                **settings,
            )

    def _write(self, width: int, **options: Any) -> list[Generation]:
        """Call the model's `generate`; `width` tokens of every row are the source."""
        sequences = self.model.generate(**options)
        return [self._generation(ids) for ids in self._new_tokens(sequences, width)]

    def _new_tokens(self, sequences: Tensor, width: int) -> list[list[int]]:
        rows = sequences[:, width:].tolist()
        if "stop_strings" in self.settings.honoured:  # a row that is done goes on with padding
            for row in rows:
                while row and row[-1] == self.tokenizer.pad_token_id:
                    row.pop()
        return rows


class ArMtpDecoder(ArDecoder):
    """The same texts as `ar`, sampled ones too, in fewer evaluations.

    The choice of a token, greedy or by the example's own random number, is a function of the
    tokens before it, so a draft can be held against it.
    """

    name = "ar+mtp"

    def __init__(
        self, parts: Parts, num_draft_tokens: int = DRAFT_TOKENS, *, chat: bool = False
    ) -> None:
        super().__init__(parts, chat=chat)
        if self.model.mtp is None:
            raise UserError(
                "ar+mtp needs a checkpoint with a multi-token predictor, and this one has none "
                "(num_nextn_predict_layers is 0 in its config.json)"
            )
        check_count("num_draft_tokens", num_draft_tokens, MOST_DRAFT_TOKENS)
        self.num_draft_tokens = num_draft_tokens

    def describe(self) -> Description:
        return replace(super().describe(), num_draft_tokens=self.num_draft_tokens)

    def _flops(self, source_length: int, text: Generation) -> float:
        return mtp_flops(
            self.model.config, source_length, text.nfe, text.num_new_tokens, self.num_draft_tokens
        )

    def _write(self, width: int, **options: Any) -> list[Generation]:
        out = self.model.generate(
            use_mtp=True,
            num_assistant_tokens=self.num_draft_tokens,
            return_dict_in_generate=True,
            **options,
        )
        return [
            self._generation(
                ids, nfe, num_drafted=drafted, num_accepted=accepted, num_verifications=nfe - 1
            )
            for ids, nfe, drafted, accepted in zip(
                self._new_tokens(out.sequences, width),
                out.num_forwards.tolist(),
                out.num_drafted.tolist(),
                out.num_accepted.tolist(),
                strict=True,
            )
        ]
