"""Compiling against copying: the time and the memory of `austeer-compile build`, and of `cp -r`, on one checkpoint."""

import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from austeer.compiler.facts import read_facts
from benchmarks.checkpoints import EIGHT_B, GB, ONE_B, THREE_B, write_checkpoint
from benchmarks.process import AUSTEER, Usage, measured
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
class Work:
    """One command on the base, run again and again: it makes `out`, and what each run cost is kept."""

    base: Path
    out: Path
    command: Sequence[str]
    usages: list[Usage] = field(default_factory=list)

    def seconds(self) -> float:
        """Runs it from the same start each time, and leaves nothing behind."""
        os.sync()
        _read(self.base)
        try:
            return seconds(self._run)
        finally:
            shutil.rmtree(self.out, ignore_errors=True)

    def _run(self) -> None:
        self.usages.append(measured(self.command))
        for path in self.out.rglob("*"):
            _fsync(path)  # for a build, which did it, this is nothing

    @property
    def peak(self) -> Estimate:
        """Megabytes."""
        return estimate([usage.peak / 1e6 for usage in self.usages])


def run(sizes: Sequence[int] = tuple(SHAPES), rounds: int = 3) -> Report:
    """Builds against copies for each size, in GB."""
    report = Report("compile", METHOD, details={"rounds": rounds, "edits": EDITS, "skipped": {}, "measured": {}})
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
    geometry, out = read_facts(base).geometry, scratch / "out"
    works = {"copy": Work(base, out, ["cp", "-r", str(base), str(out)])}
    for name, every in (("scales", 0), ("rank1", 5)):
        program = scratch / f"{name}.safetensors"
        mixed(geometry, EDITS, every_rank1=every).save(program)
        works[name] = Work(base, out, [AUSTEER, "build", str(base), str(program), "-o", str(out)])
    taken = interleaved({name: work.seconds for name, work in works.items()}, rounds)
    report.details["measured"][size] = {name: [asdict(usage) for usage in work.usages] for name, work in works.items()}
    report.rows += _rows(f"{size} GB, {geometry.layers} layers", taken, works)


def _rows(what: str, taken: dict[str, list[float]], works: dict[str, Work]) -> list[Row]:
    copy = estimate(taken["copy"])
    allowed = TIMES_COPY * copy.value + PLUS_SECONDS
    against = f"{TIMES_COPY} × copy + {PLUS_SECONDS:.0f} s; copy: {copy.value:.2f} s"
    kind = "every fifth edit is a dense Rank1"
    return [
        Row(f"{what}: build", estimate(taken["scales"]), "s", at_most=allowed, note=against),
        Row(f"{what}: build / copy", ratio(taken["scales"], taken["copy"])),
        Row(f"{what}: build, peak memory", works["scales"].peak, "MB", at_most=MEGABYTES),
        Row(f"{what}: with Rank1", estimate(taken["rank1"]), "s", at_most=allowed, note=kind),
        Row(f"{what}: with Rank1, peak memory", works["rank1"].peak, "MB", at_most=MEGABYTES),
    ]


def _read(folder: Path) -> None:
    buffer = bytearray(2**22)
    for path in folder.iterdir():
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
