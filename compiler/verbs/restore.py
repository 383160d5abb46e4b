"""restore: pruned model + the dense one it was + samples → the pruned model with what its heads lost, in biases."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from austeer.compiler.certificate import Certificate, stored_dtype
from austeer.compiler.checkpoint import Checkpoint
from austeer.compiler.edits import Shift
from austeer.compiler.errors import CheckFailed, Refused
from austeer.compiler.facts import facts_of
from austeer.compiler.layout import Layout, OutputLayout
from austeer.compiler.manifest import sha256_of
from austeer.compiler.pairs import read_pairs
from austeer.compiler.program import Program
from austeer.compiler.pruning import Pruning, examine
from austeer.compiler.responses import read_samples
from austeer.compiler.sparsity import TensorSparsity, kept_zeros
from austeer.compiler.staging import require_folder, require_place
from austeer.compiler.team import gather_team
from austeer.compiler.tokens import take_tokens
from austeer.compiler.verbs.bases import Base, open_base
from austeer.compiler.verbs.common import FORM, Compiled, Measured, Settings, write_compiled
from austeer.compiler.verbs.heads_picture import draw_heads
from austeer.compiler.verbs.picture import require_picture
from austeer.compiler.verbs.restoring import Models, Restored, find_restoration
from austeer.compiler.verbs.task import Task, TopHeads
from austeer.passes.train_shifts import Schedule
from austeer.targets.checkpoint import Plan
from austeer.targets.llama_cpp import find_converter

COMPONENTS = 10
CERTIFIED_TOKENS = 2048
STATE = ".training.safetensors"


@dataclass(frozen=True, eq=False)
class Restoration:
    """The program and what it recovers, the pruning that it makes up for, and the certificate of the checkpoint.

    `added` is the number of parameters that the output has and the pruned model has not; `after` the zeros of its
    matrices; both are None, as the certificate is, where no checkpoint was written.
    """

    out: str | None
    restored: Restored
    pruning: Pruning
    after: tuple[TensorSparsity, ...] | None
    added: int | None
    certificate: Certificate | None
    notes: tuple[str, ...]

    @property
    def chosen(self) -> list[list[int]]:
        """[layer, head] of every head that is compensated."""
        return self.restored.trained.shifts.heads.tolist()

    @property
    def sparsity(self) -> list[tuple[TensorSparsity, float | None]]:
        """Each matrix of the pruned model, and the zeros' share of it in the output."""
        then = {tensor.name: tensor.share for tensor in self.after or ()}
        return [(tensor, then.get(tensor.name)) for tensor in self.pruning.pruned]

    def plain(self) -> dict[str, Any]:
        """As JSON values."""
        program = self.restored.program
        return {
            "out": self.out,
            "sha256": program.sha256,
            "edits": len(program.edits),
            **_record(self.restored, self.pruning),
            "sparsity": _sparsity(self.pruning, self.after),
            "parameters": {"trained": self.restored.trained.best.numel(), "added": self.added},
            "certificate": self.certificate.plain() if self.certificate else None,
            "notes": list(self.notes),
        }


def restore(
    pruned: str,
    data: str | Path,
    out: str | Path,
    *,
    dense: str,
    pairs: str | Path | None = None,
    top_heads: TopHeads = None,
    components: int = COMPONENTS,
    epochs: int | None = None,
    lr: float = Schedule.lr,
    batch_size: int = Schedule.batch_size,
    head_map: str | Path | None = None,
    checkpoint: str | Path | None = None,
    picture: str | Path | None = None,
    program_only: bool = False,
    target: str | None = None,
    form: str = FORM,
    revision: str | None = None,
    dense_revision: str | None = None,
    settings: Settings = Settings(),  # noqa: B008 (frozen)
) -> Restoration | None:
    """Restores a pruned model as RestoreLCC does (arXiv 2510.21834), and writes it at `out`.

    `data` holds prompts with responses, or texts; of these a tenth is held out to stop by and a tenth to report on.
    The `top_heads` that carry most of what tells `pairs` apart (or each response from the hardest other one) are
    given a constant, half of all heads unless a number or "all" is given. It starts from `components` lost components
    of each head and is trained for `epochs` with Adam, in steps of `lr` times a head's RMS output; with 0 epochs it
    stays there. `head_map` says which dense head each head of the pruned model was, where its weights do not.
    `checkpoint` keeps the training's state, by default beside `out` until that is written; the same command goes on
    from it. With `program_only`, `out` is a program file. Returns None in all but the first of several processes.
    Raises PairsError, CheckpointError or Refused for what cannot be used, CheckFailed where restoring does not help,
    a loss is no number, or the result would not hold: nothing is written then.
    """
    out, team = Path(out), gather_team(settings.device)
    state = Path(checkpoint) if checkpoint is not None else out.with_name(out.name + STATE)
    with team.first():
        task = Task(top_heads, components, Schedule(lr, epochs, batch_size, settings.seed))
        require_place(out)
        require_folder(state)
        drawing = _drawing(picture)
        samples, contrasts = read_samples(data), read_pairs(pairs) if pairs is not None else None
        bases = open_base(dense, dense_revision), open_base(pruned, revision)
        task.count(bases[1].facts.geometry.heads // bases[1].facts.head_dim * bases[1].facts.geometry.layers)
        if not program_only:
            _require_foldable(bases[1], target, form)
        pruning = examine(bases[0].layout, bases[1].layout, Path(head_map) if head_map is not None else None)
    models = Models(*bases, pruning)
    found = find_restoration(models, samples, contrasts, task, state, settings, team)
    if found is None:
        return None
    if program_only:
        found.program.save(out)
        report = Restoration(str(out), found, pruning, None, None, None, found.notes)
    else:
        report = _write(found, models, out, target, form, Path(data), task, settings)
    state.unlink(missing_ok=True)
    drawing(found)
    return report


def _write(
    found: Restored,
    models: Models,
    out: Path,
    target: str | None,
    form: str,
    data: Path,
    task: Task,
    settings: Settings,
) -> Restoration:
    compiled = Compiled.of(found.program, models.pruned, target, form)
    dtype, note = _certificate_dtype(models.pruned, settings)
    texts = take_tokens(found.texts, CERTIFIED_TOKENS)
    zeros: list[tuple[TensorSparsity, ...]] = []

    def measure(folder: Path) -> Measured:
        after = _zeros_after(compiled, models, folder)
        zeros.extend([after] if after is not None else [])
        return Measured({"sparsity": _sparsity(models.pruning, after)}, recovery=recovery_table(found))

    def certify(folder: Path) -> Certificate:
        return compiled.certify(folder, texts, dtype, settings.device)

    extra = {"restore": _record(found, models.pruning) | _origin(models, data, task)}
    certificate = write_compiled(compiled, out, certify=certify, measure=measure, extra=extra)
    after = zeros[0] if zeros else None
    notes = (*found.notes, *note, *compiled.plan.notes)
    return Restoration(str(out), found, models.pruning, after, _added(out, models), certificate, notes)


def _require_foldable(base: Base, target: str | None, form: str) -> None:
    """Refused, before any model is run, where what will be found could not be written."""
    if form == "gguf":
        find_converter()
    geometry = base.facts.geometry
    anything = [Shift(layer, "heads", np.ones(geometry.heads)) for layer in range(geometry.layers)]
    try:
        Compiled.of(Program.of(anything, model=geometry), base, target, form)
    except Refused as error:
        raise Refused(f"{error}; or write the program alone with --program-only") from None


def _drawing(picture: str | Path | None) -> Callable[[Restored], None]:
    """What draws the heads, if they are to be drawn; refused now if they cannot be."""
    if picture is None:
        return lambda _: None
    file = Path(picture)
    require_picture(file)

    def draw(found: Restored) -> None:
        heads = found.trained.shifts.heads
        if found.importance is None:  # a note says why
            return
        chosen = np.zeros(found.importance.shape, bool)
        chosen[heads[:, 0], heads[:, 1]] = True
        draw_heads(found.importance, chosen, file)

    return draw


def _certificate_dtype(base: Base, settings: Settings) -> tuple[str, tuple[str, ...]]:
    """As stored, or what the user names: in float32 a model of 16 bits would take twice its size."""
    stored = stored_dtype(base.path)
    if settings.dtype != "auto" or stored == "float32":
        return settings.dtype, ()
    return "auto", (f"the certificate is measured in {stored}, as stored; --dtype float32 measures it more finely",)


def _zeros_after(compiled: Compiled, models: Models, folder: Path) -> tuple[TensorSparsity, ...] | None:
    """The zeros of what was written, once it is sure that none of the pruned model's is missing.

    None for the forms gguf and model-code, which copy the matrices, and which `verify` compares with the base.
    """
    if not isinstance(compiled.plan, Plan):
        return None
    checkpoint = Checkpoint.open(folder)
    written = Layout.of(checkpoint, facts_of(folder.name, checkpoint.config))
    moved = OutputLayout(models.pruned.layout, compiled.plan.form).moved
    kept = kept_zeros(models.pruned.checkpoint, written, moved)
    if kept.filled:
        name, count = kept.filled[0]
        raise CheckFailed(f"{name}: {count} values that pruning made zero would not be zero any more; report this")
    return kept.after


def _added(out: Path, models: Models) -> int:
    before, after = (
        sum(math.prod(tensor.shape) for tensor in checkpoint.tensors.values())
        for checkpoint in (models.pruned.checkpoint, Checkpoint.open(out))
    )
    return after - before


def _record(found: Restored, pruning: Pruning) -> dict[str, Any]:
    """How the program was found and what it brings, for report and manifest."""
    trained, (fit, stop, test) = found.trained, found.samples
    return {
        "loss": found.loss.plain(),
        "accuracy": found.accuracy.plain() if found.accuracy else None,
        "heads": trained.shifts.heads.tolist(),
        "importance": found.importance.tolist() if found.importance is not None else None,
        "components": trained.shifts.directions.shape[2],
        "steps": trained.step,
        "best_step": trained.best_step,
        "held_out_losses": [[step, loss] for step, loss in trained.losses.items()],
        "samples": {"fitted": fit, "stopped_by": stop, "reported_on": test},
        "pruning": pruning.kind,
    }


def _origin(models: Models, data: Path, task: Task) -> dict[str, Any]:
    """For the manifest alone: what it was made with."""
    schedule = task.schedule
    return {
        "dense": models.dense.describe(),
        "data": sha256_of(data),
        "top_heads": task.top_heads,
        "lr": schedule.lr,
        "epochs": schedule.epochs,
        "batch_size": schedule.batch_size,
        "seed": schedule.seed,
    }


def _sparsity(pruning: Pruning, after: Sequence[TensorSparsity] | None) -> list[dict[str, Any]]:
    """Of each matrix of the pruned model: its zeros before, and after if it was written."""
    then = {tensor.name: tensor for tensor in after or ()}
    rows: list[dict[str, Any]] = []
    for tensor in pruning.pruned:
        same = then.get(tensor.name)
        now = {"zeros_after": same.zeros, "pattern_after": same.pattern} if same else {}
        rows.append({**tensor.plain(), **now})
    return rows


def recovery_table(found: Restored) -> list[tuple[str, str, str, str, str]]:
    """What is back, for people."""
    figures = {"loss, nats per token": found.loss, "accuracy on contrasts": found.accuracy}
    rows: list[tuple[str, str, str, str, str]] = []
    for name, figure in figures.items():
        if figure is not None:
            share = "-" if figure.share is None else f"{figure.share:.1%}"
            rows.append((name, f"{figure.dense:.4f}", f"{figure.pruned:.4f}", f"{figure.restored:.4f}", share))
    return rows
