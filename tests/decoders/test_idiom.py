"""The shipped folders through transformers' own doors, as its users open any other model."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tess.backbones.causal_lm import HybridForCausalLM
from tess.decoders.load import load_decoder
from tess.text.tokenization import encode_sources, encode_texts, load_tokenizer, train_tokenizer

SHIPPED = Path(__file__).parents[2] / "checkpoints" / "default"
TEXTS = [
    "How do I learn to speak French fast?",
    "Although the weather was really very bad, they decided to go out for a long walk.",
]


@pytest.mark.parametrize("rows", [1, 2])
def test_auto_classes_and_generate_give_the_texts_of_the_ar_decoder(rows):
    texts = TEXTS[:rows]
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED / "ar")
    model = AutoModelForCausalLM.from_pretrained(SHIPPED / "ar", dtype=torch.float32)
    assert isinstance(model, HybridForCausalLM)
    inputs = tokenizer(texts, return_tensors="pt", padding=True)
    new = model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
    want = [text.text for text in load_decoder(SHIPPED, "ar").generate(texts)]
    assert tokenizer.batch_decode(new, skip_special_tokens=True) == want and all(want)


@pytest.mark.parametrize("place", ["ar", "tess/tokenizer", "trained", "trained and saved"])
def test_a_plain_call_of_a_tokenizer_is_the_layout_of_a_source_and_ours_adds_nothing_twice(
    place, tmp_path
):
    if place.startswith("trained"):
        tokenizer = train_tokenizer(TEXTS, 300)
        if place.endswith("saved"):
            tokenizer.save_pretrained(tmp_path)
            tokenizer = load_tokenizer(tmp_path)
    else:
        tokenizer = load_tokenizer(SHIPPED / place)
    assert tokenizer(TEXTS)["input_ids"] == encode_sources(tokenizer, TEXTS)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    for ids in encode_sources(tokenizer, TEXTS):
        assert ids.count(bos) == ids.count(eos) == 1
    assert not {bos, eos} & set(sum(encode_texts(tokenizer, TEXTS), []))
    assert set(tokenizer(TEXTS, padding=True)) == {"input_ids", "attention_mask"}
    assert tokenizer(TEXTS, padding=True)["attention_mask"][0][0] == 0  # the shorter: on the left


def test_a_tokenizer_saved_before_it_had_the_layout_is_read_as_before():
    tokenizer = load_tokenizer(SHIPPED / "ar")
    want = encode_sources(tokenizer, TEXTS)
    tokenizer.backend_tokenizer.post_processor = None
    assert tokenizer(TEXTS)["input_ids"] == encode_texts(tokenizer, TEXTS)
    assert encode_sources(tokenizer, TEXTS) == want
