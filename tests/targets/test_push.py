"""The real huggingface_hub pushes to a Hub on loopback: what is sent, and what a failure leaves behind."""

import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from huggingface_hub import constants, get_token, snapshot_download
from huggingface_hub.utils import _http

from austeer.compiler import AusteerError, OutputError, Program, Refused, Scale, UsageError
from austeer.compiler.cli import main
from austeer.compiler.verbs.build import build
from austeer.compiler.verbs.push import PushReport, push
from austeer.targets.contents import Contents
from austeer.targets.push import plan
from austeer.targets.push import push as carry_out
from tests.hub import Hub
from tests.hub_server import READER, SIGNED, WRITER, WRITING, serving
from tests.tiny import Tiny, load, on_disk, sharded, tokens

BASE, REPO = "org/base", "me/steered"
LLAMA = Tiny("llama")
RECORD = {"austeer.json", "austeer/program.safetensors", "README.md"}


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def use(hub: Hub, patch: pytest.MonkeyPatch, home: Path, token: str = WRITER) -> None:
    """Makes huggingface_hub take a Hub for its own, which HF_ENDPOINT does only at its import; no retry waits."""
    patch.setattr(constants, "ENDPOINT", hub.url)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    patch.setattr(constants, "HF_HUB_CACHE", str(home / "cache"))
    patch.setattr(constants, "HF_TOKEN_PATH", str(home / "no token"))
    patch.setattr(constants, "HF_HUB_DISABLE_XET", hub.xet is None)
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    patch.setattr(_http, "time", SimpleNamespace(sleep=lambda _: None, time=time.time))
    patch.setenv("HF_TOKEN", token)
    patch.setenv("HF_HOME", str(home))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base in three shards, of which the programs here change one."""
    return sharded(LLAMA, tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="module")
def out(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base, fetched from a Hub and compiled. Shared: do not change it."""
    folder = tmp_path_factory.mktemp("out")
    hub = Hub()
    hub.publish(BASE, files(base))
    with serving(hub), pytest.MonkeyPatch.context() as patch:
        use(hub, patch, folder / "home")
        return compiled(BASE, base, folder)


def compiled(model: str, base: Path, folder: Path, gamma: float = 0.5) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    Program.of([Scale(0, "neurons", (1,), gamma)], model=base).save(folder / "p.safetensors")
    build(model, [folder / "p.safetensors"], folder / "out")
    return folder / "out"


@pytest.fixture
def hub(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A Hub with the base on it, which huggingface_hub takes for its own."""
    hub = Hub()
    hub.publish(BASE, files(base))
    with serving(hub):
        use(hub, monkeypatch, tmp_path / "home")
        yield hub


def actions(report: PushReport) -> dict[str, set[str]]:
    return {step.action: {s.path for s in report.plan.steps if s.action == step.action} for step in report.plan.steps}


def changed_shard(base: Path, out: Path) -> str:
    (name,) = (name for name, data in files(base).items() if data != files(out)[name])
    return name


# ---- round trips


@pytest.mark.parametrize("part", [None, 3000])
def test_what_is_pushed_is_what_comes_back(hub: Hub, out: Path, base: Path, tmp_path: Path, part: int | None):
    hub.multipart = part
    report = push(out, REPO)
    assert hub.content(REPO) == files(out)
    assert hub.repositories[REPO].private
    assert [len(hub.repositories[REPO].commits), hub.requests("commit")] == [2, 1]
    assert report.commit == hub.repositories[REPO].head
    back = Path(snapshot_download(REPO, local_dir=tmp_path / "back"))
    assert {name: data for name, data in files(back).items() if not name.startswith((".cache", ".git"))} == files(out)
    assert torch.equal(load(back)(tokens()).logits, load(out)(tokens()).logits)
    assert not torch.equal(load(back)(tokens()).logits, load(base)(tokens()).logits)
