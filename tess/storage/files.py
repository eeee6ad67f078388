"""Files and folders that are written whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from safetensors import SafetensorError

from tess.errors import UserError


def prepare_output_dir(path: str | Path) -> Path:
    """Make the folder before the long run, so that an impossible one fails at once."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"cannot write to output folder {str(folder)!r}: {error}") from error
    return folder


def check_writable(path: Path) -> None:
    """Refuse before the work what `write_atomically` could not write.

    Raises:
        UserError: a folder, a device, a missing folder, or one that takes no new file.
    """
    if path.exists() and not path.is_file():
        raise UserError(f"cannot write {path}: expected the name of a file")
    temporary = _temporary(path)
    try:
        temporary.touch()
        temporary.unlink()
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def write_atomically(path: Path, text: str) -> None:
    """Write UTF-8 text through a temporary file in the same folder and `os.replace`."""
    temporary = _temporary(path)
    try:
        with open(temporary, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # gone already unless something failed


OWN_FILES = (
    "model_index.json config.json *_config.json generation_config.json processor_config.json "
    "model*.safetensors model*.safetensors.index.json average.safetensors "
    "timestep_density.safetensors place.json trainer_state.json training_args.bin optimizer.* "
    "scheduler.pt scaler.pt rng_state*.pth pytorch_model_fsdp* __*.distcp .metadata "
    "tokenizer.json special_tokens_map.json added_tokens.json vocab.* merges.txt *.model "
    "chat_template.* *.jinja"
).split()
"""Names of the files in a checkpoint: ours, and those of transformers, diffusers and accelerate."""


def check_replaceable(folder: Path) -> None:
    """What a folder holds goes when it is replaced, so that may be a checkpoint and nothing else.

    Raises:
        UserError: it is a file, or holds one that no checkpoint has; it names that file.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; expected a folder to write, or none yet")
    for path in sorted(folder.rglob("*")):
        if not path.is_dir() and not any(fnmatch(path.name, name) for name in OWN_FILES):
            raise UserError(
                f"{folder} holds something else than a checkpoint, which writing there would "
                f"delete: {path.relative_to(folder)}; move it, or name another folder"
            )


@contextmanager
def replaced_folder(final: Path, keeps_all: bool = False) -> Iterator[Path]:
    """A temporary folder that becomes `final` when the block ends without an error.

    Until then whatever was in `final` stays as it is; after an error the temporary folder is gone.
    What an earlier process, killed in mid-replacement, had moved aside is put back first.

    keeps_all: the block copies what `final` holds, so that it may be anything.

    Raises:
        UserError: when the disk refuses (full, read-only), or `check_replaceable` does.
    """
    _put_back(final.parent / ".saving")
    if not keeps_all:
        check_replaceable(final)
    temporary = final.parent / ".saving" / final.name
    old = final.parent / ".saving" / f"{final.name}.old"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        shutil.rmtree(old, ignore_errors=True)
        if final.exists():
            final.rename(old)
        temporary.rename(final)
    except BaseException as error:
        if old.exists() and not final.exists():
            old.rename(final)
        if _is_disk_error(error):
            reason = " ".join(str(error).split())
            raise UserError(
                f"could not save {final} ({reason}); earlier checkpoints are untouched"
            ) from error
        raise
    finally:
        shutil.rmtree(final.parent / ".saving", ignore_errors=True)


def _put_back(saving: Path) -> None:
    for old in saving.glob("*.old"):
        home = saving.parent / old.name.removesuffix(".old")
        if not home.exists():
            old.rename(home)


def _is_disk_error(error: BaseException) -> bool:
    # torch.save reports a failed write as a RuntimeError of its zip writer, safetensors by a class
    # of its own.
    zip_writer = isinstance(error, RuntimeError) and any(
        words in str(error)
        for words in ("PytorchStreamWriter", "inline_container", "No space left")
    )
    return isinstance(error, OSError | SafetensorError) or zip_writer
