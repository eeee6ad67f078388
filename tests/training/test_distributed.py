"""Two processes compute what one does: losses, weights, router biases, averages, sharded steps."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from tess.errors import UserError
from tess.storage.parts import load_parts
from tess.training.flags import parse_settings
from tess.training.run import train

ROOT = Path(__file__).parents[2]
WORKER = ROOT / "tests" / "training" / "distributed_worker.py"
LAUNCH = [
    sys.executable, "-m", "accelerate.commands.launch",
    "--config_file", str(ROOT / "scripts" / "recipes" / "accelerate_ddp_cpu.yaml"),
]

TINY = {
    "task": "simplification", "train_tokenizer": True, "vocab_size": 300,
    "hybrid_override_pattern": "M*E-", "hidden_size": 32, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "intermediate_size": 32, "ssm_state_size": 8,
    "mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 1, "chunk_size": 16,
    "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 16, "max_source_length": 24, "max_target_length": 24,
    "max_train_samples": 24, "max_eval_samples": 4, "warmup_steps": 0, "logging_steps": 1,
    "max_steps": 4, "learning_rate": 1e-2, "adam_epsilon": 1e-4, "save_strategy": "no",
    "save_total_limit": 0, "num_samples_to_print": 0, "ema_decay": 0.5, "disable_tqdm": True,
    "use_cpu": True, "report_to": "none", "router_balance_rate": 0.01,
}
CASES = {
    "tess": {
        "objective": "tess", "conditional_generation": "seq2seq,text_infilling,ul2",
        "pad_loss_weight": 0.1, "canvas": "rule", "source_drop_probability": 0.2,
        "unroll_probability": 0.5, "unroll_steps": 2, "save_strategy": "steps", "save_steps": 2,
    },
    # texts of unequal lengths beside each other
    "ar": {
        "objective": "ar", "mtp_depth": 2, "bucket_by_length": False, "max_target_length": 64,
    },
    "length head": {"objective": "tess", "length_head": True, "length_loss_weight": 1.0},
    "accumulation": {"objective": "tess", "gradient_accumulation_steps": 2, "max_steps": 2},
}
VARIANTS = {  # what is wrong, and the case in which it shows
    "gradients not averaged": "tess", "the same rows": "tess", "the same draws": "tess",
    "means of means": "ar", "buffers of the first process": "tess",
}
SHARDED = ["ar", "tess", "tess causal", "tess joint"]


@pytest.fixture(scope="module")
def worker():
    spec = importlib.util.spec_from_file_location("distributed_worker", WORKER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """What each of two processes saw of every case."""
    folder = tmp_path_factory.mktemp("launched")

    def case(of, output, **more):
        config = TINY | CASES[of] | {"per_device_train_batch_size": 4}
        return {"config": config | {"output_dir": str(folder / output)}, **more}

    cases = [case(name, name, name=name) for name in CASES]
    cases.append(case("tess", "tess", name="resumed", killed="checkpoint-4"))
    cases += [case(of, name, name=name, variant=name) for name, of in VARIANTS.items()]
    (folder / "cases.json").write_text(json.dumps(cases))
    launch([str(WORKER), str(folder)])
    results = [torch.load(folder / f"results.{rank}.pt", weights_only=False) for rank in (0, 1)]
    assert [result["processes"] for result in results] == [2, 2]
    return folder, results


def launch(command):
    # one thread each: two processes that share two cores with others
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*LAUNCH, *command], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return done.stdout


@pytest.fixture(scope="module")
def alone(worker, tmp_path_factory):
    """The same cases in one process, which has all rows of a step in its batch."""
    folder, seen = tmp_path_factory.mktemp("alone"), {}

    def get(name):
        if name not in seen:
            config = TINY | CASES[name] | {"per_device_train_batch_size": 8}
            seen[name] = worker.watched_train(config | {"output_dir": str(folder / name)})
        return seen[name]

    return get


def norm(tensors):
    return sum(t.double().square().sum() for t in tensors).sqrt().item()


def errors(got, want):
    """How far a run is from another: the worst loss, and the weights as a share of their way."""
    assert sorted(got["losses"]) == sorted(want["losses"])
    losses = max(abs(got["losses"][step] - want["losses"][step]) for step in want["losses"])
    names = [name for name, tensor in want["end"].items() if "bias" not in name]
    way = norm(want["end"][n] - want["start"][n] for n in names)
    return losses, norm(got["end"][n] - want["end"][n] for n in names) / way


def wrong_loads(parts, want):
    """Tokens that the processes together counted at other experts than one process did."""
    together = [sum(loads) for loads in zip(*(part["loads"] for part in parts), strict=True)]
    both = zip(together, want["loads"], strict=True)
    return sum((got - load).abs().sum().item() for got, load in both)


def biases(result):
    return [t for name, t in result["end"].items() if name.endswith("e_score_correction_bias")]


@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_as_one_does(launched, alone, name):
    _, results = launched
    want = alone(name)
    assert all(torch.equal(results[0][name]["start"][n], t) for n, t in want["start"].items())
    losses, weights = errors(results[0][name], want)
    assert losses < 1e-4 and weights < 1e-4
    for mean, own in zip(want["average"].values(), results[0][name]["average"].values()):
        torch.testing.assert_close(own, mean, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_comparison_sees_what_is_wrong(launched, alone, variant):
    _, results = launched
    want = alone(VARIANTS[variant])
    if variant.startswith("buffers"):
        assert wrong_loads([result[variant] for result in results], want) > 100
    else:
        assert errors(results[0][variant], want)[1] > 1e-2


@pytest.mark.parametrize("name", [*CASES, "resumed"])
def test_the_processes_do_not_drift_apart(launched, alone, name):
    _, (first, second) = launched
    for n, tensor in first[name]["end"].items():
        assert torch.equal(tensor, second[name]["end"][n]), n
    for n, tensor in first[name]["average"].items():
        assert torch.equal(tensor, second[name]["average"][n]), n
    want = alone("tess" if name == "resumed" else name)
    assert biases(want) and all(t.any() for t in biases(want))
    assert all(torch.equal(a, b) for a, b in zip(biases(first[name]), biases(want), strict=True))
    if name != "resumed":
        assert wrong_loads((first[name], second[name]), want) <= 4  # near ties


def test_a_killed_run_of_two_processes_goes_on_to_the_same_losses(launched):
    folder, (first, _) = launched
    assert first["resumed"]["losses"] == first["tess"]["losses"]
    assert all(torch.equal(first["resumed"]["end"][n], t) for n, t in first["tess"]["end"].items())
    names = sorted(path.name for path in (folder / "tess").iterdir())
    assert names == ["checkpoint-2", "checkpoint-4", "final", "settings.json"]
    states = sorted(path.name for path in (folder / "tess" / "checkpoint-4").glob("rng_state*"))
    assert states == ["rng_state_0.pth", "rng_state_1.pth"]


def test_the_training_script_runs_in_two_processes_and_writes_one_result(tmp_path, alone):
    config = TINY | CASES["tess"] | {"per_device_train_batch_size": 4}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config | {"output_dir": str(tmp_path / "run")}))
    output = launch([str(ROOT / "scripts" / "train.py"), str(path)])
    assert output.count(f"saved {tmp_path / 'run' / 'final'}") == 1
    want, final = alone("tess")["average"], load_parts(tmp_path / "run" / "final").model
    for name, parameter in final.named_parameters():
        torch.testing.assert_close(parameter.data, want[name], rtol=1e-3, atol=1e-4)
    state = json.loads((tmp_path / "run" / "checkpoint-4" / "trainer_state.json").read_text())
    losses = {entry["step"]: entry["loss"] for entry in state["log_history"] if "loss" in entry}
    assert losses == pytest.approx(alone("tess")["losses"], abs=1e-3)


# FSDP2


@pytest.mark.parametrize("name", SHARDED)
def test_updates_of_a_sharded_model_equal_those_of_the_whole_one(launched, name):
    _, results = launched
    own = results[0]["sharded"][name]
    (losses, states), (want_losses, want_states) = own["got"], own["want"]
    assert all(own["sharded"])
    both = [sum(result["sharded"][name]["local"]) for result in results]
    assert max(both) < 0.75 * sum(both)  # neither has it all
    for step, want in enumerate(want_losses):
        means = sum(result["sharded"][name]["got"][0][step] for result in results) / 2
        assert means == pytest.approx(want, abs=1e-4)
        assert losses[step] != pytest.approx(want, abs=1e-3)  # each has rows of its own
    for state, want_state in zip(states, want_states, strict=True):
        assert state.keys() == want_state.keys()
        differences = [state[n].double() - t.double() for n, t in want_state.items()]
        assert norm(differences) < 1e-4 * norm(want_state.values())


@pytest.mark.parametrize("name", SHARDED)
def test_whole_weights_come_out_of_a_sharded_model_and_go_back_in(launched, name):
    _, results = launched
    for result in results:
        own = result["sharded"][name]
        for got, want in ((own["copied"], own["got"][1][-1]), (own["loaded"], own["want"][1][-1])):
            assert got.keys() == want.keys()
            assert all(torch.equal(got[n], t) for n, t in want.items())


@pytest.mark.parametrize("asked", ["environment", "argument"])
def test_fsdp_on_a_cpu_is_refused(tmp_path, monkeypatch, asked):
    flags = ["--task", "simplification", "--train_tokenizer", "true", "--use_cpu", "true"]
    flags += ["--output_dir", str(tmp_path / "run")]
    if asked == "environment":
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    else:
        flags += ["--fsdp", "full_shard"]
    with pytest.raises(UserError, match="FSDP was asked for, but accelerate shards on GPUs only"):
        train(parse_settings(flags))
