"""Evaluation with a decoder of a few lines, and the script as a user runs it."""

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from tess.cli import run
from tess.commands import evaluate as command
from tess.data.rows import Example
from tess.decoders.base import Description
from tess.errors import UserError
from tess.evaluation import run as evaluation
from tess.evaluation.page import markdown, summary
from tess.evaluation.report import Report, Section
from tess.evaluation.run import Settings, write_report
from tess.metrics.catalog import CANDIDATE_MEASURES, PROTOCOLS
from tess.metrics.measures import MEASURES
from tess.storage.files import prepare_output_dir
from tess.text.tokenization import train_tokenizer

ROOT = Path(__file__).resolve().parents[2]
REPORT_KEYS = """checkpoint decoder num_parameters data rows seed batch_size num_inference_steps
scheduler timestep_spacing stopping length gen_length sampler num_candidates choose_by
nfe_mean nfe_max nfe_first_mean new_tokens generation_seconds new_tokens_per_second
milliseconds_per_token tokens_per_forward num_draft_tokens num_beams length_penalty
acceptance_length metrics protocol versions machine""".split()
DATA = {"file": "rows.jsonl", "task": None, "dataset": None, "split": None}
EXAMPLES = [Example("a b c d e", ("a b", "b c")), Example("one two ü", ("one",))]


def evaluate(decoder, examples, checkpoint="c", data=DATA, **options):
    """`evaluation.evaluate` with the options that are settings in their place."""
    settings = {n: options.pop(n) for n in list(options) if n in Settings.__dataclass_fields__}
    return evaluation.evaluate(
        decoder, examples, Settings(**settings), checkpoint=checkpoint, data=data, **options
    )


@dataclass
class Text:
    text: str
    num_new_tokens: int
    nfe: int
    num_verifications: int = 0
    first: "Text | None" = None


class FirstWords:
    """A decoder that keeps the first half of the words; NFE and length differ between rows."""

    name = "tess"
    num_parameters = 1234
    default_num_inference_steps = 16
    tokenizer = train_tokenizer(["a"], 261)  # one token per byte
    max_target_length = 6
    described = Description(
        scheduler="renoising",
        timestep_spacing="recoverability",
        length="rule",
        sampler={"guidance_scale": 2.0},
    )

    def __init__(self):
        self.calls = []

    def describe(self):
        return self.described

    def generate(self, sources, **options):
        self.calls.append((sources, options))
        words = [source.split() for source in sources]
        return [
            Text(" ".join(row[: len(row) // 2]), len(row) // 2, nfe=10 * (i + 1))
            for i, row in enumerate(words)
        ]


@pytest.fixture
def script(monkeypatch):
    """scripts/evaluate.py as a module, with the decoder above for every checkpoint."""
    monkeypatch.setattr(command, "decoder", FirstWords(), raising=False)
    monkeypatch.setattr("tess.decoders.load.load_decoder", lambda *_, **options: command.decoder)
    monkeypatch.setattr("tess.storage.hub.local_folder", Path)
    return command


def test_report_has_the_documented_keys_and_both_columns():
    decoder = FirstWords()
    got = evaluate(decoder, EXAMPLES, checkpoint="ckpt", data=DATA, num_inference_steps=7, seed=3)
    report = got.report
    assert list(report) == REPORT_KEYS == list(Report.__annotations__)
    assert report["metrics"]["system"].keys() == report["metrics"]["copy_source"].keys()
    assert report["metrics"]["copy_source"]["exact_copies"] == 2
    assert report["metrics"]["system"]["rouge1"] == pytest.approx(100.0)  # "a b" and "one"
    assert (report["nfe_mean"], report["nfe_max"], report["new_tokens"]) == (15.0, 20, 3)
    assert report["new_tokens_per_second"] == pytest.approx(3 / report["generation_seconds"])
    assert report["milliseconds_per_token"] == pytest.approx(1e3 * report["generation_seconds"] / 3)
    assert report["tokens_per_forward"] == pytest.approx(3 / 30)
    assert report["num_draft_tokens"] is report["acceptance_length"] is None
    sources, options = decoder.calls[0]
    assert sources == [example.source for example in EXAMPLES]
    assert options["seed"] == 3 and options["num_inference_steps"] == 7
    assert report["num_inference_steps"] == 7 and options["strict"] is False


def test_report_has_the_number_of_steps_that_were_run():
    decoder = FirstWords()
    report = evaluate(decoder, EXAMPLES).report
    assert report["num_inference_steps"] == 16
    assert decoder.calls[0][1]["num_inference_steps"] == 16
    decoder.default_num_inference_steps = None
    report = evaluate(decoder, EXAMPLES).report
    assert report["num_inference_steps"] is None


class Drafts(FirstWords):
    """Writes 1 + 2 and 1 + 5 tokens; reading a source, which gives the first, checks no draft."""

    name = "ar+mtp"
    default_num_inference_steps = None
    max_target_length = None
    described = Description(num_draft_tokens=4)

    def generate(self, sources, **options):
        return [Text("a b c", 3, 2, num_verifications=1), Text("one two", 6, 3, 2)]


def test_acceptance_length_is_tokens_per_check_of_a_draft():
    got = evaluate(Drafts(), EXAMPLES)
    assert got.report["acceptance_length"] == pytest.approx((2 + 5) / (1 + 2))
    assert got.report["tokens_per_forward"] == pytest.approx(9 / 5)
    assert "| tokens kept per evaluation of a draft | 2.33 |" in markdown(got.report)


def test_acceptance_length_of_drafts_by_diffusion_counts_the_verifier_alone():
    decoder = Drafts()
    decoder.name, decoder.described = "tess+ar", Description()
    texts = [Text("a b c", 3, 9, num_verifications=1), Text("one two", 6, 9, num_verifications=4)]
    decoder.generate = lambda *_, **__: texts
    report = evaluate(decoder, EXAMPLES).report
    assert report["acceptance_length"] == pytest.approx((2 + 5) / (1 + 4))
    page = markdown(report)
    assert "| tokens kept per evaluation of a draft | 1.40 |" in page
    assert "drafted tokens per evaluation" not in page


class BestOfThree(FirstWords):
    """Chooses the first half of the words; the first of the three candidates was one word."""

    described = replace(
        FirstWords.described,
        num_candidates=3,
        choose_by="mbr_chrf",
        stopping={"patience": 1, "max_entropy": 0.25},
    )

    def generate(self, sources, **options):
        written = super().generate(sources, **options)
        firsts = [Text(source.split()[0], 1, nfe=2 + i) for i, source in enumerate(sources)]
        return [replace(text, first=first) for text, first in zip(written, firsts, strict=True)]


def test_the_first_candidate_stands_beside_the_chosen_one(tmp_path):
    got = evaluate(BestOfThree(), EXAMPLES)
    report = got.report
    alone = evaluate(FirstWords(), EXAMPLES).report
    assert list(report) == REPORT_KEYS
    assert list(report["metrics"]) == ["system", "first_candidate", "copy_source"]
    assert report["metrics"]["system"] == alone["metrics"]["system"]
    first = report["metrics"]["first_candidate"]
    assert first.keys() == report["metrics"]["system"].keys()
    # rouge1: "a" against "a b", the better of the two references, and "one" against "one"
    assert first["rouge1"] == pytest.approx(100 * (2 / 3 + 1) / 2)
    assert (report["nfe_mean"], report["nfe_first_mean"]) == (15.0, 2.5)
    assert (report["num_candidates"], report["choose_by"]) == (3, "mbr_chrf")
    assert [row["first_prediction"] for row in got.predictions] == ["a", "one"]
    assert [row["prediction"] for row in got.predictions] == ["a b", "one"]

    page = markdown(report)
    assert (
        "| metric | system | first candidate | copy of the source |\n|---|---:|---:|---:|" in page
    )
    assert "| rouge1 | 100.000 | 83.333 | " in page
    assert "| network evaluations of the first candidate, mean | 2.50 |" in page
    assert "| candidates | 3, chosen by mbr_chrf |" in page
    assert "NFE mean 15.00, max 20 for 3 candidates by mbr_chrf (the first: mean 2.50)" in (
        summary(report)
    )
    (line,) = [line for line in summary(report).splitlines() if line.startswith("rouge1")]
    assert line.split()[1:3] == ["100.000", "83.333"]
    assert summary(report).splitlines()[1].split() == ["system", "first", "copy"]


def test_a_protocol_adds_its_section_to_the_report_the_page_and_the_summary():
    got = evaluate(BestOfThree(), EXAMPLES, protocol="paraphrase")
    section = got.report["protocol"]
    assert list(section) == list(Section.__annotations__)
    assert list(section["figures"]) == ["system", "first_candidate", "copy", "lead", "truncation"]
    json.dumps(got.report, allow_nan=False)
    for column, name in (("system", "system"), ("first_candidate", "first_candidate"),
                         ("copy", "copy_source")):
        for key in ("ibleu", "bleu", "self_bleu", "copy_rate", "length_ratio"):
            want = got.report["metrics"][name][key]
            assert section["figures"][column][key]["value"] == pytest.approx(want, abs=1e-9)
    assert "|samples:3-mbr_chrf|" in section["signature"]
    assert section["against_copy"].keys() == section["figures"]["system"].keys()
    page, short = markdown(got.report), summary(got.report)
    assert "## Protocol `paraphrase`" in page and section["signature"] in page
    assert "protocol paraphrase, ibleu: system " in short and section["signature"] in short

    without = evaluate(BestOfThree(), EXAMPLES)
    assert without.report["protocol"] is None
    assert "rotocol" not in markdown(without.report) + summary(without.report)


def test_an_unknown_protocol_is_refused_before_the_run():
    decoder = FirstWords()
    with pytest.raises(UserError, match="unknown protocol 'wmt'; known are tess"):
        evaluate(decoder, EXAMPLES, protocol="wmt")
    with pytest.raises(UserError, match="name a protocol as well"):
        evaluate(decoder, EXAMPLES, bertscore=object())
    assert not decoder.calls


def test_one_candidate_is_its_own_first():
    got = evaluate(FirstWords(), EXAMPLES)
    assert got.report["nfe_first_mean"] == got.report["nfe_mean"]
    assert list(got.report["metrics"]) == ["system", "copy_source"]
    assert not any("first_prediction" in row for row in got.predictions)
    assert "candidate" not in markdown(got.report) + summary(got.report)


def test_a_decoder_that_forgets_its_first_candidates_is_not_reported():
    decoder = FirstWords()
    decoder.described = replace(decoder.described, num_candidates=2)
    with pytest.raises(AssertionError, match="several candidates have a first"):
        evaluate(decoder, EXAMPLES)


def test_the_sampler_is_in_the_report():
    report = evaluate(BestOfThree(), EXAMPLES).report
    assert report["scheduler"] == "renoising" and report["timestep_spacing"] == "recoverability"
    assert report["stopping"] == {"patience": 1, "max_entropy": 0.25}
    page = markdown(report)
    assert "| scheduler | renoising |" in page and "| timestep_spacing | recoverability |" in page
    assert "| stopping | patience 1, max_entropy 0.25 |" in page and "| length | rule |" in page

    decoder = FirstWords()
    report = evaluate(decoder, EXAMPLES).report
    assert report["stopping"] is None and "| stopping | none |" in markdown(report)

    report = evaluate(Drafts(), EXAMPLES).report
    assert report["scheduler"] is report["stopping"] is report["length"] is None
    page = markdown(report)
    assert not any(f"| {name} |" in page for name in ("scheduler", "stopping", "length"))


def test_where_the_length_comes_from_is_in_the_report_and_the_reference_is_a_diagnostic():
    def run(**length):
        decoder = FirstWords()
        report = evaluate(decoder, EXAMPLES, **length).report
        shown = markdown(report), summary(report)
        return decoder.calls[0][1]["gen_length"], report, shown

    label = "Diagnostic: uses the reference's length."
    given, report, shown = run()
    assert given is None and (report["length"], report["gen_length"]) == ("rule", None)
    assert not any(label in text for text in shown)
    given, report, shown = run(gen_length=9)
    assert given == 9 and (report["length"], report["gen_length"]) == ("fixed", 9)
    assert "| length | fixed (9) |" in shown[0] and label not in shown[0] + shown[1]
    given, report, shown = run(gold_length=True)
    assert given == [4, 4]  # "a b" and "one", the first references, with </s>
    assert (report["length"], report["gen_length"]) == ("gold", None)
    assert shown[0].splitlines()[2] == f"**{label}**" and shown[1].splitlines()[1] == label


def test_gold_lengths_are_cut_as_in_training():
    decoder = FirstWords()
    rows = [Example("a", ("123456789",)), Example("a", ("12", "1234"))]
    evaluate(decoder, rows, gold_length=True)
    assert decoder.calls[0][1]["gen_length"] == [6, 3]


def test_every_key_of_the_report_is_in_the_documentation():
    text = (ROOT / "docs/evaluation.md").read_text(encoding="utf-8")
    got = evaluate(BestOfThree(), EXAMPLES, protocol="summ")
    report = got.report
    names = [*PROTOCOLS, *MEASURES, *CANDIDATE_MEASURES, *report["protocol"]]
    names += [*report["protocol"]["figures"]["system"]["rougeL"]]
    names += [*report["protocol"]["against_copy"]["rougeL"]]
    names += [*report, *report["versions"], *report["machine"], *report["data"]]
    names += [*report["metrics"]["system"], *got.predictions[0], *report["stopping"]]
    names += [f"metrics.{column}" for column in report["metrics"]]
    ranges = {f"{p}distinct{n}" for p in ("", "corpus_") for n in (2, 3)}  # "distinct1 … distinct4"
    ranges |= {"novelty2", "novelty3"}
    names.remove("metrics")
    assert not [name for name in names if f"`{name}`" not in text and name not in ranges]


def test_files_round_trip_and_a_bar_in_a_value_keeps_the_table_whole(tmp_path):
    got = evaluate(FirstWords(), EXAMPLES, checkpoint="a|b", data=DATA)
    paths = write_report(got, prepare_output_dir(tmp_path / "new" / "out"))
    assert [path.name for path in paths] == ["report.json", "report.md", "predictions.jsonl"]
    assert json.loads(paths[0].read_text(encoding="utf-8")) == got.report
    lines = paths[2].read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == got.predictions
    assert json.loads(lines[1]) == {
        "source": "one two ü",
        "references": ["one"],
        "prediction": "one",
        "nfe": 20,
        "num_new_tokens": 1,
    }
    assert sorted(path.name for path in paths[0].parent.iterdir()) == sorted(
        path.name for path in paths
    )
    assert "| checkpoint | a\\|b |" in markdown(got.report)


def test_an_older_report_survives_a_disk_that_fills_up(tmp_path, monkeypatch):
    got = evaluate(FirstWords(), EXAMPLES)
    path = write_report(got, tmp_path)[0]
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tess.storage.files.os.fsync", full)
    got.report["seed"] = 99
    with pytest.raises(OSError, match="No space left"):
        write_report(got, tmp_path)
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 3  # and no temporary file is left


def test_wrong_numbers_and_folders_are_refused(tmp_path):
    with pytest.raises(UserError, match="limit"):
        evaluate(FirstWords(), EXAMPLES, limit=0)
    with pytest.raises(UserError, match="batch_size"):
        evaluate(FirstWords(), EXAMPLES, batch_size=0)
    with pytest.raises(UserError, match="at least one example"):
        evaluate(FirstWords(), [])
    with pytest.raises(UserError, match=r"exclude each other, got both \(5\)"):
        evaluate(FirstWords(), EXAMPLES, gen_length=5, gold_length=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="output folder"):
        prepare_output_dir(tmp_path / "file")


def test_script_evaluates_a_task_with_a_limit(script, tmp_path, capsys):
    script.main(
        ["--task", "simplification", "--limit", "5", "--checkpoint", "c"]
        + ["--seed", "4", "--output_dir", str(tmp_path)]
    )
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert report["rows"] == 5 and report["seed"] == 4
    assert report["data"] == {
        "file": None,
        "task": "simplification",
        "dataset": "samples",
        "split": "test",
    }
    out = capsys.readouterr().out
    assert "sari" in out and "report.md" in out


def test_script_evaluates_a_file_with_renamed_columns(script, tmp_path):
    rows = tmp_path / "rows.csv"
    rows.write_text("long,short\na b c d,a b\n")
    script.main(
        ["--data", str(rows), "--source_column", "long", "--target_column", "short"]
        + ["--checkpoint", "c", "--output_dir", str(tmp_path)]
    )
    prediction = json.loads((tmp_path / "predictions.jsonl").read_text(encoding="utf-8"))
    assert prediction["prediction"] == "a b"


def test_script_scores_a_protocol(script, tmp_path, capsys):
    flags = ["--task", "simplification", "--limit", "4", "--checkpoint", "c"]
    script.main([*flags, "--output_dir", str(tmp_path), "--protocol", "asset"])
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert report["protocol"]["name"] == "asset" and report["protocol"]["main"] == "sari"
    assert "protocol asset, sari: system " in capsys.readouterr().out
    with pytest.raises(UserError, match="--bertscore goes with --protocol"):
        script.main([*flags, "--output_dir", str(tmp_path), "--bertscore", "any"])


def test_script_passes_strict_on(script, tmp_path):
    flags = ["--task", "simplification", "--limit", "2", "--checkpoint", "c"]
    script.main([*flags, "--output_dir", str(tmp_path), "--strict"])
    script.main([*flags, "--output_dir", str(tmp_path)])
    assert [options["strict"] for _, options in script.decoder.calls] == [True, False]


def test_script_without_a_checkpoint_outside_a_checkout_asks_for_one(script, tmp_path, monkeypatch):
    monkeypatch.setattr("tess.cli.DEFAULT_CHECKPOINT", tmp_path / "none")
    with pytest.raises(UserError, match="--checkpoint"):
        script.main(["--task", "simplification", "--output_dir", str(tmp_path / "out")])


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--task", "translation"], ["'translation'", "simplification"]),
        (["--task", "paraphrase", "--split", "train"], ["'train'", "test"]),
        (["--data", "none.jsonl"], ["none.jsonl"]),
        (["--data", "none.jsonl", "--split", "test"], ["--task"]),
    ],
)
def test_script_answers_a_mistake_with_one_sentence_and_status_2(
    script, flags, parts, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *flags, "--output_dir", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        run(script.main)
    assert stop.value.code == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    assert sentence.startswith("error: ")
    assert all(part in sentence for part in parts)
