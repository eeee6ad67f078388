"""Protocols: their measures and signatures are a format; choices, baselines and candidates hold."""

import random
import sys
import types
from dataclasses import dataclass

import pytest
import torch
from transformers import BertTokenizerFast

from tess.errors import UserError
from tess.evaluation.protocol import protocol_lines, protocol_section, protocol_summary
from tess.metrics.bertscore import BertScore
from tess.metrics.candidates import mbr_choice, pairwise_bleu
from tess.metrics.catalog import PROTOCOLS, get_protocol
from tess.metrics.measures import MEASURES, measures
from tess.metrics.ngrams import sentence_bleu
from tess.metrics.protocols import apply_protocol, baselines
from tess.metrics.tokens import tokenize_bert

KEYS = {
    "tess": "bleu rouge1 rouge2 rougeL rougeLsum sari_evaluate distinct1 distinct2 distinct3 "
    "distinct4",
    "diffuseq": "sentence_bleu_swapped sentence_bleu rougeL_unstemmed distinct1_bert",
    "fairseq": "fairseq_bleu bleu",
    "asset": "sari sari_add sari_keep sari_delete bleu_lowercase fkgl exact_copy_share "
    "source_length_ratio",
    "summ": "rouge1 rouge2 rougeL rougeLsum novelty2 repeated_words length_ratio",
    "paraphrase": "ibleu bleu self_bleu distinct1 distinct2 novelty1 copy_rate exact_copy_share "
    "repeated_words length_ratio",
}
MAIN = {
    "tess": "bleu", "diffuseq": "sentence_bleu_swapped", "fairseq": "fairseq_bleu",
    "asset": "sari", "summ": "rougeL", "paraphrase": "ibleu",
}
SOURCES = ["How do I lose weight fast?", "The cat, which was black, sat. It slept.", "東京 is big"]
REFERENCES = [
    ["What is the best way to lose weight?"],
    ["The black cat sat and slept.", "A black cat sat. It slept."],
    ["Tokyo is large"],
]
PREDICTIONS = ["How can I lose weight?", "", "東京 is big"]


def scores(name: str, predictions=PREDICTIONS, **options):
    return apply_protocol(name, predictions, REFERENCES, SOURCES, **options)


def test_protocols_have_the_measures_and_signatures_that_reports_rely_on():
    assert {name: " ".join(p.measures) for name, p in PROTOCOLS.items()} == KEYS
    assert {name: protocol.main for name, protocol in PROTOCOLS.items()} == MAIN
    for name, protocol in PROTOCOLS.items():
        got = scores(name)
        assert list(got.measures) == list(got.signatures) == list(protocol.measures)
        assert got.protocol == name and got.signature == got.signatures[protocol.main]
        refs = "1" if protocol.first_reference else "var"
        for measure, signature in got.signatures.items():
            start, end = f"{name}|{measure}|", f"|refs:{refs}|samples:1|version:tess-"
            assert signature.startswith(start) and end in signature, signature
            assert any(part in signature for part in ("|tok:", "|words:")), signature
            assert got.measures[measure].name == measure


def test_signatures_say_what_was_chosen():
    assert "|ibleu|alpha:0.8|tok:13a|case:mixed|smooth:exp|" in scores("paraphrase").signature
    assert "|tok:13a|case:lc|smooth:none|" in scores("fairseq").signature
    assert "|tok:13a|case:lc|rules:easse|" in scores("asset").signature
    assert "|stem:yes|" in scores("summ").signature
    swapped = scores("diffuseq").signature
    assert "|tok:bert-basic-decoded|pieces:joined|case:lc|smooth:nltk-method4|" in swapped
    assert "|hypothesis:reference|" in swapped
    assert "|hypothesis:" not in scores("diffuseq").signatures["sentence_bleu"]
    assert "|samples:4-mbr_bleu|" in scores("tess", samples="4-mbr_bleu").signature


def test_one_reference_protocols_read_the_first_alone_and_others_all():
    first = [row[:1] for row in REFERENCES]
    texts = [SOURCES[0], REFERENCES[1][1], SOURCES[2]]
    for name, protocol in PROTOCOLS.items():
        main = protocol.main
        one = measures([main], texts, first, SOURCES)[main].value
        all_of_them = measures([main], texts, REFERENCES, SOURCES)[main].value
        assert one != all_of_them, name
        want = one if name in ("tess", "diffuseq", "fairseq") else all_of_them
        assert scores(name, texts).measures[main].value == want, name


def test_a_copy_gets_no_credit_from_ibleu():
    got = scores("paraphrase", SOURCES).measures
    assert got["self_bleu"].value == pytest.approx(100.0)
    assert got["ibleu"].value == pytest.approx(0.8 * got["bleu"].value - 20.0)
    assert got["exact_copy_share"].value == got["copy_rate"].value == 1.0


def test_bert_tokens_are_the_words_of_an_uncased_bert_tokenizers_decoded_text(tmp_path):
    letters = "abcdefghijklmnopqrstuvwxyz0123456789東京?.,!'-$()"
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, "lose", "weight"]
    vocabulary += [f"##{letter}" for letter in letters]
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    tokenizer = BertTokenizerFast.from_pretrained(str(tmp_path))
    for text in (
        "How do I lose weight?",
        "Don't you think it's café-style, state-of-the-art (U.S. $3.50)!",
        "I'm sure they've said: we're 'here'. It's James' dog",
        "東京 is  BIG\n",
        "",
    ):
        text = text.replace(":", ",")
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.unk_token_id not in ids
        decoded = tokenizer.decode(ids, clean_up_tokenization_spaces=True)
        assert tokenize_bert(text) == tuple(decoded.split()), text


CANDIDATES = [
    ["how do i lose weight now?", "how can i lose weight now?", "do cats fly at all today?"],
    ["", "a b c d e", "a b c d f"],
    ["x", "x", "x"],
]


def slow_choice(texts) -> int:
    """DiffuSeq's loop: candidate i is the reference of every other candidate."""
    totals = []
    for i, one in enumerate(texts):
        total = 0.0
        for j, other in enumerate(texts):
            if i != j:
                rows = [tokenize_bert(other)], [[tokenize_bert(one)]]
                total += float(sentence_bleu(*rows)[0])
        totals.append(total)
    return totals.index(max(totals))


def test_mbr_chooses_as_the_double_loop_does_and_shows_the_one_sample_beside():
    one = [row[2] for row in CANDIDATES]
    got = scores("diffuseq", one, candidates=CANDIDATES)
    chosen = [row[slow_choice(row)] for row in CANDIDATES]
    assert chosen != one and chosen[0] in CANDIDATES[0][:2]
    assert [mbr_choice(pairwise_bleu(row)) for row in CANDIDATES] == [
        slow_choice(row) for row in CANDIDATES
    ]
    single, best = scores("diffuseq", one), scores("diffuseq", chosen)
    for name in PROTOCOLS["diffuseq"].measures:
        assert got.measures[name].value == single.measures[name].value
        assert got.measures[f"mbr_{name}"].value == best.measures[name].value
        assert got.measures[f"mbr_{name}"].name == f"mbr_{name}"
        assert "|samples:3-mbr|" in got.signatures[f"mbr_{name}"]
        assert "|samples:1|" in got.signatures[name]
    assert tuple(got.measures) == PROTOCOLS["diffuseq"].measures + PROTOCOLS["diffuseq"].candidates


def test_mbr_is_the_double_loop_on_random_candidates_of_unequal_length():
    rng = random.Random(3)
    for _ in range(60):
        row = [" ".join(rng.choices("abcd", k=rng.randint(0, 7))) for _ in range(4)]
        assert mbr_choice(pairwise_bleu(row)) == slow_choice(row), row


def test_diversity_of_candidates_is_bleu_of_pairs_and_distinct_4_grams():
    same = ["a b c d e f"] * 2
    other = ["a b c d e f", "u v w x y z"]
    got = [
        apply_protocol("diffuseq", ["a"], [["a"]], ["a"], candidates=[row]).measures
        for row in (same, other)
    ]
    assert got[0]["candidates_self_bleu"].value == pytest.approx(100.0)
    assert got[1]["candidates_self_bleu"].value == 0.0
    assert got[0]["candidates_div4"].value == pytest.approx(3 / 6)
    assert got[1]["candidates_div4"].value == 1.0


def test_baselines_copy_lead_and_cut():
    text = "One two three. Four five? Six seven eight nine. Ten."
    got = baselines("paraphrase", [text, "One."], [["a b c d"], ["a b"]])
    assert got == {
        "copy": [text, "One."],
        "lead": ["One two three.", "One."],
        "truncation": ["One two three.", "One."],  # 3 words, the mean of 4 and 2
    }
    for name in ("summ", "summarization"):
        lead = baselines(name, [text], [["a"]])["lead"]
        assert lead == ["One two three. Four five? Six seven eight nine."]
    got = baselines("summ", [text], [["a"]], words=4, sentences=2)
    assert got["truncation"] == ["One two three. Four"]
    assert got["lead"] == ["One two three. Four five?"]
    # texts longer than the source, and a source without a sentence end, are no trouble
    assert baselines("summ", ["a"], [["a b c"]], words=9)["truncation"] == ["a"]
    assert "fixed" not in got
    assert baselines("summ", ["a", "b"], [["c"]] * 2, fixed="d e")["fixed"] == ["d e", "d e"]


def test_a_section_of_a_report_has_intervals_baselines_and_a_test_against_the_copy():
    systems = {"system": REFERENCES[0] + [REFERENCES[1][0], "Tokyo is large"], "other": SOURCES}
    got = protocol_section("paraphrase", systems, REFERENCES, SOURCES, resamples=200)
    assert list(got["figures"]) == ["system", "other", "copy", "lead", "truncation"]
    assert got["figures"]["other"] == got["figures"]["copy"]
    for column in got["figures"].values():
        assert list(column) == list(PROTOCOLS["paraphrase"].measures)
        assert all(one["low"] <= one["high"] for one in column.values())
    test = got["against_copy"]["ibleu"]
    figures = got["figures"]
    want = figures["system"]["ibleu"]["value"] - figures["copy"]["ibleu"]["value"]
    assert test["difference"] == pytest.approx(want) and want > 0
    again = protocol_section("paraphrase", systems, REFERENCES, SOURCES, resamples=200)
    assert got == again
    page = "\n".join(protocol_lines(got))
    assert (
        "| measure | system | other | copy | lead 1 | first 6 words | system - copy | p |" in page
    )
    assert "| **ibleu** | " in page and got["signature"] in page
    assert protocol_summary(got)[0].startswith("protocol paraphrase, ibleu: system ")


@dataclass
class FakeScorer:
    """Stands for `bert_score.BERTScorer`: F1 is the share of equal letters."""

    model_type: str
    num_layers: int
    device: str | None

    def __post_init__(self):
        self._tokenizer = types.SimpleNamespace(model_max_length=10**30)

    def score(self, texts, references, batch_size):
        assert all(texts) and all(all(row) for row in references)
        best = [
            max(len(set(t) & set(r)) / len(set(t) | set(r)) for r in row)
            for t, row in zip(texts, references, strict=True)
        ]
        return torch.zeros(len(texts)), torch.zeros(len(texts)), torch.tensor(best)


def test_bertscore_joins_a_protocol_with_its_model_in_the_signature(monkeypatch, tmp_path):
    package = types.SimpleNamespace(BERTScorer=FakeScorer)
    utils = types.SimpleNamespace(model2layers={"known": 9})
    monkeypatch.setitem(sys.modules, "bert_score", package)
    monkeypatch.setitem(sys.modules, "bert_score.utils", utils)
    config = types.SimpleNamespace(num_hidden_layers=4)
    monkeypatch.setattr("tess.metrics.bertscore.AutoConfig.from_pretrained", lambda model: config)
    monkeypatch.setattr("tess.metrics.bertscore.importlib.metadata.version", lambda name: "1.0")
    model = BertScore("known")
    assert (model.layer, BertScore("other").layer) == (9, 4)
    assert model._scorer._tokenizer.model_max_length == 512
    got = apply_protocol("fairseq", ["ab", "", "x"], [["ab"], ["a"], ["b"]], list("abc"),
                         bertscore=model)
    assert got.measures["bertscore"].rows[:, 0].tolist() == [100.0, 0.0, 0.0]
    assert got.signatures["bertscore"].startswith("fairseq|bertscore|model:known|layer:9|")
    assert list(got.measures)[:-1] == list(PROTOCOLS["fairseq"].measures)


def test_bertscore_that_is_not_installed_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "bert_score", None)
    with pytest.raises(UserError, match=r"pip install 'tess-diffusion\[bertscore\]'"):
        BertScore("any")


def test_what_cannot_be_scored_is_refused():
    with pytest.raises(UserError, match="unknown protocol 'bleu'; known are tess, diffuseq"):
        get_protocol("bleu")
    with pytest.raises(UserError, match="'summ' scores one text per source"):
        scores("summ", candidates=CANDIDATES)
    with pytest.raises(UserError, match="two or more, for every source, got 1 to 3"):
        scores("diffuseq", candidates=[["a"], *CANDIDATES[1:]])
    with pytest.raises(UserError, match="for 3 sources, got them for 2"):
        scores("diffuseq", candidates=CANDIDATES[:2])
    with pytest.raises(UserError, match="as many sources"):
        scores("summ", ["a"])
    for blank in ("", " \n", "\u200b"):
        for name in PROTOCOLS:
            with pytest.raises(UserError, match="row 2: expected a text as reference 2, got"):
                apply_protocol(name, PREDICTIONS[:2], [["a"], ["b", blank]], SOURCES[:2])
    with pytest.raises(UserError, match="words of a baseline must be at least 1, got 0"):
        baselines("summ", ["a"], [["a"]], words=0)


@pytest.mark.parametrize("prediction", ["", "word", "東京"])
@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_single_row_gives_finite_figures(name, prediction):
    section = protocol_section(name, {"system": [prediction]}, [["a b", "c"]], ["a source"],
                               resamples=20)
    values = [one["value"] for one in section["figures"]["system"].values()]
    assert all(-20.0 <= value <= 100.0 for value in values)
    assert set(section["figures"]["system"]) <= set(MEASURES)
