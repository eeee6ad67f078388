"""The conventions of a call: options and keywords, generators, interrupts, what callbacks get."""

import logging

import pytest
import torch
from diffusers.callbacks import PipelineCallback, SDCFGCutoffCallback
from transformers import SuppressTokensLogitsProcessor

from tess.backbones.config import HybridConfig
from tess.config import TessConfig
from tess.denoiser import TessDenoiser
from tess.errors import UserError
from tess.pipeline import TessPipeline
from tess.sampling.options import SamplerOptions
from tess.schedulers.ddim import SimplexDDIMScheduler
from tess.schedulers.family import SAMPLERS
from tess.text.tokenization import train_tokenizer

PROMPTS = ["the cat sat", "a small dog slept by the old red door while rain fell", "rain"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(PROMPTS * 20, 300)


def make(tokenizer, sampler="renoising", **settings) -> TessPipeline:
    torch.manual_seed(5)
    config = TessConfig(
        backbone_config=HybridConfig(
            vocab_size=len(tokenizer), hidden_size=32, hybrid_override_pattern="M*",
            num_attention_heads=4, num_key_value_heads=2, head_dim=8, ssm_state_size=8,
            mamba_num_heads=4, mamba_head_dim=8, n_groups=2, chunk_size=4,
            mamba_direction="bidirectional", initializer_range=0.4,
            bos_token_id=1, eos_token_id=2, pad_token_id=0,
        ),
        max_source_length=32, max_target_length=24, target_length_ratio=0.8, **settings,
    )
    scheduler = SAMPLERS[sampler](vocab_size=config.vocab_size, simplex_value=config.simplex_value)
    pipeline = TessPipeline(TessDenoiser(config).eval(), scheduler, tokenizer)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.denoiser.double()
    return pipeline


def run(pipeline, **arguments):
    return pipeline(PROMPTS, generator=seeded(3), **{"num_inference_steps": 5} | arguments)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_options_keywords_and_both_give_the_same_texts(tokenizer):
    pipeline = make(tokenizer)
    asked = {"num_candidates": 3, "choose_by": "mbr_chrf", "guidance_scale": 2.0, "forbid": ["cat"]}
    by_name = run(pipeline, **asked)
    assert run(pipeline, options=SamplerOptions(**asked)).texts == by_name.texts
    mixed = SamplerOptions(**asked | {"guidance_scale": 5.0})
    assert run(pipeline, options=mixed, guidance_scale=2.0).texts == by_name.texts
    assert by_name.texts != run(pipeline).texts


def test_a_misspelled_keyword_is_one_sentence_with_near_ones(tokenizer):
    pipeline = make(tokenizer)
    for wrong, near in (("num_inference_step", "num_inference_steps"), ("topp", "top_p")):
        with pytest.raises(UserError, match=f"no argument '{wrong}'; did you mean .*{near}"):
            pipeline("a cat", **{wrong: 3})


def test_a_call_may_name_another_sampler_for_itself(tokenizer):
    pipeline = make(tokenizer)
    own = pipeline.scheduler
    out = run(pipeline, scheduler="ddim", noise="dense")
    assert pipeline.scheduler is own
    pipeline.scheduler = SimplexDDIMScheduler.from_config(own.config, noise="dense")
    assert run(pipeline).texts == out.texts


@pytest.mark.parametrize("more", [{}, {"num_candidates": 2, "top_p": 0.9}])
def test_each_of_several_generators_gives_the_text_that_it_gives_alone(tokenizer, more):
    pipeline = make(tokenizer)
    prompts = [PROMPTS[0], PROMPTS[0], PROMPTS[1]]
    call = {"num_inference_steps": 5, **more}
    together = pipeline(prompts, generator=[seeded(n) for n in (1, 1, 2)], **call).texts
    alone = [
        pipeline(prompt, generator=seeded(n), **call).texts[0]
        for prompt, n in zip(prompts, (1, 1, 2))
    ]
    assert together == alone and together[0] == together[1]
    assert pipeline(prompts[:1], generator=[seeded(5)], **call).texts != alone[:1]
    with pytest.raises(UserError, match="generator must be one or a list of 3, .* got 2"):
        pipeline(prompts, generator=[seeded(1), seeded(2)], **call)


@pytest.mark.parametrize("kept", [False, True])
def test_an_interrupt_leaves_the_texts_as_they_stand(tokenizer, kept):
    pipeline = make(tokenizer, "ddim")
    seen = []

    def stop(pipe, step, timestep, tensors):
        assert pipe.interrupt is False and pipe.num_timesteps == 5
        seen.append(tensors["token_ids"].clone())
        pipe._interrupt = step == 2

    out = run(pipeline, callback_on_step_end=stop, gen_length=9, output_type="seq",
              return_trace=kept)
    assert len(seen) == 3 and out.nfe == [3] * 3 and pipeline.interrupt
    ended = (seen[2] == 2).cumsum(1) - (seen[2] == 2).long() > 0
    assert torch.equal(out.sequences, seen[2].masked_fill(ended, 0))
    if kept:
        assert len(out.trace) == 3
    assert run(pipeline).nfe == [5] * 3  # the next call is not interrupted


def test_an_interrupt_ends_a_text_in_blocks_after_the_block(tokenizer):
    pipeline = make(tokenizer)
    steps = []

    def stop(pipe, step, timestep, tensors):
        steps.append(step)
        pipe._interrupt = len(steps) == 7

    no_end = [SuppressTokensLogitsProcessor([0, 2])]
    out = run(pipeline, callback_on_step_end=stop, gen_length=18, block_length=6,
              logits_processor=no_end)
    assert steps == [0, 1, 2, 3, 4, 0, 1] and out.nfe == [7] * 3
    assert (out.sequences[:, :12] != 0).all() and (out.sequences[:, 12:] == 0).all()


def test_a_live_view_may_interrupt_too(tokenizer):
    pipeline = make(tokenizer)

    def stop(step, steps, trace):
        pipeline._interrupt = step == 1

    assert run(pipeline, on_trace=stop).nfe == [2] * 3


def test_what_a_callback_gets_is_checked_as_in_diffusers(tokenizer):
    pipeline = make(tokenizer)
    keys = []

    def keep(pipe, step, timestep, tensors):
        keys.append(tuple(tensors))
        return tensors

    run(pipeline, callback_on_step_end=keep, callback_on_step_end_tensor_inputs=None)
    assert set(keys) == {("token_ids",)}
    for given, said in (("token_ids", "'token_ids'"), (["latents"], "'latents'"), ([3], "3")):
        for callback in (keep, None):
            with pytest.raises(UserError, match=f"takes a list of some of token_ids,.* got {said}"):
                run(pipeline, callback_on_step_end=callback,
                    callback_on_step_end_tensor_inputs=given)
    with pytest.raises(UserError, match="got 'prompt_embeds'"):
        run(pipeline, callback_on_step_end=SDCFGCutoffCallback(cutoff_step_ratio=0.5))

    class Entropies(PipelineCallback):
        tensor_inputs = ["entropies"]

        def callback_fn(self, pipe, step, timestep, tensors):
            keys.append(tuple(tensors))
            return tensors

    run(pipeline, callback_on_step_end=Entropies())
    assert keys[-1] == ("entropies",)

    class Fewer(type(pipeline)):
        _callback_tensor_inputs = ["entropies"]

    fewer = Fewer(**pipeline.components)
    with pytest.raises(UserError, match="some of entropies, got 'token_ids'"):
        run(fewer, callback_on_step_end=keep)


@pytest.mark.parametrize(
    "asked, message",
    [
        ({"num_inference_steps": 10**9}, "num_inference_steps must be from 1 to 5000"),
        ({"gen_length": 10**7}, "gen_length must be at most 1,048,576, got 10000000"),
        ({"gen_length": 2**20, "num_candidates": 2}, "at most 4,194,304 at a time, got 6,291,456"),
        ({"num_candidates": 10**6}, "num_candidates must be at most 65,536"),
        ({"num_candidates": 2**16, "gen_length": 30}, "at most 4,194,304 at a time"),
        ({"fixed_tokens": torch.full((3, 2**21), -1)}, "at most 4,194,304 at a time"),
    ],
)
def test_absurd_sizes_are_refused_before_memory_is_taken(tokenizer, monkeypatch, asked, message):
    pipeline = make(tokenizer)

    def never(*shape):
        raise AssertionError("a canvas was made")

    monkeypatch.setattr(pipeline.scheduler, "initial", never)
    with pytest.raises((UserError, ValueError), match=message):
        run(pipeline, **asked)


def test_a_ban_that_looks_back_needs_a_step_before(tokenizer):
    pipeline = make(tokenizer)
    for steps in ({"num_inference_steps": 1}, {"num_inference_steps": None, "timesteps": [1.0]}):
        with pytest.raises(UserError, match="no_repeat_ngram does nothing in one step"):
            run(pipeline, no_repeat_ngram=2, **steps)
    assert run(pipeline, no_repeat_ngram=2, num_inference_steps=2).texts


def test_guidance_of_a_model_that_did_not_learn_it_is_said_once(tokenizer, caplog):
    pipeline = make(tokenizer)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            run(pipeline, guidance_scale=2.0)
        run(make(tokenizer, source_drop_probability=0.1), guidance_scale=2.0)
        run(make(tokenizer))
        run(make(tokenizer, source_drop_probability=0.0), guidance_scale=2.0)
    first, second = (record.getMessage() for record in caplog.records)
    assert "this model does not say that it was trained on it" in first
    assert "this model was not trained on it" in second
