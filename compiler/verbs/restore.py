"""restore: pruned model + the dense one it was + samples → the pruned model with what its heads lost, in biases."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from austeer.compiler.certificate import Certificate
from austeer.compiler.edits import Shift
from austeer.compiler.errors import CheckFailed, Refused, UsageError
from austeer.compiler.head_map import head_counts
from austeer.compiler.live import WIDENED
from austeer.compiler.manifest import sha256_of
from austeer.compiler.pairs import read_pairs
from austeer.compiler.program import Program
from austeer.compiler.pruning import examine
from austeer.compiler.responses import read_samples
from austeer.compiler.staging import require_folder, require_place
from austeer.compiler.team import gather_team
from austeer.compiler.tokens import take_tokens
from austeer.compiler.verbs.baked import Baked, Zeros, parameters_added, zeros_of, zeros_record
from austeer.compiler.verbs.bases import Base, open_base
from austeer.compiler.verbs.common import FORM, Compiled, Measured, Settings, write_compiled
from austeer.compiler.verbs.heads_picture import draw_heads
from austeer.compiler.verbs.picture import require_picture
from austeer.compiler.verbs.restoration import Restoration, record, recovery_table
from austeer.compiler.verbs.restoring import Models, Restored, find_restoration
from austeer.compiler.verbs.task import Task, TopHeads
from austeer.passes.schedule import Schedule
from austeer.targets.llama_cpp import find_converter

COMPONENTS = 10
CERTIFIED_TOKENS = 2048
STATE = ".training.safetensors"


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
    `checkpoint` keeps the training's state, by default in a file beside `out` that goes when `out` is there; the same
    command goes on from it. With `program_only`, `out` is a program file.

    Returns None in all but the first of several processes.
    Raises PairsError, CheckpointError or Refused for what cannot be used, CheckFailed where restoring does not help,
    a loss is no number, or the result would not hold: nothing is written then.
    """
    out, team = Path(out), gather_team(settings.device)
    state = Path(checkpoint) if checkpoint is not None else out.with_name(out.name + STATE)
    with team.first():
        if checkpoint is not None and epochs == 0:
            raise UsageError("--checkpoint keeps a training, and with --epochs 0 there is none")
        task = Task(top_heads, components, Schedule(lr, epochs, batch_size, settings.seed))
        require_place(out)
        require_folder(state)
        drawing = _drawing(picture)
        samples, contrasts = read_samples(data), read_pairs(pairs) if pairs is not None else None
        bases = open_base(dense, dense_revision), open_base(pruned, revision)
        task.count(head_counts(bases[1].facts)[0] * bases[1].facts.geometry.layers)
        if not program_only:
            _require_foldable(bases[1], target, form)
        pruning = examine(bases[0].layout, bases[1].layout, Path(head_map) if head_map is not None else None)
    models = Models(*bases, pruning)
    found = find_restoration(models, samples, contrasts, task, state, settings, team)
    if found is None:
        return None
    passing = [state] if checkpoint is None else []
    doubts = _require_help(found, task, passing)
    if program_only:
        found.program.save(out)
        report = Restoration(str(out), found, pruning, None, found.notes)
    else:
        compiled = Compiled.of(found.program, models.pruned, target, form)
        report = _write(found, models, compiled, out, _origin(models, Path(data), task), settings)
    _remove(passing)
    drawing(found)
    return replace(report, notes=(*report.notes, *doubts))


def _write(
    found: Restored, models: Models, compiled: Compiled, out: Path, origin: dict[str, Any], settings: Settings
) -> Restoration:
    texts = take_tokens(found.texts, CERTIFIED_TOKENS)
    pruning, added = models.pruning, parameters_added(compiled.plan, models.pruned.layout)
    zeros: list[Zeros] = []

    def measure(folder: Path) -> Measured:
        zeros.extend(zeros_of(compiled, pruning, folder))
        return Measured({"sparsity": zeros_record(zeros)}, recovery=recovery_table(found))

    def certify(folder: Path) -> Certificate:
        return compiled.certify(folder, texts, WIDENED, settings.device)

    extra = {"restore": {**record(found, pruning, added), **origin}}
    certificate = write_compiled(compiled, out, certify=certify, measure=measure, extra=extra)
    assert certificate is not None
    notes = (*found.notes, *compiled.plan.notes)
    return Restoration(str(out), found, pruning, Baked(added, tuple(zeros), certificate), notes)


def _require_help(found: Restored, task: Task, passing: Sequence[Path]) -> tuple[str, ...]:
    """CheckFailed where training did not help, and then the state of it goes: who tries again begins anew.

    Without training that is a note.
    """
    loss = found.loss
    if loss.restored < loss.pruned:
        return ()
    worse = f"the held-out loss is {loss.pruned:.4f} nats per token without it and {loss.restored:.4f} with it"
    if task.schedule.epochs == 0:
        return (f"the lost components alone do not help: {worse}; train them (leave out --epochs 0)",)
    _remove(passing)
    advice = "Nothing was written. Give more data, more --epochs, or another --lr"
    raise CheckFailed(f"restoring does not help: {worse}. {advice}")


def _remove(files: Sequence[Path]) -> None:
    for file in files:
        file.unlink(missing_ok=True)


def _require_foldable(base: Base, target: str | None, form: str) -> None:
    """Refused, before any model is run, where what will be found could not be written."""
    geometry = base.facts.geometry
    different = np.arange(1, geometry.heads + 1)  # in every head: what is alike may have more ways
    anything = [Shift(layer, "heads", different) for layer in range(geometry.layers)]
    try:
        Compiled.of(Program.of(anything, model=geometry), base, target, form)
    except Refused as error:
        raise Refused(f"{error}\nOr write the program alone with --program-only") from None
    if form == "gguf":
        find_converter()


def _drawing(picture: str | Path | None) -> Callable[[Restored], None]:
    """What draws the heads, if they are to be drawn; refused now if they cannot be."""
    if picture is None:
        return lambda _: None
    file = Path(picture)
    require_picture(file)

    def draw(found: Restored) -> None:
        if found.importance is not None:  # else a note says why
            chosen = np.zeros(found.importance.shape, bool)
            chosen[tuple(np.transpose(found.heads))] = True
            draw_heads(found.importance, chosen, file)

    return draw


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
