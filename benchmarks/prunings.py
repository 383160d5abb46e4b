"""The ways in which models are pruned for the benchmark of restoring, by other people's pruners where these are."""

import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from austeer.compiler.facts import ModelFacts, read_facts
from austeer.compiler.responses import read_samples
from benchmarks.pruners import magnitude, structured, two_of_four, wanda

EXAMPLES = Path(__file__).parents[1] / "examples"


@dataclass(frozen=True)
class Pruning:
    """One of them: our plain pruner, and the package whose example does it in the environment of the pruners."""

    name: str
    plain: Callable[[Path, Path, Sequence[str]], None]
    package: str = ""
    options: tuple[str, ...] = ()
    calibrated: bool = False

    def apply(self, model: Path, out: Path, data: Path, python: Path | None) -> str:
        """Writes the pruned model; returns whose pruner it was. `python`: that of the pruners' environment."""
        llama = read_facts(model).architecture.model_type == "llama"  # which the examples are for
        if not (python and self.package and llama):
            self.plain(model, out, [sample.response for sample in read_samples(data)])
            return "benchmarks/pruners.py"
        script = EXAMPLES / f"prune_with_{self.package.replace('-', '_')}.py"
        texts = ("--data", data) if self.calibrated else ()
        command = [str(part) for part in (python, script, model, out, *texts, *self.options)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
        return self.package


CUT = Pruning("structured 25 %, cut", lambda model, out, _: structured(model, out), "torch-pruning")
PRUNINGS = (
    Pruning("magnitude 50 %", lambda model, out, _: magnitude(model, out)),
    Pruning("Wanda 50 %", wanda, "llmcompressor", calibrated=True),
    Pruning("2:4 by Wanda", two_of_four, "llmcompressor", ("--pattern", "2:4"), calibrated=True),
    Pruning("structured 25 %, in shape", lambda model, out, _: structured(model, out, in_shape=True)),
    CUT,
)


def prunings_of(facts: ModelFacts) -> Iterator[Pruning]:
    """Those that a model can have: without `head_dim` in config.json, no fewer heads."""
    return (pruning for pruning in PRUNINGS if pruning != CUT or "head_dim" in facts.config)
