"""Which texts a tokenizer was not trained on."""

import logging

import pytest

from tess.cli import DEFAULT_CHECKPOINT
from tess.text.alphabet import strange_letters, warn_of_strange_texts
from tess.text.tokenization import load_tokenizer, train_tokenizer

KNOWN = [
    "The museum opened in 1954.",
    "Łukasz Żółć met Søren Kierkegård and Đặng Thị Ngọc Thịnh in Nürnberg.",
    "Zoë, Şükrü, Ångström, Dvořák, Beyoncé and Ibáñez",
    "The word 東京 is Tokyo and سلام a greeting.",
    "12.5 % — €3 ☂",
]
STRANGE = [
    "سلام دنیا، این یک متن فارسی است.", "今天天气很好。", "Привет, мир", "안녕하세요",
    "東京は in",
]


@pytest.fixture(scope="module", params=["tess/tokenizer", "ar"])
def shipped(request):
    return load_tokenizer(DEFAULT_CHECKPOINT / request.param)


def test_a_notice_counts_the_texts_in_letters_that_no_token_spells(shipped, caplog):
    with caplog.at_level(logging.WARNING):
        warn_of_strange_texts(shipped, KNOWN)
        assert not caplog.records
        warn_of_strange_texts(shipped, KNOWN + STRANGE)
    (record,) = caplog.records
    assert record.getMessage().startswith("5 of 10 texts are mostly in letters such as س")


@pytest.mark.parametrize("text", STRANGE)
def test_each_such_text_is_seen_alone(shipped, caplog, text):
    warn_of_strange_texts(shipped, [text])
    assert len(caplog.records) == 1


def test_a_tokenizer_that_was_trained_on_a_script_knows_it(caplog):
    persian = train_tokenizer(["سلام دنیا این یک متن فارسی است"] * 20, 400)
    assert not strange_letters(persian, "سلام")
    assert strange_letters(persian, "今é") == {"今"}
    warn_of_strange_texts(persian, ["سلام دنیا"])
    assert not caplog.records
