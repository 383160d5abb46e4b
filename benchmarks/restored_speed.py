"""Restored: tokens per second of a pruned model, and of the same with the head shifts that bring back what it lost."""

from collections.abc import Mapping
from pathlib import Path

from austeer.compiler.program import Program
from benchmarks.engines import Trial, write_llama
from benchmarks.live_models import prune_half
from benchmarks.programs import head_shifts

WHAT = (
    "In every row of every linear map of the blocks half of the weights are zero, and there are no biases; the program "
    "is a Shift of all heads in every layer, and is compiled by build: into biases of the output projection, and the "
    "zeros that config.json then asks for as biases of queries, keys and values."
)


def _write(folder: Path, sizes: Mapping[str, object]) -> Program:
    return head_shifts(write_llama(folder, sizes, prune_half))


TRIAL = Trial("restored-speed", WHAT, _write, base="pruned", compiled="restored")
