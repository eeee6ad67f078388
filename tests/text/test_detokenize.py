"""Penn-Treebank tokenisation is undone, ordinary text stays as it is."""

import pytest

from tess.data.tasks.catalog import load_task
from tess.text.detokenize import detokenize


@pytest.mark.parametrize(
    ("tokenised", "written"),
    [
        ("It is n't the dog 's bone , is it ?", "It isn't the dog's bone, is it?"),
        ("He said `` no '' ; she left .", 'He said "no"; she left.'),
        ("Known as '' zalzalak '' ( raw ) .", 'Known as "zalzalak" (raw).'),
        ("Called '' '' one of the best '' '' by all .", 'Called "one of the best" by all.'),
        ("Some 1 , 000 of 12 , 5 and 10 : 30 , in 2008 -- 09 .", None),
        ("In 1990 , 12 men came .", "In 1990, 12 men came."),
        ("It has 1 , 250 , 000 people .", "It has 1,250,000 people."),
        ("A step - daughter , Kate .", "A step-daughter, Kate."),
        ("-LRB- QTL -RRB- is a region .", "(QTL) is a region."),
        ("He said '' stop .", 'He said "stop.'),
        ("He left ''", 'He left"'),
    ],
)
def test_tokenised_text_becomes_written_text(tokenised, written):
    if written is None:
        written = "Some 1,000 of 12, 5 and 10:30, in 2008-09."
    assert detokenize(tokenised) == written


@pytest.mark.parametrize(
    "text",
    [
        "Ordinary text - with a dash - isn't changed.",
        'She said "yes", and (then) left... 1,000 people, 3.5 %.',
        "Well ... it costs $ 5.",
        "a",
    ],
)
def test_ordinary_text_stays(text):
    assert detokenize(text) == text


def test_detokenising_twice_changes_nothing_more():
    rows = load_task("simplification", "test") + load_task("question_generation", "test")
    for row in rows:
        once = detokenize(row.source)
        assert detokenize(once) == once


def test_packaged_rows_are_detokenised():
    for task in ("simplification", "question_generation"):
        for row in load_task(task, "test"):
            assert " ," not in row.source and "''" not in row.source and "``" not in row.source
