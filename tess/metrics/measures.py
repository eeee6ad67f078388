"""Quality figures as functions of sums of row statistics, so that a resample is a sum of rows.

A corpus figure of this kind (corpus BLEU, SARI, a mean, a ratio of totals) is known for every
choice of rows as soon as each row's statistics are: a bootstrap of R resamples is the product of an
[R, N] matrix of counts with the [N, S] statistics (`tess.metrics.significance`).

| name | figure | tokens |
|---|---|---|
| `bleu`, `bleu_lowercase` | corpus BLEU, sacrebleu's, 0-100 | 13a, 13a-lc |
| `fairseq_bleu` | corpus BLEU without smoothing, fairseq's, 0-100 | 13a-lc |
| `sentence_bleu` | mean of NLTK's sentence BLEU, smoothing method 4, 0-100 | bert |
| `sentence_bleu_swapped` | the same with text and reference changed over (DiffuSeq's) | bert |
| `chrf` | corpus chrF2, 0-100 | characters |
| `self_bleu` | corpus BLEU against the sources, 0-100 | 13a |
| `ibleu` | 0.8 bleu - 0.2 self_bleu (Sun and Zhou 2012) | 13a |
| `sari`, `sari_add`, `sari_keep`, `sari_delete` | EASSE's SARI (`tess.metrics.sari`), 0-100 |
13a-lc |
| `sari_evaluate` | mean row SARI of Hugging Face `evaluate`, 0-100 | 13a-lc |
| `rouge1`, `rouge2`, `rougeL`, `rougeLsum` | mean F1, best reference, 0-100 | stemmed a-z 0-9 |
| `rougeL_unstemmed` | the same without stemming | a-z 0-9 |
| `fkgl` | Flesch-Kincaid grade level (`tess.metrics.readability`) | 13a-lc |
| `distinct1` ... `distinct4` | mean over rows of distinct n-grams / n-grams | 13a-lc |
| `distinct1_bert` | the same for words; an empty row counts 0 (DiffuSeq's) | bert |
| `novelty1` ... `novelty4` | share of the texts' n-grams that are not in their source | 13a-lc |
| `repeated_words` | share of tokens that equal the token before them | 13a-lc |
| `copy_rate` | share of tokens that are in the source, each used once at most | 13a-lc |
| `exact_copy_share` | share of rows equal to their source but for blanks around words | - |
| `length_ratio` | tokens / tokens of the references (mean over a row's) | 13a-lc |
| `source_length_ratio` | tokens / tokens of the sources | 13a-lc |

A ratio over nothing is 0. Shapes: N rows, S statistics.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import DefaultTokenizer

from tess.errors import UserError
from tess.metrics.ngrams import (
    Tokens,
    bleu_rows,
    chrf_rows,
    corpus_bleu,
    corpus_chrf,
    divide,
    sentence_bleu,
)
from tess.metrics.readability import grade_level, readability_rows
from tess.metrics.sari import sari_of_sums, sari_rows
from tess.metrics.tokens import (
    TOKENIZERS,
    check_parallel,
    check_references,
    tokenize_13a_lower,
)
from tess.text.sentences import split_sentences

ROUGE_TYPES = ("rouge1", "rouge2", "rougeL", "rougeLsum")
ORDERS = (1, 2, 3, 4)
IBLEU_ALPHA = 0.8
Combine = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True, eq=False)
class Measure:
    """One figure of a system on a test set.

    name: a key of the reports. rows: [N, S] float64, the statistics of each row. combine: sums of
    rows [..., S] to values [...]. higher_is_better: None where neither end is good.
    """

    name: str
    rows: np.ndarray
    combine: Combine
    higher_is_better: bool | None

    @property
    def value(self) -> float:
        """The figure of all rows."""
        return float(self.combine(self.rows.sum(axis=0)))


def measures(
    names: Iterable[str],
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    sources: Sequence[str],
) -> dict[str, Measure]:
    """The named measures, in the order given; row i has its own list `references[i]`.

    Statistics that several of them share are counted once.

    Raises:
        UserError: an unknown name, no rows, lists of different lengths, a row without a reference,
            or a blank reference.
    """
    names = list(names)
    if unknown := [name for name in names if name not in MEASURES]:
        raise UserError(f"unknown measure {unknown[0]!r}; known are {', '.join(MEASURES)}")
    check_parallel(sources, predictions, references)
    texts = _Texts(predictions, references, sources)
    return {name: _named(name, MEASURES[name](texts)) for name in names}


def mean_measure(
    name: str, values: Iterable[float], *, higher_is_better: bool | None = True
) -> Measure:
    """The mean over rows of one value per row."""
    column = np.array(list(values), dtype=np.float64)
    rows = np.stack([column, np.ones_like(column)], axis=1)
    return Measure(name, rows, ratio, higher_is_better)


def ratio(sums: np.ndarray) -> np.ndarray:
    """First statistic over the second, 0 where that is 0: [...] of [..., 2]."""
    return divide(sums[..., 0], sums[..., 1])


@dataclass(frozen=True)
class _Texts:
    """The three texts of each row, and what is counted of them, once."""

    predictions: Sequence[str]
    references: Sequence[Sequence[str]]
    sources: Sequence[str]

    def split(self, name: str) -> tuple[list[Tokens], list[list[Tokens]]]:
        """The tokens of the predictions and of the references; a reference without any is none:
        13a deletes "<skipped>", BERT's normaliser some signs."""
        split = TOKENIZERS[name]
        lists = [list(filter(None, map(split, row))) or [()] for row in self.references]
        return [split(text) for text in self.predictions], lists

    @cached_property
    def bleu_13a(self) -> np.ndarray:
        return bleu_rows(*self.split("13a"))

    @cached_property
    def bleu_13a_lower(self) -> np.ndarray:
        return bleu_rows(*self.split("13a-lc"))

    @cached_property
    def self_bleu(self) -> np.ndarray:
        return _Texts(self.predictions, [[s] for s in self.sources], self.sources).bleu_13a

    @cached_property
    def sari(self) -> np.ndarray:
        return sari_rows(self.sources, self.predictions, self.references)

    @cached_property
    def rouge(self) -> dict[str, np.ndarray]:
        return rouge_rows(self.predictions, self.references)

    @cached_property
    def tokens(self) -> list[tuple[str, ...]]:
        return [tokenize_13a_lower(text) for text in self.predictions]

    @cached_property
    def source_tokens(self) -> list[tuple[str, ...]]:
        return [tokenize_13a_lower(text) for text in self.sources]

    @cached_property
    def lengths(self) -> np.ndarray:
        return np.array([len(row) for row in self.tokens], dtype=np.float64)


def rouge_rows(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    types: Sequence[str] = ROUGE_TYPES,
    *,
    stem: bool = True,
) -> dict[str, np.ndarray]:
    """[N] F1 of each type, 0-1, of the best reference of each row for that type.

    Raises:
        UserError: a row without a reference, or a blank one.
    """
    check_references(references)
    scorer = RougeScorer(list(types), tokenizer=_STEMMED if stem else _UNSTEMMED)
    best = []
    for prediction, row in zip(predictions, references, strict=True):
        lined = _one_sentence_per_line(prediction)
        scores = scorer.score_multi([_one_sentence_per_line(text) for text in row], lined)
        best.append([scores[kind].fmeasure for kind in types])
    return dict(zip(types, np.array(best).T, strict=True))


class _CachedTokenizer(DefaultTokenizer):
    """rouge-score's; stemming is most of its time, and references come again."""

    @lru_cache(1 << 12)
    def tokenize(self, text: str) -> list[str]:
        return super().tokenize(text)


_STEMMED, _UNSTEMMED = _CachedTokenizer(use_stemmer=True), _CachedTokenizer(use_stemmer=False)


def _one_sentence_per_line(text: str) -> str:
    return "\n".join(split_sentences(text))


def distinct_rows(rows: Sequence[Sequence[str]], n: int, *, short_rows: bool = False) -> np.ndarray:
    """[N, 2]: distinct n-grams / n-grams and a 1 for each row of tokens that has n-grams.

    `short_rows`: the others count too, as 0.
    """
    result = np.zeros((len(rows), 2))
    for out, row in zip(result, rows, strict=True):
        grams = ngrams(row, n)
        if grams or short_rows:
            out[:] = len(set(grams)) / max(len(grams), 1), 1.0
    return result


def ngrams(tokens: Sequence[str], n: int) -> list[tuple[str, ...]]:
    """All n-grams of a row, with repeats."""
    return list(zip(*(tokens[i:] for i in range(n)), strict=False))


# What each name counts, and what it makes of the sums.

Definition = tuple[np.ndarray, Combine, bool | None]


def _named(name: str, definition: Definition) -> Measure:
    return Measure(name, *definition)


def _mean(values: np.ndarray) -> Definition:
    measure = mean_measure("", values)
    return measure.rows, measure.combine, True


def _ratio(part: Iterable[float], whole: Iterable[float], better: bool | None) -> Definition:
    return np.stack([np.array(list(part), float), np.array(list(whole), float)], 1), ratio, better


def _ibleu(texts: _Texts) -> Definition:
    def combine(sums: np.ndarray) -> np.ndarray:
        bleu, self_bleu = corpus_bleu(sums[..., :10]), corpus_bleu(sums[..., 10:])
        return IBLEU_ALPHA * bleu - (1 - IBLEU_ALPHA) * self_bleu

    return np.concatenate([texts.bleu_13a, texts.self_bleu], axis=1), combine, True


def _sentence_bleu(texts: _Texts) -> Definition:
    return _mean(sentence_bleu(*texts.split("bert")))


def _sentence_bleu_swapped(texts: _Texts) -> Definition:
    """DiffuSeq's program hands NLTK the system's text as the reference. With several references,
    the best one counts."""
    best = [
        sentence_bleu(references, [[text]] * len(references)).max()
        for text, references in zip(*texts.split("bert"), strict=True)
    ]
    return _mean(np.array(best))


def _sari_part(place: int) -> Callable[[_Texts], Definition]:
    return lambda texts: (texts.sari, lambda sums: sari_of_sums(sums)[..., place], True)


def _sari_evaluate(texts: _Texts) -> Definition:
    rows = sari_rows(texts.sources, texts.predictions, texts.references, protocol="evaluate")
    return rows, lambda sums: sari_of_sums(sums, protocol="evaluate")[..., 0], True


def _rouge(kind: str) -> Callable[[_Texts], Definition]:
    return lambda texts: _mean(100.0 * texts.rouge[kind])


def _rouge_l_unstemmed(texts: _Texts) -> Definition:
    rows = rouge_rows(texts.predictions, texts.references, ("rougeL",), stem=False)
    return _mean(100.0 * rows["rougeL"])


def _distinct(n: int) -> Callable[[_Texts], Definition]:
    return lambda texts: (distinct_rows(texts.tokens, n), ratio, True)


def _distinct_bert(texts: _Texts) -> Definition:
    rows = [TOKENIZERS["bert"](text) for text in texts.predictions]
    return distinct_rows(rows, 1, short_rows=True), ratio, True


def _novelty(n: int) -> Callable[[_Texts], Definition]:
    def define(texts: _Texts) -> Definition:
        grams = [ngrams(row, n) for row in texts.tokens]
        known = [set(ngrams(row, n)) for row in texts.source_tokens]
        new = [sum(g not in k for g in row) for row, k in zip(grams, known, strict=True)]
        return _ratio(new, map(len, grams), None)

    return define


def _repeated_words(texts: _Texts) -> Definition:
    repeats = [sum(a == b for a, b in zip(r, r[1:], strict=False)) for r in texts.tokens]
    return _ratio(repeats, texts.lengths, False)


def _copy_rate(texts: _Texts) -> Definition:
    pairs = zip(texts.tokens, texts.source_tokens, strict=True)
    copied = [(Counter(row) & Counter(source)).total() for row, source in pairs]
    return _ratio(copied, texts.lengths, None)


def _exact_copy_share(texts: _Texts) -> Definition:
    pairs = zip(texts.predictions, texts.sources, strict=True)
    same = np.array([text.split() == source.split() for text, source in pairs], float)
    return _ratio(same, np.ones_like(same), False)


def _length_ratio(texts: _Texts) -> Definition:
    wanted = [np.mean([len(tokenize_13a_lower(t)) for t in row]) for row in texts.references]
    return _ratio(texts.lengths, wanted, None)


MEASURES: dict[str, Callable[[_Texts], Definition]] = {
    "bleu": lambda texts: (texts.bleu_13a, corpus_bleu, True),
    "bleu_lowercase": lambda texts: (texts.bleu_13a_lower, corpus_bleu, True),
    "fairseq_bleu": lambda texts: (
        texts.bleu_13a_lower,
        lambda sums: corpus_bleu(sums, smooth="none"),
        True,
    ),
    "sentence_bleu": _sentence_bleu,
    "sentence_bleu_swapped": _sentence_bleu_swapped,
    "chrf": lambda texts: (chrf_rows(texts.predictions, texts.references), corpus_chrf, True),
    "self_bleu": lambda texts: (texts.self_bleu, corpus_bleu, False),
    "ibleu": _ibleu,
    **{
        name: _sari_part(place)
        for place, name in enumerate(("sari", "sari_add", "sari_keep", "sari_delete"))
    },
    "sari_evaluate": _sari_evaluate,
    **{kind: _rouge(kind) for kind in ROUGE_TYPES},
    "rougeL_unstemmed": _rouge_l_unstemmed,
    "fkgl": lambda texts: (readability_rows(texts.predictions), grade_level, False),
    **{f"distinct{n}": _distinct(n) for n in ORDERS},
    "distinct1_bert": _distinct_bert,
    **{f"novelty{n}": _novelty(n) for n in ORDERS},
    "repeated_words": _repeated_words,
    "copy_rate": _copy_rate,
    "exact_copy_share": _exact_copy_share,
    "length_ratio": _length_ratio,
    "source_length_ratio": lambda texts: _ratio(texts.lengths, map(len, texts.source_tokens), None),
}
"""Every known measure: what it counts in each row, what it makes of sums, and its better end."""
