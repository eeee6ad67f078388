"""A causal checkpoint becomes a pipeline and comes back, and loses nothing on the way."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tess.backbones.cache import HybridCache
from tess.backbones.causal_lm import HybridForCausalLM
from tess.backbones.config import HybridConfig
from tess.backbones.released import load_released, save_released
from tess.commands.convert import main
from tess.decoders.load import load_decoder
from tess.errors import UserError
from tess.storage.conversion import causal_to_tess, tess_to_causal
from tess.storage.parts import Parts, load_parts, save_parts
from tess.text.tokenization import train_tokenizer
from tiny import DECODER

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "convert_checkpoint.py"
OPTIONS = DECODER | {
    "hybrid_override_pattern": "M*E-M", "n_routed_experts": 4, "num_experts_per_tok": 2,
    "tie_word_embeddings": False, "initializer_range": 0.3, "num_nextn_predict_layers": 1,
}


def script(*arguments):
    main([str(argument) for argument in arguments])


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def released(request, tmp_path_factory):
    """A folder in the released layout, with its tokenizer."""
    folder = tmp_path_factory.mktemp("released")
    torch.manual_seed(0)
    tokenizer = train_tokenizer(["the dog ran after the cat and the cat ran away"] * 3, 270)
    model = HybridForCausalLM(HybridConfig(**OPTIONS, vocab_size=len(tokenizer))).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(request.param)
    save_released(model, folder)
    tokenizer.save_pretrained(folder)
    return folder


@torch.no_grad()
def test_the_causal_function_inside_the_pipeline_is_the_same_to_the_last_bit(released, tmp_path):
    left_out = causal_to_tess(released, tmp_path / "tess", denoiser={"simplex_value": 4.0})
    assert left_out == ["the multi-token predictor (mtp.*)"]
    causal, parts = load_released(released), load_parts(tmp_path / "tess", dtype=None)
    denoiser = parts.model
    config = denoiser.config
    assert config.label_shift and config.source_encoding == "causal"
    assert config.backbone_config.mamba_direction == "gated"
    assert config.simplex_value == parts.scheduler.config.simplex_value == 4.0
    ids, mask = torch.randint(3, 270, (3, 11)), torch.ones(3, 11, dtype=torch.long)
    mask[1, :4] = 0
    caches = HybridCache(), HybridCache()
    want = causal(ids, attention_mask=mask, cache=caches[0], use_cache=True).logits
    hidden = denoiser.backbone(ids, attention_mask=mask, cache=caches[1])
    assert torch.equal(denoiser.lm_head(hidden.last_hidden_state).float(), want)
    for index, state in caches[0].layers.items():
        assert all(map(torch.equal, state, caches[1].layers[index]))
    gates = [t for name, t in denoiser.named_parameters() if name.endswith("reverse_gate")]
    assert len(gates) == 2 and not any(gate.any() for gate in gates)
    assert denoiser.time_embedding.weight.any()  # what is new is initialised, not left empty
    assert all(parameter.isfinite().all() for parameter in denoiser.parameters())


def test_there_and_back_changes_no_bit_of_the_weights(released, tmp_path):
    causal_to_tess(released, tmp_path / "tess")
    left_out = tess_to_causal(tmp_path / "tess", tmp_path / "back")
    assert "time_embedding.weight" in left_out
    assert sum(name.endswith("reverse_gate") for name in left_out) == 2
    before = load_file(released / "model.safetensors")
    after = load_file(tmp_path / "back" / "model.safetensors")
    kept = {name for name in before if not name.startswith("mtp.")}
    assert set(after) == kept
    for name in kept:
        assert after[name].dtype == before[name].dtype and torch.equal(after[name], before[name])
    fields = [
        json.loads((folder / "config.json").read_text()) for folder in (released, tmp_path / "back")
    ]
    assert fields[1] == fields[0] | {"num_nextn_predict_layers": 0}
    assert load_decoder(tmp_path / "back").generate(["the cat"])[0].num_new_tokens > 0


def test_the_pipeline_writes_and_the_released_folder_decodes_with_drafts(released, tmp_path):
    script(released, tmp_path / "tess", "--max_target_length", 12, "--dtype", "float32")
    text = load_decoder(tmp_path / "tess").generate(["the cat"], num_inference_steps=2)[0]
    assert text.nfe == 2 and text.num_new_tokens <= 12
    plain = load_decoder(released, "ar").generate(["the cat", "a dog ran"], gen_length=9)
    drafted = load_decoder(released, "ar+mtp").generate(["the cat", "a dog ran"], gen_length=9)
    assert [g.token_ids for g in drafted] == [g.token_ids for g in plain]


def test_a_folder_trained_here_is_converted_too(tmp_path, released, capsys):
    parts = load_parts(released)
    fields = {
        name: value for name, value in parts.model.config.to_dict().items() if name != "dtype"
    }
    model = HybridForCausalLM(HybridConfig(**fields | {"tie_word_embeddings": True}))
    save_parts(Parts(model, parts.tokenizer), tmp_path / "ar")
    script(tmp_path / "ar", tmp_path / "tess")
    script(tmp_path / "tess", tmp_path / "back", "--to", "released", "--expert_layout", "stacked")
    assert "left out" in capsys.readouterr().out
    back = load_released(tmp_path / "back", dtype=torch.float32).eval()
    ids = torch.randint(3, 270, (2, 9))
    model = load_parts(tmp_path / "ar").model
    assert torch.equal(back(ids).logits, model(ids).logits)
    script(tmp_path / "ar", tmp_path / "released", "--to", "released")
    again = load_released(tmp_path / "released", dtype=torch.float32)
    assert torch.equal(again(ids).logits, model(ids).logits) and again.mtp is not None


def test_a_stored_head_is_converted_whatever_the_config_says_about_tying(released, tmp_path):
    shutil.copytree(released, tmp_path / "says")
    path = tmp_path / "says" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": True}))
    causal_to_tess(tmp_path / "says", tmp_path / "tess")
    head = load_parts(tmp_path / "tess", dtype=None).model.lm_head.weight
    assert torch.equal(head, load_released(released).lm_head.weight)


def test_what_cannot_be_converted_is_one_sentence(released, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "keep.txt").write_text("")
    for arguments, message in (
        ((tmp_path, tmp_path / "out"), "is no causal checkpoint"),
        ((released, released), "holds the source .*, which writing it would delete"),
        ((released, released.parent), "holds the source"),
        ((released, tmp_path / "file"), "is a file; expected a folder"),
        ((released, tmp_path / "notes"), "holds something else than a checkpoint"),
        ((released, tmp_path / "notes", "--to", "released"), "holds something else"),
        ((released, tmp_path / "out", "--expert_layout", "stacked"), "goes with --to released"),
        ((released, tmp_path / "out", "--to", "released", "--dtype", "float32"), "--dtype goes"),
        ((released, tmp_path / "out", "--simplex_value", 0), "simplex_value must be above 0"),
        ((tmp_path, tmp_path / "out", "--to", "released"), "is not a checkpoint"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            script(*arguments)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    shutil.copytree(released, tmp_path / "bare")
    (tmp_path / "bare" / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="tokenizer"):
        script(tmp_path / "bare", tmp_path / "out")
    script(tmp_path / "bare", tmp_path / "out", "--tokenizer", released)
    shard = tmp_path / "bare" / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(UserError, match="model.safetensors is truncated"):
        script(tmp_path / "bare", tmp_path / "again", "--tokenizer", released)
