"""Beam search: against a search written from its rule, in float64 and without a cache."""

import itertools
import json
from functools import cache

import pytest
import torch

from tess.backbones.cache import HybridCache
from tess.backbones.causal_lm import HybridForCausalLM
from tess.backbones.config import HybridConfig
from tess.commands import evaluate, generate
from tess.config import TessConfig
from tess.decoders.autoregressive import ArDecoder
from tess.decoders.base import Description
from tess.decoders.beam_search import BeamDecoder
from tess.decoders.load import load_decoder
from tess.denoiser import TessDenoiser
from tess.errors import UserError
from tess.schedulers.renoising import RenoisingScheduler
from tess.storage.parts import Parts, save_parts
from tess.text.tokenization import encode_texts, train_tokenizer
from tiny import DECODER

TEXTS = ["a cat", "the dog ran after the cat and the cat ran", "naïve 東京", "a cat sat", "b"]
LONGEST = 9
EOS = 2
SIZES = DECODER | {"initializer_range": 0.3}


@cache
def parts():
    """A causal model of random weights that ends some texts early and others never."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer(TEXTS * 3, 270)
    tokenizer.model_max_length = 64
    model = HybridForCausalLM(HybridConfig(**SIZES, vocab_size=len(tokenizer)))
    with torch.no_grad():  # a random model finds `</s>` no likelier than any other token
        model.lm_head.weight[EOS] = 2.3 * model.lm_head.weight[5]
    model.generation_config.max_new_tokens = LONGEST
    assert tokenizer.eos_token_id == EOS
    return Parts(model.eval(), tokenizer)


@cache
def double():
    """The same weights in float64."""
    copy = HybridForCausalLM(parts().model.config).double().eval()
    copy.load_state_dict(parts().model.state_dict())
    return copy


def sources(texts=TEXTS):
    tokenizer = parts().tokenizer
    return encode_texts(tokenizer, texts)


@torch.no_grad()
def next_log_probs(model, source, prefixes):
    """log p(next token) [N, V] after the source and each of N prefixes of one length, no cache."""
    rows = torch.tensor([list(source) + list(prefix) for prefix in prefixes])
    hidden = model.backbone(rows).last_hidden_state[:, -1]
    return model.lm_head(hidden).log_softmax(dim=-1)


def log_prob(model, source, text):
    """log p(text | source)."""
    rows = torch.tensor([list(source) + list(text)])
    with torch.no_grad():
        log_probs = model.lm_head(model.backbone(rows).last_hidden_state)[0].log_softmax(dim=-1)
    return sum(float(log_probs[len(source) - 1 + i, token]) for i, token in enumerate(text))


def reference(model, source, beams, penalty, longest=LONGEST, eos=EOS):
    """The best finished text, and the number of steps; the rule of `BeamDecoder`'s docstring."""
    running, finished = [((), 0.0)], []
    for step in range(1, longest + 1):
        table = next_log_probs(model, source, [prefix for prefix, _ in running])
        candidates = [
            ((*prefix, token), score + gain)
            for (prefix, score), row in zip(running, table.tolist(), strict=True)
            for token, gain in enumerate(row)
        ]
        candidates.sort(key=lambda pair: -pair[1])
        ends = [text[-1] == eos or step == longest for text, _ in candidates]
        finished += [
            (text, score / step**penalty)
            for (text, score), end in list(zip(candidates, ends))[:beams]
            if end
        ]
        finished = sorted(finished, key=lambda pair: -pair[1])[:beams]
        running = [pair for pair, end in zip(candidates, ends) if not end][:beams]
        full = len(finished) == beams
        if not running or (full and running[0][1] / step**penalty <= finished[-1][1]):
            break
    return list(finished[0][0]), step


@pytest.mark.parametrize(("beams", "penalty"), [(2, 1.0), (4, 1.0), (4, 0.0), (3, 2.5), (3, -1.0)])
def test_texts_and_steps_are_those_of_the_rule_written_out(beams, penalty):
    written = BeamDecoder(parts(), beams, penalty).generate_ids(sources(), batch_size=5)
    for generation, source in zip(written, sources(), strict=True):
        text, steps = reference(double(), source, beams, penalty)
        assert (generation.token_ids, generation.nfe) == (text, steps)


def test_the_cases_above_have_texts_that_end_and_others_and_searches_that_stop_early():
    found = [reference(double(), source, 4, 1.0) for source in sources()]
    assert {text[-1] == EOS for text, _ in found} == {True, False}
    assert {steps == LONGEST for _, steps in found} == {True, False}
    assert any(len(text) < steps for text, steps in found)
    greedy = ArDecoder(parts()).generate_ids(sources())
    assert any(g.token_ids != text for g, (text, _) in zip(greedy, found, strict=True))


@pytest.mark.parametrize("wrong", ["keys", "conv", "ssm"])
def test_each_part_of_the_cache_follows_its_beam(monkeypatch, wrong):
    def all_but_one(self, beam_idx):
        before = self.snapshot()
        self.restore(self.select(beam_idx))
        for index, state in before.layers.items():
            if wrong == "keys" and hasattr(state, "keys"):
                self.layers[index] = state
            if wrong == "conv" and hasattr(state, "conv_window"):
                self.layers[index] = self.layers[index]._replace(conv_window=state.conv_window)
            if wrong == "ssm" and hasattr(state, "ssm_state"):
                self.layers[index] = self.layers[index]._replace(ssm_state=state.ssm_state)

    def texts():
        return [g.token_ids for g in BeamDecoder(parts(), 4).generate_ids(sources(), batch_size=5)]

    want = [reference(double(), source, 4, 1.0)[0] for source in sources()]
    assert texts() == want
    monkeypatch.setattr(HybridCache, "reorder_cache", all_but_one)
    assert texts() != want


@pytest.mark.parametrize("beams", [2, 4])
def test_a_text_and_its_steps_do_not_depend_on_batch_or_order(beams):
    decoder = BeamDecoder(parts(), beams)
    together = decoder.generate(TEXTS, batch_size=5)
    assert len({generation.nfe for generation in together}) > 1
    assert [decoder.generate([text])[0] for text in TEXTS] == together
    assert decoder.generate(TEXTS[::-1], batch_size=2)[::-1] == together
    assert "_check_early_stop_heuristic" not in vars(parts().model)


@pytest.fixture(scope="module")
def five_tokens():
    """A float64 model of five tokens: every text of up to four of them can be tried."""
    torch.manual_seed(8)
    return HybridForCausalLM(HybridConfig(**SIZES | {"vocab_size": 5})).double().eval()


@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.0])
def test_enough_beams_find_the_best_of_all_texts(five_tokens, penalty):
    source, longest, eos = [3, 4, 1], 4, 2
    others = [token for token in range(5) if token != eos]
    texts = [
        [*prefix, last]
        for length in range(longest)
        for prefix in itertools.product(others, repeat=length)
        for last in (range(5) if length == longest - 1 else [eos])
    ]
    probs = {tuple(text): log_prob(five_tokens, source, text) for text in texts}
    assert sum(torch.tensor(list(probs.values())).exp()) == pytest.approx(1)
    best = max(texts, key=lambda text: probs[tuple(text)] / len(text) ** penalty)

    def search(**options):
        options |= {"max_new_tokens": longest, "eos_token_id": eos, "pad_token_id": 0}
        ids = five_tokens.generate(torch.tensor([source]), do_sample=False, **options)
        text = ids[0, 3:].tolist()
        return text[: text.index(eos) + 1] if eos in text else text

    assert search(num_beams=64, length_penalty=penalty) == best
    greedy = search()
    assert probs[tuple(greedy)] / len(greedy) ** penalty < probs[tuple(best)] / len(best) ** penalty


def test_the_best_beams_are_likelier_than_the_greedy_text_on_average():
    """No law for a single text (a beam can lose the greedy prefix), but what the search is for."""
    greedy = ArDecoder(parts()).generate_ids(sources())
    beams = BeamDecoder(parts(), 5, length_penalty=0.0).generate_ids(sources())
    gains = [
        log_prob(double(), source, b.token_ids) - log_prob(double(), source, g.token_ids)
        for source, b, g in zip(sources(), beams, greedy, strict=True)
    ]
    assert sum(gains) > 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint with tess/ and ar/, the latter with a predictor."""
    root = tmp_path_factory.mktemp("checkpoints")
    save_parts(parts(), root / "ar")
    size = len(parts().tokenizer)
    config = HybridConfig(**SIZES, vocab_size=size)
    denoiser = TessDenoiser(TessConfig(backbone_config=config, max_target_length=LONGEST))
    scheduler = RenoisingScheduler(vocab_size=size)
    save_parts(Parts(denoiser, parts().tokenizer, scheduler), root / "tess")
    return root


def test_one_beam_is_greedy_search(folder):
    one = load_decoder(folder, "ar", num_beams=1)
    assert (type(one), one.describe()) == (ArDecoder, Description())
    assert one.generate(TEXTS) == load_decoder(folder, "ar").generate(TEXTS)
    several = load_decoder(folder / "ar", num_beams=3)
    assert several.name == "ar"
    assert several.describe() == Description(num_beams=3, length_penalty=1.0)
    assert several.generate(TEXTS) == BeamDecoder(parts(), 3, 1.0).generate(TEXTS)
    assert all(len(g.token_ids) <= 4 and g.nfe <= 4 for g in several.generate(TEXTS, gen_length=4))


@pytest.mark.parametrize(
    ("decoder", "options", "message"),
    [
        ("tess", {"num_beams": 2}, "num_beams belongs to the ar decoder, and this one is tess"),
        (None, {"num_beams": 1}, "num_beams belongs to the ar decoder, and this one is tess"),
        ("ar+mtp", {"num_beams": 2}, "belongs to the ar decoder, and this one is ar.mtp"),
        ("tess+ar", {"num_beams": 2}, "belongs to the ar decoder, and this one is tess.ar"),
        ("tess", {"length_penalty": 1.0}, "length_penalty belongs to the ar decoder"),
        ("ar", {"num_beams": 0}, "num_beams must be at least 1, got 0"),
        ("ar", {"length_penalty": 2.0}, "length_penalty 2.0 does nothing without several beams"),
        ("ar", {"num_beams": 1, "length_penalty": 2.0}, "does nothing without several beams"),
        ("ar", {"num_beams": 2, "length_penalty": float("nan")}, "must be a finite number"),
    ],
)
def test_what_cannot_be_meant_is_refused(folder, decoder, options, message):
    with pytest.raises(UserError, match=message):
        load_decoder(folder, decoder, **options)


def test_sampling_is_refused_with_beams(folder):
    with pytest.raises(UserError, match="top_p samples and num_beams 2 searches"):
        load_decoder(folder, "ar", num_beams=2).generate(TEXTS[:1], top_p=0.9)


def test_the_flags_reach_the_search_and_the_report(folder, tmp_path, capsys):
    flags = ("--checkpoint", folder, "--decoder", "ar", "--num_beams", 4, "--length_penalty", 0.0)
    want = BeamDecoder(parts(), 4, 0.0).generate(TEXTS)
    generate.main([*TEXTS, *map(str, flags), "--json"])
    results = json.loads(capsys.readouterr().out)["results"]
    assert [(r["text"], r["nfe"]) for r in results] == [(g.text, g.nfe) for g in want]
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"source": t, "target": "a"}) + "\n" for t in TEXTS))
    out = ("--output_dir", tmp_path / "out")
    evaluate.main(list(map(str, ("--data", rows, *flags, *out))))
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["num_beams"], report["length_penalty"]) == (4, 0.0)
    assert report["nfe_mean"] == sum(g.nfe for g in want) / len(want)
    assert "| beams | 4, length penalty 0 |" in (tmp_path / "out" / "report.md").read_text()
