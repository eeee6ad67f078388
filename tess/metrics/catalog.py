"""The protocols by name: which measures each has; what they are is in `protocols`."""

from dataclasses import dataclass

from tess.errors import UserError


@dataclass(frozen=True)
class Protocol:
    """A named way to score.

    main: the measure that a system is judged by. measures: the keys of the figures, in the order of
    reports. what: one line. first_reference: only the first reference of a row counts. candidates:
    measures over several texts per source, where they are given.
    """

    name: str
    main: str
    measures: tuple[str, ...]
    what: str
    first_reference: bool = False
    candidates: tuple[str, ...] = ()


MEASURES_OF_CHOICE = (
    "sentence_bleu_swapped",
    "sentence_bleu",
    "rougeL_unstemmed",
    "distinct1_bert",
)
CANDIDATE_MEASURES = (
    *(f"mbr_{name}" for name in MEASURES_OF_CHOICE),
    "candidates_self_bleu",
    "candidates_div4",
)
"""Of several samples of each source."""

_COPYING = ("copy_rate", "exact_copy_share", "repeated_words", "length_ratio")
_DISTINCT = ("distinct1", "distinct2", "distinct3", "distinct4")

PROTOCOLS: dict[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            "tess",
            "bleu",
            ("bleu", "rouge1", "rouge2", "rougeL", "rougeLsum", "sari_evaluate", *_DISTINCT),
            "TESS (Karimi Mahabadi et al. 2024): corpus BLEU, one sample",
            first_reference=True,
        ),
        Protocol(
            "diffuseq",
            "sentence_bleu_swapped",
            ("sentence_bleu_swapped", "sentence_bleu", "rougeL_unstemmed", "distinct1_bert"),
            "DiffuSeq (Gong et al. 2023): mean sentence BLEU, MBR over candidates",
            first_reference=True,
            candidates=CANDIDATE_MEASURES,
        ),
        Protocol(
            "fairseq",
            "fairseq_bleu",
            ("fairseq_bleu", "bleu"),
            "Difformer, NeoDiff: fairseq's corpus BLEU on tokenised text, sacrebleu beside it",
            first_reference=True,
        ),
        Protocol(
            "asset",
            "sari",
            ("sari", "sari_add", "sari_keep", "sari_delete", "bleu_lowercase", "fkgl")
            + ("exact_copy_share", "source_length_ratio"),
            "EASSE on ASSET or TurkCorpus (Alva-Manchego et al. 2020): SARI over all references",
        ),
        Protocol(
            "summ",
            "rougeL",
            ("rouge1", "rouge2", "rougeL", "rougeLsum", "novelty2", "repeated_words")
            + ("length_ratio",),
            "summarization: F1 of ROUGE with stemming",
        ),
        Protocol(
            "paraphrase",
            "ibleu",
            ("ibleu", "bleu", "self_bleu", "distinct1", "distinct2", "novelty1", *_COPYING),
            "paraphrase: iBLEU (Sun and Zhou 2012), with what a copy of the source would get",
        ),
    )
}


def get_protocol(name: str) -> Protocol:
    """The protocol called `name`; UserError with the known names otherwise."""
    if name not in PROTOCOLS:
        raise UserError(f"unknown protocol {name!r}; known are {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]
