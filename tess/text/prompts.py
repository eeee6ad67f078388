"""Texts that a causal model goes on with as they stand, and turns of a chat: no `</s>` behind them.

What was trained here reads `<s> source </s>` (`tokenization.encode_sources`); a released model
would take that end token for the end of everything.
"""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from tess.errors import UserError
from tess.text.end_tokens import end_tokens
from tess.text.tokenization import check_texts


def encode_prompts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Ids with the special tokens that the tokenizer itself puts before a text, and none after it.

    A text that spells a special token is encoded as its characters.

    Raises:
        UserError: an empty text, or one of which no token is made.
    """
    check_texts(texts)
    encoded = tokenizer(
        list(texts), split_special_tokens=True, return_special_tokens_mask=True, verbose=False
    )
    ends, rows = set(end_tokens(tokenizer)), []
    for text, ids, added in zip(
        texts, encoded["input_ids"], encoded["special_tokens_mask"], strict=True
    ):
        row = list(ids)
        while row and added[len(row) - 1] and row[-1] in ends:  # a tokenizer that closes texts
            row.pop()
        if not row:
            raise UserError(f"the tokenizer makes no token of the text {text!r}")
        rows.append(row)
    return rows


def check_chat(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises UserError for a tokenizer without a chat template."""
    if not tokenizer.chat_template:
        raise UserError(
            f"the tokenizer {tokenizer.name_or_path!r} has no chat template, which chat needs; "
            "leave it out"
        )


def encode_chats(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Ids of each text as the user's turn of the tokenizer's chat template, then the answer begins.

    Raises:
        UserError: an empty text, no template, or one that cannot be filled.
    """
    check_texts(texts)
    check_chat(tokenizer)
    try:
        return [
            list(
                tokenizer.apply_chat_template(
                    [{"role": "user", "content": text}],
                    add_generation_prompt=True,
                    tokenize=True,
                    return_dict=True,
                )["input_ids"]
            )
            for text in texts
        ]
    except Exception as error:  # a template is a program
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"the chat template of {tokenizer.name_or_path!r} cannot be filled: {reason}"
        ) from error
