"""What a released folder says of its tokens is read together, kept, and comes back."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from tess.backbones.causal_lm import HybridForCausalLM
from tess.backbones.config import HybridConfig
from tess.backbones.released import save_released
from tess.config import TessConfig
from tess.data.collators import Collator
from tess.denoiser import TessDenoiser
from tess.errors import UserError
from tess.pipeline import TessPipeline
from tess.schedulers.renoising import RenoisingScheduler
from tess.storage.conversion import causal_to_tess, tess_to_causal
from tess.storage.parts import Parts, load_parts, save_parts
from tess.text.end_tokens import end_tokens
from tess.text.tokenization import (
    encode_texts,
    fit_tokenizer,
    load_tokenizer,
    padding_ids,
    surplus_ids,
    train_tokenizer,
)
from tess.training.losses import tess_loss

TEXTS = ["a cat", "the dog ran after the cat", "naïve 東京", "a cat sat on the mat"]
SIZES = {
    "hybrid_override_pattern": "M*-", "hidden_size": 32, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "intermediate_size": 32, "ssm_state_size": 8,
    "mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 1, "chunk_size": 8,
}


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes, indent=1))


def fields(path):
    return json.loads(path.read_text())


@pytest.fixture
def released(tmp_path):
    """A released folder whose embedding has five rows more than the tokenizer ids."""
    folder = tmp_path / "released"
    torch.manual_seed(0)
    tokenizer = train_tokenizer(TEXTS * 3, 275)
    config = HybridConfig(**SIZES, vocab_size=280, eos_after_source=False)
    save_released(HybridForCausalLM(config), folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("of_tokenizer", "of_config", "of_generation", "want"),
    [
        ("</s>", 2, [2, 11], [2, 11]),
        ("</s>", [2, 11], 2, [2, 11]),
        ("</s>", 11, 2, [2, 11]),
        ("<mask>", 2, [11], [2, 4, 11]),
        ("<mask>", 2, None, [2, 4]),
        ("</s>", 2, 2, 2),
    ],
)
def test_every_place_of_end_tokens_counts_and_is_saved(
    released, tmp_path, of_tokenizer, of_config, of_generation, want
):
    edit(released / "tokenizer_config.json", eos_token=of_tokenizer)
    edit(released / "config.json", eos_token_id=of_config)
    edit(released / "generation_config.json", eos_token_id=of_generation)

    def ends(value):
        return sorted(value) if isinstance(value, list) else value

    parts = load_parts(released)
    ids = want if isinstance(want, list) else [want]
    assert sorted(end_tokens(parts.tokenizer)) == ids
    assert end_tokens(parts.tokenizer)[0] == parts.tokenizer.eos_token_id
    assert ends(parts.model.config.eos_token_id) == want
    save_parts(parts, tmp_path / "saved")
    causal_to_tess(released, tmp_path / "tess")
    assert sorted(end_tokens(load_parts(tmp_path / "tess").tokenizer)) == ids
    pipe = TessPipeline.from_pretrained(tmp_path / "tess")
    assert sorted(end_tokens(pipe.tokenizer)) == ids
    tess_to_causal(tmp_path / "tess", tmp_path / "back")
    for name in ("saved", "back"):
        assert ends(fields(tmp_path / name / "config.json")["eos_token_id"]) == want
        stored = fields(tmp_path / name / "generation_config.json").get("eos_token_id")
        assert ends(stored) == want or (of_generation is None and stored is None)


TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
                   "chat_template.jinja")


@pytest.mark.parametrize("to", ["tess", "released"])
def test_files_of_tokens_come_back_bit_for_bit(released, tmp_path, to):
    edit(released / "config.json", eos_token_id=[2, 11])
    edit(released / "generation_config.json", eos_token_id=[11, 2], temperature=0.6, top_p=0.95,
         do_sample=True, max_new_tokens=7, stop_strings=["\n\n"])
    edit(released / "tokenizer_config.json", pad_token=None, add_bos_token=False, extra={"a": 1})
    (released / "special_tokens_map.json").write_text('{"eos_token":   "</s>"}')
    (released / "chat_template.jinja").write_text("{{ messages }}")
    between = tmp_path / "between"
    if to == "tess":
        causal_to_tess(released, between)
        TessPipeline.from_pretrained(between)
    else:
        tess_to_causal(released, between)
    tess_to_causal(between, tmp_path / "back")
    for name in (*TOKENIZER_FILES, "generation_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (released / name).read_bytes(), name
    assert fields(tmp_path / "back" / "config.json") == fields(released / "config.json")


@pytest.mark.parametrize(("of_config", "pad", "is_padding"), [
    (0, 0, True), (3, 3, True), (40, 40, False), (277, 2, False), (None, 2, False),
])
def test_a_missing_pad_token_is_the_configs(released, tmp_path, of_config, pad, is_padding):
    edit(released / "tokenizer_config.json", pad_token=None)
    edit(released / "config.json", pad_token_id=of_config)
    tokenizer = load_parts(released).tokenizer
    assert tokenizer.pad_token_id == pad
    # an end token, or an ordinary word, is not taken out of texts
    assert padding_ids(tokenizer) == ({pad} if is_padding else set())
    causal_to_tess(released, tmp_path / "tess")
    assert TessPipeline.from_pretrained(tmp_path / "tess").tokenizer.pad_token_id == pad


def test_a_missing_end_token_is_the_configs(released):
    edit(released / "tokenizer_config.json", eos_token=None)
    edit(released / "config.json", eos_token_id=[4, 2])
    tokenizer = load_parts(released).tokenizer
    assert tokenizer.eos_token_id == 4 and set(end_tokens(tokenizer)) == {2, 4}
    edit(released / "config.json", eos_token_id=None)
    edit(released / "generation_config.json", eos_token_id=None)
    with pytest.raises(UserError, match="has no eos_token, which every text needs"):
        load_parts(released)


def test_holes_and_rows_behind_the_last_token_are_surplus_and_more_ids_than_rows_are_refused(
    released,
):
    config = HybridConfig(**SIZES, vocab_size=280)
    tokenizer = load_tokenizer(released, config)
    assert surplus_ids(tokenizer, 280) == list(range(len(tokenizer), 280))
    raw = fields(released / "tokenizer.json")
    token = dict(raw["added_tokens"][-1], content="<far>", id=278)
    raw["added_tokens"].append(token)
    (released / "tokenizer.json").write_text(json.dumps(raw))
    far = load_tokenizer(released, config)
    last = far.convert_tokens_to_ids("<far>")
    assert last not in surplus_ids(far, 280) and 279 in surplus_ids(far, 280)
    with pytest.raises(UserError, match=rf"{last + 1} ids and the model's vocab_size is {last}"):
        load_tokenizer(released, HybridConfig(**SIZES, vocab_size=last))


def test_the_length_head_learns_whichever_end_token_closes_the_targets(released):
    """The config's end token is another than the tokenizer's, as in released chat models."""
    torch.manual_seed(0)
    backbone = HybridConfig(**SIZES, vocab_size=280, eos_token_id=[4, 2])
    denoiser = TessDenoiser(TessConfig(backbone_config=backbone, length_head=True))
    tokenizer = load_tokenizer(released, backbone)
    rows = [
        {"source": ids, "target": ids, "seed": 0} for ids in encode_texts(tokenizer, TEXTS)
    ]
    batch = Collator(tokenizer, max_source_length=32, max_target_length=32)(rows)
    assert set(end_tokens(tokenizer)) == {2, 4}
    assert learns(denoiser, batch)
    backbone.eos_token_id = 4  # what went unnoticed: no target ends
    assert not learns(denoiser, batch)


def learns(denoiser, batch):
    denoiser.zero_grad()
    scheduler = RenoisingScheduler(
        vocab_size=280, simplex_value=denoiser.config.simplex_value
    )
    tess_loss(denoiser, scheduler, batch, length_loss_weight=1.0).backward()
    return bool(denoiser.length_head.outer.weight.grad.any())


def test_a_pipeline_whose_config_lacks_the_tokenizers_end_token_learns_it_when_loaded(
    released, tmp_path
):
    causal_to_tess(released, tmp_path / "tess")
    path = tmp_path / "tess" / "denoiser" / "config.json"
    own = fields(path)
    own["backbone_config"]["eos_token_id"] = 4
    path.write_text(json.dumps(own))
    parts = load_parts(tmp_path / "tess")
    assert set(parts.model.config.backbone_config.eos_token_id) == {2, 4}
    scheduler, tokenizer = parts.scheduler, parts.tokenizer
    pipe = TessPipeline(denoiser=parts.model, scheduler=scheduler, tokenizer=tokenizer)
    save_parts(Parts(pipe.denoiser, tokenizer, scheduler), tmp_path / "again")
    again = fields(tmp_path / "again" / "denoiser" / "config.json")
    assert set(again["backbone_config"]["eos_token_id"]) == {2, 4}


@pytest.mark.parametrize(("file", "content"), [
    ("tokenizer.json", ""), ("tokenizer.json", "{}"), ("tokenizer.json", "\x00\x01"),
    ("tokenizer_config.json", "[]"), ("tokenizer_config.json", "{"), ("tokenizer.json", None),
    ("generation_config.json", "{"), ("generation_config.json", "[]"),
])
def test_a_broken_file_of_tokens_is_one_sentence_with_the_folder(released, file, content):
    path = released / file
    path.unlink()
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError) as caught:
        load_parts(released)
    assert "\n" not in str(caught.value) and str(released) in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("changes", [
    {"tokenizer_class": "NemotronTokenizer"}, {"tokenizer_class": None},
    {"model_max_length": 10**30}, {"model_max_length": -1}, {"add_bos_token": True},
    {"add_eos_token": True}, {"auto_map": {"AutoTokenizer": ["x.Y", None]}},
    {"tokenizer_class": "PreTrainedTokenizerFast"}, {"tokenizer_class": "LlamaTokenizerFast"},
], ids=str)
def test_odd_tokenizer_settings_give_the_same_ids_or_one_sentence(released, changes, request):
    want = encode_texts(load_parts(released).tokenizer, TEXTS)
    edit(released / "tokenizer_config.json", **changes)
    try:
        parts = load_parts(released)
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 500
    else:
        assert encode_texts(parts.tokenizer, TEXTS) == want


def test_fitting_twice_changes_nothing(released):
    parts = load_parts(released)
    before = end_tokens(parts.tokenizer), parts.tokenizer.pad_token_id
    fit_tokenizer(parts.tokenizer, parts.model.config, parts.model.generation_config)
    assert (end_tokens(parts.tokenizer), parts.tokenizer.pad_token_id) == before


def test_a_target_that_holds_other_files_is_never_emptied(released, tmp_path):
    causal_to_tess(released, tmp_path / "tess")
    note = tmp_path / "tess" / "notes.txt"
    note.write_text("mine")
    with pytest.raises(UserError, match="notes.txt"):
        causal_to_tess(released, tmp_path / "tess")
    assert note.read_text() == "mine" and Path(released).is_dir()
    shutil.rmtree(tmp_path / "tess")
