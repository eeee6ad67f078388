"""The comparison of carried with dense simplices: what it reports, and what it tells apart."""

import itertools

import pytest
import torch

from tess.benchmarks.doors import carried
from tess.benchmarks.law.carried import benchmark_carried
from tess.errors import UserError
from tess.schedulers.noise import alpha_bar
from tess.schedulers.recoverability import auto_simplex_value


def small(**options):
    given = {"times": (0.5, 0.1), "num_soft_tokens": (1, 20), "num_top": 16, "n": 1_024}
    return benchmark_carried(60, 5, **given | options)


def test_every_sampler_is_compared_at_every_time():
    result = small(seed=1)
    assert (result["benchmark"], result["embedding"], result["n"]) == (
        "carried",
        "synthetic",
        1_024,
    )
    assert result["simplex_value"] == auto_simplex_value(60)
    rows = {(row["prediction"], row["time"], row["sampler"]): row for row in result["rows"]}
    names, times = ("dense", "M=1", "M=20"), (0.5, 0.1)
    assert list(rows) == list(itertools.product(("sharpening", "unsure"), times, names))
    sigma = auto_simplex_value(60) * (1 - float(alpha_bar(0.5))) ** 0.5
    assert rows["unsure", 0.5, "dense"]["sigma"] == pytest.approx(sigma)
    assert not any(row["rejected"] for (*_, name), row in rows.items() if name != "M=1")
    cut, whole = (rows["unsure", 0.1, name] for name in names[1:])
    assert cut["rejected"] and cut["mean_error"] > 2 * whole["mean_error"]
    assert rows["unsure", 0.5, "dense"]["correlation"] is None
    assert 0.5 < whole["dense_correlation"] < 1 and whole["correlation_error"] < 0.1
    assert small(seed=1)["rows"] == result["rows"] != small()["rows"]

    lines = carried.table(result).splitlines()
    assert lines[0].startswith("carried: synthetic embedding 60 x 5, k = 1.64, K = 16, 1,024 samp")
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line[:1] == "|"]
    assert table[0] == ["prediction", "t", "sigma", "correlation", "dense", "M=1", "M=20"]
    assert [line[:2] for line in table[2:]] == [
        [kind, t] for kind in ("sharpening", "unsure") for t in ("0.5", "0.1")
    ]
    assert table[2][3] == "–" and table[2][4].endswith("/ –")
    figures = [f"{cut[name]:.{digits}f}" for name, digits in
               (("mean_error", 3), ("ks_share", 2), ("correlation_error", 3))]
    assert table[5][5] == " / ".join(figures) + " *"


def test_the_matrix_may_be_that_of_a_file(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "part.safetensors"
    save_file({"model.embeddings.weight": torch.randn(40, 6)}, path)
    result = small(embedding=path, simplex_value=2.0, n=16, num_soft_tokens=(4,))
    found = [result[key] for key in ("embedding", "vocab_size", "width", "simplex_value")]
    assert found == ["part.safetensors", 40, 6, 2.0]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"n": 15}, "n must be at least 16 samples a side, got 15"),
        ({"num_top": 61}, r"num_top must be in 1\.\.60, got 61"),
        ({"num_soft_tokens": (4, 61)}, r"num_soft_tokens must be in 1\.\.60, got 61"),
        ({"times": (0.5, 0.0)}, "times must be above 0 and at most 1, got 0.0"),
    ],
)
def test_a_request_that_does_not_fit_is_one_sentence(options, message):
    with pytest.raises(UserError, match=message):
        small(**options)
    with pytest.raises(UserError, match=r"vocab_size must be in 3\.\.65536, got 70000"):
        benchmark_carried(70_000, 2)
