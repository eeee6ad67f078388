"""Named ways to score: what the papers of a family report, with every choice spelt out.

Figures under different names are not comparable: "BLEU" alone is three different things in the
papers on text diffusion. A protocol fixes measures, tokens, case, smoothing, number of references
and number of samples, and prints them as a signature in the manner of sacrebleu.

| protocol | judged by | what it reproduces |
|---|---|---|
| `tess` | `bleu` | TESS: corpus BLEU, stemmed ROUGE, `evaluate`'s SARI, distinct; one reference |
| `diffuseq` | `sentence_bleu_swapped` | DiffuSeq's program, MBR over candidates included |
| `fairseq` | `fairseq_bleu` | Difformer, NeoDiff: fairseq's corpus BLEU; one reference |
| `asset` | `sari` | EASSE on ASSET or TurkCorpus: SARI and BLEU over all references, FKGL |
| `summ` | `rougeL` | ROUGE-1, -2, -L and -Lsum with stemming |
| `paraphrase` | `ibleu` | iBLEU, with BLEU, self-BLEU, diversity and copying beside it |
"""

import importlib.metadata
from collections.abc import Sequence
from dataclasses import dataclass

from tess.errors import UserError
from tess.metrics.bertscore import BertScore
from tess.metrics.candidates import candidate_measures
from tess.metrics.catalog import get_protocol
from tess.metrics.measures import IBLEU_ALPHA, Measure, measures
from tess.metrics.tokens import check_parallel
from tess.text.sentences import split_sentences
from tess.version import VERSION


@dataclass(frozen=True)
class ProtocolScores:
    """Figures of one system: `signature` is that of the main measure, `signatures` are all."""

    protocol: str
    signature: str
    measures: dict[str, Measure]
    signatures: dict[str, str]


def apply_protocol(
    name: str,
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    sources: Sequence[str],
    *,
    candidates: Sequence[Sequence[str]] | None = None,
    samples: str = "1",
    bertscore: BertScore | None = None,
) -> ProtocolScores:
    """Score one system.

    Args:
        name: a key of `PROTOCOLS`.
        predictions: one text per source.
        references: row i has its own list of one or more; some protocols use the first alone.
        candidates: for `diffuseq`, n samples per source, of which it chooses by minimum Bayes risk;
            figures of the choice and of diversity join those of `predictions`, never replace them.
        samples: how many samples each prediction was chosen from, and how ("4-mbr_bleu"), for the
            signatures.
        bertscore: a loaded model, whose figure joins the others.

    Raises:
        UserError: an unknown protocol, texts that do not line up, candidates for a protocol that
            has no use for them, or not equally many (two or more) for every source.
    """
    protocol = get_protocol(name)
    check_parallel(sources, predictions, references)
    if protocol.first_reference:
        references = [row[:1] for row in references]
    scores = measures(protocol.measures, predictions, references, sources)
    counts = dict.fromkeys(scores, samples)
    if candidates is not None:
        if not protocol.candidates:
            raise UserError(f"protocol {name!r} scores one text per source, got candidates as well")
        scores |= (more := candidate_measures(candidates, references))
        number = len(candidates[0])
        counts |= {k: f"{number}-mbr" if k.startswith("mbr_") else str(number) for k in more}
    numbers = {len(row) for row in references}
    refs = str(numbers.pop()) if len(numbers) == 1 else "var"
    signatures = {key: _signature(name, key, refs, counts[key]) for key in scores}
    if bertscore is not None:
        scores["bertscore"] = bertscore.measure(predictions, references)
        signatures["bertscore"] = f"{name}|{bertscore.signature}|refs:{refs}|samples:{samples}"
    return ProtocolScores(name, signatures[protocol.main], scores, signatures)


def baselines(
    protocol_or_task: str,
    sources: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    words: int | None = None,
    sentences: int | None = None,
    fixed: str | None = None,
) -> dict[str, list[str]]:
    """What can be had without a model: texts for every source, by the name of the baseline.

    `copy` is the source; `lead` its first sentences; `truncation` its first words, as many for
    every row; `fixed`, where it is given, the same text for every source.

    Args:
        protocol_or_task: the lead has `lead_sentences` of it unless told.
        references: how long texts are where `words` is not given: their mean number of words over
            all rows. Give the mean of the *training* targets as `words` where it is known.
        words: blank-separated words that truncation keeps.
        sentences: sentences that the lead keeps.
        fixed: a text that could be written without reading any source, as "We propose a new
            method." for abstracts of papers: what it scores is no merit of a model.

    Raises:
        UserError: no rows, or less than one word or sentence.
    """
    check_parallel(sources, sources, references)
    words = mean_words(references) if words is None else words
    sentences = lead_sentences(protocol_or_task) if sentences is None else sentences
    for what, number in (("words", words), ("sentences", sentences)):
        if number < 1:
            raise UserError(f"{what} of a baseline must be at least 1, got {number}")
    return {
        "copy": list(sources),
        "lead": [" ".join(split_sentences(source)[:sentences]) for source in sources],
        "truncation": [" ".join(source.split()[:words]) for source in sources],
    } | ({} if fixed is None else {"fixed": [fixed] * len(sources)})


def mean_words(references: Sequence[Sequence[str]]) -> int:
    """The mean number of blank-separated words of all references, rounded, at least 1."""
    lengths = [len(text.split()) for row in references for text in row]
    return max(1, round(sum(lengths) / len(lengths)))


def lead_sentences(protocol_or_task: str) -> int:
    """Sentences of the lead baseline: 3 for summaries (as on CNN/DailyMail), else 1."""
    return 3 if protocol_or_task in ("summ", "summarization") else 1


_BLEU = "tok:13a|case:mixed|smooth:exp|eff:no"
_SARI = "tok:13a|case:lc|rules:easse"
_ROUGE = "tok:rouge-score|case:lc|stem:yes|best-ref|sentences:rule"
_WORDS = "tok:13a|case:lc"
_SENTENCE = "tok:bert-basic-decoded|pieces:joined|case:lc|smooth:nltk-method4|mean-of-sentences"
_SWAPPED = f"{_SENTENCE}|hypothesis:reference"
_DIFFUSEQ_ROUGE = "tok:rouge-score|case:lc|stem:no|best-ref"
_CHOICES = {
    "bleu": _BLEU,
    "bleu_lowercase": "tok:13a|case:lc|smooth:exp|eff:no",
    "fairseq_bleu": "tok:13a|case:lc|smooth:none|ref-len:closest",
    "self_bleu": f"{_BLEU}|against:source",
    "ibleu": f"alpha:{IBLEU_ALPHA}|{_BLEU}",
    "sari": _SARI,
    "sari_evaluate": "tok:13a|case:lc|rules:evaluate|mean-of-rows",
    "rougeL_unstemmed": _DIFFUSEQ_ROUGE,
    "exact_copy_share": "tok:blanks|case:mixed",
    "fkgl": "words:13a-with-punctuation|syllables:vowel-groups|sentences:rule",
    "sentence_bleu": _SENTENCE,
    "sentence_bleu_swapped": _SWAPPED,
    "distinct1_bert": "tok:bert-basic-decoded|pieces:joined|case:lc|mean-of-rows",
    "candidates_self_bleu": f"{_SENTENCE}|pairs:i<j",
    "candidates_div4": "tok:bert-basic-decoded|pieces:joined|case:lc|pooled-per-source",
}
_PREFIXES = {"rouge": _ROUGE, "sari_": _SARI, "distinct": f"{_WORDS}|mean-of-rows"}


def _signature(protocol: str, measure: str, refs: str, samples: str) -> str:
    """`protocol|measure|choices|refs:n|samples:n|version:...`."""
    base = measure.removeprefix("mbr_")
    choices = _CHOICES.get(base) or next(
        (text for prefix, text in _PREFIXES.items() if base.startswith(prefix)), _WORDS
    )
    version = f"tess-{VERSION}+sacrebleu-{importlib.metadata.version('sacrebleu')}"
    return f"{protocol}|{measure}|{choices}|refs:{refs}|samples:{samples}|version:{version}"
