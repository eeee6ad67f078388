"""The task registry: packaged rows, and hub datasets in their real column layout."""

import runpy
from datetime import date
from importlib import resources
from pathlib import Path

import datasets
import pytest

from tess.data.rows import Example, load_rows
from tess.data.tasks.catalog import DEFAULT_DATASET, TASKS, get_task, load_task
from tess.errors import UserError
from tess.text.sentences import sentence_around, split_sentences

ROOT = Path(__file__).resolve().parents[2]
SIZES = {"train": 500, "test": 50}
SAMPLES = [(task.name, split) for task in TASKS.values() for split in task.sample_splits]

# hub path, config -> split -> rows with every column that the real dataset has
HUB = {
    ("abisee/cnn_dailymail", "3.0.0"): {
        "test": [{"article": "Long.", "highlights": "Short .\nTwo .", "id": "0a"}]
    },
    ("EdinburghNLP/xsum", None): {"test": [{"document": "Long.", "summary": "S.", "id": "1"}]},
    ("knkarthick/samsum", None): {
        "test": [{"id": "1", "dialogue": "A: hi\r\nB: hi", "summary": "They greet."}]
    },
    ("GEM/wiki_auto_asset_turk", None): {
        "train": [{"gem_id": "a", "gem_parent_id": "a", "source": "S", "target": "T"}],
        "test_asset": [
            {"gem_id": "a", "gem_parent_id": "a", "source": "S", "target": "T"},
            {"gem_id": "b", "gem_parent_id": "b", "source": "S2", "target": ""},
        ],
    },
    ("facebook/asset", "simplification"): {
        "test": [{"original": "Hard.", "simplifications": ["Easy.", "Plain."]}]
    },
    ("nyu-mll/glue", "qqp"): {
        "validation": [
            {"question1": "Q1?", "question2": "Q2?", "label": 0, "idx": 0},
            {"question1": "Q3?", "question2": "Q4?", "label": 1, "idx": 1},
            {"question1": "Q5?", "question2": "", "label": 1, "idx": 2},
            {"question1": "\u200b", "question2": "Q6?", "label": 1, "idx": 3},
            {"question1": "\ufeffQ7?", "question2": "Q8?", "label": 1, "idx": 4},
        ]
    },
    ("rajpurkar/squad", None): {
        "validation": [
            {
                "id": "5",
                "title": "Bridge",
                "context": "It is old. Dr. Smith built the bridge in 1850. It stands.",
                "question": "Who built the bridge?",
                "answers": {"text": ["Dr. Smith"], "answer_start": [11]},
            }
        ]
    },
}
HUB["GEM/wiki_auto_asset_turk", None]["train"][0]["references"] = []
for row, references in zip(
    HUB["GEM/wiki_auto_asset_turk", None]["test_asset"], (["R1", "R2"], ["R3"]), strict=True
):
    row["references"] = references


@pytest.fixture
def hub(monkeypatch):
    """`datasets.load_dataset` over the tables above; gives the list of calls."""
    calls = []

    def load_dataset(path, name=None, *, split, revision=None):
        calls.append((path, name, split, revision))
        return datasets.Dataset.from_list(HUB[path, name][split])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


@pytest.mark.parametrize(("name", "split"), SAMPLES)
def test_packaged_rows_load_and_are_real_text(name, split):
    examples = load_task(name, split)
    assert len(examples) >= 24
    assert len({example.source for example in examples}) == len(examples)
    assert load_task(name, split, limit=3) == examples[:3]


def test_packaged_test_rows_are_not_in_train_or_validation():
    for task in TASKS.values():
        texts = {
            split: {t for e in load_task(task.name, split) for t in (e.source, *e.references)}
            for split in task.sample_splits
        }
        for split in set(texts) - {"test"}:
            assert not texts["test"] & texts[split], (task.name, split)


def test_paraphrase_and_summarization_tests_have_several_references():
    assert all(len(e.references) == 3 for e in load_task("paraphrase"))
    assert any(len(e.references) > 1 for e in load_task("summarization"))


def test_samples_stay_small_and_every_dataset_in_them_has_a_licence_notice():
    folder = resources.files("tess") / "samples"
    files = [file for file in folder.iterdir() if file.name.endswith(".jsonl")]
    known = [*SAMPLES, ("dates", "train"), ("dates", "test")]
    assert sorted(file.name for file in files) == sorted(f"{n}.{s}.jsonl" for n, s in known)
    assert sum(len(file.read_bytes()) for file in files) < 350_000
    notice = (folder / "README.md").read_text(encoding="utf-8")
    for file in files:
        for row in datasets.Dataset.from_json(str(file)).to_list():
            assert f"| `{row['dataset']}` |" in notice


def test_the_dates_of_the_first_example_are_what_their_program_writes():
    program = runpy.run_path(str(ROOT / "scripts" / "make_dates.py"))
    rows = {
        split: load_rows(ROOT / "tess" / "samples" / f"dates.{split}.jsonl") for split in SIZES
    }
    assert {split: len(part) for split, part in rows.items()} == SIZES == program["SIZES"]
    assert rows == {
        split: [Example(row["source"], (row["target"],)) for row in part]
        for split, part in program["make_rows"]().items()
    }
    every = [row for part in rows.values() for row in part]
    assert len({row.target for row in every}) == len(every)
    assert all(
        row.source in program["spellings"](date.fromisoformat(row.target)) for row in every
    )
    assert [program["ordinal"](day) for day in (1, 2, 3, 4, 11, 12, 13, 21, 22, 23, 30)] == (
        "1st 2nd 3rd 4th 11th 12th 13th 21st 22nd 23rd 30th".split()
    )


@pytest.mark.parametrize(
    ("name", "dataset", "split", "want"),
    [
        ("summarization", "cnn_dailymail", "test", [Example("Long.", ("Short .\nTwo .",))]),
        ("summarization", "xsum", "test", [Example("Long.", ("S.",))]),
        ("summarization", "samsum", "test", [Example("A: hi\r\nB: hi", ("They greet.",))]),
        ("simplification", "wiki_auto", "train", [Example("S", ("T",))]),
        (
            "simplification",
            "wiki_auto",
            "test",
            [Example("S", ("R1", "R2")), Example("S2", ("R3",))],
        ),
        ("simplification", "asset", "test", [Example("Hard.", ("Easy.", "Plain."))]),
        (
            "paraphrase",
            "qqp",
            "validation",
            [Example("Q3?", ("Q4?",)), Example("Q7?", ("Q8?",))],
        ),
        (
            "question_generation",
            "squad",
            "validation",
            [Example("Dr. Smith built the bridge in 1850.", ("Who built the bridge?",))],
        ),
    ],
)
def test_hub_rows_become_examples(hub, name, dataset, split, want):
    assert load_task(name, split, dataset) == want
    assert load_task(name, split, dataset, limit=1) == want[:1]
    path, _, hub_split, _ = hub[0]
    assert path == TASKS[name].hub[dataset].path
    assert hub_split == TASKS[name].hub[dataset].splits[split]


def test_blank_hub_rows_are_counted_in_a_warning(hub, caplog):
    load_task("paraphrase", "validation", "qqp")
    assert "left out 2 rows" in caplog.text


def test_every_hub_dataset_is_covered_above():
    known = {(hub.path, hub.config) for task in TASKS.values() for hub in task.hub.values()}
    assert known == set(HUB)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("translation",), ["'translation'", "summarization", "question_generation"]),
        (("paraphrase", "test", "mrpc"), ["'mrpc'", "samples", "qqp"]),
        (("paraphrase", "test", "qqp"), ["'test'", "train", "validation"]),
        (("paraphrase", "train"), ["'train'", "test"]),
        (("paraphrase", "test", None, 0), ["limit", "0"]),
    ],
)
def test_unknown_names_are_answered_with_the_known_ones(arguments, parts):
    with pytest.raises(UserError) as error:
        load_task(*arguments)
    assert all(part in str(error.value) for part in parts)


@pytest.mark.parametrize("failure", [ConnectionError, FileNotFoundError, RuntimeError, ValueError])
def test_a_hub_that_cannot_be_reached_is_one_clear_sentence(monkeypatch, failure):
    def load_dataset(*args, **kwargs):
        raise failure("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError, match="facebook/asset.*no route to host.*packaged rows"):
        load_task("simplification", "test", "asset")


def test_a_hub_dataset_with_other_columns_is_refused_by_name(monkeypatch):
    table = datasets.Dataset.from_list([{"document": "a", "tldr": "b"}])
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: table)
    with pytest.raises(UserError, match=r"'summary'.*\['document', 'tldr'\]"):
        load_task("summarization", "test", "xsum")


def test_a_task_lists_its_datasets_and_splits():
    task = get_task("simplification")
    assert task.datasets == (DEFAULT_DATASET, "wiki_auto", "asset")
    assert task.splits("asset") == ("validation", "test")


def test_sentences_end_where_a_reader_would_end_them():
    text = 'Dr. A. Smith paid 3.50 pounds. "Why?" he asked! Then\nA title\n\nThe end'
    assert split_sentences(text) == [
        "Dr. A. Smith paid 3.50 pounds.",
        '"Why?" he asked!',
        "Then",
        "A title",
        "The end",
    ]
    assert split_sentences(" \n ") == []
    assert sentence_around("One. Two. Three.", 5) == "Two."
    assert sentence_around("", 0) == ""
