"""Folders are replaced whole or not at all, and only where they hold a checkpoint."""

import pytest

from tess.errors import UserError
from tess.storage import files as saving


def test_a_failed_replacement_keeps_the_old_folder(tmp_path):
    final = tmp_path / "final"
    with saving.replaced_folder(final) as folder:
        (folder / "model.safetensors").write_text("old")
    with pytest.raises(UserError, match="No space left"):
        with saving.replaced_folder(final) as folder:
            (folder / "model.safetensors").write_text("ne")
            raise OSError(28, "No space left on device")
    assert (final / "model.safetensors").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


def test_a_folder_moved_aside_by_a_killed_process_comes_back(tmp_path):
    for name in ("final.old", "checkpoint-2"):
        (tmp_path / ".saving" / name).mkdir(parents=True)
    (tmp_path / ".saving" / "final.old" / "model.safetensors").write_text("old")
    with saving.replaced_folder(tmp_path / "checkpoint-4") as folder:
        (folder / "model.safetensors").write_text("new")
    assert (tmp_path / "final" / "model.safetensors").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-4", "final"]


@pytest.mark.parametrize("name", ["notes.txt", "denoiser/paper.pdf", ".gitignore"])
def test_a_file_that_no_checkpoint_has_is_never_deleted(tmp_path, name):
    final = tmp_path / "final"
    with saving.replaced_folder(final) as folder:
        (folder / "denoiser").mkdir()
        (folder / "denoiser" / "model.safetensors").write_text("old")
    (final / name).write_text("mine")
    with pytest.raises(UserError, match=f"something else than a checkpoint, .*: {name};"):
        with saving.replaced_folder(final) as folder:
            (folder / "model_index.json").write_text("new")
    assert (final / name).read_text() == "mine"
    assert (final / "denoiser" / "model.safetensors").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["final"]
