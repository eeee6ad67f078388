"""Paraphrase: a sentence to one that means the same."""

from tess.data.tasks.hub import HubDataset, Pair, Row


def _duplicate_questions(row: Row) -> Pair | None:
    """QQP labels pairs of questions: 1 is a paraphrase, 0 is not."""
    return (row["question1"], [row["question2"]]) if row["label"] == 1 else None


PARAPHRASE = {
    # the labels of GLUE's test split are secret, so it has no known paraphrases
    "qqp": HubDataset(
        "nyu-mll/glue",
        {"train": "train", "validation": "validation"},
        ("question1", "question2", "label"),
        _duplicate_questions,
        config="qqp",
    ),
}
