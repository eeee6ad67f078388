"""Where the rows of a training come from, as settings."""

from dataclasses import dataclass

from tess.errors import UserError
from tess.options import option

CORRUPTIONS = (
    "seq2seq", "block", "prefix_lm", "span_infilling", "ul2", "unconditional",
    "ul2_with_unconditional", "text_infilling",
)
"""What `conditional_generation` may name: how a row becomes what is given and what is predicted.

- `seq2seq`: the target given the source.
- `block`: a block of the target given the source and all blocks before it, for texts longer than
  the canvas (arXiv 2210.17432, 2503.09573). Blocks are of `max_target_length` tokens, each equally
  likely; the last one ends with `</s>`, and of a text that fits it is `seq2seq`. The blocks before
  follow the source's `</s>`, and where `max_source_length` is short, their oldest tokens are cut.
  Padding, where it has a weight, fills the block. Generate with the same `block_length`.
- `prefix_lm`: the rest of a text given its beginning (1 token up to half of it), which is the
  source.
- `span_infilling`: T5 spans (15 %, mean length 3) noised in place; the rest of the text is clean
  context.
- `ul2`: in equal shares T5 spans (15 %, 3 or 8), aggressive spans (50 %, 3, 8 or 48) and
  `prefix_lm`.
- `unconditional`: the whole text.
- `ul2_with_unconditional`: in equal shares the three of `ul2` and `unconditional`.
- `text_infilling`: the text given itself with spans hidden behind one `<mask>` each (0 to 50 %,
  mean length 3).
"""

NEED_SOURCE = ("seq2seq", "block")
"""Corruptions for pairs only."""

IN_PLACE = {"span_infilling", "ul2", "ul2_with_unconditional"}
"""Those with clean context inside the target."""


def corruption_names(conditional_generation: str) -> tuple[str, ...]:
    """The corruptions of a comma-separated mixture.

    Raises:
        UserError: for an unknown or missing name, listing the known ones.
    """
    names = tuple(name.strip() for name in conditional_generation.split(","))
    if unknown := [name for name in names if name not in CORRUPTIONS]:
        raise UserError(
            f"conditional_generation has no {unknown[0]!r}; the known ones are "
            f"{', '.join(CORRUPTIONS)}"
        )
    return names


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
        "How a row is corrupted, or several ways separated by commas (one is drawn per batch): "
        f"{', '.join(CORRUPTIONS)}.",
    )
    max_train_samples: int | None = option(None, "Use the first so many training rows.")
    max_eval_samples: int | None = option(None, "Use the first so many evaluation rows.")
    bucket_by_length: bool = option(True, "Batches of like lengths: less padding.")

    def __post_init__(self) -> None:
        self.corruptions = corruption_names(self.conditional_generation)
