"""Laws of the sampler as a whole: no effect of batch and order, saving and loading, bad input."""

import json
import logging

import pytest
import torch

from tess.backbones.config import HybridConfig
from tess.config import TessConfig
from tess.denoiser import TessDenoiser
from tess.errors import UserError
from tess.pipeline import TessPipeline
from tess.sampling.call import TessPipelineOutput
from tess.sampling.sources import draw_seed, example_keys
from tess.sampling.writer import target_lengths
from tess.schedulers.renoising import RenoisingScheduler
from tess.schedulers.simplex import NoisedSimplex
from tess.text.tokenization import train_tokenizer
from tiny import DENOISER

WORDS = "the cat sat on a mat while the small dog slept by an old red door and rain fell".split()
PROMPTS = [
    "the cat sat",
    "a small dog slept by the old red door while rain fell on the mat",
    "rain",
    "the cat and the dog and the rain",
    "an old door",
]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([" ".join(WORDS)] * 20, 300)


def make(tokenizer, process=None, **settings) -> TessPipeline:
    """A pipeline of random weights; `process` has settings of the scheduler."""
    torch.manual_seed(5)
    config = TessConfig(
        backbone_config=HybridConfig(
            **DENOISER | {"hybrid_override_pattern": "M*-E", "vocab_size": len(tokenizer)}
        ),
        **{
            "max_source_length": 32, "max_target_length": 24, "target_length_ratio": 0.8,
            "target_length_margin": 3, "num_source_positions": 32, "num_target_positions": 24,
        }
        | settings,
    )
    scheduler = RenoisingScheduler(
        vocab_size=config.vocab_size, simplex_value=config.simplex_value, **process or {}
    )
    pipeline = TessPipeline(TessDenoiser(config).eval(), scheduler, tokenizer)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def seeded(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def run(pipeline: TessPipeline, prompts, **arguments) -> TessPipelineOutput:
    return pipeline(prompts, generator=seeded(), **{"num_inference_steps": 6} | arguments)


# --- batch and order ---


DENSE = {"noise": "dense"}


@pytest.mark.parametrize(
    "settings, arguments",
    [
        ({}, {}),
        ({"process": DENSE}, {}),
        ({"process": {"timestep_spacing": "uniform", "num_top": 4}}, {"top_p": 0.95}),
        ({"process": DENSE, "self_conditioning": "logits_max"}, {}),
        ({"process": DENSE, "self_conditioning_mix": "logits"}, {"guidance_scale": 2.0}),
        ({"source_encoding": "bidirectional"}, {"num_inference_steps": 20}),
        ({"source_encoding": "joint"}, {}),
        ({}, {"top_p": 0.9, "temperature": 1.5}),
        ({"self_conditioning": "logits_with_projection"}, {"gen_length": 11}),
        ({}, {"guidance_scale": 2.0}),
        ({"source_encoding": "joint"}, {"guidance_scale": 2.0, "top_p": 0.8}),
        ({"deepmind_conditional": True, "source_encoding": "joint"}, {}),
        ({"label_shift": True}, {}),
        ({"label_shift": True}, {"guidance_scale": 2.0}),
        ({"label_shift": True, "source_encoding": "joint"}, {"top_p": 0.9}),
    ],
)
def test_texts_depend_neither_on_the_batch_nor_on_the_order(tokenizer, settings, arguments):
    pipeline = make(tokenizer, **settings)
    # A random model has near-ties everywhere, which the last bits of a float32 product, different
    # for every batch shape, can flip; in float64 only a real dependence can change a text.
    pipeline.denoiser.double()
    together = run(pipeline, PROMPTS, **arguments).texts
    alone = [run(pipeline, prompt, **arguments).texts[0] for prompt in PROMPTS]
    assert together == alone
    assert run(pipeline, PROMPTS[::-1], **arguments).texts == together[::-1]
    assert len(set(together)) > 1


def test_every_step_state_is_the_same_alone_and_in_a_batch(tokenizer):
    pipeline = make(tokenizer)

    def tokens_of(prompts):
        steps = []
        run(pipeline, prompts, callback_on_step_end=lambda p, i, t, x: steps.append(x["token_ids"]))
        return steps

    together = tokens_of(PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        for step, alone in zip(together, tokens_of(prompt), strict=True):
            assert torch.equal(step[row : row + 1, : alone.shape[1]], alone)


def test_equal_sources_get_different_noise_and_the_seed_decides(tokenizer):
    pipeline = make(tokenizer)
    first = run(pipeline, [PROMPTS[0]] * 3).texts
    assert len(set(first)) > 1
    assert run(pipeline, [PROMPTS[0]] * 3).texts == first
    other = pipeline([PROMPTS[0]] * 3, num_inference_steps=6, generator=seeded(4)).texts
    assert other != first


def test_keys_follow_from_seed_source_and_occurrence():
    keys = example_keys([[1, 5, 2], [1, 6, 2], [1, 5, 2]], 9)
    assert keys.dtype == torch.long and len(set(keys.tolist())) == 3
    assert torch.equal(example_keys([[1, 6, 2], [1, 5, 2]], 9), keys[[1, 0]])
    assert not torch.equal(example_keys([[1, 5, 2]], 8), keys[:1])


def test_given_keys_stand_for_the_seed(tokenizer):
    pipeline = make(tokenizer)
    seed = draw_seed(seeded())
    sources = [[1, *tokenizer(PROMPTS[0], add_special_tokens=False)["input_ids"], 2]] * 3
    keys = example_keys(sources, seed)
    together = run(pipeline, None, input_ids=sources)
    last = pipeline(input_ids=sources[2:], num_inference_steps=6, keys=keys[2:])
    assert last.texts == together.texts[2:] != together.texts[:1]


def test_a_source_of_one_token_is_read_with_label_shift_alone_and_in_a_batch(tokenizer):
    pipeline = make(tokenizer, label_shift=True)
    pipeline.denoiser.double()
    rows = [[1], [1, *tokenizer(PROMPTS[0], add_special_tokens=False)["input_ids"], 2]]
    together = run(pipeline, None, input_ids=rows, gen_length=9).texts
    assert run(pipeline, None, input_ids=rows[:1], gen_length=9).texts == together[:1]


# --- what comes out ---


def test_output_is_cut_at_the_first_end_and_counts_evaluations(tokenizer):
    pipeline = make(tokenizer)
    letters = tokenizer("the cat sat", add_special_tokens=False)["input_ids"]
    row = [*letters, tokenizer.eos_token_id, *letters, tokenizer.eos_token_id]

    def put(pipe, step, timestep, tensors):
        return {"token_ids": torch.tensor([row])}

    out = pipeline("a dog", gen_length=len(row), num_inference_steps=2, callback_on_step_end=put)
    assert out.texts == ["the cat sat"] and out.nfe == [2]
    kept = len(letters) + 1
    assert out.sequences[0, :kept].tolist() == row[:kept]
    assert (out.sequences[0, kept:] == tokenizer.pad_token_id).all()
    assert run(pipeline, PROMPTS, guidance_scale=1.5).nfe == [12] * 5


def test_canvas_length_follows_the_rule_of_each_example(tokenizer):
    pipeline = make(tokenizer)
    sources = [[1, *range(10, 10 + n), 2] for n in (1, 8, 30)]
    config = pipeline.denoiser.config
    assert target_lengths(config, sources) == [6, 11, 24]  # ceil(.8 n) + 3, at most 24
    plain = make(tokenizer, target_length_ratio=None).denoiser.config
    assert target_lengths(plain, sources) == [24] * 3


def test_ids_may_stand_for_the_prompt_padded_or_not(tokenizer):
    pipeline = make(tokenizer)
    rows = [[1, *tokenizer(text, add_special_tokens=False)["input_ids"], 2] for text in PROMPTS[:3]]
    width = max(map(len, rows))
    padded = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    expected = run(pipeline, PROMPTS[:3]).texts
    assert run(pipeline, None, input_ids=rows).texts == expected
    assert run(pipeline, None, input_ids=padded).texts == expected


def test_output_kinds(tokenizer):
    pipeline = make(tokenizer)
    full = run(pipeline, PROMPTS)
    ids = run(pipeline, PROMPTS, output_type="seq")
    assert ids.texts is None and torch.equal(ids.sequences, full.sequences)
    sequences, texts, nfe = run(pipeline, PROMPTS, return_dict=False)
    assert torch.equal(sequences, full.sequences) and texts == full.texts and nfe == [6] * 5


def test_callback_sees_each_step_and_may_replace_the_logits(tokenizer):
    pipeline = make(tokenizer)
    seen = []

    def watch(pipe, step, timestep, tensors):
        seen.append((step, float(timestep), tuple(tensors["logits"].shape)))
        return {"logits": torch.zeros_like(tensors["logits"])}

    changed = run(
        pipeline,
        PROMPTS[:2],
        num_inference_steps=4,
        callback_on_step_end=watch,
        callback_on_step_end_tensor_inputs=["token_ids", "logits"],
    )
    shape = (2, changed.sequences.shape[1], len(tokenizer))
    times = pipeline.scheduler.timesteps.tolist()
    assert seen == [(step, times[step], shape) for step in range(4)] and times[0] == 1
    assert changed.texts != run(pipeline, PROMPTS[:2], num_inference_steps=4).texts


@pytest.mark.parametrize(
    "kind, returned, message",
    [
        ("logits_mean", "entropies", "may return token_ids and logits, got entropies"),
        ("logits_with_projection", "logits", "'logits_with_projection' does not read"),
        (None, "logits", "self_conditioning=None does not read"),
    ],
)
def test_what_a_callback_returns_is_used_or_refused(tokenizer, kind, returned, message):
    def give(pipe, step, timestep, tensors):
        return {returned: tensors["token_ids"]}

    with pytest.raises(UserError, match=message):
        run(make(tokenizer, self_conditioning=kind), "a cat", callback_on_step_end=give)


def test_callback_may_replace_tokens_and_sees_what_was_predicted(tokenizer):
    pipeline = make(tokenizer)
    names = ["token_ids", "log_probs", "entropies", "hidden_state", "logits"]

    def force(pipe, step, timestep, tensors):
        log_probs = tensors["logits"].log_softmax(-1)
        chosen = log_probs.gather(-1, tensors["token_ids"][..., None])[..., 0]
        torch.testing.assert_close(tensors["log_probs"], chosen)
        entropies = -(log_probs.exp() * log_probs).sum(-1)
        torch.testing.assert_close(tensors["entropies"], entropies)
        assert tensors["hidden_state"].shape == (*chosen.shape, 32)
        return {"token_ids": torch.full_like(tensors["token_ids"], 7)}

    out = run(
        pipeline, PROMPTS[:2], callback_on_step_end=force,
        callback_on_step_end_tensor_inputs=names,
    )
    sources = pipeline._sources(PROMPTS[:2], None, False)
    lengths = target_lengths(pipeline.denoiser.config, sources)
    for row, length in zip(out.sequences, lengths):
        assert (row[:length] == 7).all()


def test_source_is_encoded_once(tokenizer, monkeypatch):
    pipeline = make(tokenizer)
    calls = []
    read = pipeline.denoiser.read_source
    monkeypatch.setattr(
        pipeline.denoiser, "read_source", lambda *a: calls.append(a[0].shape) or read(*a)
    )
    run(pipeline, PROMPTS)
    assert len(calls) == 1
    run(pipeline, PROMPTS, guidance_scale=2.0)
    assert len(calls) == 3 and tuple(calls[2]) == (1, 2)  # the empty source is `<s></s>`


def test_guidance_is_linear_in_log_probabilities(tokenizer):
    pipeline = make(tokenizer, self_conditioning=None)
    source = [1, *tokenizer(PROMPTS[0], add_special_tokens=False)["input_ids"], 2]
    start = {}

    def watch(pipe, step, timestep, tensors):
        start["tokens"] = tensors["token_ids"]

    run(
        pipeline, None, input_ids=[source], num_inference_steps=1, guidance_scale=3.0, gen_length=9,
        callback_on_step_end=watch,
    )
    seed = int(torch.randint(2**63 - 1, (), generator=seeded()))
    sample = pipeline.scheduler.initial((1, 9), example_keys([source], seed))
    assert isinstance(sample, NoisedSimplex)
    with torch.no_grad():
        c, u = (
            pipeline.denoiser.logits(
                pipeline.denoiser(
                    sample, torch.ones(1), source_ids=torch.tensor([ids])
                ).last_hidden_state
            )
            .double()
            .log_softmax(-1)
            for ids in (source, [1, 2])
        )
    assert torch.equal(start["tokens"], (u + 3 * (c - u)).argmax(-1))


# --- saving and loading ---


def test_pipeline_comes_back_from_its_folder(tokenizer, tmp_path):
    pipeline = make(tokenizer)
    pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    # module paths are part of the file format
    assert index["_class_name"] == "TessPipeline"
    assert index["denoiser"] == ["tess.denoiser", "TessDenoiser"]
    assert index["scheduler"] == ["tess.schedulers.renoising", "RenoisingScheduler"]
    loaded = TessPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert run(loaded, PROMPTS).texts == run(pipeline, PROMPTS).texts


def test_loaded_weights_are_float32_unless_another_type_is_named(tokenizer, tmp_path):
    pipeline = make(tokenizer)
    pipeline.denoiser.to(torch.bfloat16)
    pipeline.save_pretrained(tmp_path)
    assert TessPipeline.from_pretrained(tmp_path).denoiser.dtype == torch.float32
    for name in ("dtype", "torch_dtype"):
        loaded = TessPipeline.from_pretrained(tmp_path, **{name: torch.bfloat16})
        assert loaded.denoiser.dtype == torch.bfloat16


def test_default_steps_are_16_or_all_training_steps(tokenizer):
    pipeline = make(tokenizer)
    assert pipeline("a dog").nfe == [16]
    scheduler = RenoisingScheduler.from_config(pipeline.scheduler.config, num_train_timesteps=5)
    few = TessPipeline(pipeline.denoiser, scheduler, tokenizer)
    few.set_progress_bar_config(disable=True)
    assert few("a dog").nfe == [5]


def test_pipeline_with_a_broken_denoiser_is_refused_by_name(tokenizer, tmp_path):
    make(tokenizer).save_pretrained(tmp_path)
    other = make(tokenizer, num_target_positions=0).denoiser
    other.save_pretrained(tmp_path / "denoiser")
    config = tmp_path / "denoiser" / "config.json"
    settings = json.loads(config.read_text()) | {"num_target_positions": 24}
    config.write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="lacks target_positions.weight"):
        TessPipeline.from_pretrained(tmp_path)


def test_components_must_fit_each_other(tokenizer):
    pipeline = make(tokenizer)
    large = train_tokenizer(["the cat"], 261)
    large.add_tokens([f"word{i}" for i in range(len(tokenizer))])
    found = f"vocabulary mismatch: the tokenizer has {261 + len(tokenizer)} ids"
    with pytest.raises(UserError, match=found):
        TessPipeline(pipeline.denoiser, pipeline.scheduler, large)
    with pytest.raises(UserError, match="simplex_value mismatch: the scheduler has 4.0"):
        scheduler = RenoisingScheduler(vocab_size=len(tokenizer), simplex_value=4.0)
        TessPipeline(pipeline.denoiser, scheduler, tokenizer)
    with pytest.raises(UserError, match="vocab_size mismatch: the scheduler has 77"):
        scheduler = RenoisingScheduler.from_config(pipeline.scheduler.config, vocab_size=77)
        TessPipeline(pipeline.denoiser, scheduler, tokenizer)
    with pytest.raises(UserError, match="'logits_multiply' .* needs the whole simplex: .*dense"):
        make(tokenizer, self_conditioning="logits_multiply")


# --- bad input ---


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"prompt": ""}, "expected a text, got an empty one"),
        ({"prompt": ["the cat", "  \n"]}, "expected a text, got an empty one"),
        ({"prompt": []}, "at least one prompt"),
        ({"prompt": [3]}, "string or a list of strings, got int"),
        ({}, "exactly one of prompt and input_ids"),
        ({"prompt": "a", "input_ids": [[1, 2]]}, "exactly one of prompt and input_ids"),
        ({"input_ids": [[1, 2], []]}, "row 1 of input_ids is empty"),
        ({"input_ids": [[1, 300, 2]]}, "token id 300 is outside the vocabulary"),
        ({"input_ids": torch.tensor([1, 2])}, r"must be \[batch, length\]"),
        ({"prompt": "a", "gen_length": 0}, "gen_length must be at least 1, got 0"),
        ({"prompt": "a", "gen_length": 25}, "gen_length must be at most 24"),
        ({"prompt": "a", "num_inference_steps": 0}, "num_inference_steps must be from 1 to 5000"),
        ({"prompt": "a", "num_inference_steps": 5001}, "from 1 to 5000.*got 5001"),
        ({"prompt": "a", "guidance_scale": 0.5}, "guidance_scale must be at least 1"),
        ({"prompt": "a", "guidance_scale": float("nan")}, "guidance_scale must be at least 1"),
        ({"prompt": "a", "top_p": 1.5}, "top_p must be above 0 and at most 1"),
        ({"prompt": "a", "temperature": 0.0}, "temperature must be above 0"),
        ({"prompt": "a", "temperature": 0.7}, "temperature 0.7 does nothing without top_p"),
        ({"prompt": "a", "num_inference_steps": 2.5}, "must be an integer, got 2.5"),
        ({"prompt": "a", "output_type": "list"}, "output_type must be 'text' or 'seq'"),
        (
            {"prompt": "a", "callback_on_step_end_tensor_inputs": ["latents"]},
            "some of token_ids, log_probs, entropies, hidden_state, logits, got 'latents'",
        ),
    ],
)
def test_mistakes_are_one_sentence(tokenizer, arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        make(tokenizer)(**arguments)
    assert "\n" not in str(error.value)


def test_a_source_that_is_too_long_is_cut_with_a_warning_or_refused(tokenizer, caplog):
    pipeline = make(tokenizer)
    long = " ".join(WORDS * 4)
    ids = [1, *tokenizer(long, add_special_tokens=False)["input_ids"], 2]
    assert len(ids) > 32
    with caplog.at_level(logging.WARNING):
        cut = run(pipeline, long).texts
    assert "the model takes 32" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert run(pipeline, None, input_ids=[ids]).texts == cut
    assert "the model takes 32" in caplog.text
    for arguments in ({"prompt": long}, {"input_ids": [ids]}):
        with pytest.raises(UserError, match="the model takes 32"):
            pipeline(**arguments, strict=True)
