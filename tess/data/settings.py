"""Where the rows of a training come from, as settings."""

from dataclasses import dataclass

from tess.options import option


@dataclass
class DataArguments:
    """Where texts come from, and what they are trained on."""

    task: str | None = option(None, "Train on this task's packaged rows, or on its --dataset.")
    dataset: str | None = option(None, "A dataset of --task.")
    train_file: list[str] = option(
        [], "Local files of pairs or texts: JSONL, CSV, TSV, Parquet (.gz too), or .txt."
    )
    validation_file: list[str] = option([], "The same for evaluation.")
    data_root: str | None = option(None, "Folder that relative file names start from.")
    source_column: str = option("source", "Column of the source.")
    target_column: str = option("target", "Column of the target; of a list the first is used.")
    text_column: str | None = option(
        None, "Read raw text from this column; no sources and targets then."
    )
    detokenize: bool = option(
        False, "Undo Penn-Treebank tokenisation of local files (tess/text/detokenize.py)."
    )
    max_source_length: int = option(
        128, "Tokens of a source, special ones included; longer ones are cut."
    )
    max_target_length: int = option(
        128, "Tokens of a target, special ones included; longer ones are cut."
    )
    long_rows: str = option(
        "cut",
        "What to do with pairs beyond these lengths: cut them, or drop them.",
        choices=["cut", "drop"],
    )
    drop_copies: bool = option(
        False,
        "Leave out training pairs whose target is the source, up to case and punctuation.",
    )
    conditional_generation: str = option(
        "seq2seq",
        "Objective, or several separated by commas (one is drawn per batch): seq2seq, block, "
        "prefix_lm, span_infilling, ul2, unconditional, ul2_with_unconditional, text_infilling.",
    )
    max_train_samples: int | None = option(None, "Use the first so many training rows.")
    max_eval_samples: int | None = option(None, "Use the first so many evaluation rows.")
    bucket_by_length: bool = option(True, "Batches of like lengths: less padding.")
