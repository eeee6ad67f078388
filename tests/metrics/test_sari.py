"""SARI against published values, and against a slow second reading of the definition."""

import random
from fractions import Fraction

import pytest

from tess.errors import UserError
from tess.metrics.sari import sari
from tess.metrics.tokens import tokenize_13a_lower

SOURCE = "About 95 species are currently accepted ."
REFERENCES = [
    "About 95 species are currently known .",
    "About 95 species are now accepted .",
    "95 species are now accepted .",
]


@pytest.mark.parametrize(
    ("prediction", "published"),
    [
        # the examples in main() of github.com/cocoxu/simplification SARI.py, with the values that
        # github.com/feralvam/easse tests/metrics/test_sari.py gives for them
        ("About 95 you now get in .", 26.82782411698074),
        ("About 95 species are now agreed .", 58.89995423074248),
        ("About 95 species are currently agreed .", 50.71608864657479),
    ],
)
def test_original_protocol_gives_the_published_values_of_the_authors_examples(
    prediction, published
):
    got = sari([SOURCE], [prediction], [REFERENCES], protocol="original", tokenize="split")
    assert got.sari == pytest.approx(published, abs=1e-10)


def test_easse_protocol_gives_the_value_of_the_easse_readme():
    got = sari(
        ["About 95 species are currently accepted.", "The cat perched on the mat."],
        ["About 95 you now get in.", "Cat on mat."],
        [
            [
                "About 95 species are currently known.",
                "About 95 species are now accepted.",
                "95 species are now accepted.",
            ],
            ["The cat sat on the mat.", "The cat is on the mat.", "The cat sat."],
        ],
    )
    assert got.sari == pytest.approx(33.17472563619544, abs=1e-10)


def test_evaluate_protocol_gives_the_values_of_the_hugging_face_metric_cards():
    prediction = ["About 95 you now get in ."]
    three = sari([SOURCE], prediction, [REFERENCES], protocol="evaluate")
    assert three.sari == pytest.approx(26.953601953601954, abs=1e-10)  # metric `sari`
    one = sari([SOURCE], prediction, [REFERENCES[:1]], protocol="evaluate")
    assert one.sari == pytest.approx(21.805555555555557, abs=1e-10)  # metric `wiki_split`


def test_a_perfect_rewrite_scores_100_where_something_is_added_kept_and_deleted():
    source, target = ["a b c d e f g h i j"], ["a b c d e x y z v w"]
    for protocol in ("easse", "original", "evaluate"):
        assert sari(source, target, [target], protocol=protocol).sari == pytest.approx(100.0)


def test_copying_the_source_adds_and_deletes_nothing():
    got = sari([SOURCE], [SOURCE], [REFERENCES])
    assert got.add == got.delete == 0.0
    assert got.sari == pytest.approx(got.keep / 3)


def grams(text: str, n: int) -> list[tuple[str, ...]]:
    words = tokenize_13a_lower(text)
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def divide(part: Fraction, whole: Fraction) -> Fraction:
    return part / whole if whole else Fraction(0)


def f1(p: Fraction, r: Fraction) -> Fraction:
    return divide(2 * p * r, p + r)


def slow_corpus_sari(sources, predictions, references) -> float:
    """The formulas of Xu et al. (2016), section 4, by counting lists; totals over the corpus."""
    total = Fraction(0)
    for n in (1, 2, 3, 4):
        sums = {name: [Fraction(0)] * 3 for name in ("add", "keep", "delete")}
        for source, prediction, row in zip(sources, predictions, references, strict=True):
            s, o, rs = grams(source, n), grams(prediction, n), [grams(r, n) for r in row]
            for g in {*s, *o, *(g for r in rs for g in r)}:
                i_count, o_count = Fraction(s.count(g)), Fraction(o.count(g))
                r_count = Fraction(sum(r.count(g) for r in rs), len(rs))
                new = i_count == 0
                amounts = {
                    "add": (Fraction(new and o_count > 0), Fraction(new and r_count > 0)),
                    "keep": (min(i_count, o_count), min(i_count, r_count)),
                    "delete": (max(i_count - o_count, 0), max(i_count - r_count, 0)),
                }
                for name, (output, wanted) in amounts.items():
                    step = (min(output, wanted), output, wanted)
                    sums[name] = [a + b for a, b in zip(sums[name], step, strict=True)]
        for agreed, output, wanted in sums.values():
            total += f1(divide(agreed, output), divide(agreed, wanted)) / 4 / 3
    return 100.0 * float(total)


def test_corpus_sari_is_the_slow_reference_on_random_texts_with_repeats_and_mixed_references():
    rng = random.Random(7)

    def text(shortest: int = 0) -> str:
        return " ".join(rng.choice("a b c d e .".split()) for _ in range(rng.randint(shortest, 9)))

    for _ in range(30):
        rows = rng.randint(1, 4)
        sources, predictions = [text() for _ in range(rows)], [text() for _ in range(rows)]
        references = [[text(1) for _ in range(rng.randint(1, 3))] for _ in range(rows)]
        want = slow_corpus_sari(sources, predictions, references)
        got = sari(sources, predictions, references).sari
        assert got == pytest.approx(want, abs=1e-9)


def test_row_protocols_are_means_over_rows():
    sources, predictions = [SOURCE, "a b"], ["About 95 now .", "a"]
    references = [REFERENCES, ["a"]]
    for protocol in ("original", "evaluate"):
        both = sari(sources, predictions, references, protocol=protocol)
        alone = [
            sari([s], [p], [r], protocol=protocol).sari
            for s, p, r in zip(sources, predictions, references, strict=True)
        ]
        assert both.sari == pytest.approx(sum(alone) / 2)


def test_original_deletion_of_repeated_words_is_what_is_left_after_the_references():
    # "a a a" -> "": 3 deleted, the reference keeps 1; SARI.py counts (3 - 1) / 3, all orders
    # after the first have counts 2 and 1 that the reference does not keep at all
    got = sari(["a a a"], [""], [["a"]], protocol="original")
    assert got.delete == pytest.approx(100 * (2 / 3 + 1 + 1 + 0) / 4)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((["a"], ["a", "b"], [["a"]]), {}, "as many sources"),
        (([], [], []), {}, "at least one row"),
        ((["a"], ["a"], [[]]), {}, "row 1"),
        ((["a"], ["a"], ["a"]), {}, "row 1"),
        ((["a"], ["a"], [["a"]]), {"protocol": "best"}, "easse"),
        ((["a"], ["a"], [["a"]]), {"tokenize": "words"}, "13a"),
    ],
)
def test_what_cannot_be_scored_is_refused(arguments, options, message):
    with pytest.raises(UserError, match=message):
        sari(*arguments, **options)
