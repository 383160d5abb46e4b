"""Output that appears whole or not at all, and bytes copied without a detour through memory."""

import contextlib
import errno
import os
import secrets
import shutil
import sys
from collections.abc import Generator
from pathlib import Path
from typing import IO

from austeer.compiler.errors import CheckpointError, OutputError

if sys.platform != "win32":
    import fcntl

_CHUNK = 8 << 20
_FICLONE = 0x40049409
_REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "your disk quota is used up",
    errno.EFBIG: "the file system, or a limit, does not allow files this large",
    errno.EACCES: "you have no permission to write there",
    errno.EPERM: "you have no permission to write there",
    errno.EROFS: "the file system is read-only",
}
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextlib.contextmanager
def staged(out: Path, needed: int | None = None) -> Generator[Path]:
    """A new directory to fill, which becomes `out` if the block ends well and vanishes if it raises.

    `needed`, in bytes, only makes the message about a full disk say more. Raises OutputError if `out` exists,
    its parent does not, another build is writing it, or the file system refuses.
    """
    require_place(out)
    partial = out.parent / f".{out.name}.partial"
    with _as_output_errors(out, needed), _locked(partial, out):
        try:
            _refuse_existing(out)  # another build may have finished while this one waited for the lock
            yield partial
            _sync_tree(partial)
            _refuse_existing(out)
            # Whatever appears between these two lines makes the rename fail, an empty directory excepted.
            partial.rename(out)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    _sync_directory(out.parent)


def require_place(out: Path) -> None:
    """OutputError if `out` exists, or has nowhere to be."""
    _refuse_existing(out)
    require_folder(out)


def require_folder(out: Path) -> None:
    """OutputError if the directory that `out` is to be in does not exist."""
    if not out.parent.is_dir():
        raise OutputError(f"{out}: there is no directory {out.parent}; create it first")


def write_file(path: Path, data: bytes) -> None:
    """A new file; for use inside `staged`. Raises FileExistsError."""
    with os.fdopen(create_file(path), "wb") as file:
        file.write(data)


def write_all(file: IO[bytes], data: bytes | memoryview) -> None:
    """Writes to an unbuffered file, which may take less than it is given."""
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def write_atomically(path: Path, data: bytes) -> None:
    """One file, written whole or not at all; an existing one is replaced. Raises OutputError."""
    require_folder(path)
    partial = path.parent / f".{path.name}.{secrets.token_hex(4)}.partial"
    with _as_output_errors(path, len(data)):
        if path.is_dir():
            raise OutputError(f"{path}: this is a directory; give the name of a file")
        try:
            write_file(partial, data)
            _sync_file(partial)
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    _sync_directory(path.parent)


def create_file(path: Path) -> int:
    """An open descriptor of a new file that its owner may read and write. Raises FileExistsError."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    return os.open(path, flags, 0o644)


def clone_file(src: Path, dst: Path) -> bool:
    """Makes `dst` a copy of `src` that shares its blocks until one is written; False where that cannot be.

    `dst` must not exist, and does not exist after False. Raises FileExistsError.
    """
    if sys.platform != "linux":
        return False
    target = create_file(dst)
    try:
        with src.open("rb") as source:
            fcntl.ioctl(target, _FICLONE, source.fileno())
    except OSError:
        dst.unlink()
        return False
    finally:
        os.close(target)
    return True


def copy_file(src: Path, dst: Path) -> None:
    """Copies the content, not the permissions, of `src` to the new file `dst`; as a clone where possible."""
    if clone_file(src, dst):
        return
    with src.open("rb") as source, os.fdopen(create_file(dst), "wb") as target:
        copy_range(source.fileno(), target.fileno(), 0, os.fstat(source.fileno()).st_size)


def copy_range(src_fd: int, dst_fd: int, offset: int, length: int) -> None:
    """Copies `length` bytes from `offset` of one open file to where the other one stands, which moves on.

    The kernel does it if it can. Raises CheckpointError if the source ends early; where the source's own
    position is afterwards is not defined.
    """
    done = _copy_in_kernel(src_fd, dst_fd, offset, length)
    os.lseek(src_fd, offset + done, os.SEEK_SET)
    while done < length:
        chunk = memoryview(os.read(src_fd, min(_CHUNK, length - done)))
        if not chunk:
            raise CheckpointError(f"a file of the model ended {length - done} bytes early: did it change?")
        done += len(chunk)
        while chunk:
            chunk = chunk[os.write(dst_fd, chunk) :]


def _copy_in_kernel(src_fd: int, dst_fd: int, offset: int, length: int) -> int:
    done = 0
    # Any failure, and a 0 before the end, only means that the plain loop goes on: it meets the true error.
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            while done < length:
                copied = os.copy_file_range(src_fd, dst_fd, min(length - done, 1 << 30), offset + done)
                if copied == 0:
                    break
                done += copied
    return done


def _refuse_existing(out: Path) -> None:
    if os.path.lexists(out):
        raise OutputError(f"{out} exists already; it is not overwritten. Give another name, or remove it first")


@contextlib.contextmanager
def _locked(partial: Path, out: Path) -> Generator[None]:
    """The staging directory, empty and ours; what a dead build left in it is removed."""
    if sys.platform == "win32":
        # No locks on directories there, but what a live build holds open cannot be removed either.
        partial.mkdir(exist_ok=True)
        _clear(partial)
        yield
        return
    descriptor = _lock(partial, out)
    try:
        _clear(partial)
        yield
    finally:
        os.close(descriptor)


def _lock(partial: Path, out: Path) -> int:
    # The lock dies with its process, so a left-over that can be locked is a dead build's. Between open and
    # flock its owner may rename or remove it: then what is locked is not what stands there, and we try again.
    while True:
        # Not exist_ok: where its owner renames it at this moment, pathlib would take it for something else.
        with contextlib.suppress(FileExistsError):
            partial.mkdir()
        try:
            descriptor = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except FileNotFoundError:
            continue
        _try_lock(descriptor, out)
        if _stands_at(partial, descriptor):
            return descriptor
        os.close(descriptor)


def _try_lock(descriptor: int, out: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise OutputError(f"{out}: another build is writing it; wait, or give another name") from None
    except OSError:
        return  # some network file systems have no such locks: the build goes on unprotected


def _stands_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False


def _clear(directory: Path) -> None:
    for path in directory.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _sync_tree(directory: Path) -> None:
    for path in directory.iterdir():
        if path.is_dir():
            _sync_tree(path)
        else:
            _sync_file(path)
    _sync_directory(directory)


def _sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY if sys.platform != "win32" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_directory(directory: Path) -> None:
    # Windows and some network file systems cannot; the files themselves are safe by then.
    with contextlib.suppress(OSError):
        _sync_file(directory)


@contextlib.contextmanager
def _as_output_errors(out: Path, needed: int | None) -> Generator[None]:
    """Gives the errors of writing `out` a text; those of reading something else pass as they are."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            ours = error.errno in _REASONS
        else:
            ours = str(error.filename).startswith(str(out.parent / f".{out.name}."))
        if not ours:
            raise
        why = _REASONS.get(error.errno or 0, str(error))
        if error.errno in _DISK_FULL and needed is not None:
            why += f" ({needed} bytes are needed, {shutil.disk_usage(out.parent).free} are free)"
        raise OutputError(f"{out} cannot be written: {why}. Nothing was written at {out}") from error
