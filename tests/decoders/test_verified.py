"""Draft and verify: the text is that of greedy search whatever is drafted, and counts are right."""

from pathlib import Path

import pytest
import torch
from transformers import LogitsProcessor, StoppingCriteria

from tess.backbones.causal_lm import HybridForCausalLM
from tess.backbones.config import HybridConfig
from tess.benchmarks.doors import drafting
from tess.benchmarks.drafting import benchmark_drafting
from tess.commands.generate import main
from tess.config import TessConfig
from tess.decoders.drafts import DiffusionDrafts, aligned_rest
from tess.decoders.load import load_decoder
from tess.decoders.verified import DraftVerifyDecoder, decode_with_drafts
from tess.denoiser import TessDenoiser
from tess.errors import UserError
from tess.sampling.options import SamplerOptions
from tess.schedulers.renoising import RenoisingScheduler
from tess.storage.parts import Parts, load_parts, save_parts
from tess.text.tokenization import train_tokenizer
from tiny import DECODER

ROOT = Path(__file__).resolve().parents[2]
VOCAB, LIMIT = 61, 11
TEXTS = ["a cat", "the dog ran after the cat and the cat ran away", "naïve 東京", "a cat sat"]
SIZES = DECODER | {"initializer_range": 0.3}


@pytest.fixture(scope="module")
def model():
    """Random and in float64, so that no two tokens are as good as each other."""
    torch.manual_seed(1)
    return HybridForCausalLM(HybridConfig(**SIZES | {"vocab_size": VOCAB})).double().eval()


def prompts():
    """Left-padded rows of 9, 1, 4 and 6 tokens."""
    ids = torch.randint(3, VOCAB, (4, 9), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(9) >= 9 - torch.tensor([9, 1, 4, 6])[:, None]).long()
    return ids * mask, mask


def options(ids, mask, limit=LIMIT, end=None, **more):
    return {
        "input_ids": ids, "attention_mask": mask, "max_new_tokens": limit, "do_sample": False,
        "pad_token_id": 0, "eos_token_id": end, **more,
    }


def greedy(model, ids, mask, limit=LIMIT, end=None, **more):
    """Each row's text by transformers' greedy search, cut behind its end."""
    rows = model.generate(**options(ids, mask, limit, end, **more))[:, ids.shape[1] :].tolist()
    return [row[: row.index(end) + 1] if end in row else row for row in rows]


def drafted(model, ids, mask, draft, *args, **more):
    more |= {"custom_generate": decode_with_drafts, "draft": draft}
    return model.generate(**options(ids, mask, *args, **more))


def drafters(texts, end):
    """By name, what drafts for the place of a row and its certain prefix."""
    wrong = [[(token + 1) % VOCAB for token in text] for text in texts]
    noise = torch.rand(len(texts), LIMIT, generator=torch.Generator().manual_seed(3)) < 0.3
    corrupt = [
        [bad if flip else good for good, bad, flip in zip(*columns)]
        for columns in zip(texts, wrong, noise.tolist())
    ]
    stop = 7 if end is None else end
    return {
        "own text": lambda row, at: texts[row][at:],
        "garbage": lambda row, at: wrong[row][at:] + [5] * 20,
        "corrupted": lambda row, at: corrupt[row][at:],
        "nothing": lambda row, at: [],
        "now and then": lambda row, at: corrupt[row][at:] if (row + at) % 3 else [],
        "an early end": lambda row, at: texts[row][at : at + 2] + [stop],
        "no end": lambda row, at: [t for t in texts[row][at:] if t != end] + [4] * 30,
    }


NAMES = list(drafters([], None))


def ends(model):
    """No end token, one that is the first of some row's text, and one that comes later."""
    free = greedy(model, *prompts())
    later = next(t for t in free[0][4:] if t not in free[0][:4])
    return [None, free[0][0], later]


def expected(text, draft, limit, end):
    """Counts by the rules, one token at a time: forwards, drafted, accepted, of the first."""
    written, forwards, offered, kept, first, span = 1, 1, 0, 0, 0, limit
    while written < len(text):
        tokens = draft(written)[: min(limit - written, span)]
        if end in tokens:
            tokens = tokens[: tokens.index(end) + 1]
        agreed = 0
        while agreed < len(tokens) and tokens[agreed : agreed + 1] == text[written + agreed :][:1]:
            agreed += 1
        if forwards == 1:
            first = agreed
        span = 2 * agreed + 2 if tokens else limit
        written, forwards = written + agreed + 1, forwards + 1
        offered, kept = offered + len(tokens), kept + agreed
    return forwards, offered, kept, first


@pytest.mark.parametrize("place", range(3))
@pytest.mark.parametrize("name", NAMES)
def test_text_and_counts_are_those_of_the_rules_in_any_batch(model, name, place):
    ids, mask = prompts()
    end = ends(model)[place]
    texts = greedy(model, ids, mask, LIMIT, end)
    assert len({tuple(text) for text in texts}) == 4
    chosen = drafters(texts, end)[name]
    for rows in ([0, 1, 2, 3], [3, 0], [1]):

        def draft(places, prefixes, budgets):
            assert all(1 <= budget <= LIMIT for budget in budgets)
            for at, prefix in zip(places, prefixes, strict=True):
                assert prefix == texts[rows[at]][: len(prefix)]
            return [chosen(rows[at], len(p)) for at, p in zip(places, prefixes)]

        width = int(mask[rows].sum(dim=1).max())
        written = drafted(model, ids[rows, -width:], mask[rows, -width:], draft, LIMIT, end)
        assert [one.token_ids for one in written] == [texts[row] for row in rows]
        for row, one in zip(rows, written):
            counts = (one.num_forwards, one.num_drafted, one.num_accepted, one.num_first_accepted)
            assert counts == expected(texts[row], lambda at: chosen(row, at), LIMIT, end)  # noqa: B023


def test_a_right_draft_takes_one_pass_and_garbage_one_per_token(model):
    ids, mask = prompts()
    texts = greedy(model, ids, mask)
    for name, forwards, accepted in (("own text", 2, LIMIT - 1), ("garbage", LIMIT, 0)):
        chosen = drafters(texts, None)[name]

        def draft(rows, prefixes, budgets):
            return [chosen(row, len(prefix)) for row, prefix in zip(rows, prefixes)]  # noqa: B023

        for one in drafted(model, ids, mask, draft):
            assert (one.num_forwards, one.num_accepted) == (forwards, accepted)


@pytest.mark.parametrize("pattern", ["M-M", "*-*", "E-"])
def test_layers_of_one_kind_too(pattern):
    torch.manual_seed(2)
    sizes = SIZES | {"vocab_size": VOCAB, "hybrid_override_pattern": pattern}
    model = HybridForCausalLM(HybridConfig(**sizes)).double().eval()
    ids, mask = prompts()
    texts = greedy(model, ids, mask)
    chosen = drafters(texts, None)["corrupted"]

    def draft(rows, prefixes, budgets):
        return [chosen(row, len(prefix)) for row, prefix in zip(rows, prefixes)]

    assert [one.token_ids for one in drafted(model, ids, mask, draft)] == texts


def test_dropping_padding_from_the_cache_changes_no_text(model, monkeypatch):
    monkeypatch.setattr("tess.decoders.verified.ROUNDS_BETWEEN_COMPACTIONS", 2)
    ids, mask = prompts()
    texts = greedy(model, ids, mask, 30)

    def draft(rows, prefixes, budgets):  # rows keep 0 to 3 tokens, each in its own rhythm
        return [
            texts[row][len(prefix) :][: (row + len(prefix)) % 4] + [0]
            for row, prefix in zip(rows, prefixes)
        ]

    assert [one.token_ids for one in drafted(model, ids, mask, draft, 30)] == texts


def test_finished_rows_leave_and_a_text_of_one_token_is_never_drafted(model):
    ids, mask = prompts()
    end = ends(model)[2]
    texts = greedy(model, ids, mask, LIMIT, end)
    seen = []

    def draft(rows, prefixes, budgets):
        seen.append((rows, [len(prefix) for prefix in prefixes], budgets))
        return [[] for _ in rows]

    drafted(model, ids, mask, draft, LIMIT, end)
    for round_, (rows, lengths, budgets) in enumerate(seen, start=1):
        assert rows == [row for row in range(4) if len(texts[row]) > round_]
        assert lengths == [round_] * len(rows) and budgets == [LIMIT - round_] * len(rows)
    assert len(seen) == max(map(len, texts)) - 1 and len(seen[-1][0]) < 4

    seen.clear()
    written = drafted(model, ids, mask, draft, 1)
    assert [one.token_ids for one in written] == greedy(model, ids, mask, 1)
    assert not seen and {one.num_forwards for one in written} == {1}


class ByPlaceAndText(LogitsProcessor):
    """Takes what a row's number and its last two tokens forbid."""

    def __call__(self, input_ids, scores):
        rows = torch.arange(len(scores))[:, None]
        unwanted = (torch.arange(VOCAB) + input_ids[:, -1:] + input_ids[:, -2:-1] + rows) % 3 == 0
        return scores.masked_fill(unwanted, -torch.inf)


@pytest.mark.parametrize("name", ["own text", "corrupted", "now and then", "garbage"])
def test_processors_see_what_greedy_search_shows_them(model, name):
    ids, mask = prompts()
    more = {"logits_processor": [ByPlaceAndText()], "repetition_penalty": 1.3}
    texts = greedy(model, ids, mask, **more)
    assert texts != greedy(model, ids, mask)
    chosen = drafters(texts, None)[name]

    def draft(rows, prefixes, budgets):
        return [chosen(row, len(prefix)) for row, prefix in zip(rows, prefixes)]

    assert [one.token_ids for one in drafted(model, ids, mask, draft, **more)] == texts


class Always(LogitsProcessor):
    """Leaves one token."""

    def __init__(self, token):
        self.token = token

    def __call__(self, input_ids, scores):
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([self.token]), 0.0)


@pytest.mark.parametrize("token", [0, 5])
def test_what_fills_up_a_shorter_draft_is_not_accepted(model, token):
    def draft(rows, prefixes, budgets):
        return [[token] * 2 if row == 0 else [] for row in rows]

    more = {"logits_processor": [Always(token)]}
    for row, one in enumerate(drafted(model, *prompts(), draft, **more)):
        assert one.token_ids == [token] * LIMIT
        assert (one.num_accepted, one.num_forwards) == ((0, LIMIT) if row else (7, 5))


def test_another_stopping_criterion_is_refused(model):
    class Never(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.zeros(len(input_ids), dtype=torch.bool)

    with pytest.raises(UserError, match="stops at end tokens, at strings and at a length, got"):
        drafted(model, *prompts(), lambda *_: [], stopping_criteria=[Never()])


def test_the_rest_of_a_draft_is_found_again():
    draft = list("abcdefgh")
    for text, rest in (
        ("", "abcdefgh"),
        ("abc", "defgh"),
        ("abX", "defgh"),  # in place of c
        ("abd", "efgh"),  # c left out
        ("abXYcd", "efgh"),  # two words more
        ("abcdefgh", ""),
        ("abcdefghXYZ", ""),
        ("XYZ", "defgh"),
        ("abcdefghXh", ""),
    ):
        assert aligned_rest(draft, list(text)) == list(rest), text
    assert aligned_rest(list("axbxc"), list("ax")) == list("bxc")  # the nearest, not the last
    assert aligned_rest(list("bXbY"), list("bb")) == ["Y"]  # as near: ahead, not back
    assert aligned_rest(draft, list("ah"), window=3) == list("cdefgh")  # out of sight
    assert aligned_rest(draft, list("ah"), window=6) == []


# The decoder


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A folder with tess/ and ar/, random."""
    root = tmp_path_factory.mktemp("checkpoints")
    torch.manual_seed(0)
    tokenizer = train_tokenizer(TEXTS * 3, 270)
    tokenizer.model_max_length = 16
    sizes = SIZES | {"vocab_size": len(tokenizer)}
    limits = {"max_source_length": 16, "max_target_length": 10, "target_length_ratio": 1.0}
    denoiser = TessDenoiser(TessConfig(backbone_config=HybridConfig(**sizes), **limits))
    scheduler = RenoisingScheduler(vocab_size=len(tokenizer))
    save_parts(Parts(denoiser, tokenizer, scheduler), root / "tess")
    causal = HybridForCausalLM(HybridConfig(**sizes))
    causal.generation_config.max_new_tokens = 12
    save_parts(Parts(causal, tokenizer), root / "ar")
    return root


def in_float64(decoder):
    """Products of another batch size round otherwise; in float64 no choice depends on that."""
    decoder.model.double()
    if decoder.name == "tess+ar":
        decoder.writer.model.double()
    return decoder


@pytest.mark.parametrize("sampling", [{}, {"top_p": 0.9, "temperature": 1.5}])
@pytest.mark.parametrize("redraft", ["suffix", "diffusion"])
def test_texts_are_those_of_ar_in_any_batch_and_order(checkpoints, redraft, sampling):
    texts = [*TEXTS, "a cat"]
    plain = in_float64(load_decoder(checkpoints, "ar")).generate(texts, **sampling)
    decoder = in_float64(load_decoder(checkpoints, "tess+ar"))
    decoder.redraft = redraft
    together = decoder.generate(texts, num_inference_steps=2, **sampling)
    assert [one.token_ids for one in together] == [one.token_ids for one in plain]
    assert [one.text for one in together] == [one.text for one in plain]
    for batch_size in (1, 2):
        written = decoder.generate(texts, num_inference_steps=2, batch_size=batch_size, **sampling)
        assert written == together
    reverse = decoder.generate(TEXTS[::-1], num_inference_steps=2, **sampling)
    assert reverse[::-1] == together[:4]
    for one in together:
        diffusion = one.nfe - 1 - one.num_verifications
        if redraft == "suffix":
            assert diffusion == 2
        else:
            assert diffusion % 2 == 0 and 2 <= diffusion <= 2 * one.num_verifications
    short = decoder.generate(texts, gen_length=3, num_inference_steps=1)
    wanted = load_decoder(checkpoints, "ar").generate(texts, gen_length=3)
    assert [one.token_ids for one in short] == [one.token_ids for one in wanted]


def test_redrafting_fixes_the_certain_prefix(checkpoints):
    decoder = load_decoder(checkpoints, "tess+ar")
    writer, rows = decoder.writer, [[1, 5, 6, 7, 2], [1, 8, 2], [1, 9, 10, 2]]
    keys = torch.tensor([3, 4, 5])
    drafts = DiffusionDrafts(writer, rows, keys, 2, "diffusion")
    first = drafts([0, 1, 2], [[11], [12], [13]], [9, 9, 9])
    given = {"keys": keys, "num_inference_steps": 2, "output_type": "seq"}
    out = writer.pipeline(input_ids=rows, **given)
    for text, length, own, start in zip(out.sequences.tolist(), out.lengths, first, (11, 12, 13)):
        assert own == aligned_rest(text[:length], [start])
    full = [14] * out.lengths[1]  # no place is left for more
    again = drafts([0, 1, 2], [[11, 20], full, [13, 21, 22]], [9, 9, 9])
    fixed = torch.full((2, max(out.lengths[0], out.lengths[2])), -1)
    fixed[0, :2], fixed[1, :3] = torch.tensor([11, 20]), torch.tensor([13, 21, 22])
    given |= {"keys": keys[[0, 2]], "gen_length": [out.lengths[0], out.lengths[2]]}
    wanted = writer.pipeline(input_ids=[rows[0], rows[2]], fixed_tokens=fixed, **given)
    assert again == [
        wanted.sequences[0, 2 : out.lengths[0]].tolist(),
        [],
        wanted.sequences[1, 3 : out.lengths[2]].tolist(),
    ]
    assert drafts.nfe == [4, 2, 4]


def test_defaults_and_the_command_line(checkpoints, capsys):
    decoder = load_decoder(checkpoints, "tess+ar")
    assert (decoder.name, decoder.redraft) == ("tess+ar", "suffix")
    assert decoder.default_num_inference_steps == 1
    sizes = [load_decoder(checkpoints, name).num_parameters for name in ("tess", "ar")]
    assert decoder.num_parameters == sum(sizes)
    assert load_decoder(checkpoints).name == "tess"
    shown = []
    for name in ("ar", "tess+ar"):
        main(["a cat", "--checkpoint", str(checkpoints), "--decoder", name])
        shown.append(capsys.readouterr().out.rpartition("\n[")[0])
    assert shown[0] == shown[1]


def test_options_of_the_sampler_reach_the_drafts(checkpoints):
    at_once = SamplerOptions(confidence_threshold=1e-9)  # every token is sure enough
    for options, evaluations in ((None, 16), (at_once, 1)):
        decoder = load_decoder(checkpoints, "tess+ar", options=options)
        for one in decoder.generate(TEXTS[1:2], num_inference_steps=16):
            assert one.nfe - 1 - one.num_verifications == evaluations


def test_what_does_not_go_together_is_refused(checkpoints, tmp_path):
    for folder, has in ((checkpoints / "ar", "ar"), (checkpoints / "tess", "tess")):
        with pytest.raises(UserError, match=rf"has no decoder 'tess\+ar'; it has {has}"):
            load_decoder(folder, "tess+ar")
    with pytest.raises(UserError, match=r"num_draft_tokens belongs to the ar\+mtp decoder"):
        load_decoder(checkpoints, "tess+ar", num_draft_tokens=2)
    parts = [load_parts(checkpoints / name) for name in ("tess", "ar")]
    with pytest.raises(UserError, match="redraft must be one of suffix, diffusion, got 'all'"):
        DraftVerifyDecoder(*parts, redraft="all")
    parts[1].tokenizer = train_tokenizer(["something else entirely"] * 3, 270)
    with pytest.raises(UserError, match="needs two models of one vocabulary"):
        DraftVerifyDecoder(*parts)


def test_the_benchmark_counts_and_prints():
    result = benchmark_drafting(
        ROOT / "checkpoints" / "default",
        rows=3, num_inference_steps=[1], redraft_steps=[1], redraft_every=2, batch_sizes=[2],
    )
    assert [(row["system"], row["redraft"], row["rows"]) for row in result["rows"]] == [
        ("ar", None, 3), ("ar+mtp", None, 3), ("tess+ar", "suffix", 3), ("tess+ar", "diffusion", 2),
    ]
    for row in result["rows"]:
        assert row["equal_texts"] == row["rows"]
        tokens = row["tokens_per_ar_evaluation"] * row["ar_evaluations"] * row["rows"]
        assert tokens == pytest.approx(row["new_tokens"])
    plain, _, suffix, again = result["rows"]
    assert plain["tokens_per_ar_evaluation"] == 1 and plain["diffusion_evaluations"] == 0
    assert suffix["diffusion_evaluations"] == 1 < again["diffusion_evaluations"]
    assert 0 < suffix["first_accepted_mean"] < suffix["new_tokens"] / 3
    assert len(drafting.table(result).splitlines()) == 4 + len(result["rows"])
