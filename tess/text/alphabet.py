"""Letters that a tokenizer was not trained on, which its model has therefore not learned to write.

A byte-level tokenizer takes every string; what it never saw it spells byte by byte.
"""

import logging
from collections.abc import Iterable, Sequence
from unicodedata import normalize

from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

MOST_STRANGE = 0.5
"""Share of a text's letters; a name of another language amid a text is no reason for a notice."""


def strange_letters(tokenizer: PreTrainedTokenizerBase, letters: Iterable[str]) -> set[str]:
    """Those letters that no token spells as a whole; a Latin letter with marks counts as known."""
    asked = sorted(letter for letter in set(letters) if not normalize("NFD", letter)[0].isascii())
    if not asked:
        return set()
    rows = tokenizer(asked, add_special_tokens=False)["input_ids"]
    return {
        letter
        for letter, ids in zip(asked, rows, strict=True)
        if not ids or letter.casefold() not in tokenizer.decode(ids[-1:]).casefold()
    }


def warn_of_strange_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> None:
    """One warning counts the texts of which more than half the letters are strange."""
    letters = [[char for char in text if char.isalpha()] for text in texts]
    strange = strange_letters(tokenizer, (char for row in letters for char in row))
    found = [
        row for row in letters if sum(char in strange for char in row) > MOST_STRANGE * len(row)
    ]
    if found:
        logger.warning(
            "%d of %d texts are mostly in letters such as %s, which the tokenizer spells in bytes: "
            "the model was not trained on such text",
            len(found), len(texts), next(char for char in found[0] if char in strange),
        )
