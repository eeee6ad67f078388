"""Measures against sacrebleu, rouge-score, NLTK and published values, and as functions of sums."""

import gzip
import json
import random
from pathlib import Path

import numpy as np
import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer

from tess.errors import UserError
from tess.metrics.measures import MEASURES, measures
from tess.metrics.ngrams import bleu_rows, sentence_bleu
from tess.metrics.readability import grade_level, readability_rows, syllables
from tess.metrics.sari import sari
from tess.metrics.scores import rouge, score
from tess.metrics.tokens import tokenize_bert

DATA = Path(__file__).resolve().parents[3] / "shared" / "data" / "simplification"
WORDS = "the The cat sat , on a a mat . running runs 東京 мир 12".split()


def corpus(seed: int, rows: int, references: int = 3):
    """Random rows with repeats, empty texts and different numbers of references."""
    rng = random.Random(seed)

    def text(shortest: int) -> str:
        return " ".join(rng.choice(WORDS) for _ in range(rng.randint(shortest, 9)))

    sources = [text(1) for _ in range(rows)]
    predictions = [s if rng.random() < 0.2 else text(0) for s in sources]
    lists = [[text(1) for _ in range(rng.randint(1, references))] for _ in range(rows)]
    return predictions, lists, sources


def value(name: str, predictions, references, sources=None) -> float:
    return measures([name], predictions, references, sources or [""] * len(predictions))[name].value


@pytest.mark.parametrize(("seed", "rows"), [(0, 12), (1, 1), (2, 1), (3, 5), (4, 40)])
def test_corpus_scores_are_those_of_sacrebleu(seed, rows):
    predictions, references, sources = corpus(seed, rows)
    streams = [
        [row[i] if i < len(row) else None for row in references]
        for i in range(max(map(len, references)))
    ]
    got = {
        name: m.value for name, m in measures(MEASURES, predictions, references, sources).items()
    }
    bleu = sacrebleu.corpus_bleu
    assert got["bleu"] == pytest.approx(bleu(predictions, streams).score, abs=1e-9)
    lower = bleu(predictions, streams, lowercase=True)
    assert got["bleu_lowercase"] == pytest.approx(lower.score, abs=1e-9)
    plain = bleu(predictions, streams, lowercase=True, smooth_method="none")
    assert got["fairseq_bleu"] == pytest.approx(plain.score, abs=1e-9)
    own = bleu(predictions, [sources]).score
    assert got["self_bleu"] == pytest.approx(own, abs=1e-9)
    assert got["ibleu"] == pytest.approx(0.8 * got["bleu"] - 0.2 * own, abs=1e-9)
    chrf = sacrebleu.corpus_chrf(predictions, streams).score
    assert got["chrf"] == pytest.approx(chrf, abs=1e-9)
    easse = sari(sources, predictions, references)
    assert [got[k] for k in ("sari", "sari_add", "sari_keep", "sari_delete")] == pytest.approx(
        list(easse), abs=1e-9
    )
    stemmed = RougeScorer(["rouge1"], use_stemmer=True)
    best = [
        max(stemmed.score(r, p)["rouge1"].fmeasure for r in row)
        for p, row in zip(predictions, references, strict=True)
    ]
    assert got["rouge1"] == pytest.approx(100 * sum(best) / rows, abs=1e-9)
    table = score(predictions, references, sources)
    shared = got.keys() & table.keys()
    assert len(shared) > 15 and not [k for k in shared if abs(got[k] - table[k]) > 1e-9]
    assert table["exact_copies"] == round(got["exact_copy_share"] * rows)


def test_every_measure_of_drawn_rows_is_its_combination_of_their_sums():
    predictions, references, sources = corpus(5, 15)
    drawn = np.random.default_rng(0).integers(15, size=(4, 15))
    again = [
        measures(
            MEASURES,
            [predictions[i] for i in rows],
            [references[i] for i in rows],
            [sources[i] for i in rows],
        )
        for rows in drawn
    ]
    for name, measure in measures(MEASURES, predictions, references, sources).items():
        counts = np.stack([np.bincount(rows, minlength=15) for rows in drawn]).astype(float)
        got = measure.combine(counts @ measure.rows)
        assert measure.rows.dtype == np.float64 and measure.rows.ndim == 2, name
        assert got.shape == (4,), name
        want = [each[name].value for each in again]
        assert got == pytest.approx(want, abs=1e-9), name


def test_an_order_without_a_match_is_smoothed_in_bleu_and_fatal_in_fairseqs():
    prediction, reference = ["a b c d e"], [["a b x d e"]]
    assert value("bleu", prediction, reference) > 5
    assert value("fairseq_bleu", prediction, reference) == 0.0


@pytest.mark.parametrize(
    ("text", "references", "nltk"),
    [
        # sentence_bleu(..., smoothing_function=SmoothingFunction().method4) of NLTK 3.10.4
        ("the cat sat on the mat", ["the cat sat on a mat"], 53.7284965911771),
        ("how do i lose weight?", ["what is the best way to lose weight?"], 6.652197169056367),
        ("a c", ["a b c d", "c a"], 8.032423517939204),  # the closest of two lengths
        ("a b c d e f", ["a x c y e z", "f e d c b a q"], 5.883685791697665),
        ("the the the", ["the cat"], 7.249749990681824),  # clipped
        ("a b", ["a b"], 22.138858862513068),  # orders longer than the text count as one n-gram
        ("weight", ["weight loss"], 36.787944117144235),  # one word is not smoothed
        ("x y", ["a b"], 0.0),
        ("", ["a"], 0.0),
    ],
)
def test_sentence_bleu_is_nltks_with_smoothing_method_4(text, references, nltk):
    got = sentence_bleu([text.split()], [[r.split() for r in references]])
    assert got[0] == pytest.approx(nltk, abs=1e-9)


def method4(row: np.ndarray) -> float:
    """Chen and Cherry (2014) in NLTK's way, of counts: the k-th order without a match has
    ln(length) / (5 * 2^k), one longer than the text is one n-gram; one word is not smoothed."""
    length, wanted, matches, totals = row[0], row[1], row[2:6].copy(), np.maximum(row[6:], 1)
    if not matches[0]:
        return 0.0
    missed = np.flatnonzero(matches == 0)
    matches[missed] = np.log(length) / (5 * 2.0 ** np.arange(1, len(missed) + 1))
    logs = np.log((matches / totals)[matches > 0]).sum() / 4
    return 100 * min(1.0, np.exp(1 - wanted / length)) * np.exp(logs)


def test_sentence_bleu_is_the_formula_on_random_texts():
    predictions, references, _ = corpus(6, 60)
    texts = [tokenize_bert(text) for text in predictions]
    lists = [[tokenize_bert(text) for text in row] for row in references]
    want = list(map(method4, bleu_rows(texts, lists)))
    assert sentence_bleu(texts, lists) == pytest.approx(want, abs=1e-9)
    assert value("sentence_bleu", predictions, references) == pytest.approx(np.mean(want), abs=1e-9)


def test_swapped_sentence_bleu_takes_the_text_for_the_reference():
    text, reference = "a b c d e f", "a b c"
    forward = value("sentence_bleu", [text], [[reference]])
    swapped = value("sentence_bleu_swapped", [text], [[reference]])
    assert swapped == pytest.approx(value("sentence_bleu", [reference], [[text]]))
    assert abs(swapped - forward) > 1
    # of several references, the best
    more = value("sentence_bleu_swapped", [text], [["x y", reference]])
    assert more == pytest.approx(swapped)


def test_copying_novelty_and_repeats_are_counted_by_hand():
    predictions, sources = ["a b b z", "a  b", ""], ["a b c", "a b", "a"]
    references = [["a b", "a b c d"], ["a"], ["a b"]]
    got = {
        name: m.value for name, m in measures(MEASURES, predictions, references, sources).items()
    }
    assert got["copy_rate"] == pytest.approx((2 + 2) / 6)
    assert got["novelty1"] == pytest.approx(1 / 6)  # z
    assert got["novelty2"] == pytest.approx(2 / 4)  # "b b" and "b z"
    assert got["novelty4"] == pytest.approx(1.0)
    assert got["repeated_words"] == pytest.approx(1 / 6)
    assert got["exact_copy_share"] == pytest.approx(1 / 3)
    assert got["length_ratio"] == pytest.approx(6 / (3 + 1 + 2))
    assert got["source_length_ratio"] == pytest.approx(6 / 6)
    assert got["distinct1"] == pytest.approx((3 / 4 + 1) / 2)  # the empty row has no word
    assert got["distinct1_bert"] == pytest.approx((3 / 4 + 1 + 0) / 3)


def test_texts_of_another_script_are_scored():
    got = measures(
        MEASURES, ["東京は大きい。", "Москва"], [["東京は大きい。"], ["Москва"]], ["x", "y"]
    )
    assert got["chrf"].value == pytest.approx(100.0)
    assert got["sentence_bleu"].rows[0, 0] == pytest.approx(100.0)  # BERT splits ideographs
    assert got["rouge1"].value == 0.0  # rouge-score knows a-z and digits only


@pytest.mark.parametrize(
    ("word", "count"),
    [("the", 1), ("makes", 1), ("hoped", 1), ("wanted", 2), ("table", 2), ("tables", 2)]
    + [("boxes", 2), ("churches", 2), ("simple", 2), ("people", 2), ("café", 2), ("rhythm", 1)]
    + [("1990", 0), (",", 0), ("hmm", 1)],
)
def test_syllables_follow_the_rule(word, count):
    assert syllables(word) == count


def test_grade_level_is_the_textbook_formula():
    # 11 words with the two full stops, 2 sentences, 11 syllables
    texts = ["The cat sat on the table.", "", "It was happy."]
    assert readability_rows(texts).tolist() == [[1, 7, 7], [0, 0, 0], [1, 4, 4]]
    want = 0.39 * 11 / 2 + 11.8 * 11 / 11 - 15.59
    assert grade_level(readability_rows(texts).sum(axis=0)) == pytest.approx(max(want, 0.0))
    hard = ["Unconstitutional generalisations proliferate."]
    sentences, words, spoken = readability_rows(hard)[0]
    assert (sentences, words, spoken) == (1, 4, 16)
    assert value("fkgl", hard, [["x"]]) == pytest.approx(0.39 * 4 + 11.8 * 16 / 4 - 15.59)
    assert value("fkgl", [""], [["x"]]) == 0.0


@pytest.mark.parametrize(
    ("dataset", "published"),
    [
        # The source as its own simplification under EASSE: a row of tables in the literature (to
        # our knowledge in MUSS, arXiv 2005.00352, which was not at hand to look it up)
        ("asset", {"sari": 20.73, "bleu_lowercase": 92.81, "fkgl": 10.02}),
        ("turkcorpus", {"sari": 26.29, "fkgl": 10.02}),
    ],
)
def test_the_copied_source_has_its_published_scores(dataset, published):
    path = DATA / dataset / "test.jsonl.gz"
    if not path.exists():
        pytest.skip("needs the test set, which is not in the repository")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    sources, references = [row["source"] for row in rows], [row["target"] for row in rows]
    got = measures(published, sources, references, sources)
    # EASSE counts syllables with a table of exceptions, and sentences by a trained model
    tolerance = {"sari": 0.005, "bleu_lowercase": 0.005, "fkgl": 0.1}
    for name, want in published.items():
        assert got[name].value == pytest.approx(want, abs=tolerance[name]), name


@pytest.mark.parametrize("name", [*MEASURES, "score", "rouge", "sari"])
def test_a_blank_reference_is_refused_by_every_measure(name):
    """sacrebleu takes one for a reference of length 0, and lifts this text from 22 to 100."""
    text, references, source = ["the cat"], [["the cat sat on the mat", ""]], ["a cat sat"]
    calls = {
        "score": lambda: score(text, references, source),
        "rouge": lambda: rouge(text, references),
        "sari": lambda: sari(source, text, references),
    }
    with pytest.raises(UserError, match="row 1: expected a text as reference 2, got ''"):
        calls.get(name, lambda: measures([name], text, references, source))()


def test_a_reference_without_a_token_is_none():
    # the empty one would be the closest in length
    short = ["the black cat sat on"]
    reference = "the black cat sat on the mat and slept all day long"
    empty = {"bleu": "<skipped>", "fairseq_bleu": "<skipped>", "sentence_bleu": "\ufffd"}
    for name, nothing in empty.items():
        alone = value(name, short, [[reference]])
        assert alone < 60 and value(name, short, [[reference, nothing]]) == alone, name
        assert value(name, short, [[nothing]]) == 0.0


def test_wrong_names_and_rows_are_refused():
    with pytest.raises(UserError, match="unknown measure 'bleau'; known are bleu"):
        measures(["bleau"], ["a"], [["a"]], ["a"])
    with pytest.raises(UserError, match="row 1"):
        measures(["bleu"], ["a"], [[]], ["a"])
    with pytest.raises(UserError, match="at least one row"):
        measures(["bleu"], [], [], [])
