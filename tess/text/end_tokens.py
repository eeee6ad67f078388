"""Which tokens end a text: one set for stopping, cutting, saving and the lengths of targets.

A released model names its end tokens in up to three places: the tokenizer, config.json and
generation_config.json. They need not agree, and any of them ends a text.
"""

from collections.abc import Collection, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from tess.errors import UserError


def union(*owners: Any) -> tuple[int, ...]:
    """The `eos_token_id` of each owner, a number, a list or None, in this order and once each.

    Negative ones, which some files write for "none", are left out.

    Raises:
        UserError: what is no token id.
    """
    found: dict[int, None] = {}
    for owner in owners:
        given = getattr(owner, "eos_token_id", None)
        ids = given if isinstance(given, list | tuple) else [] if given is None else [given]
        if not all(isinstance(id_, int) for id_ in ids):
            raise UserError(
                f"eos_token_id must be a number or a list of numbers, got {given!r} in a "
                f"{type(owner).__name__}"
            )
        found |= dict.fromkeys(id_ for id_ in ids if id_ >= 0)
    return tuple(found)


def end_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """All ids that end a text; the first is the tokenizer's own, which layouts write."""
    return tuple(dict.fromkeys((*union(tokenizer), *getattr(tokenizer, "model_end_tokens", ()))))


def remember_end_tokens(tokenizer: PreTrainedTokenizerBase, *owners: Any) -> None:
    """Let `end_tokens` know those of the model's configs; a saved tokenizer does not have them."""
    tokenizer.model_end_tokens = union(*owners)


def share_end_tokens(tokenizer: PreTrainedTokenizerBase, config: Any, *more: Any) -> None:
    """Give the model's config all end tokens, and others that name some; who has all stays as it
    is."""
    ids = union(config, *more, tokenizer)
    for owner in (config, *(one for one in more if one.eos_token_id is not None)):
        if set(union(owner)) != set(ids):
            owner.eos_token_id = list(ids) if len(ids) > 1 else ids[0]


def through_end(ids: Sequence[int], ends: Collection[int]) -> list[int]:
    """The ids up to and including the first that is an end."""
    return list(ids[: before_end(ids, ends) + 1])


def before_end(ids: Sequence[int], ends: Collection[int]) -> int:
    """The place of the first id that is an end, or the number of ids where there is none."""
    return next((place for place, token in enumerate(ids) if token in ends), len(ids))
