"""Simplification: a sentence to a simpler one."""

from tess.data.tasks.hub import PARQUET_BRANCH, HubDataset, Pair, Row, pair_of_columns


def _target_or_references(row: Row) -> Pair:
    """GEM's layout: `references` is empty where there is one `target`."""
    return row["source"], list(row["references"]) or [row["target"]]


SIMPLIFICATION = {
    # Wiki-Auto to train on; ASSET and TurkCorpus to test on, as GEM bundles them
    "wiki_auto": HubDataset(
        "GEM/wiki_auto_asset_turk",
        {
            "train": "train",
            "validation": "validation",
            "test": "test_asset",
            "test_turk": "test_turk",
        },
        ("source", "target", "references"),
        _target_or_references,
        revision=PARQUET_BRANCH,
    ),
    "asset": HubDataset(
        "facebook/asset",
        {"validation": "validation", "test": "test"},
        ("original", "simplifications"),
        pair_of_columns("original", "simplifications"),
        config="simplification",
    ),
}
