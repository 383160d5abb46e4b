"""The real huggingface_hub against a small Hub on loopback: what is downloaded, what a refusal says."""

import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
from huggingface_hub import constants
from safetensors.numpy import save

from austeer.compiler.checkpoint import Checkpoint, files_to_copy
from austeer.compiler.errors import CheckpointError, Refused
from austeer.targets.hub import Fetched, content_sha256, fetch

ID, COMMIT = "org/tiny", "c0ffee" + "0" * 34
LFS = (".safetensors", ".bin", ".gguf")
WEIGHTS = save({"a.weight": np.ones((2, 3), np.float32)})
CONFIG = json.dumps({"model_type": "llama"}).encode()
INDEX = json.dumps({"weight_map": {"a.weight": "model-1.safetensors", "b.weight": "model-2.safetensors"}}).encode()
SMALL = {"config.json": CONFIG, "tokenizer.json": b"{}", "LICENSE": b"free", "README.md": b"---\n---\n"}
TWINS = {
    "consolidated.safetensors": WEIGHTS,
    "pytorch_model.bin": b"pickle",
    "onnx/config.json": b"{}",
    "original/tokenizer.model": b"",
    "model.gguf": b"GGUF",
}
ONE_FILE = {**SMALL, **TWINS, "model.safetensors": WEIGHTS}
SHARDED = {
    **SMALL,
    "model.safetensors.index.json": INDEX,
    "model-1.safetensors": WEIGHTS,
    "model-2.safetensors": save({"b.weight": np.ones(2, np.float32)}),
    "model-3.safetensors": b"not in the index",
}


@dataclass
class Hub:
    """What the server answers: one repository, or errors, as status and code, for its API or its files."""

    files: dict[str, bytes] = field(default_factory=dict)
    api_error: tuple[int, str] | None = None
    files_error: tuple[int, str] | None = None
    downloaded: list[str] = field(default_factory=list)
    url: str = ""


class Handler(BaseHTTPRequestHandler):
    """The few calls that a download makes: model info, file tree, file."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if path.startswith("/api/models/"):
            self.api(path.removeprefix("/api/models/"))
        elif path.startswith(f"/{ID}/resolve/"):
            self.file(path.removeprefix(f"/{ID}/resolve/").partition("/")[2])
        else:
            self.fail(404, "RepoNotFound")

    def do_HEAD(self) -> None:
        self.do_GET()

    def api(self, path: str) -> None:
        if self.hub.api_error:
            self.fail(*self.hub.api_error)
        elif path in {ID, f"{ID}/revision/main", f"{ID}/revision/v1", f"{ID}/revision/{COMMIT}"}:
            siblings = [{"rfilename": name} for name in self.hub.files]
            self.answer(200, json.dumps({"_id": "1", "id": ID, "sha": COMMIT, "siblings": siblings}).encode())
        elif path.startswith(f"{ID}/tree/{COMMIT}"):
            self.answer(200, json.dumps([self.entry(name) for name in self.hub.files]).encode())
        else:
            self.fail(404, "RevisionNotFound" if path.startswith(f"{ID}/") else "RepoNotFound")

    def entry(self, name: str) -> dict[str, object]:
        data = self.hub.files[name]
        lfs = {"lfs": {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}}
        plain = {"type": "file", "path": name, "oid": hashlib.sha1(data).hexdigest(), "size": len(data)}
        return {**plain, **(lfs if name.endswith(LFS) else {})}

    def file(self, name: str) -> None:
        if self.hub.files_error:
            self.fail(*self.hub.files_error)
            return
        if name not in self.hub.files:
            self.fail(404, "EntryNotFound")
            return
        data = self.hub.files[name]
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha1(data).hexdigest()}"'}
        if name.endswith(LFS):
            headers |= {
                "X-Linked-Etag": f'"{hashlib.sha256(data).hexdigest()}"',
                "X-Linked-Size": str(len(data)),
            }
        if self.command == "GET":
            self.hub.downloaded.append(name)
        self.answer(200, data, headers)

    def fail(self, status: int, code: str) -> None:
        self.answer(status, b"{}", {"X-Error-Code": code} if code else {})

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub that huggingface_hub takes for its own, with an empty cache and no token."""
    hub = Hub(dict(ONE_FILE))
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    point_to(hub.url, monkeypatch)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    yield hub
    server.shutdown()
    thread.join()
    server.server_close()


def point_to(url, monkeypatch):
    # HF_ENDPOINT, which huggingface_hub reads once, at its import.
    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


def test_only_what_a_model_is_made_of_is_downloaded(hub):
    found = fetch(ID)
    assert (found.id, found.revision) == (ID, COMMIT)
    assert sorted(hub.downloaded) == sorted([*SMALL, "model.safetensors"])
    kept, left_out = files_to_copy(Checkpoint.open(found.path))
    assert kept == ["LICENSE", "config.json", "model.safetensors", "tokenizer.json"]
    assert left_out == ["README.md"]


def test_only_the_shards_of_the_index_are_downloaded(hub):
    hub.files = SHARDED
    checkpoint = Checkpoint.open(fetch(ID).path)
    assert checkpoint.shards == ("model-1.safetensors", "model-2.safetensors")
    assert sorted(hub.downloaded) == sorted(SHARDED.keys() - {"model-3.safetensors"})


@pytest.mark.parametrize("revision", ["v1", COMMIT])
@pytest.mark.usefixtures("hub")
def test_a_revision_becomes_its_commit(revision):
    assert fetch(ID, revision).revision == COMMIT


def test_a_second_time_nothing_is_downloaded(hub):
    first = fetch(ID)
    hub.downloaded.clear()
    assert fetch(ID) == first
    assert hub.downloaded == []


@pytest.mark.usefixtures("hub")
def test_weights_are_named_by_their_content_and_other_files_are_not():
    path = fetch(ID).path
    assert content_sha256(path / "model.safetensors") == hashlib.sha256(WEIGHTS).hexdigest()
    assert content_sha256(path / "config.json") is None  # its blob bears a git hash


def test_a_file_elsewhere_has_no_known_content(tmp_path):
    file = tmp_path / ("a" * 64)
    file.touch()
    assert content_sha256(file) is None
    assert content_sha256(tmp_path / "missing") is None


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (
            {**SMALL, "pytorch_model.bin": b""},
            "org/tiny has its weights as pickle.*spaces/safetensors/convert",
        ),
        ({"model.gguf": b""}, "org/tiny has its weights as GGUF"),
        ({"adapter_config.json": b"{}", "adapter_model.safetensors": b""}, "org/tiny is an adapter"),
        ({**ONE_FILE, "config.json": b'{"quantization_config": {"bits": 4}}'}, "org/tiny is quantised"),
        ({**SHARDED, "model.safetensors": WEIGHTS}, "org/tiny has both"),
    ],
)
def test_an_unsupported_model_is_refused_before_its_weights_are_downloaded(hub, files, words):
    hub.files = files
    with pytest.raises(Refused, match=words):
        fetch(ID)
    assert not [name for name in hub.downloaded if name.endswith(LFS)]


def test_an_index_cannot_make_it_download_anything_else(hub):
    hub.files = {**SHARDED, "model.safetensors.index.json": b'{"weight_map": {"a": "../pytorch_model.bin"}}'}
    with pytest.raises(CheckpointError, match="not the plain name"):
        fetch(ID)
    assert not [name for name in hub.downloaded if name.endswith(LFS)]


@pytest.mark.parametrize("where", ["api_error", "files_error"])
def test_a_gated_model_names_its_licence_and_the_login(hub, where):
    setattr(hub, where, (403, "GatedRepo"))
    with pytest.raises(CheckpointError) as caught:
        fetch(ID)
    assert str(caught.value) == f"{ID} is gated: accept its licence at {hub.url}/{ID}, then run `hf auth login`"


@pytest.mark.parametrize("error", [(404, "RepoNotFound"), (401, "RepoNotFound")])
def test_an_unknown_model(hub, error):
    hub.api_error = error
    with pytest.raises(CheckpointError, match=r"neither a local directory nor a Hub model.*`hf auth login`"):
        fetch(ID)


def test_an_unknown_revision(hub):
    with pytest.raises(CheckpointError, match=f"no revision 'v2'; {hub.url}/{ID}/commits/main"):
        fetch(ID, "v2")


@pytest.mark.parametrize("where", ["api_error", "files_error"])
@pytest.mark.parametrize("status", [401, 403])
def test_no_access(hub, where, status):
    setattr(hub, where, (status, ""))
    with pytest.raises(CheckpointError, match=r"`hf auth login`"):
        fetch(ID)


def test_a_hub_in_trouble_is_named_with_its_answer(hub):
    hub.api_error = (500, "")
    with pytest.raises(CheckpointError, match=f"cannot be downloaded from {hub.url} .*500.*Check the connection"):
        fetch(ID)


@pytest.mark.parametrize("trouble", ["offline", "no server", "answers 500"])
def test_without_the_hub_the_cache_has_to_do(hub, monkeypatch, trouble):
    first = fetch(ID)
    if trouble == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    elif trouble == "no server":
        point_to("http://127.0.0.1:1", monkeypatch)
    else:
        hub.api_error = (500, "")
    assert fetch(ID) == first
    assert fetch(ID, COMMIT) == first


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("lost", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_cache_that_lacks_a_file_does_not_do(monkeypatch, lost):
    (fetch(ID).path / lost).unlink()
    point_to("http://127.0.0.1:1", monkeypatch)
    with pytest.raises(CheckpointError, match="the cache does not have all of it"):
        fetch(ID)


@pytest.mark.usefixtures("hub")
def test_offline_with_an_empty_cache(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="not in the Hub's cache, and HF_HUB_OFFLINE"):
        fetch(ID)


@pytest.mark.usefixtures("hub")
def test_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "cache").write_text("a file in its place")
    with pytest.raises(CheckpointError, match=r"cannot be stored in the Hub's cache: .*cache"):
        fetch(ID)


@pytest.mark.usefixtures("hub")
def test_a_local_directory_wins_and_is_named_without_its_path(tmp_path, monkeypatch):
    (tmp_path / "org" / "tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert fetch(ID) == Fetched(Path(ID), "tiny", None)
    monkeypatch.chdir(tmp_path / "org" / "tiny")
    assert fetch(".", "v1") == Fetched(Path(), "tiny", None)


@pytest.mark.parametrize(
    "model",
    ["", "./missing", "/missing/model", "a/b/c", "../x", "x/", "a b", "https://huggingface.co/org/tiny"],
)
def test_what_is_no_hub_id_is_no_directory_either(hub, model):
    with pytest.raises(
        CheckpointError, match="there is no such directory, and a model of the Hub is written as org/name"
    ):
        fetch(model)
    assert hub.downloaded == []
