"""Compiling against copying: the time and the memory of `austeer-compile build`, and of `cp -r`, on one checkpoint."""

import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from austeer.compiler.facts import read_facts
from benchmarks.checkpoints import EIGHT_B, GB, ONE_B, THREE_B, write_checkpoint
from benchmarks.process import Usage, measured
from benchmarks.programs import mixed
from benchmarks.report import FOLDER, Report, Row
from benchmarks.samples import Estimate, estimate, interleaved, ratio, seconds

SHAPES = {1: ONE_B, 4: THREE_B, 8: EIGHT_B}
EDITS = 100
TIMES_COPY, PLUS_SECONDS, MEGABYTES = 1.1, 4.0, 400
METHOD = (
    "Whole processes, in turns. Before each one, untimed: sync, and the base is read once, so that the page cache "
    "holds it for both. A copy is `cp -r` and fsync of every file; a build fsyncs by itself. Every output is removed "
    "at once."
)


@dataclass(frozen=True)
class Arena:
    """The base, the commands' output, and what they cost."""

    base: Path
    out: Path
    usages: list[Usage] = field(default_factory=list)

    def copy(self) -> float:
        """Seconds of one copy."""

        def work() -> None:
            measured(["cp", "-r", str(self.base), str(self.out)])
            for path in self.out.iterdir():
                _fsync(path)

        return self._alone(lambda: seconds(work))

    def build(self, program: Path) -> float:
        """Seconds of one build."""

        def work() -> float:
            usage = measured([str(_script()), "build", str(self.base), str(program), "-o", str(self.out)])
            self.usages.append(usage)
            return usage.seconds

        return self._alone(work)

    def _alone(self, work: Callable[[], float]) -> float:
        """`work` from the same start each time, and nothing left of it."""
        os.sync()
        _read(self.base)
        try:
            return work()
        finally:
            shutil.rmtree(self.out, ignore_errors=True)


def run(sizes: Sequence[int] = tuple(SHAPES), rounds: int = 3) -> Report:
    """Builds against copies for each size, in GB."""
    report = Report("compile", METHOD, details={"rounds": rounds, "edits": EDITS, "skipped": {}, "seconds": {}})
    FOLDER.mkdir(parents=True, exist_ok=True)
    for size in sizes:
        with TemporaryDirectory(dir=FOLDER, prefix="compile-") as scratch:
            free = shutil.disk_usage(scratch).free / GB
            if free < 2.2 * size:
                report.details["skipped"][size] = f"needs {2.2 * size:.1f} GB of free disk, there are {free:.1f} GB"
                continue
            _measure(Path(scratch), size, rounds, report)
    return report


def _measure(scratch: Path, size: int, rounds: int, report: Report) -> None:
    base = scratch / "base"
    write_checkpoint(base, SHAPES[size], size * GB)
    geometry = read_facts(base).geometry
    scales, rank1 = scratch / "scales.safetensors", scratch / "rank1.safetensors"
    mixed(geometry, EDITS).save(scales)
    mixed(geometry, EDITS, every_rank1=5).save(rank1)
    plain, heavy = Arena(base, scratch / "out"), Arena(base, scratch / "out")
    taken = interleaved(
        {"copy": plain.copy, "build": lambda: plain.build(scales), "rank1": lambda: heavy.build(rank1)}, rounds
    )
    report.details["seconds"][size] = taken
    report.rows += _rows(f"{size} GB, {geometry.layers} layers", taken, plain.usages, heavy.usages)


def _rows(what: str, taken: dict[str, list[float]], plain: list[Usage], heavy: list[Usage]) -> list[Row]:
    copy = estimate(taken["copy"])
    allowed = TIMES_COPY * copy.value + PLUS_SECONDS
    against = f"copy: {copy.value:.1f} s"
    return [
        Row(f"{what}: build", estimate(taken["build"]), "s", at_most=allowed, note=f"1.1 × copy + 4 s; {against}"),
        Row(f"{what}: build / copy", ratio(taken["build"], taken["copy"])),
        Row(f"{what}: build, peak memory", _peak(plain), "MB", at_most=MEGABYTES),
        Row(f"{what}: every fifth edit a dense Rank1", estimate(taken["rank1"]), "s", note=against),
        Row(f"{what}: the same, peak memory", _peak(heavy), "MB", at_most=MEGABYTES),
    ]


def _peak(usages: list[Usage]) -> Estimate:
    return estimate([usage.peak / 1e6 for usage in usages])


def _script() -> Path:
    return Path(sys.executable).with_name("austeer-compile")


def _read(folder: Path) -> None:
    buffer = bytearray(2**22)
    for path in folder.iterdir():
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def _fsync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
