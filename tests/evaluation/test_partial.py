"""An evaluation that is killed: what it wrote is there, and the next one goes on with it."""

import json

import pytest
import torch

from tess.backbones.config import HybridConfig
from tess.config import TessConfig
from tess.costs.machine import environment
from tess.data.rows import Example
from tess.decoders.diffusion import TessDecoder
from tess.decoders.options import SamplerOptions
from tess.denoiser import TessDenoiser
from tess.evaluation.partial import PARTIAL
from tess.evaluation.run import Settings, evaluate, write_report
from tess.schedulers.renoising import RenoisingScheduler
from tess.storage.parts import Parts
from tess.text.tokenization import train_tokenizer

TEXTS = ["a cat", "the dog ran after the cat", "naïve 東京", "a cat sat", "a cat", "the dog"]
EXAMPLES = [Example(text, (text[::-1],)) for text in TEXTS]
SETTINGS = {"num_inference_steps": 3, "batch_size": 2, "seed": 4}
DATA = {"file": "rows.jsonl", "task": None, "dataset": None, "split": None}
SIZES = {
    "hybrid_override_pattern": "M*-", "hidden_size": 32, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "intermediate_size": 32, "ssm_state_size": 8,
    "mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 1, "chunk_size": 8,
    "tie_word_embeddings": True, "initializer_range": 0.3,
}
TIMES = ("generation_seconds", "new_tokens_per_second", "milliseconds_per_token")


class Killed(BaseException):
    """As an interrupt: nothing on its way catches it."""


def decoder(num_candidates=1):
    torch.manual_seed(0)
    tokenizer = train_tokenizer(TEXTS * 3, 270)
    config = HybridConfig(**SIZES, vocab_size=len(tokenizer))
    limits = {"max_source_length": 16, "max_target_length": 12, "target_length_ratio": 1.0}
    denoiser = TessDenoiser(TessConfig(backbone_config=config, **limits))
    scheduler = RenoisingScheduler(vocab_size=len(tokenizer))
    parts = Parts(denoiser, tokenizer, scheduler)
    return TessDecoder(parts, SamplerOptions(num_candidates=num_candidates))


def run(one, partial=None, weights="w", **changed):
    settings = Settings(**SETTINGS | changed)
    return evaluate(
        one, EXAMPLES, settings, checkpoint="c", data=DATA, partial=partial, weights=weights
    )


def kill_after(one, batches):
    """Let the decoder write so many batches; returns the list of those it wrote."""
    write, written = one._batch, []

    def batch(rows, *args):
        if len(written) == batches:
            raise Killed
        written.append(rows)
        return write(rows, *args)

    one._batch = batch
    return written


@pytest.fixture
def killed(tmp_path):
    """What an evaluation of six texts leaves that was killed after two batches of two."""
    one = decoder(num_candidates=2)
    kill_after(one, 2)
    with pytest.raises(Killed):
        run(one, tmp_path / PARTIAL)
    return tmp_path / PARTIAL


def test_texts_are_on_disk_as_they_come(killed):
    head, *lines = killed.read_text(encoding="utf-8").splitlines()
    assert json.loads(head)["batch_size"] == 2
    rows = [json.loads(line) for line in lines]
    whole = run(decoder(num_candidates=2)).predictions
    assert len(rows) == 4
    for row in rows:
        assert row["text"] == whole[row["row"]]["prediction"]
        assert row["first"]["text"] == whole[row["row"]]["first_prediction"]


@pytest.mark.parametrize("torn", [0, 3])
def test_a_killed_evaluation_goes_on_and_its_report_is_that_of_an_undisturbed_one(killed, torn):
    content = killed.read_bytes()
    killed.write_bytes(content[: len(content) - torn])  # killed in the middle of a line
    one = decoder(num_candidates=2)
    written = kill_after(one, 2)
    again, whole = run(one, killed), run(decoder(num_candidates=2))
    assert again.num_kept == (3 if torn else 4) and len(written) == (2 if torn else 1)
    assert again.predictions == whole.predictions
    assert list(again.report) == list(whole.report)
    for key, value in whole.report.items():
        if key not in TIMES:
            assert again.report[key] == value, key
    folder = killed.parent
    write_report(again, folder)
    assert sorted(path.name for path in folder.iterdir()) == [
        "predictions.jsonl", "report.json", "report.md",
    ]


@pytest.mark.parametrize(
    "changed", [{"seed": 5}, {"weights": "v"}, {"batch_size": 3}, {"num_inference_steps": 2}]
)
def test_texts_of_other_settings_or_weights_are_not_reused(killed, changed):
    one = decoder(num_candidates=2)
    again = run(one, killed, **changed)
    assert again.num_kept == 0
    assert again.predictions == run(decoder(num_candidates=2), **changed).predictions


@pytest.mark.parametrize("what", ["options", "rows", "versions", "machine"])
def test_texts_of_other_options_rows_versions_or_machines_are_not_reused(killed, what, monkeypatch):
    one = decoder(num_candidates=3 if what == "options" else 2)
    facts = {"versions": {"torch": "0"}, "machine": {"accelerator": "another"}}
    if what in facts:
        monkeypatch.setattr(
            "tess.evaluation.run.environment", lambda names: environment(names) | facts[what]
        )
    assert run(one, killed, limit=5 if what == "rows" else None).num_kept == 0


def test_the_time_of_both_processes_counts(killed):
    before = sum(json.loads(line)["seconds"] for line in killed.read_text().splitlines()[1:])
    again = run(decoder(num_candidates=2), killed)
    assert again.report["generation_seconds"] > before > 0
