"""The overview of several comparisons: what its table says, and what it refuses."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tess.comparison.overview import overview_markdown, read_reports, write_overview
from tess.comparison.page import markdown
from tess.comparison.report import Difference, Figure, Report, Sample, Verdict, from_json, to_json
from tess.errors import UserError

SAVED = sorted((Path(__file__).parents[2] / "docs" / "benchmarks" / "comparison").glob("*.json"))
MAIN = "sari"


def saved(name="simplification"):
    (path,) = (path for path in SAVED if path.stem == name)
    return read_reports([path])[0]


def figure(value, half=1.0):
    return {MAIN: Figure(value, value - half, value + half)}


def system(value, nfe, low, high, apart, flops=2e6):
    one = next(iter(saved().results.systems.values()))
    cost = replace(one.first.cost, nfe_mean=nfe, flops_per_output_token=flops)
    seed = replace(
        one.first,
        measures=figure(value),
        against_copy={MAIN: Difference((low + high) / 2, low, high, 0.5)},
        intervals_apart=Verdict(apart, apart),
        cost=cost,
    )
    settings = {"decoder": "tess", "num_inference_steps": nfe}
    return replace(one, settings=settings, seeds={"0": seed})


def report(name="task"):
    systems = {
        "clear": system(30.0, 4, 4.0, 6.0, True),
        "close": system(26.0, 8, 0.2, 1.8, False),
        "same": system(25.5, 16, -0.4, 1.2, False, flops=None),
        "worse": system(20.0, 1, -6.0, -4.0, False),
        "untrained": system(10.0, 16, -16.0, -14.0, False),
    }
    given = saved()
    results = replace(
        given.results,
        data=replace(given.results.data, rows=7),
        greedy_ar=None,
        baselines=replace(given.results.baselines, measures={"copy": figure(25.0)}),
        systems=systems,
        samples=[Sample(0, "not ours to give", ["a"], {})],
    )
    timing = next(iter(given.timings.systems.values()))
    timed = replace(timing, latency=replace(timing.latency, median_ms=12.4))
    timings = replace(given.timings, systems={"clear": timed})
    return replace(given, name=name, results=results, timings=timings)


def cells(page, name):
    line = next(line for line in page.splitlines() if f"| {name} |" in line)
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_every_system_has_its_figures_and_says_whether_it_beats_the_copy():
    page = overview_markdown([report()])
    assert cells(page, "clear") == [
        "task", "clear", "`sari`", "30.0 [29.0, 31.0]", "4.0", "12", "2.0", "yes, intervals apart",
    ]
    assert [cells(page, name)[-1] for name in ("close", "same", "worse", "untrained")] == [
        "paired only", "not told apart", "no", "–",
    ]
    assert cells(page, "same")[5:7] == ["–", "–"], "neither timed nor counted"
    assert cells(page, "copy of the source")[3] == "25.0 [24.0, 26.0]"


def test_reports_come_in_the_given_order(tmp_path):
    for name in ("second", "first"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").write_text(json.dumps(to_json(report(name))))
    reports = read_reports([tmp_path / "first", tmp_path / "second" / "report.json"])
    page = overview_markdown(reports)
    assert page.index("| first |") < page.index("| second |")


def test_the_figure_has_a_panel_for_each_report_and_is_the_same_twice(tmp_path):
    reports = [report("one"), report("two")]
    written = write_overview(reports, tmp_path)
    assert [path.name for path in written] == [
        "overview.md", "one.json", "two.json", "overview.svg", "overview.png",
    ]
    svg = written[3].read_text()
    assert "one, 7 rows" in svg and "two, 7 rows" in svg
    (tmp_path / "again").mkdir()
    assert write_overview(reports, tmp_path / "again")[3].read_text() == svg


def test_figures_are_kept_without_the_sample_texts(tmp_path):
    given = report()
    written = write_overview([given], tmp_path, plots=False)
    assert [path.name for path in written] == ["overview.md", "task.json"]
    kept = json.loads(written[1].read_text())
    assert kept["results"]["samples"] == []
    assert kept["results"]["systems"] == to_json(given.results.systems)
    assert given.results.samples, "the report itself stays whole"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "there is no report"),
        ("{", "is not JSON"),
        ("[]", "is not the report of a comparison"),
        ('{"results": {}}', "is not the report of a comparison"),
    ],
)
def test_what_is_no_report_is_named(tmp_path, text, message):
    path = tmp_path / "report.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=message) as error:
        read_reports([path])
    assert str(Path(path)) in str(error.value)


def test_two_reports_of_one_name_are_refused(tmp_path):
    with pytest.raises(UserError, match="different names, got 'task' twice"):
        write_overview([report(), report()], tmp_path, plots=False)


def test_no_report_is_refused(tmp_path):
    with pytest.raises(UserError, match="expected at least one report, got none"):
        write_overview([], tmp_path)


@pytest.mark.parametrize("path", SAVED, ids=lambda path: path.stem)
def test_a_saved_report_is_the_same_after_it_was_read(path):
    content = json.loads(path.read_text(encoding="utf-8"))
    report = from_json(Report, content)
    assert json.dumps(to_json(report)) == json.dumps(content)
    assert f"# Comparison: {content['name']}" in markdown(report)
