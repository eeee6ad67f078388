"""A checkpoint's place: a folder here, or a repository on the Hugging Face hub."""

import re
from pathlib import Path

from tess.errors import UserError

CONFIGS = ["*.json"]
CHECKPOINT = [*CONFIGS, "*.safetensors", "*.jinja", "*.txt", "*.model"]
"""What is downloaded: configs, weights and the tokenizer's files."""

_HUB_ID = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?")


def local_folder(name: str | Path, files: list[str] = CHECKPOINT) -> Path:
    """The folder of a checkpoint, downloaded first where `name` says so.

    Args:
        name: a folder, or as text a hub id, `owner/name` or `owner/name@revision`. A folder that is
            here goes before a hub id; a `Path`, `./NAME` and `/NAME` are always folders. Without a
            network, or with HF_HUB_OFFLINE=1, what the hub's cache has is taken.
        files: patterns of the files that are needed.

    Raises:
        UserError: no such folder, or a repository that is not there or cannot be reached.
    """
    if not str(name):
        raise UserError("expected a folder or a hub id, got an empty name")
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise UserError(f"expected the folder of a checkpoint, got the file {str(name)!r}")
    asked = _HUB_ID.fullmatch(name) if isinstance(name, str) else None
    if asked is None:
        raise UserError(f"there is no folder {str(name)!r}")
    return _downloaded(asked["id"], asked["revision"], files)


def _downloaded(repo_id: str, revision: str | None, files: list[str]) -> Path:
    from huggingface_hub import errors, snapshot_download

    try:
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=files))
    except Exception as error:  # a network has errors of many libraries
        why = " ".join(str(error).split()) or type(error).__name__
        for kind, reason in (
            (errors.LocalEntryNotFoundError, "it is not in the hub's cache, and no hub is reached"),
            (errors.GatedRepoError, "its owner gives access to those who log in and ask for it"),
            (errors.RepositoryNotFoundError, "the hub has no such repository, or it is private"),
            (errors.RevisionNotFoundError, f"it has no revision {revision!r}"),
        ):
            if isinstance(error, kind):
                why = reason
                break
        name = f"{repo_id}@{revision}" if revision else repo_id
        raise UserError(f"there is no folder {name!r} here, and none on the hub: {why}") from error
