"""Flesch-Kincaid grade level: the school years that a text asks for, from counts alone.

    0.39 words / sentences + 11.8 syllables / words - 15.59        (Kincaid et al. 1975)

over all texts together, not below 0. As in EASSE, words are lower-cased 13a tokens, punctuation
and numbers included (which have no syllable). Sentences are those of `tess.text.sentences`.
Syllables
are counted by rule, for English: see `syllables`.
"""

import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from tess.metrics.tokens import tokenize_13a_lower
from tess.text.sentences import split_sentences

_VOWELS = re.compile(r"[aeiouy]+")
_SILENT = re.compile(r"(?<=[^aeiouy\W\d])e(?:d(?<![dt]ed)|s(?<![cgsxz]es)(?<!ches)(?<!shes))?$")
_SYLLABIC_LE = re.compile(r"[^aeiouy\W\d]les?$")


@lru_cache(1 << 14)
def syllables(word: str) -> int:
    """Syllables of a lower-cased English word, by rule.

    One per group of vowels (a e i o u y), less one for a silent last e, es or ed (not after d or t
    in -ed, nor after a hiss in -es, nor in -le after a consonant), and at least one where there is
    a letter. Numbers and punctuation have none, as in EASSE.
    """
    word = unicodedata.normalize("NFD", word)  # an accented vowel is a vowel, and not silent
    if not any(c.isalpha() for c in word):
        return 0
    groups = len(_VOWELS.findall(word))
    if _SILENT.search(word) and not _SYLLABIC_LE.search(word):
        groups -= 1
    return max(groups, 1)


def readability_rows(texts: Sequence[str]) -> np.ndarray:
    """[N, 3]: sentences, words and syllables of each text."""
    rows = np.zeros((len(texts), 3))
    for row, text in zip(rows, texts, strict=True):
        words = tokenize_13a_lower(text)
        row[:] = len(split_sentences(text)), len(words), sum(map(syllables, words))
    return rows


def grade_level(sums: np.ndarray) -> np.ndarray:
    """[...] of summed counts [..., 3]; 0 without a word."""
    sentences, words, syllables_ = sums[..., 0], sums[..., 1], sums[..., 2]
    some = np.maximum(words, 1.0)
    grade = 0.39 * words / np.maximum(sentences, 1.0) + 11.8 * syllables_ / some - 15.59
    return np.where(words > 0, np.maximum(grade, 0.0), 0.0)
