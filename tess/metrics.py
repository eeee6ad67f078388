"""What a set of predictions scores against references and sources, as one flat dictionary.

`score` gives these keys, always all of them, in this order. "0-100" is a percentage; the other
figures are plain ratios. "Tokens" are lower-cased 13a tokens (sacrebleu's mteval-v13a).

| key | meaning |
|---|---|
| `rouge1` `rouge2` `rougeL` `rougeLsum` | mean over rows of the best F1 of a reference, 0-100 |
| `bleu` `bleu_signature` | corpus BLEU over all references, 0-100, and sacrebleu's signature |
| `chrf` `chrf_signature` | corpus chrF2, 0-100, and its signature |
| `sari` `sari_add` `sari_keep` `sari_delete` | corpus SARI as EASSE does it, 0-100 (`tess.sari`) |
| `sari_evaluate` | mean row SARI as Hugging Face `evaluate` does it (the TESS paper's), 0-100 |
| `self_bleu` | corpus BLEU of the predictions against their *sources*: 100 is a copy, 0-100 |
| `ibleu` | 0.8 bleu - 0.2 self_bleu (Sun and Zhou 2012): paraphrase without credit for copying |
| `distinct1` ... `distinct4` | mean over rows of distinct n-grams / n-grams (rows long enough) |
| `corpus_distinct1` ... `corpus_distinct4` | distinct n-grams / n-grams of all rows together |
| `repeated_words` | share of tokens that equal the token before them |
| `copy_rate` | share of the predictions' tokens that are in the source, each used once at most |
| `exact_copies` | number of predictions equal to their source but for blanks around words |
| `length_ratio` | tokens of the predictions / tokens of the references (mean over a row's) |
| `source_length_ratio` | tokens of the predictions / tokens of the sources |
| `empty_predictions` | number of predictions with no visible character |
| `rows` | number of rows |

ROUGE is rouge-score's with stemming; for Lsum, texts are split into sentences by rule
(`tess.sentences`). Its tokenizer keeps only a-z and 0-9, so on other scripts it is 0: use chrF
there. A ratio over nothing is 0.
"""

from collections import Counter
from collections.abc import Sequence
from itertools import chain, zip_longest

from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU, CHRF

from tess.sari import check_parallel, sari, tokenize_13a
from tess.sentences import split_sentences

ROUGE_TYPES = ("rouge1", "rouge2", "rougeL", "rougeLsum")
ORDERS = (1, 2, 3, 4)
IBLEU_ALPHA = 0.8


def score(
    predictions: Sequence[str], references: Sequence[Sequence[str]], sources: Sequence[str]
) -> dict[str, float | int | str]:
    """All metrics of the table at the top of this module; rows may have different numbers of
    references.

    Raises:
        UserError: no rows, lists of different lengths, or a row without a reference.
    """
    check_parallel(sources, predictions, references)
    bleu = _sacrebleu(BLEU(), predictions, references)
    chrf = _sacrebleu(CHRF(), predictions, references)
    self_bleu = _sacrebleu(BLEU(), predictions, [[source] for source in sources])[0]
    corpus_sari = sari(sources, predictions, references)
    return {
        **rouge(predictions, references),
        "bleu": bleu[0],
        "bleu_signature": bleu[1],
        "chrf": chrf[0],
        "chrf_signature": chrf[1],
        "sari": corpus_sari.sari,
        "sari_add": corpus_sari.add,
        "sari_keep": corpus_sari.keep,
        "sari_delete": corpus_sari.delete,
        "sari_evaluate": sari(sources, predictions, references, protocol="evaluate").sari,
        "self_bleu": self_bleu,
        "ibleu": IBLEU_ALPHA * bleu[0] - (1 - IBLEU_ALPHA) * self_bleu,
        **distinct(predictions),
        **_surface(predictions, references, sources),
    }


def rouge(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Mean ROUGE F1 (0-100), the best reference of each row for each type."""
    scorer = RougeScorer(list(ROUGE_TYPES), use_stemmer=True)
    totals = dict.fromkeys(ROUGE_TYPES, 0.0)
    for prediction, row in zip(predictions, references, strict=True):
        lined = "\n".join(split_sentences(prediction))
        best = scorer.score_multi(["\n".join(split_sentences(r)) for r in row], lined)
        for kind in ROUGE_TYPES:
            totals[kind] += best[kind].fmeasure
    return {kind: 100.0 * total / len(predictions) for kind, total in totals.items()}


def distinct(texts: Sequence[str]) -> dict[str, float]:
    """Distinct n-grams over all n-grams, n = 1 to 4: per text then averaged, and in one pool."""
    tokens = [tokenize_13a(text) for text in texts]
    per_text, pooled = {}, {}
    for n in ORDERS:
        grams = [list(zip(*(row[i:] for i in range(n)), strict=False)) for row in tokens]
        shares = [len(set(row)) / len(row) for row in grams if row]
        pool = list(chain.from_iterable(grams))
        per_text[f"distinct{n}"] = _ratio(sum(shares), len(shares))
        pooled[f"corpus_distinct{n}"] = _ratio(len(set(pool)), len(pool))
    return per_text | pooled


def _sacrebleu(
    metric: BLEU | CHRF, predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[float, str]:
    """Corpus score and signature. sacrebleu wants one list per reference number, None for gaps."""
    streams = [list(stream) for stream in zip_longest(*references)]
    result = metric.corpus_score(list(predictions), streams)
    return float(result.score), str(metric.get_signature())


def _surface(
    predictions: Sequence[str], references: Sequence[Sequence[str]], sources: Sequence[str]
) -> dict[str, float | int]:
    tokens = [tokenize_13a(text) for text in predictions]
    source_tokens = [tokenize_13a(text) for text in sources]
    length = sum(map(len, tokens))
    wanted = sum(sum(len(tokenize_13a(text)) for text in row) / len(row) for row in references)
    repeats = sum(a == b for row in tokens for a, b in zip(row, row[1:], strict=False))
    copied = sum(
        (Counter(row) & Counter(source)).total()
        for row, source in zip(tokens, source_tokens, strict=True)
    )
    return {
        "repeated_words": _ratio(repeats, length),
        "copy_rate": _ratio(copied, length),
        "exact_copies": sum(
            p.split() == s.split() for p, s in zip(predictions, sources, strict=True)
        ),
        "length_ratio": _ratio(length, wanted),
        "source_length_ratio": _ratio(length, sum(map(len, source_tokens))),
        "empty_predictions": sum(not text.strip() for text in predictions),
        "rows": len(predictions),
    }


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
