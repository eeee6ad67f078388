"""Undo Penn-Treebank-style tokenisation, so that corpora of both kinds can be mixed and read.

WikiSplit, WikiLarge, PWKP and SQuAD's question-generation split are published with spaces around
punctuation, split contractions and `` '' quotes. The rules below are ours; they undo what those
corpora do and leave ordinary text as it is, apart from runs of white space.
"""

import re

_BRACKETS = {
    "-LRB-": "(", "-RRB-": ")", "-LSB-": "[", "-RSB-": "]", "-LCB-": "{", "-RCB-": "}",
    "-lrb-": "(", "-rrb-": ")", "-lsb-": "[", "-rsb-": "]", "-lcb-": "{", "-rcb-": "}",
}
_CONTRACTION = re.compile(r"(?<=\w) (n't|'(?:s|re|ve|ll|d|m|S))\b")
_DIGITS = re.compile(r"(?<=\d) ([,.:]) (?=\d)")
_BEFORE = re.compile(r" ([,.;:?!%)\]}]|\.\.\.)(?=$|[\s,.;:?!)\]}\"'])")
_AFTER = re.compile(r"(?<!\S)([(\[{$£€]) (?=\S)")
_DOUBLED = re.compile(r"(?<!\S)(``|''|\")(?: (?:``|''|\"))+(?!\S)")
_RANGE = re.compile(r"(?<=\d) -- (?=\d)")
_HYPHEN = re.compile(r"(?<=\w) - (?=\w)")


def detokenize(text: str) -> str:
    """Text as one would write it: `` the `` car '' , it 's `` becomes `` the "car", it's ``.

    A hyphen with spaces on both sides is joined only where the text is tokenised elsewhere too
    (a comma or full stop stands apart), since ordinary text uses it as a dash.
    """
    original = text
    tokenised = re.search(r"\S [,.;?!](?= |$)", text) is not None
    text = " ".join(_BRACKETS.get(word, word) for word in text.split())
    text = _quotes(text) if tokenised or "``" in text or "''" in text else text
    text = _CONTRACTION.sub(r"\1", text)
    if tokenised:
        text = _DIGITS.sub(_join_digits, text)
        text = _HYPHEN.sub("-", text)
        text = _RANGE.sub("-", text)
    elif "``" not in original and "''" not in original:
        return text
    text = _AFTER.sub(r"\1", text)
    previous = None
    while previous != text:  # `` . ) ''`` closes in more than one step
        previous, text = text, _BEFORE.sub(r"\1", text)
    return text


def _join_digits(match: re.Match[str]) -> str:
    """`1 , 000` and `3 . 5` and `10 : 30` are one number; `in 1990 , 12 men` is not."""
    rest = match.string[match.end() :]
    thousands = re.match(r"\d{3}(?!\d)", rest) is not None
    if match[1] == "," and not thousands:
        return f"{match[1]} "
    return match[1]


def _quotes(text: str) -> str:
    """Every stand-alone `` or '' or " opens or closes in turn; doubled ones count once."""
    words, opened = [], False
    glue = False
    for word in _DOUBLED.sub(r"\1", text).split(" "):
        if word in ("``", "''", '"'):
            if opened and words:
                words[-1] += '"'
            else:
                glue = True
            opened = not opened
            continue
        words.append(f'"{word}' if glue else word)
        glue = False
    if glue:  # an opening quote at the very end closes what no one opened
        if words:
            words[-1] += '"'
        else:
            words.append('"')
    return " ".join(words)
