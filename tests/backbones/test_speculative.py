"""Speculative decoding: the cache's way back, and whole texts against plain ones."""

import math
from pathlib import Path

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria

from tess.backbones.cache import HybridCache
from tess.backbones.causal_lm import HybridForCausalLM
from tess.backbones.config import HybridConfig
from tess.data.tasks.catalog import load_task
from tess.kernels import reference
from tess.kernels.speculative import accept_drafts
from tess.kernels.ssd import ssd_advance
from tess.storage.parts import load_parts
from tess.text.tokenization import encode_sources
from tiny import BACKBONE

SHIPPED = Path(__file__).resolve().parents[2] / "checkpoints" / "default" / "ar"

OPTIONS = BACKBONE | {"moe_latent_size": 24, "num_nextn_predict_layers": 1}


def make(agreeing=False, **changes):
    """A random causal model; `agreeing` makes its predictor right about half of the time.

    That predictor passes the backbone's state on and adds nothing, and the backbone nearly repeats
    itself from token to token.
    """
    torch.manual_seed(1)
    model = HybridForCausalLM(HybridConfig(**OPTIONS | changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
        if agreeing:
            hidden = model.config.hidden_size
            for layer in model.mtp.layers:
                for name, parameter in layer.mixer.named_parameters():
                    if "o_proj" in name or "down_proj" in name:
                        parameter.zero_()
            model.mtp.layers[0].eh_proj.weight.zero_()
            model.mtp.layers[0].eh_proj.weight[:, hidden:] = torch.eye(hidden)
            model.backbone.embeddings.weight.mul_(0.02)
            model.backbone.embeddings.weight[:, :4].add_(1.0)
    return model


def prompts(rows, width, seed=0):
    """Left-padded rows of mixed lengths, one of them a single token."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 61, (rows, width), generator=generator)
    lengths = torch.randint(1, width + 1, (rows,), generator=generator)
    lengths[0] = width
    if rows > 1:
        lengths[1] = 1
    mask = (torch.arange(width) >= width - lengths[:, None]).long()
    return ids * mask, mask


def relative(got, want):
    return ((got - want).norm() / want.norm()).item()


# The state after a part of a block


@pytest.mark.parametrize("length", [1, 5, 17])
def test_state_after_a_part_of_a_block_equals_the_recurrence(length):
    x = torch.randn(3, length, 4, 6, dtype=torch.float64)
    dt = torch.rand(3, length, 4, dtype=torch.float64) * 2
    a = -torch.rand(4, dtype=torch.float64) * 3
    b = torch.randn(3, length, 2, 5, dtype=torch.float64)
    state = torch.randn(3, 4, 6, 5, dtype=torch.float64)
    for counts in ([0, length, length // 2], [length] * 3, [0, 0, 0]):
        counts = torch.tensor(counts)
        got = ssd_advance(x, dt, a, b, state, counts)
        want = reference.ssd_advance(x, dt, a, b, state, counts)
        assert relative(got, want) < 1e-12
    strided = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in (x, dt, b)]
    again = ssd_advance(strided[0], strided[1], a, strided[2], state, counts)
    assert torch.equal(again, got)


@pytest.mark.parametrize("pattern", ["M*EM-*", "MM", "**", "E-"])
@torch.no_grad()
def test_advancing_equals_reading_only_the_kept_tokens(pattern):
    model = make(hybrid_override_pattern=pattern).double().backbone
    ids, mask = prompts(3, 9)
    block = torch.randint(3, 61, (3, 5))
    cache = HybridCache()
    model(ids, attention_mask=mask, cache=cache)
    before = cache.snapshot()
    out = model(block, cache=cache, mode="verify")
    assert cache.length == before.length == 9
    whole = model(block, cache=before.snapshot()).last_hidden_state
    assert relative(out.last_hidden_state, whole) < 1e-12
    counts = torch.tensor([5, 1, 3])
    cache.advance(out.record, counts)
    cache.compact()
    probe = torch.randint(3, 61, (3, 4))
    got = model(probe, cache=cache).last_hidden_state
    for row, count in enumerate(counts.tolist()):
        alone = before.select(torch.tensor([row]))
        model(block[row : row + 1, :count], cache=alone)
        want = model(probe[row : row + 1], cache=alone).last_hidden_state[0]
        assert relative(got[row], want) < 1e-12


@torch.no_grad()
def test_compacting_drops_the_padding_that_all_rows_can_spare_and_changes_nothing():
    model = make().double().backbone
    cache = HybridCache()
    model(torch.randint(3, 61, (2, 4)), cache=cache)
    for counts in ([1, 4], [4, 1], [2, 2]):
        out = model(torch.randint(3, 61, (2, 4)), cache=cache, mode="verify")
        cache.advance(out.record, torch.tensor(counts))
    compact = cache.snapshot()
    compact.compact()
    assert (cache.length, compact.length) == (4 + 4 + 4 + 2, 4 + 1 + 4 + 2)
    assert compact.key_mask is None  # both rows kept as many: no padding is left
    probe = torch.randint(3, 61, (2, 3))
    want = model(probe, cache=cache).last_hidden_state
    assert relative(model(probe, cache=compact).last_hidden_state, want) < 1e-12
    compact.compact()
    assert compact.length == 14


def test_verifying_needs_a_cached_text():
    model = make().backbone
    for cache in (None, HybridCache()):
        with pytest.raises(ValueError, match="verify mode reads a block after a cached text"):
            model(torch.ones(1, 2, dtype=torch.long), cache=cache, mode="verify")


# Whole texts


def plain_and_drafted(model, ids, mask, k, **options):
    options = {
        "attention_mask": mask, "max_new_tokens": 24, "do_sample": False, "pad_token_id": 0,
        "eos_token_id": [7, 11],
    } | options
    plain = model.generate(ids, **options)
    drafted = model.generate(
        ids, use_mtp=True, num_assistant_tokens=k, return_dict_in_generate=True, **options
    )
    return plain, drafted


@pytest.mark.parametrize("agreeing", [False, True])
@pytest.mark.parametrize("k", [1, 2, 3, 6])
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_greedy_text_with_drafts_is_the_text_without(agreeing, k, rows):
    model = make(agreeing).double()  # where two products never change the order of two logits
    total = accepted = 0
    for seed in range(2):
        ids, mask = prompts(rows, 7, seed)
        plain, drafted = plain_and_drafted(model, ids, mask, k)
        assert torch.equal(drafted.sequences, plain)
        accepted += int(drafted.num_accepted.sum())
        total += int(drafted.num_drafted.sum())
        new = (plain[:, 7:] != 0).sum(1)
        assert torch.equal(drafted.num_drafted, (drafted.num_forwards - 1) * k)
        assert (drafted.num_forwards + drafted.num_accepted >= new).all()
        assert (drafted.num_accepted <= drafted.num_drafted).all()
    assert accepted / total > 0.3 if agreeing else accepted / total < 0.2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_over_200_prompts_a_text_differs_only_where_two_logits_are_nearly_equal(dtype):
    # One product over a block and several over positions are rounded differently, so a tie may
    # fall the other way; it must be one.
    model = make(agreeing=True).to(dtype)
    same, near = 0, 1e-4 if dtype == torch.float32 else 0.2
    for seed in range(25):
        ids, mask = prompts(8, 12, seed)
        plain, drafted = plain_and_drafted(model, ids, mask, 1 + seed % 6)
        for row, (a, b) in enumerate(zip(plain.tolist(), drafted.sequences.tolist())):
            same += a == b
            if a == b:
                continue
            first = next(i for i, (s, t) in enumerate(zip(a, b)) if s != t)
            with torch.no_grad():
                seen = plain[row : row + 1, :first]
                real = torch.cat([mask[row : row + 1], torch.ones(1, first - 12).long()], dim=1)
                logits = model(seen, attention_mask=real).logits[0, -1]
            gap = (logits[a[first]] - logits[b[first]]).abs() / logits.std()
            assert gap < near
    assert same >= (195 if dtype == torch.float32 else 100)


@torch.no_grad()
def rounds_by_the_book(model, ids, text, k):
    """(evaluations, accepted drafts) of one row, each round computed from the text alone."""
    backbone, embed = model.backbone, model.backbone.embeddings
    done, forwards, accepted = ids.shape[1] + 1, 1, 0
    while done < len(text):
        seen = text[None, :done]
        out = backbone(seen[:, :-1])
        state, tokens, drafts = model.mtp_input(out), seen[:, 1:], []
        for _ in range(k):
            # with its own output for the tokens it drafted, the backbone's state for all others
            own = model.mtp(embed(tokens), state)[:, -1:]
            drafts.append(model.lm_head(own)[0, 0].float().argmax())
            state = torch.cat([state, own], dim=1)
            tokens = torch.cat([tokens, drafts[-1].view(1, 1)], dim=1)
        rest = text[done : done + k]
        right = sum((torch.stack(drafts[: len(rest)]) == rest).long().cumprod(0)).item()
        accepted, done, forwards = accepted + right, done + right + 1, forwards + 1
    return forwards, accepted


@pytest.mark.parametrize(("k", "after_norm"), [(1, True), (4, True), (4, False)])
def test_drafts_are_those_of_the_predictor_over_the_whole_text(k, after_norm):
    parts = load_parts(SHIPPED, torch.float64)  # a trained one: right often, and not always
    model, tokenizer = parts.model, parts.tokenizer
    model.config.mtp_after_norm_f = after_norm
    sources = [example.source for example in load_task("simplification", "test")[:6]]
    share = []
    for row in encode_sources(tokenizer, sources, 80, False):
        ids = torch.tensor([row])
        plain, drafted = plain_and_drafted(
            model, ids, torch.ones_like(ids), k, eos_token_id=None, max_new_tokens=30
        )
        want = rounds_by_the_book(model, ids, plain[0], k)
        assert (int(drafted.num_forwards), int(drafted.num_accepted)) == want
        share.append(want[1] / (k * (want[0] - 1)))
    assert 0.1 < sum(share) / len(share) < 1


class ByRow(LogitsProcessor):
    """Depends on everything a processor is shown: the tokens, the length and the row."""

    def __call__(self, input_ids, scores):
        shift = (input_ids.sum(1) * 7 + input_ids.shape[1] * 3 + torch.arange(len(scores)) * 5) % 61
        return scores.scatter(1, shift[:, None], -math.inf)


@pytest.mark.parametrize("agreeing", [False, True])
def test_logits_processors_see_what_plain_decoding_shows_them(agreeing):
    model = make(agreeing).double()
    ids, mask = prompts(4, 6)
    options = {
        "repetition_penalty": 1.4, "no_repeat_ngram_size": 2, "min_new_tokens": 5,
        "logits_processor": LogitsProcessorList([ByRow()]),
    }
    plain, drafted = plain_and_drafted(model, ids, mask, 3, **options)
    assert torch.equal(drafted.sequences, plain)
    without, _ = plain_and_drafted(model, ids, mask, 3)
    assert plain.shape != without.shape or not torch.equal(plain, without)


class SumIsLarge(StoppingCriteria):
    """Stops a row by the tokens it holds."""

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids.sum(1) > 500


def test_every_stopping_criterion_stops_at_the_same_token():
    model = make(agreeing=True).double()
    ids, mask = prompts(5, 6)
    plain, drafted = plain_and_drafted(
        model, ids, mask, 4, stopping_criteria=[SumIsLarge()], eos_token_id=60
    )
    assert torch.equal(drafted.sequences, plain)
    assert plain.shape[1] < 30
    for length in (1, 2, 5):
        plain, drafted = plain_and_drafted(model, ids, mask, 4, max_new_tokens=length)
        assert torch.equal(drafted.sequences, plain)


@pytest.mark.parametrize("length", [16, 17, 18, 33, 40])
def test_texts_that_end_when_the_caches_are_compacted_are_no_exception(length):
    model = make().double()  # one token a round: the last row ends in round length - 1
    ids, mask = prompts(3, 7)
    plain, drafted = plain_and_drafted(
        model, ids, mask, 1, max_new_tokens=length, eos_token_id=None
    )
    assert torch.equal(drafted.sequences, plain)


@pytest.mark.parametrize("pattern", ["M*", "-", "*M-E", "MM"])
@pytest.mark.parametrize("after_norm", [True, False])
def test_other_predictors_change_no_text_and_draft_the_same_in_any_batch(pattern, after_norm):
    model = make(
        agreeing=False, mtp_hybrid_override_pattern=pattern, mtp_after_norm_f=after_norm,
        tie_word_embeddings=True,
    ).double()
    ids, mask = prompts(4, 6, seed=3)
    plain, drafted = plain_and_drafted(model, ids, mask, 3)
    assert torch.equal(drafted.sequences, plain)
    for row in range(4):
        start = int((mask[row] == 0).sum())
        alone = plain_and_drafted(
            model, ids[row : row + 1, start:], mask[row : row + 1, start:], 3
        )[1]
        assert alone.num_accepted[0] == drafted.num_accepted[row]
        assert alone.num_forwards[0] == drafted.num_forwards[row]


def test_finished_rows_are_padded_as_plain_decoding_pads_them_without_a_pad_token():
    model = make(pad_token_id=None).double()
    ids, mask = prompts(5, 6)
    plain, drafted = plain_and_drafted(model, ids, mask, 2, pad_token_id=None, eos_token_id=[29, 5])
    assert torch.equal(drafted.sequences, plain)
    assert (plain[:, -1] == 29).any()


def test_the_number_of_drafts_comes_from_where_it_was_said():
    model = make()
    ids, _ = prompts(1, 4)

    def drafts(**options):
        out = model.generate(
            ids, use_mtp=True, max_new_tokens=2, eos_token_id=None, pad_token_id=0,
            return_dict_in_generate=True, **options,
        )
        return int(out.num_drafted)

    assert drafts() == 3
    assert drafts(num_assistant_tokens=5) == 5
    model.generation_config.num_assistant_tokens = 2
    assert drafts() == 2


class Listener:
    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.ended = True


def test_a_streamer_gets_the_same_tokens():
    model = make(agreeing=True).double()
    ids, mask = prompts(1, 5)
    heard = []
    for options in ({}, {"use_mtp": True}):
        listener = Listener()
        out = model.generate(
            ids, max_new_tokens=9, do_sample=False, eos_token_id=None, pad_token_id=0,
            streamer=listener, **options,
        )
        assert listener.tokens == out[0].tolist() and listener.ended
        heard.append(listener.tokens)
    assert heard[0] == heard[1]


def chi_squared(counts, others):
    """Two-sample statistic over cells that hold something, and its degrees of freedom."""
    keep = counts + others >= 10
    a, b = counts[keep], others[keep]
    return ((a - b) ** 2 / (a + b)).sum().item(), int(keep.sum()) - 1


def second_tokens(model, rows, use_mtp):
    """How often each pair of second and third new token comes up, over many samples."""
    torch.manual_seed(3 + use_mtp)
    ids = torch.tensor([[5, 9, 4]]).expand(rows, 3)
    options = {"use_mtp": True, "num_assistant_tokens": 2} if use_mtp else {}
    out = model.generate(
        ids, max_new_tokens=3, do_sample=True, top_k=4, temperature=1.3, eos_token_id=None,
        pad_token_id=0, **options,
    )
    return torch.bincount(out[:, 4] * 61 + out[:, 5], minlength=61 * 61).float()


@pytest.mark.parametrize("agreeing", [False, True])
def test_sampled_texts_have_the_law_of_plain_sampling(agreeing):
    model = make(agreeing)
    plain, drafted = (second_tokens(model, 6000, use_mtp) for use_mtp in (False, True))
    statistic, freedom = chi_squared(plain, drafted)
    assert freedom > 10
    assert statistic < freedom + 3.7 * math.sqrt(2 * freedom)


def test_texts_of_drafts_that_always_stay_have_another_law(monkeypatch):
    model = make()
    plain = second_tokens(model, 6000, False)

    def always(drafts, q, p, accept, choose):
        return accept_drafts(drafts, q, p, accept * 0, choose)

    monkeypatch.setattr("tess.backbones.speculative.accept_drafts", always)
    wrong, freedom = chi_squared(plain, second_tokens(model, 6000, True))
    assert wrong > freedom + 6 * math.sqrt(2 * freedom)


def test_sampling_with_drafts_follows_the_seed():
    model = make(agreeing=True)
    ids, mask = prompts(3, 5)

    def sample(seed):
        torch.manual_seed(seed)
        return model.generate(
            ids, attention_mask=mask, use_mtp=True, do_sample=True, max_new_tokens=8,
            pad_token_id=0, eos_token_id=None,
        )

    assert torch.equal(sample(1), sample(1))
    assert not torch.equal(sample(1), sample(2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_assistant_tokens": 0}, "num_assistant_tokens must be 1 or more with use_mtp"),
        ({"num_assistant_tokens": 2.5}, "must be 1 or more with use_mtp, got 2.5"),
        ({"guidance_scale": 1.5}, "guidance_scale does not go with use_mtp"),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens does not go with use_mtp"),
        ({"num_beams": 2}, "use_mtp goes with greedy search and sampling"),
        ({"use_cache": False}, "use_mtp needs the cache"),
        ({"return_dict_in_generate": True, "output_logits": True}, "output_logits is not avail"),
    ],
)
def test_what_drafting_cannot_do_is_refused(options, message):
    ids, _ = prompts(1, 4)
    with pytest.raises(ValueError, match=message):
        make().generate(ids, use_mtp=True, max_new_tokens=3, **options)


def test_drafting_without_a_predictor_is_refused():
    model = make(num_nextn_predict_layers=0)
    ids, _ = prompts(1, 4)
    with pytest.raises(ValueError, match="no multi-token predictor .num_nextn_predict_layers is 0"):
        model.generate(ids, use_mtp=True, max_new_tokens=3)
    with pytest.raises(ValueError, match="no multi-token predictor"):
        model(ids, loss_weights=torch.ones(1, 4), mtp_depth=1)
