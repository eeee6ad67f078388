"""The `ar` and `ar+mtp` decoders: token by token, or several checked at a time."""

from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerBase

from tess.backbones.causal_lm import DRAFT_TOKENS
from tess.costs.decoding import ar_flops, mtp_flops
from tess.decoders.base import Decoder, Description, Generation
from tess.errors import UserError
from tess.kernels import random
from tess.schedulers.renoising import sample_nucleus
from tess.storage.parts import Parts
from tess.text.padding import pad_left


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
    """Tokens, by what the tokenizer says of its causal model; None: any."""
    longest = tokenizer.model_max_length
    return None if longest > 10**6 else longest  # transformers writes a huge number for "no limit"


class ArDecoder(Decoder):
    """One token per network evaluation, through the cache: greedy, or sampled with `top_p`."""

    name = "ar"

    @property
    def max_source_length(self) -> int | None:
        return longest_source(self.tokenizer)

    def describe(self) -> Description:
        return Description()

    def _flops(self, source_length: int, text: Generation) -> float:
        return ar_flops(self.model.config, source_length, text.nfe)

    def _batch(
        self, rows, keys, num_inference_steps, gen_length, top_p, temperature
    ) -> list[Generation]:
        if gen_length is not None and not isinstance(gen_length, int):
            raise UserError(
                "decoders that go token by token take one gen_length for all sources, got one each"
            )
        if num_inference_steps is not None:
            raise UserError(
                "num_inference_steps belongs to the tess decoder; ar takes one evaluation per "
                "token, and ar+mtp fewer"
            )
        source = pad_left(rows, self.tokenizer.pad_token_id)
        device = self.model.device
        width = source["source_ids"].shape[1]
        choice = LogitsProcessorList()
        if top_p is not None:
            choice.append(_KeyedNucleus(keys.to(device), width, top_p, temperature))
        return self._write(
            width,
            input_ids=source["source_ids"].to(device),
            attention_mask=source["source_mask"].to(device),
            max_new_tokens=gen_length or self.model.generation_config.max_new_tokens or 128,
            pad_token_id=self.tokenizer.pad_token_id,
            eos_token_id=self.tokenizer.eos_token_id,
            do_sample=False,
            logits_processor=choice,
        )

    def _write(self, width: int, **options: Any) -> list[Generation]:
        """Call the model's `generate`; `width` tokens of every row are the source."""
        sequences = self.model.generate(**options)
        return [self._generation(ids) for ids in sequences[:, width:].tolist()]


class ArMtpDecoder(ArDecoder):
    """The same texts as `ar`, sampled ones too, in fewer evaluations.

    The choice of a token, greedy or by the example's own random number, is a function of the
    tokens before it, so a draft can be held against it.
    """

    name = "ar+mtp"

    def __init__(self, parts: Parts, num_draft_tokens: int = DRAFT_TOKENS) -> None:
        super().__init__(parts)
        if self.model.mtp is None:
            raise UserError(
                "ar+mtp needs a checkpoint with a multi-token predictor, and this one has none "
                "(num_nextn_predict_layers is 0 in its config.json)"
            )
        if num_draft_tokens < 1:
            raise UserError(f"num_draft_tokens must be at least 1, got {num_draft_tokens}")
        self.num_draft_tokens = num_draft_tokens

    def describe(self) -> Description:
        return Description(num_draft_tokens=self.num_draft_tokens)

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
                out.sequences[:, width:].tolist(),
                out.num_forwards.tolist(),
                out.num_drafted.tolist(),
                out.num_accepted.tolist(),
                strict=True,
            )
        ]
