"""A checkpoint by folder or hub id: from a server on this machine, and from the hub's cache."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from tess.cli import checkpoint_or_default
from tess.errors import UserError
from tess.storage.hub import local_folder

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "checkpoints" / "default"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of the hub, offline, in an empty working folder."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "cache"


def put(cache: Path, repo_id: str, folder: Path, ref: str = "main") -> Path:
    """The repository in the cache as the hub's library lays it out."""
    place = cache / f"models--{repo_id.replace('/', '--')}"
    snapshot = place / "snapshots" / COMMIT
    for file in folder.rglob("*"):
        if file.is_file():
            blob = place / "blobs" / hashlib.sha1(file.read_bytes()).hexdigest()
            blob.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, blob)
            link = snapshot / file.relative_to(folder)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(blob)
    (place / "refs").mkdir()
    (place / "refs" / ref).write_text(COMMIT)
    return snapshot


def test_without_a_network_the_cache_of_the_hub_is_read(cache, capsys):
    from tess.commands import generate

    snapshot = put(cache, "owner/shipped", SHIPPED)
    assert local_folder("owner/shipped") == local_folder(f"owner/shipped@{COMMIT}") == snapshot
    texts = []
    for checkpoint in ("owner/shipped", str(SHIPPED)):
        generate.main(["The museum opened in 1920 .", "--json", "--checkpoint", checkpoint])
        shown = json.loads(capsys.readouterr().out)
        assert shown["checkpoint"] == checkpoint
        texts.append(shown["results"])
    assert texts[0] == texts[1]


def test_a_revision_is_the_one_that_was_asked_for(cache):
    snapshot = put(cache, "owner/shipped", SHIPPED, "v1")
    assert local_folder("owner/shipped@v1") == snapshot
    for name in ("owner/shipped", "owner/shipped@v2"):
        with pytest.raises(UserError, match=f"no folder '{name}' here, and none on the hub: it is"):
            local_folder(name)


def test_a_folder_goes_before_a_hub_id_and_a_path_is_never_one(cache):
    put(cache, "owner/shipped", SHIPPED)
    for name in (Path("owner/shipped"), "./owner/shipped", "/owner/shipped", "owner", "a/b/c"):
        with pytest.raises(UserError, match=f"^there is no folder '{str(name)}'$"):
            local_folder(name)
    Path("owner/shipped").mkdir(parents=True)
    for name in ("owner/shipped", "./owner/shipped", Path("owner/shipped")):
        assert local_folder(name) == Path("owner/shipped")
    Path("file").touch()
    with pytest.raises(UserError, match="expected the folder of a checkpoint, got the file 'file'"):
        local_folder("file")


@pytest.mark.parametrize("name", ["owner/not_there", "owner/not..there", "owner/not_there@v1"])
def test_a_repository_that_is_not_to_be_had_is_one_sentence(cache, name):
    with pytest.raises(UserError, match=f"^there is no folder '{name}' here, .*") as caught:
        local_folder(name)
    assert "\n" not in str(caught.value)


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as a download needs: one repository, and which files were fetched."""

    files = {path.name: path for path in (SHIPPED / "ar").iterdir()} | {
        "pytorch_model.bin": SHIPPED / "README.md", "notes.md": SHIPPED / "README.md",
    }
    fetched: set[str] = set()

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        content, etag = b"{}", None
        if path == "/api/models/owner/small/revision/main":
            content = json.dumps({"id": "owner/small", "sha": COMMIT}).encode()
        elif path == f"/api/models/owner/small/tree/{COMMIT}":
            rows = [
                {"type": "file", "path": name, "size": file.stat().st_size, "oid": name}
                for name, file in self.files.items()
            ]
            content = json.dumps(rows).encode()
        elif path.startswith(f"/owner/small/resolve/{COMMIT}/"):
            name = path.rsplit("/", 1)[1]
            self.fetched.add(name)
            content, etag = self.files[name].read_bytes(), name
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        if etag is not None:
            self.send_header("ETag", f'"{etag}"')
            self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        """Nothing on stderr."""


def test_only_what_is_needed_is_downloaded(tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    environment = os.environ | {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0",
        "HF_HUB_CACHE": str(tmp_path), "HF_HUB_DISABLE_XET": "1",
    }
    code = """
import sys
from tess.errors import UserError
from tess.storage.hub import CONFIGS, local_folder
for files in ([CONFIGS], []):
    print(*sorted(path.name for path in local_folder("owner/small", *files).iterdir()))
try:
    local_folder("owner/large")
except UserError as error:
    print(error)
"""
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=environment
    )
    server.shutdown()
    assert run.returncode == 0, run.stderr
    configs, files, mistake = run.stdout.splitlines()
    wanted = {name for name in Hub.files if name.endswith((".json", ".safetensors"))}
    assert set(configs.split()) == {name for name in wanted if name.endswith(".json")}
    assert set(files.split()) == Hub.fetched == wanted
    assert mistake.endswith("none on the hub: the hub has no such repository, or it is private")


def test_an_empty_name_is_no_folder_and_not_the_default():
    with pytest.raises(UserError, match="expected a folder or a hub id, got an empty name"):
        local_folder("")
    assert checkpoint_or_default("") == ""
