"""The choice of a program: in a space of them, the best effect on held-out samples within a limit of drift."""

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from austeer.compiler.errors import UsageError
from austeer.compiler.facts import Geometry
from austeer.compiler.measure import Score, drifts
from austeer.compiler.program import Program
from austeer.compiler.tokens import Tokens
from austeer.passes.reach import Trial, at, reach
from austeer.passes.study import Dimension, Point, Range, Study

if TYPE_CHECKING:
    from transformers import PreTrainedModel

AIM = "aim"  # the dimension that stands for α: the part of the limit that the drift is to use up
AIMS = Range(0.1, 0.95, log=False)

Judge: TypeAlias = Callable[[Sequence[Program | None]], Sequence[Score]]
"""Measures the effect of programs (None: the model as it is) on samples that none of them was fitted to."""


class Space(Protocol):
    """What a search chooses from: points, each of them a program of any strength α."""

    @property
    def model(self) -> Geometry:
        """The model that the programs are for."""
        ...

    @property
    def dimensions(self) -> Mapping[str, Dimension]:
        """The choices there are."""
        ...

    @property
    def starts(self) -> Sequence[Point]:
        """The points to try first, each as strongly as the limit allows."""
        ...

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know, one sentence each."""
        ...

    def program(self, point: Point, alpha: float) -> Program:
        """The program of a point with strength α."""
        ...

    def size(self, point: Point) -> int:
        """How many components it edits: among equals the smallest wins."""
        ...


@dataclass(frozen=True)
class Search:
    """The trials in order of point and α, the base's effect, and the winner: None where none beats the base.

    A trial that drives the model to infinity is left out.
    """

    table: tuple[Trial, ...]
    base: Score
    best: Trial | None


@dataclass(frozen=True)
class Terms:
    """How to search: the limit in nats per token of neutral text, α where it is given, and the number of trials.

    `file` keeps the study, with which a later search goes on; `identity` says, part by part, what it is a study of.
    Raises UsageError for a limit that is not positive, or no trials.
    """

    max_drift: float
    alpha: float | None = None
    trials: int = 24
    seed: int = 0
    file: Path | None = None
    identity: Mapping[str, str] = field(default_factory=dict[str, str])

    def __post_init__(self) -> None:
        if not self.max_drift > 0:
            raise UsageError(f"the drift limit must be a positive number of nats per token, got {self.max_drift}")
        if self.trials < 1:
            raise UsageError(f"a search needs at least one trial, got {self.trials}")


def search(
    model: "PreTrainedModel",
    space: Space,
    judge: Judge,
    neutral: Sequence[Tokens],
    terms: Terms,
    *,
    batch_tokens: int,
) -> Search:
    """Tries the starts of the space, then what TPE makes of them; the trials of a round are measured together.

    α is no dimension of the study: a point comes with the drift that it aims at, and α follows from the drifts
    measured so far. The winner is the trial within the limit with the best effect (its first figure, then its
    second), then the fewest components. Raises InputError for a `file` that is not the study of this search.
    """

    def drift(trials: Sequence[Trial]) -> list[Trial]:
        found = drifts(model, neutral, [space.program(t.point, t.alpha) for t in trials], batch_tokens)
        return [replace(t, drift=math.inf if math.isnan(d) else d) for t, d in zip(trials, found, strict=True)]

    study = _study(space, neutral, terms)
    (base,) = judge([None])
    while asked := study.ask(terms.trials):
        known = [_trial(record, base) for record in study.settled]
        points = [{name: point[name] for name in space.dimensions} for point in asked]
        if terms.alpha is not None:
            found = at(terms.alpha, points, known, drift)
        else:
            found = reach([(p, a[AIM] * terms.max_drift) for p, a in zip(points, asked, strict=True)], known, drift)
        for point, trial in zip(asked, _judged(found, space, judge, terms.max_drift), strict=True):
            study.tell(point, _value(trial, terms.max_drift), asdict(trial))
    return _summary([_trial(record, base) for record in study.records], base, space)


def best_of(trials: Sequence[Trial], base: Score, space: Space) -> Trial | None:
    """The trial with the best effect, then the fewest components; None if none beats the base's first figure."""
    ranked = [(t.effect.rank, -space.size(t.point), t) for t in trials if t.effect]
    best = max(ranked, key=lambda entry: entry[:2], default=None)
    return best[2] if best and best[0][0] > base.rank[0] else None


def digest(value: Any) -> str:
    """SHA-256 of a value as JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _study(space: Space, neutral: Sequence[Tokens], terms: Terms) -> Study:
    dimensions = {**space.dimensions, **({} if terms.alpha is not None else {AIM: AIMS})}
    starts = [{AIM: AIMS.high, **point} if AIM in dimensions else point for point in space.starts]
    goal = [list(map(str, space.dimensions.items())), terms.max_drift, terms.alpha]
    identity = {**terms.identity, "neutral text": digest(neutral), "goal (site, k, α or drift limit)": digest(goal)}
    return Study(dimensions, starts, seed=terms.seed, file=terms.file, identity=identity)


def _judged(trials: Sequence[Trial], space: Space, judge: Judge, limit: float) -> list[Trial]:
    """The trials, those within the limit with their effects; equal ones are measured once."""
    wanted = [
        trial
        for number, trial in enumerate(trials)
        if trial.drift <= limit and trial.effect is None and trial not in trials[:number]
    ]
    effects = judge([space.program(trial.point, trial.alpha) for trial in wanted]) if wanted else ()
    found = [(trial, replace(trial, effect=effect)) for trial, effect in zip(wanted, effects, strict=True)]
    return [next((new for old, new in found if old == trial), trial) for trial in trials]


def _value(trial: Trial, limit: float) -> float:
    """One number that orders trials as `rank` does, those beyond the limit below all others by how far they are."""
    if trial.effect is None:
        return -min(trial.drift / limit, 1e6)
    first, second = trial.effect.rank
    return first + 1e-6 * second / (1 + abs(second))


def _trial(record: Mapping[str, Any], base: Score) -> Trial:
    effect = record["effect"] and replace(base, **record["effect"])
    return Trial(record["point"], record["alpha"], record["drift"], effect)


def _summary(trials: Sequence[Trial], base: Score, space: Space) -> Search:
    finite = [trial for number, trial in enumerate(trials) if trial.drift < math.inf and trial not in trials[:number]]
    table = sorted(finite, key=lambda trial: (*trial.point.values(), trial.alpha))
    return Search(tuple(table), base, best_of(table, base, space))
