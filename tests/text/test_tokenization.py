"""A trained tokenizer gives every text back; layouts keep `</s>`; unfit tokenizers are refused."""

import subprocess
import sys

import pytest

from tess.errors import UserError
from tess.text import tokenization

TEXTS = [
    "The cat sat on the mat .",
    "A dog ran after the cat and the cat ran away .",
    "naïve café, 東京 🙂",
] * 3


@pytest.fixture(scope="module")
def tokenizer():
    return tokenization.train_tokenizer(TEXTS, 300)


def test_special_tokens_have_the_fixed_ids(tokenizer):
    assert tokenizer.convert_tokens_to_ids(["<pad>", "<s>", "</s>", "<unk>", "<mask>"]) == [
        0,
        1,
        2,
        3,
        4,
    ]
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert (tokenizer.unk_token_id, tokenizer.mask_token_id) == (3, 4)


@pytest.mark.parametrize(
    "text",
    [
        "plain",
        "  spaces  and\ttabs\n",
        "naïve café",
        "東京 🙂 \u200d",
        "\x00\x7f",
        "it 's <s> no </s> special <pad>",
        "a .",
    ],
)
def test_every_text_comes_back(tokenizer, text):
    (ids,) = tokenization.encode_texts(tokenizer, [text])
    assert tokenization.decode(tokenizer, ids) == text
    assert not set(ids) & set(range(5))


def test_round_trip_survives_saving(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = tokenization.load_tokenizer(tmp_path)
    for text in TEXTS + ["x </s> y ."]:
        assert tokenization.encode_texts(loaded, [text]) == tokenization.encode_texts(
            tokenizer, [text]
        )
        (ids,) = tokenization.encode_sources(loaded, [text])
        assert tokenization.decode(loaded, ids[1:]) == text


def test_training_is_deterministic_across_processes(tokenizer):
    code = (
        "from tess.text.tokenization import train_tokenizer\n"
        f"print(train_tokenizer({TEXTS!r}, 300).backend_tokenizer.to_str())"
    )
    others = [
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        for _ in range(2)
    ]
    assert others == [tokenizer.backend_tokenizer.to_str()] * 2


def test_layout_and_truncation_keep_the_end_token(tokenizer):
    (source,) = tokenization.encode_sources(tokenizer, [TEXTS[1]])
    (ids,) = tokenization.encode_texts(tokenizer, [TEXTS[1]])
    target = tokenization.target_layout(tokenizer, ids)
    assert source == [1, *target]
    assert target == [*ids, 2]
    assert tokenization.encode_sources(tokenizer, [TEXTS[1]], max_length=6) == [source[:5] + [2]]
    assert tokenization.target_layout(tokenizer, ids, max_length=6) == target[:5] + [2]


def test_long_texts_are_cut_with_one_warning_or_refused(tokenizer, caplog):
    texts = [TEXTS[1], "a", TEXTS[0]]
    longest = len(tokenization.encode_sources(tokenizer, texts)[0])
    rows = tokenization.encode_sources(tokenizer, texts, max_length=6)
    assert [len(row) for row in rows] == [6, 3, 6]
    assert [record.getMessage() for record in caplog.records] == [
        f"2 of 3 sources have up to {longest} tokens and the model takes 6; their ends were cut off"
    ]
    with pytest.raises(UserError, match="source 1 of 3 has .* tokens and the model takes 6"):
        tokenization.encode_sources(tokenizer, texts, max_length=6, strict=True)


@pytest.mark.parametrize("text", ["", "  \n\t"])
def test_empty_text_is_refused(tokenizer, text):
    with pytest.raises(UserError, match="empty"):
        tokenization.encode_sources(tokenizer, ["a", text])


def test_decode_stops_at_the_end_token(tokenizer):
    (ids,) = tokenization.encode_texts(tokenizer, ["the cat"])
    assert tokenization.decode(tokenizer, [*ids, 2, *ids, 0, 0]) == "the cat"


def test_unfit_tokenizers_are_refused(tokenizer, tmp_path):
    with pytest.raises(UserError, match="300 ids and the model's vocab_size is 299"):
        tokenization.check_tokenizer(tokenizer, 299)
    tokenization.check_tokenizer(tokenizer, 301)  # embeddings are often padded
    with pytest.raises(UserError, match="at least 261, got 260|at least 261 .*got 260"):
        tokenization.train_tokenizer(TEXTS, 260)
    with pytest.raises(UserError, match="no tokenizer could be loaded"):
        tokenization.load_tokenizer(tmp_path)
    without_pad = tokenization.train_tokenizer(TEXTS, 300)
    without_pad.pad_token = None
    with pytest.raises(UserError, match="no pad_token"):
        tokenization.check_tokenizer(without_pad)
