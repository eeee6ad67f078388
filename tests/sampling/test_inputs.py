"""What the denoising loop hands to the network, the scheduler and the processors in every step."""

import pytest
import torch
from transformers import SequenceBiasLogitsProcessor, SuppressTokensLogitsProcessor

from tess.backbones.config import HybridConfig
from tess.cli import default_checkpoint
from tess.config import TessConfig
from tess.decoders.load import load_decoder
from tess.denoiser import TessDenoiser
from tess.errors import UserError
from tess.length import quantile_lengths
from tess.pipeline import TessPipeline
from tess.sampling.candidates import choose_candidates
from tess.sampling.guidance import Guidance
from tess.sampling.options import SamplerOptions
from tess.sampling.request import Request
from tess.sampling.sources import derived_keys, example_keys
from tess.schedulers.family import SAMPLERS
from tess.schedulers.renoising import RenoisingScheduler
from tess.schedulers.stopping import StoppingRule, text_mask
from tess.text.tokenization import train_tokenizer
from tiny import DENOISER

PROMPTS = ["the cat sat", "a small dog slept by the old red door while rain fell", "rain"]
FIXED = torch.tensor([[5, -1, -1, 7, -1, -1, 2], [-1] * 7, [9, 8, -1, -1, -1, -1, -1]])


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(PROMPTS * 20, 300)


def make(tokenizer, sampler="renoising", process=None, **settings) -> TessPipeline:
    torch.manual_seed(5)
    config = TessConfig(
        backbone_config=HybridConfig(
            **DENOISER, vocab_size=len(tokenizer), bos_token_id=1, eos_token_id=2, pad_token_id=0
        ),
        max_source_length=32, max_target_length=24, target_length_ratio=0.8,
        num_source_positions=64, num_target_positions=24,
        **settings,
    )
    first = RenoisingScheduler(vocab_size=config.vocab_size, simplex_value=config.simplex_value)
    scheduler = SAMPLERS[sampler].from_config(first.config, **process or {})
    pipeline = TessPipeline(TessDenoiser(config).eval(), scheduler, tokenizer)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.denoiser.double()
    return pipeline


def run(pipeline, **arguments):
    generator = torch.Generator().manual_seed(3)
    return pipeline(PROMPTS, generator=generator, **{"num_inference_steps": 5} | arguments)


def watched(monkeypatch, owner, name, keep):
    """Calls `keep` with the arguments of each call of a method."""
    inner = getattr(owner, name)

    def spy(*args, **kwargs):
        keep(*args, **kwargs)
        return inner(*args, **kwargs)

    monkeypatch.setattr(owner, name, spy)


def test_given_tokens_are_clean_context(tokenizer, monkeypatch):
    pipeline = make(tokenizer)
    seen = []
    watched(monkeypatch, pipeline.denoiser, "forward", lambda **inputs: seen.append(inputs))
    run(pipeline, fixed_tokens=FIXED)
    assert len(seen) == 5
    for inputs in seen:
        given = FIXED >= 0
        assert torch.equal(inputs["noise_mask"], (~given).long())
        assert torch.equal(inputs["clean_ids"][given], FIXED[given])
    seen.clear()
    run(pipeline)
    assert all("noise_mask" not in inputs for inputs in seen)


def test_finished_rows_are_not_evaluated(tokenizer, monkeypatch):
    pipeline = make(tokenizer, "ddim")
    rows = []
    watched(
        monkeypatch,
        pipeline.denoiser,
        "forward",
        lambda **inputs: rows.append(len(inputs["timesteps"])),
    )
    out = run(pipeline, num_inference_steps=24, stopping=StoppingRule(1))
    assert len(set(out.nfe)) > 1  # otherwise nobody left early
    assert rows == sorted(rows, reverse=True) and sum(rows) == sum(out.nfe)


@pytest.mark.parametrize("noise", ["dense", "order_statistics"])
def test_held_tokens_are_certain_for_samplers_of_soft_predictions(tokenizer, monkeypatch, noise):
    pipeline = make(tokenizer, "ddim", {"noise": noise})
    outputs = []
    watched(monkeypatch, pipeline.scheduler, "step", lambda output, *_: outputs.append(output))
    out = run(pipeline, confidence_threshold=0.2, return_trace=True, gen_length=9)
    held = torch.full((3, 9), -1)
    certain = 0
    for trace, output in zip(out.trace, outputs):
        if noise == "dense":
            probs = output.softmax(-1)
        else:
            probs = torch.zeros(len(output[0]), 9, len(tokenizer)).scatter_(-1, *output)
        rows = trace.active.nonzero()[:, 0].tolist()  # of the output, in this order
        for row, place in (held >= 0).nonzero().tolist():
            if row in rows:
                assert probs[rows.index(row), place, held[row, place]] == 1
                certain += 1
        inside = text_mask(trace.token_ids, torch.ones(3, 9), tokenizer.eos_token_id)
        sure = (trace.log_probs.exp() >= 0.2) & (held < 0) & inside & trace.active[:, None]
        held = torch.where(sure, trace.token_ids, held)
    assert certain > 0


@pytest.mark.parametrize("sampler", ["ddim", "dpm_solver"])
def test_forbidden_tokens_have_no_share_in_soft_predictions(tokenizer, monkeypatch, sampler):
    pipeline = make(tokenizer, sampler, {"noise": "dense"})
    outputs = []
    watched(monkeypatch, pipeline.scheduler, "step", lambda output, *_: outputs.append(output))
    banned = list(range(20, 90))
    run(pipeline, logits_processor=[SuppressTokensLogitsProcessor(banned)])
    assert len(outputs) == 4  # after the last evaluation there is no step
    for output in outputs:
        assert output[..., banned].isneginf().all() and output[..., 100:].isfinite().all()


def test_processors_see_the_step_before_and_at_first_what_is_given(tokenizer):
    pipeline = make(tokenizer)
    seen = []

    def spy(input_ids, scores):
        if input_ids.shape[1] == 6:
            seen.append(input_ids.clone())
        return scores

    out = run(pipeline, fixed_tokens=FIXED, logits_processor=[spy], return_trace=True)
    assert torch.equal(seen[0], FIXED[:, :6].clamp(min=0))
    for prefix, trace in zip(seen[1:], out.trace):
        assert torch.equal(prefix, trace.token_ids[:, :6])


def test_a_reward_is_climbed_as_often_as_asked():
    def reward(probabilities, target_mask):
        return (probabilities[..., 1].square() * target_mask).sum(1)

    torch.manual_seed(0)
    logits, mask = torch.randn(2, 3, 4), torch.tensor([[1, 1, 0], [1, 0, 0]])
    at = logits
    for _ in range(3):
        leaf = at.clone().requires_grad_(True)
        reward(leaf.softmax(-1), mask).sum().backward()
        at = at + 0.7 * leaf.grad
    guidance = Guidance(reward=reward, reward_scale=0.7, reward_steps=3)
    shifted = guidance.reward_processor(logits, mask)(0, logits.flatten(0, 1).clone())
    torch.testing.assert_close(shifted.view_as(at), at)


@pytest.mark.parametrize("encoding", ["causal", "bidirectional"])
def test_padding_of_a_block_is_no_context_of_the_next(tokenizer, encoding):
    pipeline = make(tokenizer, source_encoding=encoding)
    pads = [SequenceBiasLogitsProcessor({(0,): 4.0}), SuppressTokensLogitsProcessor([2])]
    rows = pipeline._sources(PROMPTS, None, False)
    keys = example_keys(rows, 11)
    call = {"num_inference_steps": 3, "logits_processor": pads, "output_type": "seq"}
    out = pipeline(input_ids=rows, keys=keys, gen_length=12, block_length=6, **call)
    first = out.sequences[:, :6].tolist()
    assert any(0 in row for row in first)
    whole = [row + [t for t in block if t != 0] for row, block in zip(rows, first)]
    second = pipeline(
        input_ids=whole, keys=derived_keys(keys, 2, "block").view(3, 2)[:, 1], gen_length=6, **call
    )
    assert torch.equal(out.sequences[:, 6:], second.sequences)


def test_the_canvas_is_the_heads_quantile_and_the_margin(tokenizer):
    settings = {"length_head": True, "target_length_quantile": 0.8, "target_length_margin": 2}
    pipeline = make(tokenizer, **settings)
    with torch.no_grad():  # around the source's length, whatever its state
        pipeline.denoiser.length_head.outer.weight *= 0.01
    writer = pipeline._writer(SamplerOptions(), Request())
    _, log_probs = writer.read(pipeline._sources(PROMPTS, None, False), with_lengths=True)
    expected = [min(n + 2, 24) for n in quantile_lengths(log_probs, 0.8).tolist()]
    assert run(pipeline).lengths == expected
    assert expected != [min(n + 2, 24) for n in quantile_lengths(log_probs, 0.5).tolist()]
    assert run(pipeline, gen_length=5).lengths == [5] * 3


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_callback_may_give_back_what_it_was_given(tokenizer, sampler):
    pipeline = make(tokenizer, sampler)
    out = run(
        pipeline, callback_on_step_end=lambda pipe, step, time, tensors: tensors,
        callback_on_step_end_tensor_inputs=["token_ids", "entropies", "hidden_state"],
    )
    assert out.texts == run(pipeline).texts
    if sampler != "renoising":
        with pytest.raises(UserError, match="only the re-noising scheduler takes tokens"):
            run(pipeline, callback_on_step_end=lambda p, s, t, x: {"token_ids": x["token_ids"] * 1})


@pytest.mark.parametrize("name", ["ar", "ar+mtp"])
def test_options_of_the_sampler_are_refused_by_other_decoders(name):
    with pytest.raises(
        UserError, match="scheduler belongs to the tess decoder, and this one is ar"
    ):
        load_decoder(default_checkpoint(), name, options=SamplerOptions(scheduler="ddim"))


def test_padding_amid_a_candidate_is_not_scored(tokenizer, monkeypatch):
    seen = {}

    def keep(choose_by, texts, *, log_probs, sources, targets, scorer):
        seen.update(targets=targets, log_probs=log_probs)
        return [1]

    monkeypatch.setattr("tess.sampling.candidates.choose", keep)
    sequences = torch.tensor([[5, 0, 6, 2], [0, 0, 7, 7]])
    inside = torch.tensor([[True, True, True, True], [True, True, False, False]])
    values = torch.tensor([[-1.0, -2.0, -3.0, -2.0], [-1.0, -3.0, -9.0, -9.0]])
    chosen = choose_candidates(
        sequences, inside, values, [3, 4], [[1, 9, 2]], 2,
        choose_by="ar", scorer=None, tokenizer=tokenizer,
    )
    assert seen["targets"] == [[[5, 6, 2], [0, 0]]]  # a text of nothing else stays as it is
    assert seen["log_probs"].tolist() == [[-2.0, -2.0]]
    assert chosen.chosen_rows().tolist() == [1] and chosen.nfe == [[3, 4]]
