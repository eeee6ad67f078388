"""Tokenizers: train a byte-level BPE, load any Hugging Face one, lay out source and target ids.

Layout of one example: source ids are `<s> source </s>`, target ids are `target </s>` (`<s>` is left
out where the tokenizer has no bos). Truncation cuts the text and keeps `</s>`.
"""

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tess.backbones.damage import fault_in
from tess.errors import UserError
from tess.text.end_tokens import before_end, end_tokens, remember_end_tokens

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
    # a plain call gives the layout of a source, so that `model.generate(**tokenizer(text))` works
    bos, eos = SPECIAL_TOKENS["bos_token"], SPECIAL_TOKENS["eos_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A {eos}",
        pair=f"{bos} $A {eos} $B:1 {eos}:1",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (bos, eos)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        clean_up_tokenization_spaces=False,
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
        **SPECIAL_TOKENS,
    )


def load_tokenizer(name_or_path: str | Path, *configs: Any) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a folder or by its name on the hub, and check it.

    configs: of the model it belongs to, see `fit_tokenizer`; none for a new model.

    Raises:
        UserError: when nothing can be loaded from there, or it is refused.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(name_or_path))
    except Exception as error:  # transformers lets through whatever its readers stumble over
        reason = fault_in(Path(name_or_path)) or " ".join(str(error).split())[:200]
        reason = reason or type(error).__name__
        raise UserError(f"no tokenizer could be loaded from {name_or_path}: {reason}") from error
    if configs:
        fit_tokenizer(tokenizer, *configs)
    else:
        check_tokenizer(tokenizer)
    return tokenizer


def fit_tokenizer(tokenizer: PreTrainedTokenizerBase, config: Any, *more: Any) -> None:
    """Give a tokenizer what its model's configs know and it does not, in memory; then check it.

    A missing pad or end token is the config's; where that has no pad token either, texts are padded
    with the end token, as transformers does.

    Args:
        config: has vocab_size, pad_token_id and eos_token_id.
        more: other places of end tokens (a `GenerationConfig`).

    Raises:
        UserError: see `check_tokenizer`.
    """
    remember_end_tokens(tokenizer, config, *more)
    if tokenizer.eos_token_id is None:
        tokenizer.eos_token = _first_token(tokenizer, end_tokens(tokenizer))
    if tokenizer.pad_token_id is None:
        pads = () if config.pad_token_id is None else (config.pad_token_id,)
        tokenizer.pad_token = _first_token(tokenizer, (*pads, *end_tokens(tokenizer)))
    check_tokenizer(tokenizer, config.vocab_size)


def _first_token(tokenizer: PreTrainedTokenizerBase, ids: Iterable[int]) -> str | None:
    spellings = {id_: token for token, id_ in tokenizer.get_vocab().items()}
    return next((spellings[id_] for id_ in ids if id_ in spellings), None)


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, vocab_size: int | None = None) -> None:
    """Refuse a tokenizer without pad or eos, or with an id that a model of `vocab_size` lacks.

    A model may have more rows than the tokenizer has ids; see `surplus_ids`.

    Raises:
        UserError: saying what is missing, or both sizes.
    """
    for role in ("pad_token", "eos_token"):
        if getattr(tokenizer, f"{role}_id") is None:
            raise UserError(
                f"the tokenizer {tokenizer.name_or_path!r} has no {role}, which every text needs"
            )
    if vocab_size is not None and (needed := id_count(tokenizer)) > vocab_size:
        raise UserError(
            f"vocabulary mismatch: the tokenizer has {needed} ids and the model's "
            f"vocab_size is {vocab_size}"
        )


def id_count(tokenizer: PreTrainedTokenizerBase) -> int:
    """One more than the highest id: rows that a model of this tokenizer needs."""
    return max(tokenizer.get_vocab().values()) + 1


def surplus_ids(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> list[int]:
    """Ids of a model that are no token: embeddings are padded, and vocabularies have holes.

    They must never be written.
    """
    if len(tokenizer) == vocab_size:
        return []
    return sorted(set(range(vocab_size)) - set(tokenizer.get_vocab().values()))


def padding_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The ids that are padding wherever they stand.

    None where the pad token ends texts too, or is an ordinary token that a config chose.
    """
    pad = tokenizer.pad_token_id
    known = tokenizer.added_tokens_decoder.get(pad)
    return {pad} - set(end_tokens(tokenizer)) if known is not None and known.special else set()


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
    check_texts(texts)
    rows = [source_layout(tokenizer, ids) for ids in encode_texts(tokenizer, texts)]
    return cut_sources(rows, max_length, strict)


def check_texts(texts: Sequence[str]) -> None:
    """Raises UserError for a text of white space alone."""
    if not all(text.strip() for text in texts):
        raise UserError("expected a text, got an empty one (or only white space)")


def cut_sources(
    rows: Sequence[Sequence[int]],
    max_length: int | None,
    strict: bool = False,
    warn: bool = True,
    closed: bool = True,
) -> list[list[int]]:
    """Source ids of at most `max_length` each; one warning counts cuts.

    closed: the last id of every row is `</s>`, and stays.

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
    kept = [list(row[:max_length]) for row in rows]
    if closed:
        for cut, row in zip(kept, rows, strict=True):
            cut[-1] = row[-1]
    return kept


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Text of the ids before the first end token, special tokens left out."""
    ids = list(ids[: before_end(ids, end_tokens(tokenizer))])
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
