"""What a causal model reads: an end behind the source if it was trained here, else the text."""

import json
import shutil

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

from tess.backbones.causal_lm import HybridForCausalLM
from tess.backbones.config import HybridConfig
from tess.backbones.released import save_released
from tess.commands.generate import main
from tess.decoders.load import load_decoder, make_decoder
from tess.errors import UserError
from tess.storage.conversion import causal_to_tess, tess_to_causal
from tess.storage.parts import Parts, load_parts, save_parts
from tess.text.tokenization import encode_texts, train_tokenizer

TEXTS = ["a cat", "the dog ran after the cat", "naïve 東京", "it spells </s> and <s>"]
SIZES = {
    "hybrid_override_pattern": "M*-", "hidden_size": 32, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "intermediate_size": 32, "ssm_state_size": 8,
    "mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 1, "chunk_size": 8,
    "initializer_range": 0.3,
}
TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant:{% endif %}"
)


def causal(**fields):
    torch.manual_seed(0)
    tokenizer = train_tokenizer(TEXTS * 3, 275)
    model = HybridForCausalLM(HybridConfig(**SIZES, vocab_size=275, **fields)).eval()
    model.generation_config.max_new_tokens = 10
    return Parts(model, tokenizer)


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    folder = tmp_path_factory.mktemp("released")
    parts = causal(eos_after_source=False)
    save_released(parts.model, folder)
    parts.tokenizer.chat_template = TEMPLATE
    parts.tokenizer.save_pretrained(folder)
    return folder


def with_processor(folder, target, template):
    """The folder with a tokenizer whose own layout is `template`."""
    shutil.copytree(folder, target)
    tokenizer = AutoTokenizer.from_pretrained(target)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=template, special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    tokenizer.save_pretrained(target)
    return target


@pytest.mark.parametrize("layout", ["$A", "<s> $A", "<s> $A </s>", "$A </s>"])
def test_a_released_text_is_read_as_its_tokenizer_has_it_but_for_an_end(released, tmp_path, layout):
    folder = with_processor(released, tmp_path / "folder", layout)
    decoder = load_decoder(folder)
    rows = decoder.encode(TEXTS).rows
    bare = encode_texts(decoder.tokenizer, TEXTS)
    assert rows == [([1] if "<s>" in layout else []) + ids for ids in bare]


def test_a_released_folder_writes_what_transformers_writes(released, tmp_path):
    folder = with_processor(released, tmp_path / "folder", "<s> $A")
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text, ours in zip(TEXTS[:3], load_decoder(folder).generate(TEXTS[:3], batch_size=2)):
        read = tokenizer(text, return_tensors="pt")
        ids = model.generate(**read, do_sample=False)[0, read["input_ids"].shape[1] :]
        assert ours.text == tokenizer.decode(ids, skip_special_tokens=True)


def closed(folder):
    rows = load_decoder(folder, "ar").encode(TEXTS).rows
    assert len({row[-1] == 2 for row in rows}) == 1
    return rows[0][-1] == 2


def test_what_was_trained_here_keeps_the_end_of_its_sources(released, tmp_path):
    assert not closed(released)
    save_parts(causal(), tmp_path / "ours")
    assert closed(tmp_path / "ours")
    path = tmp_path / "ours" / "config.json"
    fields = json.loads(path.read_text())
    assert fields.pop("eos_after_source", True) is True
    path.write_text(json.dumps(fields))  # as older checkpoints are
    assert closed(tmp_path / "ours")
    tess_to_causal(tmp_path / "ours", tmp_path / "exported")
    assert json.loads((tmp_path / "exported" / "config.json").read_text())["eos_after_source"]
    assert closed(tmp_path / "exported")
    save_parts(load_parts(released), tmp_path / "copied")
    assert not closed(tmp_path / "copied")
    causal_to_tess(released, tmp_path / "tess")
    tess_to_causal(tmp_path / "tess", tmp_path / "back")
    assert not closed(tmp_path / "back")
    assert "eos_after_source" not in json.loads((tmp_path / "back" / "config.json").read_text())


def test_a_chat_is_laid_out_by_the_tokenizers_template(released):
    decoder = load_decoder(released, chat=True)
    want = decoder.tokenizer.apply_chat_template(
        [{"role": "user", "content": TEXTS[1]}], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    assert decoder.encode([TEXTS[1]]).rows == [want]
    assert want[0] == 1 and want[-1] != 2 and want.count(1) == 2
    for options in ({"num_beams": 2}, {}):
        (text,) = load_decoder(released, chat=True, **options).generate([TEXTS[1]])
        (same,) = load_decoder(released, **options).generate_ids([want])
        assert text == same
    decoder.tokenizer.model_max_length = len(want) - 1
    with pytest.raises(UserError, match=rf"has {len(want)} tokens and the model takes"):
        decoder.generate([TEXTS[1]])


def test_the_chat_flag_writes_what_python_does(released, capsys):
    main([TEXTS[0], "--checkpoint", str(released), "--decoder", "ar", "--chat", "--json"])
    (text,) = load_decoder(released, chat=True).generate([TEXTS[0]])
    assert json.loads(capsys.readouterr().out)["results"][0]["text"] == text.text


def test_a_chat_that_cannot_be_laid_out_is_one_sentence(released, tmp_path):
    save_parts(causal(), tmp_path / "ours")
    with pytest.raises(UserError, match="has no chat template, which chat needs"):
        load_decoder(tmp_path / "ours", chat=True)
    parts = load_parts(released)
    parts.tokenizer.chat_template = "{{ raise_exception('only poems') }}"
    with pytest.raises(UserError, match="cannot be filled: only poems") as caught:
        make_decoder(parts, chat=True).generate(["a cat"])
    assert "\n" not in str(caught.value)
    causal_to_tess(released, tmp_path / "tess")
    with pytest.raises(UserError, match="chat belongs to the ar decoders, and this one is tess"):
        load_decoder(tmp_path / "tess", chat=True)


def test_a_text_that_is_too_long_loses_its_end_and_nothing_else(released, caplog):
    decoder = load_decoder(released)
    whole = decoder.encode([TEXTS[1]]).rows[0]
    decoder.tokenizer.model_max_length = 6
    read = decoder.encode([TEXTS[1]])
    assert read.rows == [whole[:6]] and read.num_cut == 1
    assert "cut off" in caplog.text
