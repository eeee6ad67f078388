"""A released folder's generation_config.json: what of it is honoured here, and what is not.

Decoders choose beams, sampling, drafts and the cache by their own options, so that a text never
depends on a file without a word. Whatever else of a file changes texts is honoured or ignored by
the table below, and both are reported.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from transformers import GenerationConfig, PreTrainedModel

from tess.errors import UserError

HONOURED = (
    "repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "sequence_bias",
    "suppress_tokens", "begin_suppress_tokens", "min_length", "min_new_tokens", "stop_strings",
)

USUAL = (
    "max_new_tokens", "pad_token_id", "bos_token_id", "eos_token_id", "transformers_version",
    "_from_model_config",
)
"""What every decoder reads, or what says nothing of texts."""

REASONS = {
    "num_beams asks for beams": (
        "num_beams", "num_beam_groups", "length_penalty", "early_stopping", "diversity_penalty",
    ),
    "top_p and temperature ask for sampling": (
        "do_sample", "temperature", "top_k", "top_p", "min_p", "top_h", "typical_p",
        "epsilon_cutoff", "eta_cutoff",
    ),
    "decoders keep a cache of their own": ("use_cache", "cache_implementation", "cache_config"),
    "gen_length and max_new_tokens limit the new tokens": ("max_length",),
    "ar+mtp drafts": (
        "use_mtp", "num_assistant_tokens", "num_assistant_tokens_schedule",
        "assistant_confidence_threshold", "prompt_lookup_num_tokens",
    ),
}
"""Why a key is ignored; one that stands nowhere here has no decoder that could honour it."""

NEUTRAL = {
    "repetition_penalty": 1.0, "num_beams": 1, "num_beam_groups": 1, "length_penalty": 1.0,
    "temperature": 1.0, "top_k": 50, "top_p": 1.0, "typical_p": 1.0, "use_cache": True,
    "max_length": 20, "num_return_sequences": 1, "encoder_repetition_penalty": 1.0,
    "guidance_scale": 1.0, "num_assistant_tokens_schedule": "constant",
}
"""Values that change nothing, where that is not None, False, zero or an empty list."""


@dataclass(frozen=True)
class GenerationSettings:
    """The settings of a file that would change texts, by what becomes of them."""

    honoured: Mapping[str, Any]
    ignored: Mapping[str, Any]

    @classmethod
    def of(cls, config: GenerationConfig) -> "GenerationSettings":
        """Those of a loaded file."""
        given = {
            name: value for name, value in json.loads(config.to_json_string()).items()
            if name not in USUAL and not _is_neutral(name, value)
        }
        honoured = {name: getattr(config, name) for name in given if name in HONOURED}
        ignored = {name: value for name, value in given.items() if name not in HONOURED}
        return cls(honoured, ignored)

    def report(self) -> dict[str, dict[str, Any]] | None:
        """For reports: both, or None where there is nothing to say."""
        if not self.honoured and not self.ignored:
            return None
        return {"honoured": dict(self.honoured), "ignored": dict(self.ignored)}

    @contextmanager
    def checked(self) -> Iterator[None]:
        """A value that transformers refuses to honour is the file's mistake.

        Raises:
            UserError: it names the settings.
        """
        try:
            yield
        except (ValueError, TypeError, AttributeError) as error:
            if not self.honoured or isinstance(error, UserError):
                raise
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"{_list(self.honoured)} from generation_config.json cannot be honoured: {reason}"
            ) from error

    def notice(self) -> str | None:
        """The same in one sentence."""
        parts = []
        if self.honoured:
            parts.append(f"{_list(self.honoured)} from generation_config.json is honoured")
        why = {name: reason for reason, names in REASONS.items() for name in names}
        groups: dict[str, dict[str, Any]] = {}
        for name, value in self.ignored.items():
            groups.setdefault(why.get(name, "no decoder has it"), {})[name] = value
        parts += [
            f"{_list(group)} from generation_config.json is ignored: {reason}"
            for reason, group in groups.items()
        ]
        return "; ".join(parts) or None


def _is_neutral(name: str, value: Any) -> bool:
    if name in NEUTRAL:
        return value is None or value == NEUTRAL[name]
    return value is None or value in (False, 0, [], {})


def _list(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in settings.items())


@contextmanager
def only_given_options(model: PreTrainedModel) -> Iterator[None]:
    """Inside, `model.generate` reads its arguments alone, and nothing that a file left in it."""
    stored, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = stored
