"""The pipeline's options: schedulers, stopping, cache, candidates, guidance, tokens, blocks."""

import pytest
import torch
from transformers import SequenceBiasLogitsProcessor, SuppressTokensLogitsProcessor

from tess.backbones.config import HybridConfig
from tess.config import TessConfig
from tess.denoiser import TessDenoiser
from tess.errors import UserError
from tess.pipeline import TessPipeline
from tess.sampling.options import SamplerOptions
from tess.sampling.request import Request
from tess.sampling.sources import derived_keys, example_keys
from tess.sampling.writer import target_lengths
from tess.schedulers.family import SAMPLERS
from tess.schedulers.renoising import RenoisingScheduler
from tess.schedulers.stopping import StoppingRule, text_mask
from tess.text.padding import right_mask
from tess.text.tokenization import train_tokenizer
from tiny import DENOISER

WORDS = "the cat sat on a mat while the small dog slept by an old red door and rain fell".split()
PROMPTS = ["the cat sat", "a small dog slept by the old red door while rain fell", "rain"]
SOME_ENDS = {"logits_processor": [SequenceBiasLogitsProcessor({(2,): 5.0})]}
"""Random weights write hardly any `</s>` by themselves."""
KINDS = [(name, noise) for name in SAMPLERS for noise in ("dense", "order_statistics")]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([" ".join(WORDS)] * 20, 300)


def make(tokenizer, sampler="renoising", process=None, **settings) -> TessPipeline:
    torch.manual_seed(5)
    config = TessConfig(
        backbone_config=HybridConfig(
            **DENOISER, vocab_size=len(tokenizer), bos_token_id=1, eos_token_id=2, pad_token_id=0
        ),
        **{
            "max_source_length": 32, "max_target_length": 24, "target_length_ratio": 0.8,
            "target_length_margin": 3, "num_source_positions": 64, "num_target_positions": 24,
        }
        | settings,
    )
    first = RenoisingScheduler(vocab_size=config.vocab_size, simplex_value=config.simplex_value)
    scheduler = SAMPLERS[sampler].from_config(first.config, **process or {})
    pipeline = TessPipeline(TessDenoiser(config).eval(), scheduler, tokenizer)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.denoiser.double()  # random weights have near-ties everywhere (see test_pipeline.py)
    return pipeline


def run(pipeline, prompts=PROMPTS, **arguments):
    generator = torch.Generator().manual_seed(3)
    return pipeline(prompts, generator=generator, **{"num_inference_steps": 5} | arguments)


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


# ---- every scheduler ----


@pytest.mark.parametrize("sampler, noise", KINDS)
def test_texts_depend_neither_on_the_batch_nor_on_the_order(tokenizer, sampler, noise):
    pipeline = make(tokenizer, sampler, {"noise": noise})
    together = run(pipeline)
    assert run(pipeline, PROMPTS[::-1]).texts == together.texts[::-1]
    for row, prompt in enumerate(PROMPTS):
        alone = run(pipeline, [prompt])
        assert alone.texts == together.texts[row : row + 1]
    assert len(set(together.texts)) == 3 and together.nfe == [5] * 3


@pytest.mark.parametrize("sampler, noise", KINDS)
def test_stopping_gives_the_texts_that_the_whole_run_shows_at_that_step(tokenizer, sampler, noise):
    pipeline = make(tokenizer, sampler, {"noise": noise})
    whole = run(pipeline, num_inference_steps=12, return_trace=True, **SOME_ENDS)
    rule = StoppingRule(1, 100.0)
    state, stops = rule.start(), [12] * 3
    canvas = right_mask(whole.lengths)
    for step, trace in enumerate(whole.trace):
        mask = text_mask(trace.token_ids, canvas, tokenizer.eos_token_id)
        state, done = state.update(trace.token_ids, trace.entropies, mask)
        for row in done.nonzero()[:, 0].tolist():
            stops[row] = min(stops[row], step + 1)
    out = run(pipeline, num_inference_steps=12, stopping=rule, **SOME_ENDS)
    assert out.nfe == stops
    for row, stop in enumerate(stops):
        final = whole.trace[stop - 1].token_ids[row]
        inside = text_mask(final[None], canvas[row : row + 1], tokenizer.eos_token_id)[0]
        expected = final.masked_fill(~inside, tokenizer.pad_token_id)
        assert torch.equal(out.sequences[row], expected)


@pytest.mark.parametrize("encoding", ["causal", "bidirectional", "joint"])
@pytest.mark.parametrize("sampler", ["renoising", "dpm_solver"])
def test_without_the_cache_the_text_is_the_same(tokenizer, encoding, sampler):
    pipeline = make(tokenizer, sampler, source_encoding=encoding)
    assert run(pipeline).texts == run(pipeline, use_cache=False).texts
    guided = {"guidance_scale": 1.5, "num_candidates": 2}
    cached, read = (run(pipeline, **guided, use_cache=use) for use in (True, False))
    assert cached.texts == read.texts and cached.candidates.texts == read.candidates.texts


def test_the_source_is_read_once_for_all_steps_and_candidates(tokenizer, monkeypatch):
    pipeline = make(tokenizer)
    calls = []
    inner = pipeline.denoiser.backbone.forward

    def spy(*args, **kwargs):
        calls.append((kwargs["mode"], len(kwargs["inputs_embeds"])))
        return inner(*args, **kwargs)

    monkeypatch.setattr(pipeline.denoiser.backbone, "forward", spy)
    run(pipeline, num_candidates=2)
    assert calls == [("causal", 3), *[("denoise", 6)] * 5]
    calls.clear()
    run(pipeline, guidance_scale=2.0)
    assert calls == [("causal", 3), ("causal", 1), *[("denoise", 3)] * 10]


def test_custom_timesteps_and_number_of_steps_exclude_each_other(tokenizer):
    pipeline = make(tokenizer)
    times = [1.0, 0.6, 0.3]
    out = run(pipeline, num_inference_steps=None, timesteps=times, return_trace=True)
    assert [round(trace.timestep, 6) for trace in out.trace] == times and out.nfe == [3] * 3
    with pytest.raises(UserError, match="at most one of num_inference_steps and timesteps"):
        run(pipeline, timesteps=times)


# ---- holding and leaving ----


def test_sure_tokens_stay_and_finished_rows_leave(tokenizer):
    pipeline = make(tokenizer)
    out = run(pipeline, num_inference_steps=16, confidence_threshold=0.5, return_trace=True)
    plain = run(pipeline, num_inference_steps=16, return_trace=True)
    changed = 0
    for row in range(3):
        for place in range(out.lengths[row]):
            held = None
            for trace, other in zip(out.trace, plain.trace):
                if not trace.active[row]:
                    continue
                token = int(trace.token_ids[row, place])
                assert held in (None, token)
                changed += token != int(other.token_ids[row, place])
                inside = text_mask(
                    trace.token_ids[row : row + 1],
                    right_mask([out.lengths[row]]).new_ones(1, trace.token_ids.shape[1]),
                    tokenizer.eos_token_id,
                )[0, place]
                if held is None and inside and trace.log_probs[row, place].exp() >= 0.5:
                    held = token
    assert changed > 0
    active = torch.stack([trace.active for trace in out.trace]).sum(0).tolist()
    assert out.nfe == active
    with pytest.raises(UserError, match="confidence_threshold must be above 0"):
        run(pipeline, confidence_threshold=0.0)


# ---- candidates ----


@pytest.mark.parametrize("choose_by", ["confidence", "mbr_bleu", "mbr_chrf"])
def test_the_first_candidate_is_the_single_text_and_one_is_chosen(tokenizer, choose_by):
    pipeline = make(tokenizer)
    single = run(pipeline)
    out = run(pipeline, num_candidates=4, choose_by=choose_by)
    several = out.candidates
    assert [texts[0] for texts in several.texts] == single.texts
    assert all(len(set(texts)) > 1 for texts in several.texts)
    assert out.texts == [texts[i] for texts, i in zip(several.texts, several.chosen)]
    assert out.nfe == [20] * 3 and several.nfe == [[5] * 4] * 3
    if choose_by == "confidence":
        assert several.chosen == several.log_probs.argmax(dim=1).tolist()


def test_the_confidence_is_that_of_the_text_up_to_its_end(tokenizer):
    out = run(make(tokenizer), num_candidates=3, return_trace=True, **SOME_ENDS)
    assert (out.candidates.sequences == 2).any()
    last = out.trace[-1]
    inside = text_mask(
        last.token_ids, right_mask([n for n in out.lengths for _ in range(3)]), 2
    ).float()
    mean = (last.log_probs * inside).sum(1) / inside.sum(1)
    torch.testing.assert_close(out.candidates.log_probs.flatten(), mean)


def test_derived_keys_begin_with_the_key_itself():
    keys = example_keys([[1, 5, 2], [1, 6, 2]], 9)
    rows = derived_keys(keys, 3, "candidate").view(2, 3)
    assert torch.equal(rows[:, 0], keys) and len(set(rows.flatten().tolist())) == 6
    assert not torch.equal(rows, derived_keys(keys, 3, "block").view(2, 3))


# ---- guidance and control ----


@pytest.mark.parametrize("form", ["logits", "probabilities"])
@pytest.mark.parametrize("sampler", ["renoising", "ddim"])
def test_one_guided_step_is_its_formula(tokenizer, form, sampler):
    pipeline = make(tokenizer, sampler, {"noise": "dense"})
    kept = {}

    def keep(pipe, step, timestep, tensors):
        kept.update(tensors)

    run(pipeline, num_inference_steps=1, callback_on_step_end=keep,
        callback_on_step_end_tensor_inputs=["logits"])
    own = kept["logits"]
    writer = pipeline._writer(SamplerOptions(), Request(num_inference_steps=1))
    context = writer.empty(3, writer.read([[1, 2]])[0])
    inputs = pipeline._sources(PROMPTS, None, False)
    lengths = target_lengths(pipeline.denoiser.config, inputs)
    seed = int(torch.randint(2**63 - 1, (), generator=torch.Generator().manual_seed(3)))
    sample = pipeline.scheduler.initial((3, max(lengths)), example_keys(inputs, seed))
    state = pipeline.denoiser(
        sample=sample, timesteps=torch.ones(3), target_mask=right_mask(lengths),
        **context.arguments(),
    ).last_hidden_state
    empty = pipeline.denoiser.logits(state)
    if form == "logits":
        expected = (empty + 3 * (own - empty)).argmax(-1)
    else:
        expected = (empty.softmax(-1) + 3 * (own.softmax(-1) - empty.softmax(-1))).argmax(-1)
    out = run(pipeline, num_inference_steps=1, guidance_scale=3.0, guidance_form=form)
    inside = text_mask(expected, right_mask(lengths), 2)
    assert torch.equal(out.sequences, expected.masked_fill(~inside, 0))
    assert not torch.equal(expected, own.argmax(-1))


@pytest.mark.parametrize("sampler, noise", KINDS)
def test_a_reward_is_climbed_and_a_steep_one_wins(tokenizer, sampler, noise):
    pipeline = make(tokenizer, sampler, {"noise": noise})
    wanted = ids_of(tokenizer, "cat")[0]

    def reward(probabilities, target_mask):
        return (probabilities[..., wanted].clamp_min(1e-9).log() * target_mask).sum(1)

    share = []
    for scale in (1e-6, 0.5, 1e3):
        out = run(pipeline, reward=reward, reward_scale=scale, gen_length=8)
        share.append((out.sequences == wanted).float().mean().item())
    assert share[0] <= share[1] <= share[2] == 1.0 > share[0]
    assert run(pipeline, reward=reward, reward_scale=1e-9).texts == run(pipeline).texts
    with pytest.raises(UserError, match="reward must give differentiable scores"):
        run(pipeline, reward=lambda p, m: torch.zeros(3))


@pytest.mark.parametrize("sampler, noise", KINDS)
def test_fixed_tokens_stay_and_the_rest_is_written(tokenizer, sampler, noise):
    pipeline = make(tokenizer, sampler, {"noise": noise})
    fixed = torch.full((3, 9), -1)
    fixed[:, 2], fixed[1, 5:] = 7, torch.tensor([8, 9, 10, 2])
    out = run(pipeline, fixed_tokens=fixed, return_trace=True)
    for trace in out.trace:
        assert torch.equal(trace.token_ids[fixed >= 0], fixed[fixed >= 0])
    other = fixed.clone()
    other[:, 2] = 20
    free = fixed[0] < 0
    assert not torch.equal(
        run(pipeline, fixed_tokens=other).sequences[0, free], out.sequences[0, free]
    )
    assert out.lengths == [9] * 3


@pytest.mark.parametrize("sampler, noise", KINDS)
@pytest.mark.parametrize("top_p", [None, 0.9])
def test_forbidden_tokens_are_never_written(tokenizer, sampler, noise, top_p):
    pipeline = make(tokenizer, sampler, {"noise": noise})
    plain = run(pipeline, top_p=top_p).sequences
    banned = [token for token in plain.unique().tolist() if token > 4][:20]
    out = run(pipeline, logits_processor=[SuppressTokensLogitsProcessor(banned)], top_p=top_p)
    assert not torch.isin(out.sequences, torch.tensor(banned)).any()
    assert torch.isin(plain, torch.tensor(banned)).any()


# ---- blocks ----


@pytest.mark.parametrize("encoding", ["causal", "bidirectional", "joint"])
def test_a_block_is_denoised_after_the_source_and_all_blocks_before(tokenizer, encoding):
    pipeline = make(tokenizer, source_encoding=encoding)
    no_end = [SuppressTokensLogitsProcessor([tokenizer.eos_token_id, tokenizer.pad_token_id])]
    rows = pipeline._sources(PROMPTS, None, False)
    keys = example_keys(rows, 11)
    out = pipeline(
        input_ids=rows, keys=keys, gen_length=17, block_length=6, num_inference_steps=3,
        logits_processor=no_end,
    )
    assert out.nfe == [9] * 3 and out.sequences.shape == (3, 17)
    block_keys = derived_keys(keys, 3, "block").view(3, 3)
    so_far = [list(row) for row in rows]
    for block, width in enumerate((6, 6, 5)):
        alone = pipeline(  # the context read afresh, where the pipeline goes on from its state
            input_ids=so_far, keys=block_keys[:, block], gen_length=width, num_inference_steps=3,
            logits_processor=no_end, output_type="seq",
        ).sequences
        assert torch.equal(out.sequences[:, 6 * block : 6 * block + width], alone)
        so_far = [row + new for row, new in zip(so_far, alone.tolist())]


def test_a_causal_context_is_extended_and_not_read_again(tokenizer, monkeypatch):
    pipeline = make(tokenizer)
    reads = []
    inner = pipeline.denoiser.backbone.forward

    def spy(*args, **kwargs):
        if kwargs["mode"] != "denoise":
            reads.append(kwargs["inputs_embeds"].shape[1])
        return inner(*args, **kwargs)

    monkeypatch.setattr(pipeline.denoiser.backbone, "forward", spy)
    no_end = [SuppressTokensLogitsProcessor([0, 2])]
    run(pipeline, gen_length=12, block_length=4, logits_processor=no_end)
    width = max(map(len, pipeline._sources(PROMPTS, None, False)))
    assert reads == [width, 4, 4]


def test_a_row_that_ends_leaves_the_blocks(tokenizer):
    pipeline = make(tokenizer)
    together = run(pipeline, gen_length=20, block_length=4, **SOME_ENDS)
    assert len(set(together.nfe)) > 1
    for row, prompt in enumerate(PROMPTS):
        alone = run(pipeline, [prompt], gen_length=20, block_length=4, **SOME_ENDS)
        assert alone.texts == together.texts[row : row + 1]
        assert alone.nfe == together.nfe[row : row + 1]
    one = run(pipeline, gen_length=20, block_length=20)
    assert one.texts == run(pipeline, gen_length=20).texts


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"block_length": 4}, "block_length needs gen_length"),
        ({"block_length": 0, "gen_length": 8}, "block_length must be at least 1, got 0"),
        ({"block_length": 25, "gen_length": 50}, "at most 24"),
        ({"block_length": 4, "gen_length": 200}, "source positions"),
        ({"block_length": 4, "gen_length": 8, "return_trace": True}, "return_trace belongs to one"),
        ({"gen_length": [3, 4]}, "gen_length must be one number or 3, got 2"),
        ({"gen_length": [3, 0, 2]}, "gen_length must be at least 1, got 0"),
        ({"guidance_form": "odds"}, "guidance_form must be one of logits, probabilities"),
        ({"reward_steps": 0}, "reward_steps must be at least 1, got 0"),
        ({"num_candidates": 0}, "num_candidates must be at least 1, got 0"),
        ({"num_candidates": 2, "choose_by": "luck"}, "choose_by must be one of"),
        ({"num_candidates": 2, "choose_by": "ar"}, "needs scorer"),
        ({"choose_by": "luck"}, "choose_by must be one of"),
        ({"gen_length": 5.0}, "gen_length must be an integer, got 5.0"),
        ({"fixed_tokens": [[1, -1]]}, r"must be an int64 tensor \[3, length\], got list"),
        ({"keys": torch.zeros(2, dtype=torch.long)}, r"keys must be \[3\], one per source"),
    ],
)
def test_arguments_that_cannot_be_meant(tokenizer, arguments, message):
    with pytest.raises(UserError, match=message):
        run(make(tokenizer), **arguments)


def test_each_example_may_have_its_own_length(tokenizer):
    pipeline = make(tokenizer)
    out = run(pipeline, gen_length=[3, 7, 5])
    assert out.lengths == [3, 7, 5]
    assert out.texts[1:2] == run(pipeline, PROMPTS[1], gen_length=7).texts


# ---- what is said of tokens that were not chosen ----


def test_log_probabilities_belong_to_the_tokens_they_stand_beside(tokenizer):
    pipeline = make(tokenizer)
    logits = []

    def keep(pipe, step, timestep, tensors):
        logits.append(tensors["logits"])
        return {"token_ids": tensors["token_ids"].roll(1, dims=1)} if step == 2 else tensors

    out = run(
        pipeline, confidence_threshold=0.2, return_trace=True, callback_on_step_end=keep,
        callback_on_step_end_tensor_inputs=["token_ids", "logits"], num_inference_steps=3,
    )
    inside = right_mask(out.lengths).bool()
    for trace, logits_BLV in zip(out.trace, logits, strict=True):
        told = logits_BLV.log_softmax(-1).gather(-1, trace.token_ids[..., None])[..., 0]
        torch.testing.assert_close(trace.log_probs[inside], told[inside].float())
        assert (trace.token_ids[~inside] == 0).all()
        assert (trace.log_probs[~inside] == 0).all()
    held = out.trace[1].token_ids != logits[1].argmax(-1)
    assert (held & inside).any()  # otherwise nothing but arg-maxima was looked at


def test_given_tokens_need_no_certainty(tokenizer):
    fixed = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12, -1]] * 3)
    pipeline = make(tokenizer)
    out = run(pipeline, fixed_tokens=fixed, return_trace=True)
    for trace in out.trace:
        assert (trace.log_probs[:, :8] == 0).all() and (trace.entropies[:, :8] == 0).all()
        assert (trace.entropies[:, 8] > 0).all()
    bound = min(float(trace.entropies[:, 8].min()) for trace in out.trace) * 0.9
    rule = StoppingRule(1, bound)  # the mean over all nine would be below it
    assert run(pipeline, fixed_tokens=fixed, stopping=rule).nfe == [5] * 3
    full = fixed.clone()
    full[:, 8] = 13
    assert run(pipeline, fixed_tokens=full, stopping=StoppingRule(1, 0.0)).nfe == [2] * 3


@pytest.mark.parametrize("encoding", ["causal", "bidirectional"])
def test_blocks_with_padding_amid_the_text(tokenizer, encoding):
    pipeline = make(tokenizer, source_encoding=encoding)
    pads = [SequenceBiasLogitsProcessor({(0,): 4.0}), SuppressTokensLogitsProcessor([2])]
    call = {"gen_length": 18, "block_length": 6, "logits_processor": pads}
    out = run(pipeline, **call)
    assert (out.sequences == 0).any() and run(pipeline, **call, use_cache=False).texts == out.texts
    assert run(pipeline, PROMPTS[1], **call).texts == out.texts[1:2]


def test_the_probability_form_leaves_processors_something_to_choose(tokenizer):
    only = [SuppressTokensLogitsProcessor([i for i in range(len(tokenizer)) if i != 9])]
    out = run(
        make(tokenizer), guidance_scale=5.0, guidance_form="probabilities", logits_processor=only
    )
    assert set(out.sequences.unique().tolist()) <= {0, 9}


def test_one_block_needs_no_positions_behind_the_source(tokenizer):
    pipeline = make(tokenizer, num_source_positions=32)
    one = run(pipeline, gen_length=24, block_length=24)
    assert one.texts == run(pipeline, gen_length=24).texts


def test_a_long_list_of_soft_tokens_is_not_cut_in_silence(tokenizer):
    process = {"noise": "order_statistics", "num_soft_tokens": 200}
    pipeline = make(tokenizer, "ddim", process)
    lists = []

    def keep(sample, timestep):
        lists.append(sample.token_ids.shape[-1])
        return sample

    pipeline.scheduler.scale_model_input = keep
    run(pipeline, num_inference_steps=3)
    assert lists[1] == 200
