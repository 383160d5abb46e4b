"""What restoring brought: the report, the record of it in the manifest, and a table for people."""

from dataclasses import dataclass
from typing import Any

from austeer.compiler.certificate import Certificate
from austeer.compiler.pruning import Pruning
from austeer.compiler.recovery import Recovery
from austeer.compiler.verbs.baked import Baked, Zeros, zeros_record
from austeer.compiler.verbs.restoring import Restored


@dataclass(frozen=True, eq=False)
class Restoration:
    """The program and what it recovers, the pruning that it makes up for, and what was written, if anything was."""

    out: str
    restored: Restored
    pruning: Pruning
    baked: Baked | None
    notes: tuple[str, ...]

    @property
    def certificate(self) -> Certificate | None:
        """That of the output."""
        return self.baked.certificate if self.baked else None

    @property
    def zeros(self) -> tuple[Zeros, ...]:
        """Those of every matrix of the pruned model."""
        return self.baked.zeros if self.baked else tuple(map(Zeros, self.pruning.pruned))

    def plain(self) -> dict[str, Any]:
        """As JSON values."""
        program = self.restored.program
        return {
            "out": self.out,
            "sha256": program.sha256,
            "edits": len(program.edits),
            **record(self.restored, self.pruning, self.baked.added if self.baked else None),
            "sparsity": zeros_record(self.zeros),
            "certificate": self.certificate.plain() if self.certificate else None,
            "notes": list(self.notes),
        }


def record(found: Restored, pruning: Pruning, added: int | None) -> dict[str, Any]:
    """How the program was found and what it brings, for report and manifest; `added` counts parameters."""
    trained, (fit, stop, test) = found.trained, found.samples
    return {
        "loss": found.loss.plain(),
        "accuracy": found.accuracy.plain() if found.accuracy else None,
        "heads": found.heads,
        "importance": found.importance.tolist() if found.importance is not None else None,
        "components": trained.shifts.directions.shape[2],
        "parameters": {"trained": found.learned, "added": added},
        "steps": trained.step,
        "best_step": trained.best_step,
        "held_out_losses": [[step, loss] for step, loss in trained.losses.items()],
        "samples": {"fitted": fit, "stopped_by": stop, "reported_on": test},
        "pruning": pruning.kind,
        "head_map": [list(heads) for heads in pruning.head_map],
    }


def recovery_table(found: Restored) -> list[tuple[str, str, str, str, str]]:
    """What is back, for people: the figure; of the dense, pruned and restored model; the part that is back."""
    figures = {"loss, nats per token": found.loss, "accuracy on contrasts": found.accuracy}
    return [
        (name, f"{figure.dense:.4f}", f"{figure.pruned:.4f}", f"{figure.restored:.4f}", _back(figure))
        for name, figure in figures.items()
        if figure is not None
    ]


def _back(figure: Recovery) -> str:
    if figure.share is None:
        return "nothing was lost"
    return f"{figure.share:.1%}" if figure.share <= 1 else "all, and more"
