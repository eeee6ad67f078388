"""Training texts: kept apart from the evaluation rows, detokenised, cut or left out by length."""

import json

import pytest

from tess.data.settings import DataArguments
from tess.data.texts import load_data, warn_of_cuts, without_long
from tess.data.token_rows import TokenRows
from tess.errors import UserError
from tess.text.tokenization import train_tokenizer


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def pair(source, target):
    return {"source": source, "target": target}


def test_training_rows_that_share_a_text_with_the_evaluation_rows_are_left_out(tmp_path, caplog):
    train = [
        pair("A cat sat.", "Cat sat."),
        pair("A dog ran.", "Dog ran."),
        pair("Birds!", "a CAT sat"),  # an evaluation source as a target, but for case
    ]
    data = DataArguments(
        train_file=[write(tmp_path / "train.jsonl", train)],
        validation_file=[write(tmp_path / "eval.jsonl", [pair("A cat, sat", "It sat.")])],
    )
    train_texts, eval_texts = load_data(data, want_eval=True)
    assert train_texts == [("A dog ran.", "Dog ran.")]
    assert eval_texts == [("A cat, sat", "It sat.")]
    assert "left out 2 training rows" in caplog.text


def test_training_on_the_evaluation_rows_alone_is_refused(tmp_path):
    file = write(tmp_path / "rows.jsonl", [pair("A cat sat.", "Cat sat.")])
    with pytest.raises(UserError, match="every training row shares a text"):
        load_data(DataArguments(train_file=[file], validation_file=[file]), want_eval=True)


def test_detokenize_writes_both_sides(tmp_path):
    rows = [pair("It is n't , he said .", "He 's here .")]
    data = DataArguments(train_file=[write(tmp_path / "train.jsonl", rows)], detokenize=True)
    assert load_data(data, want_eval=False)[0] == [("It isn't, he said.", "He's here.")]


def test_copies_are_left_out_when_asked(tmp_path, caplog):
    rows = [pair("A cat sat.", "a cat sat"), pair("A dog ran.", "Dog ran.")]
    data = DataArguments(train_file=[write(tmp_path / "train.jsonl", rows)])
    assert len(load_data(data, want_eval=False)[0]) == 2
    data.drop_copies = True
    assert load_data(data, want_eval=False)[0] == [("A dog ran.", "Dog ran.")]
    assert "left out 1 training rows whose target is their source" in caplog.text
    data.train_file = [write(tmp_path / "copies.jsonl", rows[:1])]
    with pytest.raises(UserError, match="every training row is a copy of its source"):
        load_data(data, want_eval=False)


def test_long_pairs_are_dropped_when_asked():
    texts = ["one two three", "one two three four five six seven eight"]
    tokenizer = train_tokenizer(texts * 5, 300)
    rows = TokenRows(tokenizer, texts, ["one", "two"], seed=0)
    limit = len(rows.sources[0]) + 2
    kept = without_long(rows, DataArguments(max_source_length=limit, max_target_length=9))
    assert kept.sources == rows.sources[:1] and kept.targets == rows.targets[:1]
    assert len(rows) == 2
    with pytest.raises(UserError, match="every training row is longer"):
        without_long(rows, DataArguments(max_source_length=3, max_target_length=9))


def test_a_target_of_several_blocks_is_long_only_where_its_context_is(caplog):
    tokenizer = train_tokenizer(["a"], 261)
    # with </s> the targets have 8, 9 and 17 tokens: 1, 2 and 3 blocks of 8 after a source of 2 + 2
    rows = TokenRows(tokenizer, ["ab"] * 3, ["x" * 7, "x" * 8, "x" * 16], seed=0)
    limits = {"max_source_length": 12, "max_target_length": 8}
    data = DataArguments(conditional_generation="block", **limits)
    assert without_long(rows, data).targets == rows.targets[:2]
    mixed = DataArguments(conditional_generation="block,seq2seq", **limits)
    assert without_long(rows, mixed).targets == rows.targets[:1]
    warn_of_cuts(rows, data)
    assert "1 of 3 training rows" in caplog.text


@pytest.mark.parametrize("objective", ["block", "seq2seq"])
def test_raw_text_has_no_source_to_write_from(tmp_path, objective):
    (tmp_path / "train.txt").write_text("a text\n")
    data = DataArguments(
        train_file=[str(tmp_path / "train.txt")], conditional_generation=f"ul2,{objective}"
    )
    with pytest.raises(UserError, match=f"{objective} needs training rows with a source"):
        load_data(data, want_eval=False)
