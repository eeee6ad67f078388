"""The mapping in a settings file: one value for each key, and text in any encoding that says so."""

import json

import pytest

from tess.errors import UserError
from tess.options import read_config

TWICE = {
    "a.yaml": ("lr: 1\nother:\n  lr: 3\nlr: 2\n", "line 4: the key 'lr' is there twice, first on "),
    "b.yaml": ("stages:\n- name: x\n  name: y\n", "line 3: the key 'name'"),
    "c.yaml": ("{a: 1, 'a': 2}\n", "line 1: the key 'a'"),
    "a.json": ('{\n\t"lr":1,\n\t"other": {"lr": 3},\n\t"lr": 2\n}', "line 4: the key 'lr'"),
    "b.json": ('[{"a": 1,\n"a": 2}]', "line 2: the key 'a'"),
    "c.json": ('{"a": "\x7f",\n"a": 2}', "the key 'a' is there twice"),  # no YAML: without a line
}


@pytest.mark.parametrize("name", TWICE)
def test_a_key_that_stands_twice_is_refused_with_its_line(tmp_path, name):
    text, message = TWICE[name]
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError) as error:
        read_config(tmp_path / name)
    assert str(error.value).startswith(f"{tmp_path / name}, {message}")


def test_keys_of_a_merged_mapping_are_not_there_twice(tmp_path):
    text = "base: &b {a: 1, b: 2}\nmore: &more\n  <<: *b\n  a: 3\nmost:\n  <<: *more\n  b: 4\n"
    (tmp_path / "a.yaml").write_text(text)
    config = read_config(tmp_path / "a.yaml")
    assert config["more"] == {"a": 3, "b": 2} and config["most"] == {"a": 3, "b": 4}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_settings_are_read_in_every_encoding_that_a_byte_order_mark_names(tmp_path, encoding):
    (tmp_path / "a.yaml").write_bytes("name: é\nseeds: [1]\n".encode(encoding))
    (tmp_path / "a.json").write_bytes(json.dumps({"name": "é", "seeds": [1]}).encode(encoding))
    for name in ("a.yaml", "a.json"):
        assert read_config(tmp_path / name) == {"name": "é", "seeds": [1]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4\n", "Git LFS pointer"),
        (b"a: 1\nb: \xff\n", "line 2: expected UTF-8 text"),
        (b"a: 1\nb: \x00\n", "line 2: expected text, found a zero byte"),
        (b"a: [1\nb: 2\n", "is not readable: "),
        (b"- a\n", "expected a mapping of settings, found list"),
        (b"", "expected a mapping of settings, found NoneType"),
    ],
)
def test_settings_that_cannot_be_read_are_one_line_with_the_name_of_the_file(
    tmp_path, content, message
):
    (tmp_path / "a.yaml").write_bytes(content)
    with pytest.raises(UserError) as error:
        read_config(tmp_path / "a.yaml")
    text = str(error.value)
    assert message in text and "a.yaml" in text and "\n" not in text
