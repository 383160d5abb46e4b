"""Kills a build after each of its file-system calls in turn. A program of its own: forking wants a single thread.

Usage: killing.py BASE PROGRAM FOLDER. Prints a JSON list with, for each kill, what was found and whether the
same command worked afterwards.
"""

import json
import os
import shutil
import sys
from pathlib import Path

from austeer.compiler.verbs.build import build

# Everything that changes a file system, by the names of the C functions behind it.
CHANGING = {
    "close", "copy_file_range", "flock", "fsync", "ftruncate", "ioctl", "mkdir", "open", "rename", "replace", "rmdir",
    "unlink", "write",
}  # fmt: skip


def die_after(call: int) -> None:
    """Counts such calls from the first mkdir on, and ends the process at once when number `call` has returned."""
    left, writing = call, False

    def watch(_: object, event: str, function: object) -> None:
        nonlocal left, writing
        if event == "c_return" and (name := getattr(function, "__name__", "")) in CHANGING:
            writing |= name == "mkdir"  # what only reads before that leaves nothing behind
            left -= writing
            if left == 0:
                os._exit(137)

    sys.setprofile(watch)


def in_child(base: str, program: str, out: Path, kill_at: int | None) -> int:
    """Builds in a forked process; its exit code, 137 if it was killed."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            if kill_at is not None:
                die_after(kill_at)
            build(base, [program], out)
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(base: str, program: str, folder: Path) -> list[dict[str, object]]:
    """One entry per kill, until a build survives its number."""
    whole, out = folder / "whole", folder / "out"
    build(base, [program], whole)  # in this process, so that every child finds its imports made
    found: list[dict[str, object]] = []
    while (code := in_child(base, program, out, len(found) + 1)) == 137:
        litter = sorted(path.name for path in folder.iterdir() if path not in (out, whole))
        state = "none" if not out.exists() else "whole" if same(out, whole) else "partial"
        if state == "whole":
            shutil.rmtree(out)
        again = in_child(base, program, out, None)
        clean = sorted(path.name for path in folder.iterdir()) == ["out", "whole"]
        found.append({"state": state, "litter": litter, "again": again, "same": same(out, whole), "clean": clean})
        shutil.rmtree(out)
    assert code == 0, code
    return found


def same(left: Path, right: Path) -> bool:
    """Whether two outputs have the same files."""
    names = [sorted(str(path.relative_to(side)) for path in side.rglob("*")) for side in (left, right)]
    files = [name for name in names[0] if (left / name).is_file()]
    return names[0] == names[1] and all((left / name).read_bytes() == (right / name).read_bytes() for name in files)


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))))
