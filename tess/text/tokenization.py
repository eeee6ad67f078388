"""Tokenizers: train a byte-level BPE, load any Hugging Face one, lay out source and target ids.

Layout of one example: source ids are `<s> source </s>`, target ids are `target </s>` (`<s>` is left
out where the tokenizer has no bos). Truncation cuts the text and keeps `</s>`.
"""

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tess.errors import UserError

logger = logging.getLogger(__name__)

SPECIAL_TOKENS = {
    "pad_token": "<pad>",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "mask_token": "<mask>",
}
"""Role and spelling of a trained tokenizer's special tokens; their ids are 0 to 4."""

SMALLEST_VOCAB_SIZE = len(SPECIAL_TOKENS) + 256


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on `texts`: every string can be encoded and comes back unchanged.

    The same texts give the same tokenizer: merges are ordered by count, then by the pair's ids.

    Args:
        texts: training strings.
        vocab_size: number of ids, special tokens and the 256 bytes included; fewer when the texts
            run out of pairs.

    Raises:
        UserError: when `vocab_size` cannot hold the special tokens and the bytes.
    """
    if vocab_size < SMALLEST_VOCAB_SIZE:
        raise UserError(
            f"vocab_size must be at least {SMALLEST_VOCAB_SIZE} (special tokens and bytes), "
            f"got {vocab_size}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS.values()),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        min_frequency=2,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **SPECIAL_TOKENS
    )


def load_tokenizer(
    name_or_path: str | Path, vocab_size: int | None = None
) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a folder or by its name on the hub, and check it.

    Raises:
        UserError: when nothing can be loaded from there, or `check_tokenizer` refuses it.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(name_or_path))
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"no tokenizer could be loaded from {name_or_path}: {reason}") from error
    check_tokenizer(tokenizer, vocab_size)
    return tokenizer


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, vocab_size: int | None = None) -> None:
    """Refuse a tokenizer without pad or eos, or with another number of ids than `vocab_size`.

    Raises:
        UserError: saying what is missing, or both sizes.
    """
    for role in ("pad_token", "eos_token"):
        if getattr(tokenizer, f"{role}_id") is None:
            raise UserError(
                f"the tokenizer {tokenizer.name_or_path!r} has no {role}, which every text needs"
            )
    if vocab_size is not None and len(tokenizer) != vocab_size:
        raise UserError(
            f"vocabulary mismatch: the tokenizer has {len(tokenizer)} ids and the model's "
            f"vocab_size is {vocab_size}"
        )


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Ids of bare texts; one that spells `</s>` is encoded as those four characters."""
    if not texts:
        return []
    encoded = tokenizer(
        list(texts),
        add_special_tokens=False,
        split_special_tokens=True,
        return_attention_mask=False,
        verbose=False,
    )
    return encoded["input_ids"]


def source_layout(
    tokenizer: PreTrainedTokenizerBase,
    ids: Sequence[int],
    max_length: int | None = None,
    with_eos: bool = True,
) -> list[int]:
    """`<s> ids </s>` of at most `max_length`; `with_eos=False` is for a text that goes on."""
    before = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    after = [tokenizer.eos_token_id] if with_eos else []
    return before + _cut(ids, max_length, len(before) + len(after)) + after


def target_layout(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], max_length: int | None = None
) -> list[int]:
    """`ids </s>` of at most `max_length` ids; the end of `ids` is cut."""
    return _cut(ids, max_length, 1) + [tokenizer.eos_token_id]


def _cut(ids: Sequence[int], max_length: int | None, reserved: int) -> list[int]:
    if max_length is None:
        return list(ids)
    if max_length <= reserved:
        raise UserError(
            f"a maximum length of {max_length} leaves no room beside {reserved} special tokens"
        )
    return list(ids[: max_length - reserved])


def encode_sources(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    max_length: int | None = None,
    strict: bool = False,
) -> list[list[int]]:
    """Source ids of each text, `<s> source </s>`; too long ones are cut as by `cut_sources`.

    Raises:
        UserError: for an empty text, and with `strict` for one that is too long.
    """
    if not all(text.strip() for text in texts):
        raise UserError("expected a text, got an empty one (or only white space)")
    rows = [source_layout(tokenizer, ids) for ids in encode_texts(tokenizer, texts)]
    return cut_sources(rows, max_length, strict)


def cut_sources(
    rows: Sequence[Sequence[int]],
    max_length: int | None,
    strict: bool = False,
    warn: bool = True,
) -> list[list[int]]:
    """Source ids of at most `max_length` each, the last one (`</s>`) kept; one warning counts cuts.

    Raises:
        UserError: with `strict`, for the first source that is too long.
    """
    lengths = [len(row) for row in rows]
    if max_length is None or max(lengths, default=0) <= max_length:
        return [list(row) for row in rows]
    if strict:
        number, length = next((i, n) for i, n in enumerate(lengths, 1) if n > max_length)
        raise UserError(
            f"source {number} of {len(rows)} has {length} tokens and the model takes {max_length}"
        )
    if warn:
        logger.warning(
            "%d of %d sources have up to %d tokens and the model takes %d; their ends were cut off",
            *(sum(n > max_length for n in lengths), len(rows), max(lengths), max_length),
        )
    return [
        [*row[: max_length - 1], row[-1]] if len(row) > max_length else list(row) for row in rows
    ]


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Text of the ids before the first `</s>`, special tokens left out."""
    ids = list(ids)
    if tokenizer.eos_token_id in ids:
        ids = ids[: ids.index(tokenizer.eos_token_id)]
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
