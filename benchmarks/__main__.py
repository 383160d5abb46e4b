"""python -m benchmarks: runs benchmarks, prints their tables, and exits with 1 if a limit is broken."""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from benchmarks import compile as compiling
from benchmarks import gates, localize, restore, restored_memory, restored_speed, serving
from benchmarks.checkpoints import EIGHT_B, Shape
from benchmarks.report import Report


def _restore(given: argparse.Namespace) -> Iterable[Report]:
    options = {"only": given.only, "epochs": given.epochs, "curve": given.curve}
    return restore.run(given.models, given.data, given.pruner_python, **options)


# Those of processes first: they measure them from a small one, and the others load torch.
BENCHMARKS: Mapping[str, Callable[[argparse.Namespace], Iterable[Report]]] = {
    "compile": lambda given: [compiling.run(given.sizes, given.rounds or 3)],
    "restored-memory": lambda _: [restored_memory.run()],
    "localize": lambda given: [localize.run(given.rounds or 9, device=given.device)],
    "serving": lambda given: [serving.run(given.device, given.rounds or 15)],
    "gates": lambda given: [gates.TRIAL.run(given.shape, given.layers, given.rounds or 15)],
    "restore": _restore,
    "restored-speed": lambda given: [restored_speed.TRIAL.run(given.shape, given.layers, given.rounds or 15)],
}

SPEEDS = "gates and restored-speed"


def main() -> int:
    """The exit code."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what was written is removed then too
    # One thread a process: threads that wait for each other on a shared machine measure the scheduler.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    given = _parser().parse_args()
    broken = False
    for name in BENCHMARKS if given.benchmark == "all" else [given.benchmark]:
        for report in BENCHMARKS[name](given):
            report.publish()
            if given.json:
                print(report.json())
            broken |= report.broken
    return int(broken)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("benchmark", nargs="?", default="all", choices=[*BENCHMARKS, "all"])
    parser.add_argument("--sizes", type=_sizes, default=tuple(compiling.SHAPES), help="compile: GB, such as 1,4")
    parser.add_argument("--shape", type=_shape, default=EIGHT_B, help=f"{SPEEDS}: hidden,neurons,heads,kv heads")
    parser.add_argument("--layers", type=int, default=2, help=f"{SPEEDS}: of that shape (default: 2)")
    parser.add_argument("--rounds", type=int, help="measurements of each thing")
    parser.add_argument("--device", default="cpu", help="localize and serving: a torch device (default: cpu)")
    parser.add_argument("--models", type=Path, help=f"restore: a folder with any of {', '.join(restore.DATA)}")
    parser.add_argument("--data", type=Path, help="restore: the folder of their texts")
    parser.add_argument("--only", nargs="+", default=(), choices=restore.DATA, help="restore: of these models")
    parser.add_argument("--epochs", type=int, help="restore: of all training (default: that of restore)")
    parser.add_argument("--curve", action="store_true", help="restore: with 5, 10 and 20 heads too")
    parser.add_argument("--pruner-python", type=Path, help="restore: of an environment with pruners (.venv-pruners)")
    parser.add_argument("--json", action="store_true", help="print the JSON too")
    return parser


def _sizes(text: str) -> tuple[int, ...]:
    sizes = tuple(map(int, text.split(",")))
    if unknown := set(sizes) - compiling.SHAPES.keys():
        raise argparse.ArgumentTypeError(f"no such size: {sorted(unknown)}; there are {sorted(compiling.SHAPES)}")
    return sizes


def _shape(text: str) -> Shape:
    return Shape(*map(int, text.split(",")))


if __name__ == "__main__":
    sys.exit(main())
