"""Whether a text has anything to see."""

import unicodedata

_UNSEEN = {"Zs", "Zl", "Zp", "Cc", "Cf"}  # blanks, line ends, controls, zero-width characters


def is_blank(text: str) -> bool:
    """Whether no character of `text` is visible: zero-width ones and byte-order marks are not."""
    return not text.strip() or all(unicodedata.category(c) in _UNSEEN for c in text)
