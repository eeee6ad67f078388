"""Question generation: a sentence to a question that it answers."""

from tess.data.tasks.hub import HubDataset, Pair, Row
from tess.text.sentences import sentence_around


def _answer_sentence(row: Row) -> Pair:
    """Du et al. (2017): the question is asked of the sentence in which the answer begins."""
    return sentence_around(row["context"], row["answers"]["answer_start"][0]), [row["question"]]


QUESTION_GENERATION = {
    "squad": HubDataset(
        "rajpurkar/squad",
        {"train": "train", "validation": "validation"},
        ("context", "question", "answers"),
        _answer_sentence,
    ),
}
