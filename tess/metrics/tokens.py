"""How texts become tokens before n-grams are counted: one name per way, as signatures print it.

| name | tokens |
|---|---|
| `13a` | mteval-v13a (sacrebleu's default), case kept |
| `13a-lc` | the same of lower-cased text |
| `bert` | what DiffuSeq's program scores: see `tokenize_bert` |
"""

from collections.abc import Callable, Sequence
from functools import lru_cache

from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer

from tess.errors import UserError
from tess.text.visible import is_blank

_13A = Tokenizer13a()
_BERT_NORMALIZER = BertNormalizer(lowercase=True)  # also drops accents and splits ideographs
_BERT_SPLITTER = BertPreTokenizer()
_CACHE_SIZE = 1 << 12  # texts: references come again for each of a system's baselines


@lru_cache(_CACHE_SIZE)
def tokenize_13a_cased(text: str) -> tuple[str, ...]:
    """mteval-v13a tokens, case kept."""
    return tuple(_13A(text.rstrip()).split())


@lru_cache(_CACHE_SIZE)
def tokenize_13a_lower(text: str) -> tuple[str, ...]:
    """mteval-v13a tokens of the lower-cased text."""
    return tuple(_13A(text.lower().rstrip()).split())


@lru_cache(_CACHE_SIZE)
def tokenize_bert(text: str) -> tuple[str, ...]:
    """Blank-separated words of an uncased BERT tokenizer's decoded text.

    DiffuSeq encodes and decodes every text with `bert-base-uncased` before it scores it. Word
    pieces are joined again by that, so no vocabulary is needed here (but for characters that the
    vocabulary lacks, which become [UNK] there and stay as they are here): lower case, no accents,
    every punctuation mark and ideograph on its own, and then transformers' clean-up of spaces,
    which joins full stops, commas, question and exclamation marks and apostrophes to the word.
    """
    pieces = _BERT_SPLITTER.pre_tokenize_str(_BERT_NORMALIZER.normalize_str(text))
    return tuple(_clean_up(" ".join(piece for piece, _ in pieces)).split())


def _clean_up(text: str) -> str:
    """The spaces that transformers' `decode` removes by default, in its order."""
    for mark in ".?!,":
        text = text.replace(f" {mark}", mark)
    text = text.replace(" ' ", "'")
    for ending in ("n't", "'m", "'s", "'ve", "'re"):
        text = text.replace(f" {ending}", ending)
    return text


Tokenize = Callable[[str], tuple[str, ...]]
TOKENIZERS: dict[str, Tokenize] = {
    "13a": tokenize_13a_cased,
    "13a-lc": tokenize_13a_lower,
    "bert": tokenize_bert,
}


def check_parallel(
    sources: Sequence[str], predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> None:
    """Refuse corpora that do not line up, are empty, or fail `check_references`."""
    lengths = (len(sources), len(predictions), len(references))
    if len(set(lengths)) != 1:
        raise UserError(
            f"expected as many sources as predictions and lists of references, got {lengths}"
        )
    if not lengths[0]:
        raise UserError("expected at least one row to score, got none")
    check_references(references)


def check_references(references: Sequence[Sequence[str]]) -> None:
    """Refuse a row without a reference, and a blank reference.

    BLEU takes the reference of the closest length: for a short text that would be the blank one,
    and nothing would be held against its shortness.
    """
    for number, row in enumerate(references, start=1):
        if isinstance(row, str) or not row:
            raise UserError(f"row {number}: expected a list of one or more references, got {row!r}")
        for place, text in enumerate(row, start=1):
            if not isinstance(text, str) or is_blank(text):
                raise UserError(
                    f"row {number}: expected a text as reference {place}, got {text!r}; leave out "
                    "what is no reference"
                )
