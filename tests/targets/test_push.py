"""The real huggingface_hub pushes to a Hub on loopback: what is sent, and what a failure leaves behind."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import hf_xet
import pytest
import torch
from click.testing import CliRunner
from huggingface_hub import CommitOperationAdd, HfApi, constants, snapshot_download
from huggingface_hub.utils import _http

from austeer.compiler import OutputError, Program, Refused, Scale, UsageError
from austeer.compiler.cli import main
from austeer.compiler.verbs.build import build
from austeer.compiler.verbs.push import PushReport, push
from austeer.targets.contents import Contents
from austeer.targets.push import push as carry_out
from austeer.targets.push_plan import plan
from tests.hub import Hub
from tests.hub_server import READER, SIGNED, WRITER, WRITING, serving
from tests.tiny import Tiny, load, on_disk, sharded, tokens

BASE, REPO = "org/base", "me/steered"
LLAMA = Tiny("llama")

# huggingface_hub 2.4 hands files to httpx2 in a way that the latter calls deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


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


def test_only_the_changed_shard_is_sent_and_the_rest_copied_on_the_hub(hub: Hub, out: Path, base: Path):
    report = push(out, REPO)
    changed = changed_shard(base, out)
    shards = {name for name in files(base) if name.endswith(".safetensors")}
    assert len(shards) == 3
    assert actions(report) == {"copy": shards - {changed}, "upload": files(out).keys() - shards | {changed}}
    sent = sum((out / name).stat().st_size for name in (changed, "austeer/program.safetensors"))
    assert hub.bytes_received(*SIGNED) == sent
    assert report.plan.bytes_to("copy") == sum((out / name).stat().st_size for name in shards - {changed})


@pytest.mark.parametrize("trouble", ["denied", "failed", "base gone"])
def test_what_the_hub_does_not_copy_is_uploaded_with_a_note(hub: Hub, out: Path, trouble: str):
    if trouble == "denied":
        hub.fail("duplicate", 403)
    elif trouble == "failed":
        hub.repositories[BASE].objects.clear()
    else:
        del hub.repositories[BASE]
    report = push(out, REPO)
    (note,) = report.plan.notes
    assert ("org/base cannot be read" if trouble == "base gone" else "did not copy from org/base") in note
    assert actions(report) == {"upload": set(files(out))}
    assert hub.content(REPO) == files(out)
    assert hub.requests("commit") == 1


def test_a_second_push_finds_everything_there(hub: Hub, out: Path):
    first = push(out, REPO)
    hub.received.clear()
    again = push(out, REPO)
    assert again.commit == first.commit
    assert actions(again) == {"already there": set(files(out))}
    assert {route for route, _ in hub.received} <= {"info", "tree"}


def test_an_update_sends_what_changed_and_deletes_what_is_gone(hub: Hub, out: Path, tmp_path: Path):
    push(out, REPO)
    repository = hub.repositories[REPO]
    hub.publish(REPO, {**hub.content(REPO), "notes.md": b"ours", "figure.png": b"too"})
    other = compiled(str(on_disk(LLAMA)), on_disk(LLAMA), tmp_path)  # in one file
    report = push(other, REPO)
    assert hub.content(REPO) == {**files(other), "notes.md": b"ours", "figure.png": b"too"}
    assert report.plan.kept == ("figure.png", "notes.md")
    gone = {name for name in files(out) if name not in files(other)}
    assert len(gone) == 4  # three shards and their index
    assert actions(report)["delete"] == gone
    assert len(repository.commits) == 4


def test_a_file_of_equal_size_is_not_taken_for_equal(hub: Hub, base: Path, out: Path, tmp_path: Path):
    push(out, REPO)
    other = compiled(BASE, base, tmp_path, gamma=0.75)
    for name in (changed_shard(base, out), "austeer.json"):
        assert (other / name).stat().st_size == (out / name).stat().st_size
        assert (other / name).read_bytes() != (out / name).read_bytes()
    push(other, REPO)
    assert hub.content(REPO) == files(other)


def test_copies_come_from_the_revision_that_was_compiled(hub: Hub, base: Path, out: Path):
    hub.publish(BASE, {name: data[::-1] for name, data in files(base).items()})
    assert len(actions(push(out, REPO))["copy"]) == 2
    assert hub.content(REPO) == files(out)


def test_a_dry_run_changes_nothing(hub: Hub, out: Path):
    report = push(out, REPO, dry_run=True)
    assert REPO not in hub.repositories
    assert not {route for route, _ in hub.received} & {*WRITING, *SIGNED, "duplicate"}
    assert report.commit is None
    assert actions(report).keys() == {"upload", "copy"}


# ---- failures: the repository is untouched or complete, and a rerun completes it without sending anything twice


def failed(hub: Hub, out: Path) -> str:
    """The message of a push that must fail and leave nothing behind."""
    with pytest.raises(OutputError) as caught:
        push(out, REPO)
    assert WRITER not in str(caught.value)
    repository = hub.repositories.get(REPO)
    assert repository is None or (repository.files.keys() == {".gitattributes"} and len(repository.commits) == 1)
    return str(caught.value)


DENIED = "the token may not write there (403: as the test wants it)"
UNKNOWN = "the Hub does not know the token (401)"
MEANWHILE = "made or changed by somebody else meanwhile"
TROUBLE = "the Hub is in trouble (500: as the test wants it); the repository is unchanged or complete"
BROKEN = "the connection to http://127.0.0.1"


@pytest.mark.parametrize(
    ("route", "status", "message"),
    [
        ("info", 401, UNKNOWN),
        ("info", 403, DENIED),
        ("info", 500, TROUBLE),
        ("info", None, BROKEN),
        ("create", 401, UNKNOWN),
        ("create", 403, DENIED),
        ("create", 409, f"{MEANWHILE} (409)"),
        ("create", None, BROKEN),
        ("preupload", 401, UNKNOWN),
        ("preupload", 403, DENIED),
        ("preupload", 500, TROUBLE),
        ("batch", 403, DENIED),
        ("batch", None, BROKEN),
        ("object", 500, TROUBLE),
        ("object", None, BROKEN),
        ("verify", 500, TROUBLE),
        ("commit", 401, UNKNOWN),
        ("commit", 403, DENIED),
        ("commit", 409, f"{MEANWHILE} (409)"),
        ("commit", 412, f"{MEANWHILE} (412)"),
        ("commit", 413, "the Hub answered 413: as the test wants it. Nothing was committed"),
        ("commit", 500, TROUBLE),
        ("commit", None, BROKEN),
    ],
)
def test_a_failure_leaves_nothing_and_a_rerun_completes(
    hub: Hub, out: Path, route: str, status: int | None, message: str
):
    hub.fail(route, status)
    assert message in failed(hub, out)
    assert route != "info" or REPO not in hub.repositories
    before = hub.bytes_received("object")
    hub.faults.clear()
    push(out, REPO)
    assert hub.content(REPO) == files(out)
    if route == "commit":  # all had arrived
        assert before > 0
        assert hub.bytes_received("object") == before


@pytest.mark.parametrize("route", ["preupload", "batch", "object", "verify"])
@pytest.mark.parametrize("status", [500, None])
def test_a_passing_trouble_is_overcome_without_the_user(hub: Hub, out: Path, route: str, status: int | None):
    hub.fail(route, status, times=2)
    push(out, REPO)
    assert hub.content(REPO) == files(out)


def test_a_connection_cut_in_the_middle_of_a_file(hub: Hub, out: Path, base: Path):
    changed = changed_shard(base, out)
    hub.fail("object", cut=1000)
    message = failed(hub, out)
    assert "Error while uploading" in message
    assert "Run this again: what has arrived is not sent again" in message
    assert ("object", 1000) in hub.received
    assert ("object", (out / changed).stat().st_size) not in hub.received
    hub.fail("object", cut=1000, times=1)
    push(out, REPO)
    assert hub.content(REPO) == files(out)


def test_of_several_files_those_that_arrived_are_not_sent_again(hub: Hub, out: Path):
    del hub.repositories[BASE]  # so that nothing is copied
    large = [data for name, data in files(out).items() if name.endswith(".safetensors")]
    assert len(large) == 4
    hub.lose = hashlib.sha256(large[2]).hexdigest()
    failed(hub, out)
    assert len(hub.repositories[REPO].objects) == 3
    hub.lose = None
    hub.received.clear()
    push(out, REPO)
    assert hub.content(REPO) == files(out)
    assert [size for route, size in hub.received if route == "object"] == [len(large[2])]


@pytest.mark.parametrize("status", [None, 500, 504])
def test_a_commit_whose_answer_is_lost_is_found_to_have_arrived(hub: Hub, out: Path, status: int | None):
    hub.fail("commit", status, times=1, late=True)
    report = push(out, REPO)
    assert report.commit == hub.repositories[REPO].head
    assert hub.content(REPO) == files(out)
    assert hub.requests("commit") == 1


def test_a_repository_that_moved_after_the_plan_is_left_as_it_is(hub: Hub, out: Path):
    push(out, REPO)
    less = {name: data for name, data in hub.content(REPO).items() if name != "config.json"}
    hub.publish(REPO, less)
    stale = plan(Contents.of(out), REPO)
    head = hub.publish(REPO, {**less, "notes.md": b"theirs"})
    with pytest.raises(OutputError, match=r"changed by somebody else meanwhile \(412\).*Run this again"):
        carry_out(stale)
    assert hub.repositories[REPO].head == head
    push(out, REPO)
    assert hub.content(REPO) == {**files(out), "notes.md": b"theirs"}


def test_a_card_that_the_hub_does_not_accept(hub: Hub, out: Path, tmp_path: Path):
    copied = Path(shutil.copytree(out, tmp_path / "copy"))
    card = copied / "README.md"
    card.write_text(card.read_text().replace("base_model: org/base", "base_model: not/a/model"))
    with pytest.raises(OutputError, match=r'does not accept this push .*"base_model" is not valid'):
        push(copied, REPO)
    assert hub.bytes_received(*SIGNED) == 0


# ---- tokens and names


def test_a_token_that_may_only_read(hub: Hub, out: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", READER)
    with pytest.raises(OutputError) as caught:
        push(out, REPO)
    assert str(caught.value) == (
        "me/steered: the token may not write there (403: You don't have the rights to write here). Nothing was "
        f"committed. Use one with write access to me: {hub.url}/settings/tokens, then `hf auth login`"
    )
    assert REPO not in hub.repositories


def test_without_a_token_nothing_is_asked(hub: Hub, out: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UsageError, match=r"no token .* write access .*`hf auth login` or set HF_TOKEN"):
        push(out, REPO)
    assert hub.received == []


def test_offline(hub: Hub, out: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    _http.close_session()
    try:
        with pytest.raises(OutputError, match="HF_HUB_OFFLINE forbids"):
            push(out, REPO)
    finally:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        _http.close_session()
    assert hub.received == []


@pytest.mark.parametrize("name", ["", "steered", "a/b/c", "https://huggingface.co/me/steered", "me/ steered"])
def test_a_name_that_cannot_be_one(hub: Hub, out: Path, name: str):
    with pytest.raises(UsageError, match=re.escape(f"{name!r} cannot name a repository; write it as user/name")):
        push(out, name)
    assert hub.received == []


# ---- what is not overwritten, and who sees it


def test_a_repository_that_was_not_pushed_from_here_is_refused(hub: Hub, out: Path):
    head = hub.publish(REPO, {"config.json": b"{}", "model.safetensors": b"other"}, private=True)
    with pytest.raises(Refused, match=r"has no austeer.json.*config.json, model.safetensors.*another REPO_ID"):
        push(out, REPO)
    assert hub.repositories[REPO].head == head


def test_an_empty_repository_is_filled(hub: Hub, out: Path):
    hub.publish(REPO, {}, private=True)
    push(out, REPO)
    assert hub.content(REPO) == files(out)
    assert hub.requests("create") == 0


def test_a_gitignore_that_could_drop_files_is_refused(hub: Hub, out: Path):
    hub.publish(REPO, {"austeer.json": b"{}", ".gitignore": b"*.json"}, private=True)
    with pytest.raises(Refused, match=r"has a \.gitignore.*delete it there first"):
        push(out, REPO)


def test_public_only_if_said(hub: Hub, out: Path):
    assert push(out, REPO, public=True).visibility == "public"
    assert not hub.repositories[REPO].private
    with pytest.raises(Refused, match="is public, and a push is private by default: add --public"):
        push(out, REPO)
    push(out, REPO, public=True)


def test_a_private_repository_stays_private(hub: Hub, out: Path):
    push(out, REPO)
    report = push(out, REPO, public=True)
    assert hub.repositories[REPO].private
    assert report.visibility == "private"
    assert any("is private and stays so" in note for note in report.plan.notes)


def test_a_local_base_is_pushed_with_a_warning(hub: Hub, base: Path, out: Path, tmp_path: Path):
    assert push(out, REPO).plan.notes == ()
    local = compiled(str(base), base, tmp_path)
    report = push(local, "me/other")
    assert any("was the local folder 'base'" in note and "base_model" in note for note in report.plan.notes)
    assert hub.requests("duplicate") == 1  # by the first push only
    card = local / "README.md"
    card.write_text(card.read_text().replace("base_model: base", f"base_model: {BASE}"))
    assert push(local, "me/other").plan.notes == ()


# ---- the command


def command(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(main, ["push", *map(str, arguments)])
    assert result.exit_code == code, result.output
    assert WRITER not in result.output
    return result.output


def test_the_command_shows_every_file(hub: Hub, out: Path, tmp_path: Path):
    copied = Path(shutil.copytree(out, tmp_path / "copy"))
    (copied / ".secret").write_text("mine")
    output = command(copied, REPO, "--dry-run")
    assert all(name in output for name in files(out))
    assert "Left out (no compile writes them): .secret" in output
    assert f"{hub.url}/{REPO} (private)" in output
    assert "Written" not in output
    assert f"Written: {hub.url}/{REPO}/commit/" in command(copied, REPO)
    assert ".secret" not in hub.content(REPO)


def test_the_command_in_json(hub: Hub, out: Path):
    report = json.loads(command(out, REPO, "--json"))
    assert report["commit"] == hub.repositories[REPO].head
    assert {file["file"] for file in report["files"]} == set(files(out))
    assert report["bytes_to_upload"] == sum(f["bytes"] for f in report["files"] if f["action"] == "upload")
    hub.fail("info", 500)
    assert "the Hub is in trouble" in json.loads(command(out, REPO, "--json", code=1).splitlines()[0])["error"]


# ---- Xet: the store is a folder, which hf_xet itself fills and reads


@pytest.fixture
def xet(hub: Hub, out: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The same Hub with a Xet store, to which the base's shards have moved."""
    hub.xet = tmp_path / "store"
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    # The real Hub learns these from what hf_xet uploads; here they are told.
    for path in (*base.glob("*.safetensors"), *out.rglob("*.safetensors")):
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        hub.xet_hashes[sha256] = hf_xet.hash_files([str(path)])[0].hash
    HfApi().preupload_lfs_files(BASE, [CommitOperationAdd(p.name, p) for p in base.glob("*.safetensors")])
    hub.objects.clear()
    hub.received.clear()
    return hub


def stored(hub: Hub) -> set[str]:
    """The blocks of chunks in the Xet store, which are named by their content."""
    assert hub.xet is not None
    return {path.name for path in hub.xet.rglob("xorbs/default.*") if path.suffix != ".tagset"}


def test_a_round_trip_through_xet(xet: Hub, out: Path, tmp_path: Path):
    report = push(out, REPO)
    assert len(actions(report)["copy"]) == 2
    assert xet.bytes_received(*SIGNED) == 0
    assert xet.requests("xet_token") == 1
    assert len(xet.repositories[REPO].commits) == 2
    back = Path(snapshot_download(REPO, local_dir=tmp_path / "back"))
    assert {name: (back / name).read_bytes() for name in files(out)} == files(out)
    assert not xet.objects
    assert torch.equal(load(back)(tokens()).logits, load(out)(tokens()).logits)


def test_through_xet_a_rerun_stores_nothing_twice(xet: Hub, out: Path):
    base = stored(xet)
    xet.fail("commit", 403)
    assert DENIED in failed(xet, out)
    arrived = stored(xet)
    assert len(base) == 1
    assert len(arrived - base) == 1
    xet.faults.clear()
    push(out, REPO)
    assert stored(xet) == arrived
    assert push(out, REPO).plan.changes == ()


@pytest.mark.parametrize(("status", "message"), [(401, UNKNOWN), (403, "the token may not write there (403)")])
def test_xet_denied(xet: Hub, out: Path, status: int, message: str):
    before = stored(xet)
    xet.fail("xet_token", status)
    assert message in failed(xet, out)
    assert stored(xet) == before


def test_a_xet_store_out_of_reach(xet: Hub, out: Path, tmp_path: Path):
    xet.xet = tmp_path / "file"
    xet.xet.write_text("a file in its place")
    assert BROKEN in failed(xet, out)
    xet.xet = tmp_path / "store"
    push(out, REPO)
    assert push(out, REPO).plan.changes == ()


# ---- the whole command in a process of its own


def test_the_command_alone_needs_no_torch(hub: Hub, out: Path, tmp_path: Path):
    code = "import atexit, sys; atexit.register(lambda: print(*sys.modules, file=sys.stderr))"
    code += "; from austeer.compiler.cli import main; main()"
    environment = {"HF_ENDPOINT": hub.url, "HF_TOKEN": WRITER, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, "push", str(out), REPO, "--json"],
        env={**os.environ, **environment}, capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert json.loads(done.stdout)["commit"] == hub.repositories[REPO].head
    assert hub.content(REPO) == files(out)
    assert not {"torch", "transformers"} & set(done.stderr.split())
    assert "huggingface_hub" in done.stderr.split()
    assert "%|" not in done.stderr  # no bar where nobody watches
