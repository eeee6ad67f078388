"""Checkpoints with a file that is damaged as a whole: the error names the file and what it is."""

import shutil
from pathlib import Path

import pytest

from tess.backbones.damage import POINTER, fault_in
from tess.decoders.load import load_decoder
from tess.errors import UserError
from tess.storage.parts import load_parts
from tess.text.tokenization import load_tokenizer

SHIPPED = Path(__file__).parents[2] / "checkpoints" / "default"
FAULTS = {
    "pointer": (POINTER + b"v1\noid sha256:0\nsize 7\n", "is a Git LFS pointer, not the file"),
    "empty": (b"", "is empty"),
    "binary": (b"\x80\x81\xfe\xff" * 9, "is no JSON object, but binary"),
}


def refused(call, *arguments):
    with pytest.raises(UserError) as caught:
        call(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("kind", FAULTS)
@pytest.mark.parametrize(
    "name",
    [
        "ar/config.json", "ar/tokenizer.json", "ar/tokenizer_config.json", "ar/model.safetensors",
        "tess/model_index.json", "tess/denoiser/config.json", "tess/tokenizer/tokenizer.json",
        "tess/scheduler/scheduler_config.json", "tess/denoiser/model.safetensors",
    ],
)
def test_a_damaged_file_of_a_checkpoint_is_named_with_what_it_is(tmp_path, name, kind):
    content, fault = FAULTS[kind]
    shutil.copytree(SHIPPED, tmp_path, dirs_exist_ok=True)
    assert fault_in(tmp_path / "ar") is None and fault_in(tmp_path / "tess") is None
    (tmp_path / name).write_bytes(content)
    if kind == "binary" and name.endswith("safetensors"):
        fault = "is truncated or no safetensors file"
    model = name.split("/")[0]
    for message in (
        refused(load_parts, tmp_path / model),
        refused(load_decoder, tmp_path / model, model),
    ):
        assert f"{tmp_path / name} {fault}" in message


@pytest.mark.parametrize("kind", FAULTS)
def test_a_damaged_tokenizer_is_named_where_it_is_loaded_alone(tmp_path, kind):
    content, fault = FAULTS[kind]
    shutil.copytree(SHIPPED / "tess" / "tokenizer", tmp_path, dirs_exist_ok=True)
    (tmp_path / "tokenizer.json").write_bytes(content)
    assert f"{tmp_path / 'tokenizer.json'} {fault}" in refused(load_tokenizer, tmp_path)
