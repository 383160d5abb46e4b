"""Gates: tokens per second of the base, of the model compiled with gates, and of the base with the gates as hooks."""

from collections.abc import Mapping
from pathlib import Path

from austeer.compiler.program import Program
from benchmarks.engines import Trial, write_llama
from benchmarks.programs import gated

NEURONS = 256
WHAT = (
    f"The base has no biases; the program has a Scale and a Shift behind a gate in every layer, on {NEURONS} new "
    "neurons, and is compiled by build."
)


def _write(folder: Path, sizes: Mapping[str, object]) -> Program:
    return gated(write_llama(folder, sizes), NEURONS)


TRIAL = Trial("gates", WHAT, _write, hooks=True)
