"""Single tokens as strings that are safe to show: in a terminal, in a page."""

import json
import unicodedata
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

SPACE = "␣"
_NAMED = {"\n": "↵", "\r": "␍", "\t": "⇥"}
# control, format (bidirectional overrides too), surrogate, private, unassigned, line and paragraph
_HIDDEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


class TokenStrings:
    """The strings of a tokenizer's ids.

    Control and invisible characters become a visible name (`⟨U+001B⟩`), bytes that are no whole
    character theirs (`⟨C3⟩`), a line feed `↵`, a tab `⇥`; special tokens are shown by name.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._decoders = _decoder_types(tokenizer)
        self._special = set(tokenizer.all_special_ids)
        self._known: dict[int, tuple[bytes, str, bool]] = {}

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special

    def string(self, token_id: int) -> str:
        """The token by itself, spaces as `␣`."""
        return self._look_up(token_id)[1].replace(" ", SPACE)

    def pieces(self, token_ids: Sequence[int]) -> list[str]:
        """What each token adds to the text; a character of several tokens belongs to the first."""
        looked_up = [self._look_up(token_id) for token_id in token_ids]
        result = [string for _, string, _ in looked_up]
        start = 0
        while start < len(result):
            stop = start
            while stop < len(result) and not looked_up[stop][2]:
                stop += 1
            if stop - start > 1:
                result[start:stop] = _visible([data for data, _, _ in looked_up[start:stop]])
            start = stop + 1
        return result

    def _look_up(self, token_id: int) -> tuple[bytes, str, bool]:
        """Bytes, visible string, whether the bytes are whole characters."""
        if token_id not in self._known:
            token = self._tokenizer.convert_ids_to_tokens(token_id)
            if token is None or self.is_special(token_id):
                data = (token or f"⟨id {token_id}⟩").encode(errors="replace")
            else:
                data = _token_bytes(token, self._decoders)
            self._known[token_id] = (data, _visible([data])[0], _is_whole(data))
        return self._known[token_id]


def _decoder_types(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """Which decoders a fast tokenizer is made of: "ByteLevel", "Metaspace", ..."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder = json.loads(backend.to_str()).get("decoder") if backend is not None else None
    if decoder is None:
        return set()
    return {part["type"] for part in decoder.get("decoders", [decoder])}


def _token_bytes(token: str, decoders: set[str]) -> bytes:
    if "ByteLevel" in decoders:
        return b"".join(_BYTE.get(char) or char.encode(errors="replace") for char in token)
    if "ByteFallback" in decoders and len(token) == 6 and token.startswith("<0x"):
        return bytes([int(token[3:5], 16)])
    if "WordPiece" in decoders:
        token = token[2:] if token.startswith("##") else " " + token
    return token.replace("▁", " ").encode(errors="replace")


def _byte_of_character() -> dict[str, bytes]:
    """The alphabet of byte-level BPE (Radford et al. 2019): printable bytes stand for themselves,
    the others for the code points from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    code_points = printable + [256 + number for number in range(len(others))]
    return {
        chr(point): bytes([byte])
        for point, byte in zip(code_points, printable + others, strict=True)
    }


_BYTE = _byte_of_character()


def _is_whole(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _visible(parts: list[bytes]) -> list[str]:
    """The characters of the joined bytes, each with the part that its first byte is in."""
    data = b"".join(parts)
    owners = [number for number, part in enumerate(parts) for _ in part]
    result = [""] * len(parts)
    at = 0
    while at < len(data):
        lead = data[at]
        size = 1 if lead < 0xC0 else 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4
        character = data[at : at + size]
        if _is_whole(character):
            result[owners[at]] += _visible_character(character.decode())
        else:
            result[owners[at]] += f"⟨{lead:02X}⟩"
            size = 1
        at += size
    return result


def _visible_character(character: str) -> str:
    if character in _NAMED:
        return _NAMED[character]
    if unicodedata.category(character) in _HIDDEN:
        return f"⟨U+{ord(character):04X}⟩"
    return character
