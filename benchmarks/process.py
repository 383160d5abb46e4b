"""One command as a process of its own: how long it took, and its peak memory."""

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

AUSTEER = str(Path(sys.executable).with_name("austeer-compile"))


@dataclass(frozen=True)
class Usage:
    """Seconds by the wall clock from start to exit, seconds of processor time, and the peak resident set in bytes."""

    seconds: float
    processor: float
    peak: int


def measured(command: Sequence[str]) -> Usage:
    """Runs a command to its end; RuntimeError, with what it said, if it fails.

    The kernel's figure for the peak includes the starting process at the moment of the fork, so this process
    has to be small: no torch in it.
    """
    start = perf_counter()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        errors = process.stderr.read()
        _, status, usage = os.wait4(process.pid, 0)
        spent = perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{errors}")
    return Usage(spent, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024))
