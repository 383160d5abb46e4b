"""Output appears whole or not at all, whatever happens while it is written."""

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from austeer.compiler import staging
from austeer.compiler.errors import CheckpointError, OutputError
from austeer.compiler.staging import clone_file, copy_file, copy_range, staged, write_atomically, write_file

posix = pytest.mark.skipif(sys.platform == "win32", reason="needs locks on directories")
BUILD = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background inherits that it is ignored
from pathlib import Path
from austeer.compiler.staging import staged, write_file
with staged(Path(sys.argv[1])) as partial:
    write_file(partial / "half", b"x")
    print("writing", flush=True)
    sys.stdin.read()
"""


def partial_of(out: Path) -> Path:
    return out.parent / f".{out.name}.partial"


def is_clean(out: Path) -> bool:
    """Neither the output nor anything else was left."""
    return list(out.parent.iterdir()) == []


def build(out: Path, then: Callable[[], object], needed: int | None = None) -> None:
    """A build that writes one file, does `then`, and ends."""
    with staged(out, needed) as partial:
        write_file(partial / "a", b"1")
        then()


def must_not_run() -> None:
    pytest.fail("the block ran")


def raises(error: BaseException) -> Callable[[], None]:
    def then() -> None:
        raise error

    return then


def live_build(out: Path) -> "subprocess.Popen[bytes]":
    """Another process that is in the middle of a build, until its stdin is closed."""
    process = subprocess.Popen([sys.executable, "-c", BUILD, str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline().strip() == b"writing"
    return process


def test_what_was_staged_appears_whole(tmp_path):
    out = tmp_path / "out"
    with staged(out) as partial:
        assert partial == partial_of(out)
        write_file(partial / "a", b"1")
        (partial / "sub").mkdir()
        write_file(partial / "sub" / "b", b"2")
        assert not out.exists()
    assert sorted(file.relative_to(out).as_posix() for file in out.rglob("*")) == ["a", "sub", "sub/b"]
    assert (out / "sub/b").read_bytes() == b"2"
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, OutputError])
def test_an_exception_leaves_nothing_and_goes_on(tmp_path, error):
    out = tmp_path / "out"
    with pytest.raises(error, match="stop"):
        build(out, raises(error("stop")))
    assert is_clean(out)


@pytest.mark.parametrize("kind", ["directory", "file", "broken link"])
def test_an_existing_output_is_refused(tmp_path, kind):
    out = tmp_path / "out"
    if kind == "directory":
        out.mkdir()
    elif kind == "file":
        out.write_text("keep me")
    else:
        out.symlink_to("nowhere")
    with pytest.raises(OutputError, match="exists already; it is not overwritten"):
        build(out, must_not_run)
    assert list(tmp_path.iterdir()) == [out]


def test_a_missing_parent_is_not_made(tmp_path):
    with pytest.raises(OutputError, match=r"there is no directory .*missing; create it first"):
        build(tmp_path / "missing" / "out", must_not_run)
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_appears_meanwhile_is_left_alone(tmp_path):
    out = tmp_path / "out"

    def other() -> None:
        out.mkdir()
        (out / "theirs").write_text("keep me")

    with pytest.raises(OutputError, match="exists already"):
        build(out, other)
    assert (out / "theirs").read_text() == "keep me"
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("appears", ["file", "full directory"])
def test_even_between_the_last_look_and_the_rename(tmp_path, monkeypatch, appears):
    out = tmp_path / "out"
    rename = Path.rename

    def late(self, target):
        if appears == "file":
            out.write_text("keep me")
        else:
            out.mkdir()
            (out / "theirs").write_text("keep me")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", late)
    with pytest.raises(OutputError, match="cannot be written"):
        build(out, lambda: None)
    assert (out if appears == "file" else out / "theirs").read_text() == "keep me"
    assert list(tmp_path.iterdir()) == [out]


@posix
def test_a_live_build_is_not_disturbed(tmp_path):
    out = tmp_path / "out"
    with live_build(out) as process:
        with pytest.raises(OutputError, match="another build is writing it"):
            build(out, must_not_run)
        process.stdin.close()
        assert process.wait(10) == 0
    assert (out / "half").read_bytes() == b"x"


@posix
def test_what_a_killed_build_left_is_no_obstacle(tmp_path):
    out = tmp_path / "out"
    with live_build(out) as process:
        process.send_signal(signal.SIGKILL)
        process.wait(10)
    assert (partial_of(out) / "half").exists()
    (partial_of(out) / "sub").mkdir()
    (partial_of(out) / "link").symlink_to(tmp_path)
    with staged(out) as partial:
        assert list(partial.iterdir()) == []
        write_file(partial / "a", b"1")
    assert [file.name for file in out.iterdir()] == ["a"]
    assert list(tmp_path.iterdir()) == [out]


@posix
@pytest.mark.parametrize("ends", ["whole", "removed"])
def test_a_build_that_ends_while_the_next_one_takes_the_lock(tmp_path, monkeypatch, ends):
    out, flock = tmp_path / "out", staging.fcntl.flock
    partial_of(out).mkdir()

    def late(descriptor, operation):
        monkeypatch.undo()
        if ends == "whole":
            partial_of(out).rename(out)
        else:
            partial_of(out).rmdir()
        return flock(descriptor, operation)

    monkeypatch.setattr(staging.fcntl, "flock", late)
    if ends == "whole":
        with pytest.raises(OutputError, match="exists already"):
            build(out, must_not_run)
    else:
        build(out, lambda: None)
    assert list(tmp_path.iterdir()) == [out]


@posix
def test_an_interrupted_build_cleans_up(tmp_path):
    out = tmp_path / "out"
    with live_build(out) as process:
        process.send_signal(signal.SIGINT)
        assert process.wait(10) != 0
    assert is_clean(out)


@posix
@pytest.mark.parametrize("kind", ["file", "link"])
def test_something_else_in_the_staging_place_is_not_touched(tmp_path, kind):
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "theirs").write_text("keep me")
    if kind == "link":
        partial_of(out).symlink_to(elsewhere)
    else:
        partial_of(out).write_text("keep me")
    with pytest.raises(OutputError, match=r"cannot be written: .*\.out\.partial"):
        build(out, must_not_run)
    assert (elsewhere / "theirs").read_text() == "keep me"
    assert os.path.lexists(partial_of(out))


@posix
@pytest.mark.parametrize("leftover", [False, True])
def test_of_many_builds_at_once_exactly_one_wins(tmp_path, leftover):
    for turn in range(20):
        out = tmp_path / f"out{turn}"
        if leftover:
            partial_of(out).mkdir()
            (partial_of(out) / "old").touch()
        won, lost = [], []
        start = threading.Barrier(8)

        def race(number, out=out, won=won, lost=lost, start=start):
            start.wait()
            try:
                with staged(out) as partial:
                    write_file(partial / "who", str(number).encode())
                    time.sleep(0.001)
                won.append(number)
            except OutputError as error:
                lost.append(str(error))

        threads = [threading.Thread(target=race, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (len(won), len(lost)) == (1, 7)
        assert all("another build" in text or "exists already" in text for text in lost)
        assert [(file.name, file.read_text()) for file in out.iterdir()] == [("who", str(won[0]))]
    assert len(list(tmp_path.iterdir())) == 20


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_explained(tmp_path):
    out = tmp_path / "out"
    words = "the disk is full .4096 bytes are needed, [0-9]+ are free.. Nothing was written at"
    with pytest.raises(OutputError, match=words):
        build(out, lambda: Path("/dev/full").write_bytes(b"x"), needed=4096)
    assert is_clean(out)


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.EDQUOT, "quota"),
        (errno.EFBIG, "files this large"),
        (errno.EROFS, "read-only"),
        (errno.EACCES, "permission"),
    ],
)
def test_other_refusals_of_the_file_system_are_explained(tmp_path, number, words):
    out = tmp_path / "out"
    with pytest.raises(OutputError, match=words):
        build(out, raises(OSError(number, os.strerror(number), str(partial_of(out) / "a"))))
    assert is_clean(out)


def test_errors_of_the_input_are_not_taken_for_those_of_the_output(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(PermissionError, match="base"):
        build(out, raises(PermissionError(errno.EACCES, "no", str(tmp_path / "base" / "model.safetensors"))))
    with pytest.raises(FileNotFoundError):
        build(out, (tmp_path / "nothing").read_bytes)
    assert is_clean(out)


@posix
def test_all_is_on_the_disk_before_it_appears(tmp_path, monkeypatch):
    out, synced = tmp_path / "out", []

    def fsync(descriptor):
        synced.append((os.fstat(descriptor).st_ino, out.exists()))

    monkeypatch.setattr(os, "fsync", fsync)
    with staged(out) as partial:
        (partial / "sub").mkdir()
        write_file(partial / "sub" / "a", b"1")
    inside = [path.stat().st_ino for path in (out / "sub" / "a", out / "sub", out)]
    assert synced == [*((inode, False) for inode in inside), (tmp_path.stat().st_ino, True)]


def test_one_file_is_replaced_whole(tmp_path):
    path = tmp_path / "p.safetensors"
    write_atomically(path, b"old")
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_one_file_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "p.safetensors"
    path.write_bytes(b"old")

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match=r"the disk is full .3 bytes are needed"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_one_file_needs_a_directory_and_a_name_of_its_own(tmp_path):
    with pytest.raises(OutputError, match="there is no directory"):
        write_atomically(tmp_path / "missing" / "p", b"")
    with pytest.raises(OutputError, match="this is a directory"):
        write_atomically(tmp_path, b"")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "source"
    path.write_bytes(bytes(range(256)) * 100)
    path.chmod(0o444)
    return path


def copied(source: Path, offset: int, length: int) -> bytes:
    """What `copy_range` appends to a file that begins with `head`."""
    target = source.parent / "target"
    with source.open("rb") as src, target.open("wb", buffering=0) as dst:
        dst.write(b"head")
        copy_range(src.fileno(), dst.fileno(), offset, length)
        dst.write(b"tail")
    return target.read_bytes()


def test_a_range_is_copied_to_where_the_target_stands(source):
    assert copied(source, 1000, 5000) == b"head" + source.read_bytes()[1000:6000] + b"tail"
    assert copied(source, 7, 0) == b"headtail"


@pytest.mark.skipif(not hasattr(os, "copy_file_range"), reason="needs copy_file_range")
@pytest.mark.parametrize("number", [errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EIO, 0])
def test_what_the_kernel_does_not_copy_is_copied_plainly(source, monkeypatch, number):
    kernel, calls = os.copy_file_range, []

    def stops(src, dst, count, offset):
        calls.append(offset)
        if len(calls) <= 2:
            return kernel(src, dst, min(count, 10), offset)  # a short copy is no error
        if number:
            raise OSError(number, os.strerror(number))
        return 0

    monkeypatch.setattr(os, "copy_file_range", stops)
    assert copied(source, 1000, 5000) == b"head" + source.read_bytes()[1000:6000] + b"tail"
    assert calls == [1000, 1010, 1020]


def test_short_reads_and_writes_are_completed(source, monkeypatch):
    write = os.write
    monkeypatch.setattr(staging, "_copy_in_kernel", lambda *_: 0)
    monkeypatch.setattr(staging, "_CHUNK", 1000)
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:7]))
    assert copied(source, 1000, 5000) == b"head" + source.read_bytes()[1000:6000] + b"tail"


def test_a_source_that_ends_early_is_an_error(source):
    with pytest.raises(CheckpointError, match="ended 400 bytes early"):
        copied(source, 20_000, 6000)


@posix
@pytest.mark.parametrize(("umask", "mode"), [(0, 0o644), (0o077, 0o600)])
def test_a_copy_can_be_written_though_its_source_cannot(source, umask, mode):
    target = source.parent / "copy"
    before = os.umask(umask)
    try:
        copy_file(source, target)
    finally:
        os.umask(before)
    assert target.read_bytes() == source.read_bytes()
    assert target.stat().st_mode & 0o777 == mode
    assert target.stat().st_nlink == 1


def test_a_clone_is_a_copy_or_nothing(source):
    target = source.parent / "clone"
    assert clone_file(source, target) is target.exists()
    assert not target.exists() or target.read_bytes() == source.read_bytes()


@pytest.mark.skipif(sys.platform != "linux", reason="the ioctl is Linux's")
def test_a_clone_is_asked_for_by_the_right_call(source, monkeypatch):
    asked = []
    monkeypatch.setattr(staging.fcntl, "ioctl", lambda *arguments: asked.append(arguments))
    assert clone_file(source, source.parent / "clone")
    (target, request, _), ficlone = asked[0], 0x40049409  # _IOW(0x94, 9, int), linux/fs.h
    assert (type(target), request) == (int, ficlone)


def test_copies_do_not_overwrite(source):
    with pytest.raises(FileExistsError):
        copy_file(source, source)
    assert len(source.read_bytes()) == 25_600
