"""Metrics: known values, edge cases, and keys that others rely on."""

import json
import math

import pytest
import sacrebleu

from tess.errors import UserError
from tess.metrics.scores import distinct, rouge, score

KEYS = """rouge1 rouge2 rougeL rougeLsum bleu bleu_signature chrf chrf_signature sari sari_add
sari_keep sari_delete sari_evaluate self_bleu ibleu distinct1 distinct2 distinct3 distinct4
corpus_distinct1 corpus_distinct2 corpus_distinct3 corpus_distinct4 repeated_words copy_rate
exact_copies length_ratio source_length_ratio empty_predictions rows""".split()

SOURCES = ["The cat that was black sat on the mat.", "It rained a lot during the whole night."]
PREDICTIONS = ["The black cat sat on the mat.", "It rained all night."]
REFERENCES = [
    ["The black cat sat on a mat.", "A black cat was on the mat."],
    ["It rained all night."],
]


def test_keys_are_stable_and_the_result_is_json():
    got = score(PREDICTIONS, REFERENCES, SOURCES)
    assert list(got) == KEYS
    assert json.loads(json.dumps(got, allow_nan=False)) == got


def test_perfect_predictions_get_full_marks():
    best = [row[0] for row in REFERENCES]
    got = score(best, [[text] for text in best], SOURCES)
    for key in ("rouge1", "rouge2", "rougeL", "rougeLsum", "bleu", "chrf"):
        assert got[key] == pytest.approx(100.0)
    assert got["length_ratio"] == 1.0


def test_a_copy_of_the_source_is_seen_as_one():
    got = score(SOURCES, REFERENCES, SOURCES)
    assert got["self_bleu"] == pytest.approx(100.0)
    assert got["ibleu"] == pytest.approx(0.8 * got["bleu"] - 20.0)
    assert got["exact_copies"] == 2
    assert got["copy_rate"] == got["source_length_ratio"] == 1.0
    assert got["sari_add"] == 0.0


def test_rows_may_have_different_numbers_of_references():
    got = score(PREDICTIONS, REFERENCES, SOURCES)
    streams = [[row[0] for row in REFERENCES], [REFERENCES[0][1], None]]
    assert got["bleu"] == pytest.approx(sacrebleu.corpus_bleu(PREDICTIONS, streams).score, abs=1e-9)
    assert got["chrf"] == pytest.approx(sacrebleu.corpus_chrf(PREDICTIONS, streams).score, abs=1e-9)
    assert got["bleu_signature"].startswith("nrefs:var|case:mixed|eff:no|tok:13a|smooth:exp|")
    assert got["chrf_signature"].startswith("nrefs:var|")


def test_bleu_is_the_textbook_value():
    # clipped matches of each order by hand; both texts have 7 words, so no brevity penalty
    prediction, reference = "the cat sat on the mat .", "a cat sat on the rug ."
    words, pairs, triples, quads = 5 / 7, 3 / 6, 2 / 5, 1 / 4
    want = 100 * math.exp(sum(map(math.log, (words, pairs, triples, quads))) / 4)
    assert score([prediction], [[reference]], ["x"])["bleu"] == pytest.approx(want)


def test_rouge_takes_the_best_reference_of_each_row_and_averages_rows():
    got = rouge(["a b c d", "x"], [["a b", "a b c d"], ["y"]])
    assert got["rouge1"] == got["rougeL"] == pytest.approx(50.0)


def test_rouge_stems_and_lsum_matches_sentences_in_any_order():
    assert rouge(["cats running"], [["cat run"]])["rouge1"] == pytest.approx(100.0)
    got = rouge(["One two three. Four five six."], [["Four five six. One two three."]])
    assert got["rougeLsum"] == pytest.approx(100.0)
    assert got["rougeL"] == pytest.approx(50.0)


def test_distinct_is_averaged_over_texts_and_pooled():
    got = distinct(["a a b", "a a a a", ""])
    assert got["distinct1"] == pytest.approx((2 / 3 + 1 / 4) / 2)
    assert got["distinct2"] == pytest.approx((1 + 1 / 3) / 2)
    assert got["distinct4"] == 1.0  # only the second text has a 4-gram
    assert got["corpus_distinct1"] == pytest.approx(2 / 7)


def test_repeats_and_copied_words_are_counted_with_their_multiplicity():
    got = score(["how how how are"], [["how are you"]], ["how are you how"])
    assert got["repeated_words"] == pytest.approx(2 / 4)
    assert got["copy_rate"] == pytest.approx(3 / 4)
    assert got["length_ratio"] == pytest.approx(4 / 3)


@pytest.mark.parametrize("prediction", ["", "  \n", "word", "東京"])
def test_an_empty_or_short_prediction_in_a_single_row_gives_finite_figures(prediction):
    got = score([prediction], [["a reference", "another one"]], ["a source"])
    assert got["empty_predictions"] == (not prediction.strip())
    assert got["rouge1"] == 0.0
    json.dumps(got, allow_nan=False)


def test_a_row_without_a_reference_is_refused():
    with pytest.raises(UserError, match="row 2"):
        score(["a", "b"], [["a"], []], ["a", "b"])
    with pytest.raises(UserError, match="at least one row"):
        score([], [], [])
