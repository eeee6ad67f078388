"""Summarization: a text to its summary."""

from tess.data.tasks.hub import ALL_SPLITS, PARQUET_BRANCH, HubDataset, pair_of_columns

SUMMARIZATION = {
    "cnn_dailymail": HubDataset(
        "abisee/cnn_dailymail",
        ALL_SPLITS,
        ("article", "highlights"),
        pair_of_columns("article", "highlights"),
        config="3.0.0",
    ),
    "xsum": HubDataset(
        "EdinburghNLP/xsum",
        ALL_SPLITS,
        ("document", "summary"),
        pair_of_columns("document", "summary"),
        revision=PARQUET_BRANCH,
    ),
    "samsum": HubDataset(
        "knkarthick/samsum",
        ALL_SPLITS,
        ("dialogue", "summary"),
        pair_of_columns("dialogue", "summary"),
    ),
}
