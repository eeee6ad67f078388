"""tess-benchmark gpu: a dry run goes all the way, a wrong kernel is seen and has no times."""

import json
import math
import os
import re
import subprocess
import sys
from inspect import signature
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="the GPU benchmark needs the package triton")

from tess.benchmarks.commands import make_parser  # noqa: E402
from tess.benchmarks.gpu import checks, report, shapes  # noqa: E402
from tess.benchmarks.gpu import compare as comparison  # noqa: E402
from tess.benchmarks.gpu import run as benchmark_gpu  # noqa: E402
from tess.benchmarks.gpu.cases import Maker, evaluate, scan_case  # noqa: E402
from tess.benchmarks.gpu.clock import Clock, as_gpu, summarize  # noqa: E402
from tess.benchmarks.gpu.options import OPERATIONS, PACKAGES, Options  # noqa: E402
from tess.benchmarks.gpu.peers import Absent, Contender, load  # noqa: E402
from tess.commands.benchmark import main  # noqa: E402
from tess.costs.gpus import Gpu  # noqa: E402
from tess.costs.roofline import Cost  # noqa: E402
from tess.errors import UserError  # noqa: E402
from tess.kernels import conv, cross_entropy, head, norms  # noqa: E402
from tess.kernels.dispatch import is_interpreted  # noqa: E402
from tess.kernels.triton.launch import Config  # noqa: E402
from tess.kernels.triton.norms import FORWARD  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "benchmark.py"
needs_interpreter = pytest.mark.skipif(
    not is_interpreted(), reason="a dry run is one in Triton's interpreter"
)


def script(*arguments):
    """Call the script's main in this process; its status."""
    return main([str(argument) for argument in arguments])


def without_kernels():
    """Operations that have no Triton path: they fail the gate, and all others have to pass it."""
    public = {
        "causal_conv1d": conv.causal_conv1d, "vocabulary_sweep": head.vocabulary_sweep,
        "linear_cross_entropy": cross_entropy.linear_cross_entropy,
    }
    return {op for op, call in public.items() if "backend" not in signature(call).parameters}


# ---- the command ----


def dry_run(*arguments):
    """The command in a process of its own, as a user starts it."""
    command = [sys.executable, str(SCRIPT), "gpu", "--dry_run", *map(str, arguments)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_a_dry_run_checks_and_compares_every_operation(tmp_path, assert_keys_are_documented):
    out = tmp_path / "figures.json"
    run = dry_run("--json", out)
    table, figures = run.stdout, json.loads(out.read_text())
    missing = without_kernels()
    assert figures["failed"] == sorted(missing) and run.returncode == bool(missing), run.stderr
    assert figures["dry_run"] and table.startswith("DRY RUN")

    checked = {(row["op"], row["variant"], row["dtype"]) for row in figures["checks"]}
    for op, variants in checks.VARIANTS.items():
        for dtype in ("float32", "float16") if op != "route_tokens" else ("float32",):
            assert {(op, variant, dtype) for variant in variants} <= checked
    for row in figures["checks"]:
        assert row["passed"] and row["runs_equal"] or row["op"] in missing, row
    assert any("BLOCK" in row["configuration"] for row in figures["checks"])

    ours = [row for row in figures["rows"] if row["system"] == "ours"]
    timed = {op for op in OPERATIONS if not {op, *checks.PARTS.get(op, ())} & missing}
    assert {row["op"] for row in ours} == timed
    for row in figures["rows"]:
        assert not row["failed"] and (row["ms"] or row["note"])
        if row["difference"] is not None:
            assert row["difference"] < 1e-4, row
        assert row["ms"] is None or f"({row['ms']:.3f} (" in table  # in brackets
    assert {p["package"] for p in figures["peers"]} == set(PACKAGES)
    for peer in figures["peers"]:
        assert peer["version"] or peer["package"] in re.search("absent: (.*)", table)[1]
    assert len(figures["goals"]) == 7 and all(goal["met"] is None for goal in figures["goals"])
    assert_keys_are_documented(figures)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_without_a_gpu_it_refuses_in_one_sentence():
    with pytest.raises(UserError, match="needs a CUDA device of compute capability 8.0"):
        script("gpu")


def test_a_dry_run_without_the_interpreter_is_refused(monkeypatch):
    monkeypatch.setattr(benchmark_gpu, "is_interpreted", lambda: False)
    with pytest.raises(UserError, match="needs TRITON_INTERPRET=1"):
        script("gpu", "--dry_run")


def test_it_needs_none_of_the_packages_of_training():
    missing = "diffusers", "datasets", "sacrebleu", "accelerate", "rouge_score"
    code = (
        f"import runpy, sys\nsys.modules.update(dict.fromkeys({missing!r}))\n"
        f"sys.argv = ['benchmark.py', 'gpu', '--ops', 'rms_norm', '--dry_run']\n"
        f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert run.returncode == 0, run.stderr.decode()
    assert b"| rms_norm | tiny | float32 |" in run.stdout


def test_shapes_are_those_of_the_models():
    nano, small = shapes.NANO, shapes.shipped(ROOT / "checkpoints" / "default")
    assert (nano.tokens, nano.mamba_width, nano.conv_width) == (32_768, 4096, 6144)
    assert (small.hidden, small.heads, small.states, small.vocabulary) == (192, 8, 32, 4096)
    for shape in (nano, small):
        few = shapes.for_checks(shape)
        for name in ("head_width", "states", "taps", "hidden", "top_k"):
            assert getattr(few, name) == getattr(shape, name)
        assert few.heads // few.groups == shape.heads // shape.groups
    with pytest.raises(UserError, match="--shapes shipped"):
        shapes.shipped(ROOT / "nowhere")


# ---- the gate ----


def norm_rows(dtype="float32", device="cpu"):
    one = {"op": "rms_norm", "variants": ["plain"], "dtype": dtype, "device": device, "seed": 0}
    sizes = vars(shapes.TINY) | {"few_tokens": [3]}
    return checks.check(**one, shape=sizes, quick=True)


def spoil(monkeypatch, change):
    """`change(y, call)` of what the Triton path of the norm gives, calls being counted."""
    right, calls = norms.rms_norm, []

    def wrong(x, weight, eps, *, backend=None):
        y = right(x, weight, eps, backend=backend)
        calls.append(backend)
        return change(y, calls.count("triton")) if backend == "triton" else y

    monkeypatch.setattr(norms, "rms_norm", wrong)


@needs_interpreter
def test_a_wrong_kernel_is_seen_and_has_no_times(monkeypatch, tmp_path, capsys):
    spoil(monkeypatch, lambda y, call: y * 1.001)
    out = tmp_path / "figures.json"
    command = ("gpu", "--dry_run", "--ops", "rms_norm", "ssd_step", "--json", out)
    assert script(*command) == 1
    table, figures = capsys.readouterr().out, json.loads(out.read_text())
    assert figures["failed"] == ["rms_norm"]
    assert {row["op"] for row in figures["rows"]} == {"ssd_step"}
    assert "| rms_norm, plain |" not in table and "no times of rms_norm: it failed" in table
    assert re.search(r"FAIL: rms_norm, plain, tiny, float32, configuration its own: y is", table)


@needs_interpreter
@pytest.mark.parametrize(
    "change, symptom",
    [
        (lambda y, call: y + 1e-3 * y.detach(), "y"),
        (lambda y, call: y.detach() + 0.01 * (y - y.detach()), "d x"),  # the gradient alone
        (lambda y, call: y * math.nan, "nan"),
        (lambda y, call: y * (1 + 1e-6 * (call == 3)), "runs"),  # bits of one run
    ],
)
def test_what_is_wrong_is_named(monkeypatch, change, symptom):
    assert all(row["passed"] for row in norm_rows())
    spoil(monkeypatch, change)
    (row,) = norm_rows()
    assert not row["passed"]
    if symptom == "runs":
        assert not row["runs_equal"] and row["error"] <= row["bound"]
    elif symptom == "nan":
        assert row["error"] is None and "is not finite" in row["note"]
    else:
        assert row["worst"] in (symptom, "d weight") and row["error"] > row["bound"]


@needs_interpreter
def test_a_single_wrong_configuration_is_seen(monkeypatch):
    other = Config({"TILE": 2048}, 4, 1)
    monkeypatch.setattr(FORWARD, "others", (other,))
    x = torch.ones(1)
    spoil(monkeypatch, lambda y, call: y * (1 + 0.01 * (FORWARD.config(x) == other)))
    monkeypatch.setitem(checks.VARIANTS, "rms_norm", ("plain",))
    own, forced = norm_rows("float16")
    assert own["passed"] and own["configuration"] == "its own"
    assert not forced["passed"]
    assert forced["configuration"] == "rms_norm_forward TILE=2048 warps=4 stages=1"
    assert FORWARD.config(x) != other  # put back


@needs_interpreter
def test_a_kernel_that_raises_fails_and_one_that_does_not_fit_is_left_out(monkeypatch):
    class OutOfResources(Exception):
        pass

    monkeypatch.setattr(FORWARD, "others", (Config({"TILE": 2048}, 4, 1),))
    monkeypatch.setitem(checks.VARIANTS, "rms_norm", ("plain",))

    def refuse(y, call):
        if FORWARD.config(torch.ones(1)).blocks["TILE"] == 2048:
            raise error
        return y

    spoil(monkeypatch, refuse)
    for error, passed in ((OutOfResources("shared memory"), None), (RuntimeError("no"), False)):
        own, forced = norm_rows("float16")
        assert own["passed"] and forced["passed"] is passed and forced["note"]


@needs_interpreter
def test_a_difference_at_full_size_takes_the_times_away(monkeypatch):
    spoil(monkeypatch, lambda y, call: y * 1.1)
    (row,) = comparison.compare("rms_norm", shapes.TINY, settings())
    assert row["failed"] and row["ms"] is None and "differs from the PyTorch path" in row["note"]


@needs_interpreter
def test_checks_run_in_processes_of_their_own(monkeypatch):
    wanted = [one for one in checks.requests("rms_norm", shapes.TINY, "cpu", 0, quick=True)]
    rows = checks.check_all(wanted, 2, lambda line: None)
    assert [row["dtype"] for row in rows] == 2 * ["float32"] + 2 * ["float16"]
    assert all(row["passed"] for row in rows)
    monkeypatch.setattr(sys, "executable", "false")
    (lost,) = checks.check_all(wanted[:1], 1, lambda line: None)
    assert not lost["passed"] and "status 1" in lost["note"]


def test_bounds_follow_the_pytorch_path_between_floor_and_limit():
    assert checks.bound("bfloat16", None) == checks.FLOORS["bfloat16"]
    assert checks.bound("bfloat16", 1e-4) == checks.FLOORS["bfloat16"]
    assert checks.bound("bfloat16", 5e-3) == 1e-2
    assert checks.bound("bfloat16", 1.0) == checks.LIMITS["bfloat16"]
    assert checks.bound("float32", 1.0, loose=True) == 10 * checks.LIMITS["float32"]
    one, nothing = torch.ones(4), torch.zeros(4)
    assert checks.difference(1.5 * one, one) == 0.5
    assert checks.difference(0.25 * one, nothing) == checks.difference(0.25 * one, None) == 0.25
    assert checks.difference(torch.tensor([1, 2]), torch.tensor([1, 3])) == 0.5


# ---- times ----


def settings(peers=()):
    gpu = Gpu("measured", 1e12, 1e11, 0.0)
    return comparison.Settings("float32", 1, 0, peers, Clock(torch.device("cpu")), gpu)


@needs_interpreter
def test_a_peer_that_raises_has_a_line_and_the_others_their_times(monkeypatch):
    def contenders(case):
        yield Contender("breaks", "torch", lambda: lambda leaves: 1 / 0)
        yield Contender("double", "torch", lambda: lambda t: {"y": 2 * case.run(t, "torch")["y"]})
        yield Contender("other", "liger-kernel", lambda: lambda leaves: {})

    monkeypatch.setattr(comparison.sequence_peers, "contenders", contenders)
    rows = comparison.compare("ssd_step", shapes.TINY, settings(peers=("torch",)))
    assert [row["system"] for row in rows] == ["ours", comparison.PLAIN, "breaks", "double"]
    ours, plain, breaks, double = rows
    assert breaks["ms"] is None and breaks["note"] == "ZeroDivisionError: division by zero"
    assert double["ms"] and "differs from the PyTorch path by 1.0e+00" in double["note"]
    assert ours["ratio"] == 1 and plain["ratio"] == plain["ms"] / ours["ms"]
    assert ours["of_roofline"] == pytest.approx(ours["least_ms"] / ours["ms"])


def test_absent_packages_and_names_are_named(monkeypatch):
    monkeypatch.setitem(PACKAGES, "mamba-ssm", "no_such_module")
    with pytest.raises(Absent, match="absent: package mamba-ssm"):
        load("mamba-ssm", "no_such_module.ops", "scan")
    with pytest.raises(Absent, match="has no torch.nn.no_such_name"):
        load("torch", "torch.nn", "no_such_name")


def test_quantiles_are_those_of_the_runs():
    timing = summarize([(ms, 2.0) for ms in (5.0, 1.0, 3.0, 2.0, 4.0, 6.0)])
    assert (timing.ms, timing.ms_q20, timing.ms_q80) == (3.5, 2.0, 5.0)
    assert (timing.host_ms, timing.runs) == (2.0, 6)


def test_systems_take_turns_after_warm_up_and_resets_are_not_timed():
    seen = []
    calls = {name: lambda name=name: seen.append(name) for name in "ab"}
    resets = {"b": lambda: seen.append("reset")}
    timings = Clock(torch.device("cpu")).compare(calls, 3, resets)
    assert seen == 5 * ["a", "reset", "b"] and timings["a"].runs == 3


# ---- the least an operation takes: figures computed by hand for Nemotron-3-Nano ----


def near(cost, gigabytes, teraflops):
    assert cost.bytes / 1e9 == pytest.approx(gigabytes, rel=0.02)
    assert cost.flops / 1e12 == pytest.approx(teraflops, rel=0.02)


def test_rooflines_of_the_scan():
    tokens, x, maps = 8 * 4096, 8 * 4096 * 64 * 64, 8 * 4096 * 8 * 128
    one, two = shapes.scan_costs(shapes.NANO, 2), shapes.scan_costs(shapes.NANO, 2, 2)
    near(one.forward, 0.675, 0.112)
    near(two.forward, 0.675, 0.180)
    assert one.forward.bytes == 2 * (2 * x + 2 * maps + tokens * 64)
    assert one.training.flops == 3 * one.forward.flops
    assert one.training.bytes == one.forward.bytes + 2 * (3 * x + 4 * maps + 2 * tokens * 64)
    h100 = as_gpu({"copy_bytes_per_second": 3e12, "bfloat16_flops": 790e12}, "bfloat16")
    assert 1e3 * one.forward.seconds(h100) == pytest.approx(0.225, rel=0.01)
    assert one.forward.bound(h100) == "memory" and two.forward.bound(h100) == "compute"


def test_rooflines_over_tokens():
    nano = shapes.NANO
    near(shapes.expert_costs(nano, 2, 32_768, 128).forward, 2.9, 3.92)
    near(shapes.expert_costs(nano, 2, 512, 128).forward, 2.56, 0.061)
    near(shapes.head_costs(nano, 2).forward, 0.88, 23.1)
    near(shapes.head_costs(nano, 2).training, 2.64, 69.3)
    near(shapes.head_costs(nano, 2, products=2).forward, 1.06, 46.2)
    for num_top, gigabytes in ((16, 3.2), (64, 11.6)):
        s = shapes.replace(nano, num_top=num_top)
        near(shapes.embedding_costs(s, 2).forward, gigabytes, 0.48)


def test_rooflines_of_what_only_moves_memory():
    nano = shapes.NANO
    row = 32_768 * 2688 * 2
    assert shapes.norm_costs(nano, 2, 2688).forward == Cost(2 * row + 2 * 2688, 0)
    gated = shapes.norm_costs(nano, 2, 4096, gated=True)
    assert gated.training.bytes == 2 * (8 * 32_768 * 4096 + 3 * 4096)
    conv = shapes.conv_costs(nano, 2).forward
    assert conv.bytes == 2 * (2 * 32_768 * 6144 + 5 * 6144)
    state = 8 * 64 * 64 * 128 * 4
    assert shapes.step_costs(nano, 2).forward.bytes == pytest.approx(2 * state, rel=0.01)


# ---- goals ----


def test_goals_take_the_fastest_rival_of_their_comparison():
    def row(op, variant, what, system, ms, peak=None):
        return {
            "op": op, "variant": variant, "shape": "nano", "what": what, "system": system,
            "ms": ms, "peak_bytes": peak,
        }

    both, training = "bidirectional", "forward + backward"
    rows = [
        row("ssd_scan", "forward", "forward", "ours", 0.5),
        row("ssd_scan", "forward", "forward", "mamba-ssm, chunks of 128", 1.2),
        row("ssd_scan", "forward", "forward", "mamba-ssm, chunks of 256", 0.9),
        row("ssd_scan", both, "forward", "ours", 0.6),
        row("ssd_scan", both, "forward", "mamba-ssm, chunks of 128, one causal pass", 1.0),
        row("ssd_scan", both, "forward", "mamba-ssm, chunks of 128, two passes", 3.0),
        row("ssd_scan", both, training, "ours", 2.0, 40),
        row("ssd_scan", both, training, "mamba-ssm, chunks of 128, two passes", 6.0, 100),
        row("ssd_scan", both, training, "mamba-ssm, chunks of 128, one causal pass", 3.0, 50),
        row("experts", "32768 tokens", "forward", "ours", 6.0),
        row("experts", "32768 tokens", "forward", "torch grouped_mm, sort and scatter", 9.0),
    ]
    result = {"shapes": [vars(shapes.NANO)], "rows": rows, "dry_run": False}
    found = report.goals(result)
    figures = [goal["figure"] for goal in found]
    assert figures[:5] == pytest.approx([1.8, 0.6, 3.0, 0.4, 1.5])
    assert [goal["met"] for goal in found] == [False, True, True, True, True, None, None]
    assert all(g["met"] is None for g in report.goals(result | {"dry_run": True}))


def test_the_bidirectional_case_differs_from_two_passes_by_the_token_counted_twice():
    make = lambda: Maker(torch.device("cpu"), torch.float64, 0)  # noqa: E731
    cases = {d: scan_case(shapes.TINY, d, make()) for d in ("forward", "reverse", "bidirectional")}
    ys = {d: evaluate(case.exact, case.leaves, None)["y"] for d, case in cases.items()}
    t = cases["forward"].leaves
    dt = torch.nn.functional.softplus(t["dt"] + t["bias"])
    cb = (t["b"] * t["c"]).sum(-1).repeat_interleave(2, dim=-1)
    own = (dt * cb + t["d"])[..., None] * t["x"]
    torch.testing.assert_close(ys["forward"] + ys["reverse"] - own, ys["bidirectional"])


def test_options_have_the_names_that_are_built_and_the_defaults_of_the_command():
    assert OPERATIONS == tuple(checks.BUILDERS)
    args = make_parser().parse_args(["gpu"])
    given = {name: tuple(v) if isinstance(v, list) else v for name, v in vars(args).items()}
    assert Options(**{name: given[name] for name in vars(Options())}) == Options()
