"""A released folder stops at every end token it names, as transformers' own `generate` does."""

import json
import logging
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, NemotronHConfig, NemotronHForCausalLM

from tess.backbones.causal_lm import HybridForCausalLM
from tess.backbones.config import HybridConfig
from tess.config import TessConfig
from tess.decoders.autoregressive import ArDecoder, ArMtpDecoder
from tess.decoders.beam_search import BeamDecoder
from tess.decoders.diffusion import TessDecoder
from tess.decoders.load import load_decoder
from tess.decoders.options import SamplerOptions
from tess.decoders.verified import DraftVerifyDecoder
from tess.denoiser import TessDenoiser
from tess.errors import UserError
from tess.schedulers.renoising import RenoisingScheduler
from tess.storage.parts import Parts, load_parts, own_fields, save_parts
from tess.text.end_tokens import end_tokens
from tess.text.tokenization import train_tokenizer

TEXTS = ["a cat", "the dog ran after the cat", "naïve 東京", "a cat sat on the mat"]
ROWS = [[70, 71, 72], [80, 81, 82, 83, 84], [90, 91], [100, 101, 102, 103]]
SIZES = {
    "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
    "intermediate_size": 32, "ssm_state_size": 8, "mamba_num_heads": 4, "mamba_head_dim": 16,
    "n_groups": 1, "chunk_size": 8, "initializer_range": 0.3,
}
LENGTH, SURPLUS = 14, 9


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A folder as transformers writes it: no pad and no bos token, nine rows more than tokens."""
    folder = tmp_path_factory.mktemp("released")
    tokenizer = train_tokenizer(TEXTS * 3, 270)
    tokenizer.pad_token = tokenizer.bos_token = None
    torch.manual_seed(0)
    config = NemotronHConfig(
        **SIZES, vocab_size=len(tokenizer) + SURPLUS,
        layers_block_type=["mamba", "attention", "mlp"],
    )
    model = NemotronHForCausalLM(config)
    with torch.no_grad():  # what no token stands for would be the likeliest of all
        model.lm_head.weight[len(tokenizer) :] *= 3
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def oracle(folder, ends, rows=ROWS, **options):
    """transformers' own texts, each by itself, through the first end token."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    size = model.config.vocab_size
    texts = []
    for row in rows:
        ids = model.generate(
            torch.tensor([row]), max_new_tokens=LENGTH, do_sample=False, pad_token_id=0,
            eos_token_id=ends, suppress_tokens=list(range(size - SURPLUS, size)), **options,
        )
        texts.append(ids[0, len(row) :].tolist())
    return texts


@pytest.fixture(scope="module")
def two_ends(released, tmp_path_factory):
    """(folder, [2, a, b]): the model writes a and b early in two of the texts."""
    free = oracle(released, 2)
    first = free[0][3]
    second = next(t for t in free[1][4:] if t != first and t not in free[1][:4])
    folder = tmp_path_factory.mktemp("two") / "ends"
    shutil.copytree(released, folder)
    edit(folder / "config.json", eos_token_id=[2, first])
    edit(folder / "generation_config.json", eos_token_id=[second])
    return folder, [2, first, second]


def written(decoder, rows=ROWS, **options):
    return [g.token_ids for g in decoder.generate_ids(rows, gen_length=LENGTH, **options)]


def test_ar_stops_at_every_end_token_as_transformers_does(two_ends):
    folder, ends = two_ends
    decoder = load_decoder(folder, "ar")
    assert set(end_tokens(decoder.tokenizer)) == set(ends)
    want = oracle(folder, ends)
    assert {text[-1] for text in want} >= set(ends[1:])  # both do end texts
    assert written(decoder) == want
    calls = []
    hook = decoder.model.backbone.register_forward_hook(lambda *_: calls.append(1))
    written(decoder, batch_size=1)
    hook.remove()
    assert len(calls) == sum(map(len, want))  # it stops there, and does not only cut
    for text in decoder.generate_ids(ROWS, gen_length=LENGTH):
        assert text.text == decoder.tokenizer.decode(
            [t for t in text.token_ids if t not in ends], skip_special_tokens=True
        )


def test_the_end_token_that_only_the_tokenizer_names_ends_texts_too(two_ends, tmp_path):
    folder, (_, first, second) = two_ends
    shutil.copytree(folder, tmp_path / "own")
    edit(tmp_path / "own" / "config.json", eos_token_id=2)
    tokenizer = load_parts(folder).tokenizer
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(first)
    tokenizer.save_pretrained(tmp_path / "own")
    assert written(load_decoder(tmp_path / "own")) == oracle(folder, [2, first, second])


def test_beams_stop_at_every_end_token_as_transformers_does(two_ends):
    folder, ends = two_ends
    decoder = load_decoder(folder, "ar", num_beams=3)
    assert isinstance(decoder, BeamDecoder)
    assert written(decoder) == oracle(folder, ends, num_beams=3, length_penalty=1.0)


def with_predictor(parts):
    fields = own_fields(parts.model.config)
    fields |= {"num_nextn_predict_layers": 1, "mtp_hybrid_override_pattern": "*"}
    torch.manual_seed(4)
    model = HybridForCausalLM(HybridConfig(**fields))
    model.load_state_dict(parts.model.state_dict(), strict=False)
    model.generation_config = parts.model.generation_config
    return Parts(model, parts.tokenizer)


def denoiser_of(parts):
    torch.manual_seed(1)
    backbone = HybridConfig(**own_fields(parts.model.config))
    config = TessConfig(backbone_config=backbone, max_target_length=LENGTH)
    scheduler = RenoisingScheduler(vocab_size=config.vocab_size, simplex_value=config.simplex_value)
    return Parts(TessDenoiser(config), parts.tokenizer, scheduler)


def test_drafts_of_either_kind_change_no_text_of_a_released_folder(two_ends, tmp_path):
    folder, ends = two_ends
    want = oracle(folder, ends)
    save_parts(with_predictor(load_parts(folder)), tmp_path)
    assert written(load_decoder(tmp_path, "ar+mtp", num_draft_tokens=3), batch_size=3) == want
    parts = load_parts(folder)
    for redraft in ("suffix", "diffusion"):
        drafted = DraftVerifyDecoder(denoiser_of(parts), load_parts(folder), redraft=redraft)
        assert written(drafted, batch_size=3) == want


@pytest.mark.parametrize("options", [
    {}, {"scheduler": "ddim"}, {"num_candidates": 3}, {"block_length": 5}, {"guidance_scale": 2.0},
    {"confidence_threshold": 0.2}, {"scheduler": "ddim", "noise": "dense"},
], ids=str)
@pytest.mark.parametrize("top_p", [None, 0.99])
def test_tess_cuts_at_every_end_token_and_writes_no_surplus_row(released, options, top_p):
    parts = denoiser_of(load_parts(released))
    with torch.no_grad():
        parts.model.backbone.embeddings.weight[-SURPLUS:] *= 3
        parts.model.head_weight()[-SURPLUS:] *= 3
    parts.model.config.backbone_config.eos_token_id = [2, *range(100, 200)]
    decoder = TessDecoder(parts, SamplerOptions(**options))
    ends, size = set(end_tokens(parts.tokenizer)), parts.model.config.vocab_size
    assert ends == {2, *range(100, 200)}
    texts = decoder.generate_ids(ROWS, gen_length=LENGTH, num_inference_steps=3, top_p=top_p)
    assert any(text.token_ids[-1] in ends for text in texts)
    if "block_length" in options:  # three blocks of three steps, unless the text has ended
        assert min(text.nfe for text in texts if text.token_ids[-1] in ends - {2}) < 9
    for text in texts:
        assert ends.isdisjoint(text.token_ids[:-1])
        assert max(text.token_ids) < size - SURPLUS


def test_sampled_ar_texts_have_no_surplus_row(released):
    texts = written(load_decoder(released), top_p=1.0, temperature=5.0)
    size = load_parts(released).model.config.vocab_size
    assert max(max(text) for text in texts) < size - SURPLUS


SETTINGS = {
    "repetition_penalty": 1.7, "no_repeat_ngram_size": 2, "num_beams": 4, "do_sample": True,
    "temperature": 0.6, "top_p": 0.95, "use_cache": False, "max_new_tokens": LENGTH,
}


def test_generation_settings_are_honoured_or_ignored_and_both_are_said(released, tmp_path, caplog):
    shutil.copytree(released, tmp_path / "a")
    edit(tmp_path / "a" / "generation_config.json", **SETTINGS)
    with caplog.at_level(logging.WARNING):
        decoder = load_decoder(tmp_path / "a")
    said = [r.getMessage() for r in caplog.records if "generation_config.json" in r.getMessage()]
    assert len(said) == 1
    honoured, *ignored = said[0].split("; ")
    assert honoured.startswith("no_repeat_ngram_size=2, repetition_penalty=1.7 from") or (
        honoured.startswith("repetition_penalty=1.7, no_repeat_ngram_size=2 from")
    )
    for name in ("num_beams=4", "do_sample=True", "temperature=0.6", "top_p=0.95", "use_cache=F"):
        assert any(name in part and "is ignored" in part for part in ignored)
    assert decoder.settings.report() == {
        "honoured": {"repetition_penalty": 1.7, "no_repeat_ngram_size": 2},
        "ignored": {
            name: SETTINGS[name]
            for name in ("num_beams", "do_sample", "temperature", "top_p", "use_cache")
        },
    }
    want = oracle(released, 2, repetition_penalty=1.7, no_repeat_ngram_size=2)
    assert want != oracle(released, 2)
    assert [g.token_ids for g in decoder.generate_ids(ROWS)] == want
    assert decoder.model.generation_config.num_beams == 4  # and is saved again


@pytest.mark.parametrize(("settings", "message"), [
    ({"repetition_penalty": -1.0}, r"repetition_penalty=-1.0 from gen.* cannot be honoured: "),
    ({"stop_strings": [1]}, r"stop_strings=\[1\] from gen.* cannot be honoured"),
    ({"eos_token_id": ["2"]}, r"eos_token_id must be a number or a list of numbers, got \['2'\]"),
])
def test_a_setting_that_cannot_be_honoured_is_one_sentence(released, tmp_path, settings, message):
    shutil.copytree(released, tmp_path / "a")
    edit(tmp_path / "a" / "generation_config.json", **settings)
    with pytest.raises(UserError, match=message) as caught:
        load_decoder(tmp_path / "a").generate(["a cat"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [0, -1, "long"])
def test_a_longest_source_that_is_none_is_one_sentence(released, value):
    decoder = load_decoder(released)
    decoder.tokenizer.model_max_length = value
    with pytest.raises(UserError, match=f"must be a number of at least 1, got {value!r}"):
        decoder.generate(["a cat"])


def test_a_folder_trained_here_says_nothing_of_its_generation_settings(released, tmp_path, caplog):
    parts = load_parts(released)
    parts.model.generation_config.max_new_tokens = 12
    save_parts(parts, tmp_path)
    decoder = load_decoder(tmp_path)
    assert decoder.settings.report() is None and not caplog.records


@pytest.mark.parametrize("name", ["ar", "beams", "ar+mtp", "tess+ar"])
def test_a_stop_string_ends_texts_as_in_transformers(released, name):
    parts = load_parts(released)
    free = oracle(released, 2)
    string = parts.tokenizer.decode(free[0][5:7])
    options = {"num_beams": 3, "length_penalty": 1.0} if name == "beams" else {}
    want = oracle(released, 2, stop_strings=[string], tokenizer=parts.tokenizer, **options)
    if name != "beams":
        assert len(want[0]) <= 7
    parts.model.generation_config.stop_strings = [string]
    if name == "ar+mtp":
        decoder = ArMtpDecoder(with_predictor(parts), 3)
    elif name == "tess+ar":
        decoder = DraftVerifyDecoder(denoiser_of(load_parts(released)), parts)
    else:
        decoder = ArDecoder(parts) if name == "ar" else BeamDecoder(parts, 3)
    texts = decoder.generate_ids(ROWS, gen_length=LENGTH, batch_size=3)
    assert [text.token_ids for text in texts] == want
    if name == "ar":
        assert [text.nfe for text in texts] == [len(text) for text in want]
