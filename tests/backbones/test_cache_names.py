"""The cache under both of its names, and through every way that transformers' `generate` goes."""

import pytest
import torch

from tess.backbones.cache import HybridCache
from tess.backbones.causal_lm import HybridCausalLMOutput, HybridForCausalLM
from tess.backbones.config import HybridConfig
from tess.backbones.hybrid import HybridModelOutput

OPTIONS = {
    "vocab_size": 61, "hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 12, "intermediate_size": 80, "ssm_state_size": 16, "mamba_num_heads": 4,
    "mamba_head_dim": 16, "n_groups": 1, "chunk_size": 16, "hybrid_override_pattern": "M*-M",
}
GREEDY = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
NAMES = ("cache", "past_key_values")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return HybridForCausalLM(HybridConfig(**OPTIONS)).eval()


@pytest.fixture(scope="module")
def ids():
    return torch.randint(3, 61, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", [HybridCausalLMOutput, HybridModelOutput])
def test_an_output_has_its_cache_under_both_names_and_lists_it_once(kind):
    cache = HybridCache()
    out = kind(cache=cache)
    assert list(out) == ["cache"] and out.to_tuple() == (cache,)
    assert out.past_key_values is out["past_key_values"] is out.get("past_key_values") is cache
    assert "past_key_values" in out and "past_key_values" not in kind()
    assert kind().past_key_values is None


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_forward_takes_either_name(model, ids, name):
    want = model(ids).logits[:, 7:]
    for part, logits in ((model, lambda out: out.logits), (model.backbone, model_logits(model))):
        cache = HybridCache()
        options = {"use_cache": True} if part is model else {}
        part(ids[:, :7], **{name: cache}, **options)
        out = part(ids[:, 7:], **{name: cache}, **options)
        assert out.cache is out.past_key_values is cache and cache.get_seq_length() == 12
        torch.testing.assert_close(logits(out), want)


def model_logits(model):
    return lambda out: model.lm_head(out.last_hidden_state).float()


@pytest.mark.parametrize("call", ["forward", "generate"])
def test_both_names_at_once_are_refused(model, ids, call):
    with pytest.raises(ValueError, match="cache and past_key_values are one argument; got both"):
        getattr(model, call)(ids, cache=HybridCache(), past_key_values=HybridCache())


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_text_goes_on_from_a_cache_under_either_name(model, ids, name):
    want = model.generate(ids, **GREEDY)
    cache = HybridCache()
    model(ids[:, :8], cache=cache, use_cache=True)
    lengths = []
    watch = model.backbone.register_forward_pre_hook(
        lambda _, args: lengths.append(args[0].shape[1])
    )
    try:
        assert torch.equal(model.generate(ids, **{name: cache}, **GREEDY), want)
    finally:
        watch.remove()
    assert lengths == [4] + [1] * 8  # the cached positions are not read again
    assert cache.get_seq_length() == 12 + 8


@pytest.mark.parametrize("name", NAMES)
def test_inputs_for_generation_are_cut_to_what_a_cache_has_not_read(model, ids, name):
    cache = HybridCache()
    inputs = model.prepare_inputs_for_generation(ids, 3, **{name: cache})
    assert inputs["input_ids"].shape == (2, 3)
    assert [inputs[key] for key in NAMES if key in inputs] == [cache]


@pytest.mark.parametrize(
    "options",
    [
        {}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2},
        {"prefill_chunk_size": 5}, {"return_dict_in_generate": True},
        {"num_beams": 2, "return_dict_in_generate": True},
    ],
    ids=str,
)
@torch.no_grad()
def test_generating_reads_each_token_once_and_gives_the_texts_without_a_cache(model, ids, options):
    want = model.generate(ids, use_cache=False, **GREEDY, **options | {"prefill_chunk_size": None})
    read = []
    watch = model.backbone.register_forward_pre_hook(lambda _, args: read.append(args[0].shape[1]))
    try:
        got = model.generate(ids, **GREEDY, **options)
    finally:
        watch.remove()
    assert sum(read) == 12 + 8
    if options.get("return_dict_in_generate"):
        assert isinstance(got.past_key_values, HybridCache)
        got, want = got.sequences, want.sequences
    assert torch.equal(got, want)


def test_an_assistant_is_refused_since_a_state_cannot_go_back(model, ids):
    with pytest.raises(ValueError, match="(?i)assisted|stateful"):
        model.generate(ids[:1], assistant_model=model, **GREEDY)
