"""Restoring on live models: the dense one says what was lost, then the pruned one learns what to add."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, TypeAlias

from austeer.compiler.activation_memory import affordable_tokens
from austeer.compiler.certificate import stored_dtype
from austeer.compiler.edits import Floats
from austeer.compiler.errors import PairsError
from austeer.compiler.forward import longest_text
from austeer.compiler.live import live_facts, load_model, load_tokenizer
from austeer.compiler.measure import applied
from austeer.compiler.pairs import Pair
from austeer.compiler.program import Program
from austeer.compiler.pruning import Pruning, require_same_tokenizer
from austeer.compiler.recovery import Recovery
from austeer.compiler.response_loss import mean_loss
from austeer.compiler.responses import Response, Sample, encode_responses, split_samples
from austeer.compiler.team import Team
from austeer.compiler.tokens import Tokens
from austeer.compiler.verbs.bases import Base
from austeer.compiler.verbs.common import Settings, chat_notice
from austeer.compiler.verbs.lost import DenseView, Lost, accuracy, ask_dense, ask_pruned, contrasts_of
from austeer.compiler.verbs.task import Task
from austeer.passes.head_shifts import HeadShifts
from austeer.passes.search import digest
from austeer.passes.train_shifts import Trained, train_shifts
from austeer.passes.training_state import StateFile

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


Parts: TypeAlias = tuple[tuple[Sample, ...], ...]
"""Samples to fit to, to stop by and to report on."""


@dataclass(frozen=True)
class Models:
    """The dense and the pruned model, and what was done to make the one of the other."""

    dense: Base
    pruned: Base
    pruning: Pruning


@dataclass(frozen=True, eq=False)
class Restored:
    """The program, what it recovers, how important every head is [layers, heads], and how the chosen were trained.

    `samples` counts those fitted to, stopped by and reported on; `texts` are the last, which nothing was fitted to.
    """

    program: Program
    trained: Trained
    loss: Recovery
    accuracy: Recovery | None
    importance: Floats | None
    samples: tuple[int, int, int]
    texts: list[Tokens]
    notes: tuple[str, ...]

    @property
    def heads(self) -> list[list[int]]:
        """[layer, head] of every head that is compensated."""
        return self.trained.shifts.heads.tolist()

    @property
    def learned(self) -> int:
        """How many numbers were trained."""
        return self.trained.best.numel() if self.trained.step else 0


@dataclass(frozen=True)
class _Material:
    """The samples to fit to, to stop by and to report on, as tokens of at most `length`."""

    parts: tuple[tuple[Response, ...], ...]
    length: int
    notes: tuple[str, ...]


def find_restoration(
    models: Models,
    samples: Sequence[Sample],
    pairs: Sequence[Pair] | None,
    task: Task,
    state: Path,
    settings: Settings,
    team: Team,
) -> Restored | None:
    """Runs the dense and then the pruned model, one in memory at a time, and trains what the heads lack.

    The first process of a team prepares and reports; all of them train, and the others return None. Raises PairsError
    for samples that are too few, CheckFailed where a loss is no number.
    """
    with team.first():
        parts = split_samples(samples, settings.seed)
        tokenizer = load_tokenizer(models.pruned.path)
        require_same_tokenizer(load_tokenizer(models.dense.path), tokenizer)
    with TemporaryDirectory(prefix="austeer-") as folder:
        scratch = Path(folder)
        view = team.share(lambda: _view_dense(models, tokenizer, parts, pairs, scratch, settings, team))
        with team.first():
            model = _load(models.pruned, settings, team)
            settings = _sparing(settings, model)
            material = _material(model, tokenizer, parts, settings)
        lost = team.share(lambda: ask_pruned(model, view, task, scratch, settings))
    file = StateFile(state, _identity(models, material, task))
    trained = _train(model, lost.shifts, material, task, file, settings, team)
    return _judge(model, trained, view, lost, material, settings) if team.leads else None


def _view_dense(
    models: Models,
    tokenizer: "PreTrainedTokenizerBase",
    parts: Parts,
    pairs: Sequence[Pair] | None,
    scratch: Path,
    settings: Settings,
    team: Team,
) -> DenseView:
    model = _load(models.dense, settings, team)
    settings = _sparing(settings, model)
    material = _material(model, tokenizer, parts, settings)
    fit, _, test = parts
    contrasts = contrasts_of(model, tokenizer, pairs, fit, test, material.length, settings)
    return ask_dense(model, contrasts, material.parts[2], models.pruning, scratch, settings.batch_tokens)


def _load(base: Base, settings: Settings, team: Team) -> "PreTrainedModel":
    """As stored, for files that are mapped take no memory of their own; but float16, which no gradient survives."""
    dtype = settings.dtype
    if dtype == "auto" and stored_dtype(base.path) == "float16":
        dtype = "bfloat16"
    return load_model(base.path, dtype=dtype, device=team.device or settings.device)


def _sparing(settings: Settings, model: "PreTrainedModel") -> Settings:
    """With as many tokens of a pass as have room beside the model."""
    return replace(settings, batch_tokens=affordable_tokens(model, settings.batch_tokens))


def _material(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", parts: Parts, settings: Settings
) -> _Material:
    length = min(settings.length_for(model.config.to_dict()), longest_text(model))
    encoded, notes = encode_responses(tokenizer, list(chain(*parts)), length, settings.chat)
    found = {response.where: response for response in encoded}
    kept = tuple(tuple(found[one.where] for one in part if one.where in found) for part in parts)
    for responses, purpose in zip(kept, ("fit to", "stop by", "report on"), strict=True):
        if not responses:
            raise PairsError(
                f"no sample is left to {purpose}: of their responses nothing lies within {length} tokens; give more "
                "samples, or a larger --max-length"
            )
    return _Material(kept, length, (*chat_notice(tokenizer, settings), *notes))


def _identity(models: Models, material: _Material, task: Task) -> dict[str, str]:
    """What a training's state belongs to; its length and its learning rate may change."""
    tokens = [[(response.prefix, response.own) for response in part] for part in material.parts]
    return {
        "model": digest([models.dense.describe(), models.pruned.describe()]),
        "data": digest(tokens),
        "heads": str(task.top_heads),
        "components": str(task.components),
        "batch size": str(task.schedule.batch_size),
        "seed": str(task.schedule.seed),
    }


def _train(
    model: "PreTrainedModel",
    shifts: HeadShifts,
    material: _Material,
    task: Task,
    file: StateFile,
    settings: Settings,
    team: Team,
) -> Trained:
    if task.schedule.epochs == 0:
        return Trained.untrained(shifts)
    fit, stop, _ = material.parts
    return train_shifts(model, shifts, fit, stop, task.schedule, file, batch_tokens=settings.batch_tokens, team=team)


def _judge(
    model: "PreTrainedModel",
    trained: Trained,
    view: DenseView,
    lost: Lost,
    material: _Material,
    settings: Settings,
) -> Restored:
    """What is back, on samples and pairs that nothing was fitted to."""
    program = trained.shifts.program(trained.best, live_facts(model).geometry)
    test, judged, batch_tokens = material.parts[2], view.contrasts.judged, settings.batch_tokens
    before, right = mean_loss(model, test, batch_tokens), accuracy(model, judged, None, batch_tokens)
    with applied(model, program):
        loss = Recovery(view.loss, before, mean_loss(model, test, batch_tokens))
    restored = accuracy(model, judged, program, batch_tokens)
    hits = None
    if view.accuracy is not None and right is not None and restored is not None:
        hits = Recovery(view.accuracy, right, restored, rising=True)
    notes = (*material.notes, *view.contrasts.notes, *lost.notes)
    counts = len(material.parts[0]), len(material.parts[1]), len(test)
    texts = [response.text for response in test]
    return Restored(program, trained, loss, hits, lost.importance, counts, texts, notes)
