"""The choice of k and α: the best accuracy on held-out pairs within a limit of drift."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from austeer.compiler.errors import UsageError
from austeer.compiler.facts import Geometry
from austeer.compiler.live import live_facts
from austeer.compiler.measure import Effect, drifts, effects
from austeer.compiler.program import Program
from austeer.compiler.tokens import PairTokens, Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MOST_UNITS = 256
START = 1.0  # the first α: each unit about doubled
ROUNDS = 6  # drift measurements per k, at most
CLOSE = 0.8  # with this part of the limit used up, α is as strong as need be
LEAP = 32.0  # the most that α changes from one measurement to the next, as a factor
TINY_DRIFT = 1e-12  # for logarithms; far below float32 noise


class Ranking(Protocol):
    """What a find pass knows of a model: its components (units, heads, neurons) by how much they matter."""

    @property
    def size(self) -> int:
        """The number of components."""
        ...

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know, one sentence each."""
        ...

    def select(self, k: int, alpha: float, model: Geometry) -> Program:
        """The program that edits the first k components with strength α."""
        ...


@dataclass(frozen=True)
class Trial:
    """One (k, α): its drift on neutral text and, where that is within the limit, its effect on held-out pairs."""

    k: int
    alpha: float
    drift: float
    effect: Effect | None = None


@dataclass(frozen=True)
class Search:
    """The trials in order of k and α, the base's effect, and the winner: None where none beats the base's accuracy.

    A trial that drives the model to infinity is left out.
    """

    table: tuple[Trial, ...]
    base: Effect
    best: Trial | None


def search(
    model: "PreTrainedModel",
    ranking: Ranking,
    held_out: Sequence[PairTokens],
    neutral: Sequence[Tokens],
    *,
    max_drift: float,
    top_k: int | None = None,
    alpha: float | None = None,
    batch_tokens: int,
) -> Search:
    """Tries k = 1, 2, 4, ... (or `top_k`), each up to the strongest α (or at `alpha`) within `max_drift`.

    The winner has the best accuracy on `held_out` pairs, which `ranking` must not have seen; among equals the
    largest margin. `max_drift` is in nats per token of `neutral`. Raises UsageError unless it is positive.
    """
    if not max_drift > 0:
        raise UsageError(f"the drift limit must be a positive number of nats per token, got {max_drift}")
    geometry = live_facts(model).geometry

    def programs(trials: Sequence[Trial]) -> list[Program]:
        return [ranking.select(trial.k, trial.alpha, geometry) for trial in trials]

    def measured(trials: Sequence[Trial]) -> list[Trial]:
        found = drifts(model, neutral, programs(trials), batch_tokens)
        return [
            Trial(t.k, t.alpha, math.inf if math.isnan(drift) else drift)
            for t, drift in zip(trials, found, strict=True)
        ]

    counts = [top_k] if top_k is not None else _powers_of_two(min(MOST_UNITS, ranking.size))
    tried = climb(measured, counts, alpha, max_drift)
    within = [trial for trial in tried if trial.drift <= max_drift]
    base, *found = effects(model, held_out, [None, *programs(within)], batch_tokens)
    candidates = [Trial(t.k, t.alpha, t.drift, effect) for t, effect in zip(within, found, strict=True)]
    beyond = (trial for trial in tried if max_drift < trial.drift < math.inf)
    table = sorted([*candidates, *beyond], key=lambda trial: (trial.k, trial.alpha))
    return Search(tuple(table), base, best_of(candidates, base))


def climb(
    measured: Callable[[Sequence[Trial]], list[Trial]], counts: Sequence[int], alpha: float | None, limit: float
) -> list[Trial]:
    """For each k, trials up to an α whose drift is just within `limit`, and one at half of it.

    All k of a round are measured together. With `alpha` given, that one only. `measured` fills in the drift of trials.
    """
    tried: list[Trial] = []
    wanted = [Trial(k, START if alpha is None else alpha, 0.0) for k in counts]
    for _ in range(ROUNDS if alpha is None else 1):
        tried += measured(wanted)
        strengths = ((k, next_alpha([trial for trial in tried if trial.k == k], limit)) for k in counts)
        wanted = [Trial(k, strength, 0.0) for k, strength in strengths if strength is not None]
        if not wanted:
            break
    if alpha is not None:
        return tried
    strongest = {t.k: t.alpha for t in sorted(tried, key=lambda t: t.alpha) if t.drift <= limit}
    halves = [Trial(k, strength / 2, 0.0) for k, strength in strongest.items()]  # on some models less is more
    return tried + (measured(halves) if halves else [])


def next_alpha(tried: Sequence[Trial], limit: float) -> float | None:
    """Where to look next for the strongest α within `limit`, given the trials of one k; None once close enough.

    log drift is taken as linear in log α: between two trials that enclose the limit, or else beyond the nearest
    two, or, after a single one, with slope 2, as for small changes.
    """
    within = sorted((t for t in tried if t.drift <= limit), key=lambda t: -t.alpha)
    beyond = sorted((t for t in tried if not t.drift <= limit), key=lambda t: t.alpha)
    target = math.log((1 + CLOSE) / 2 * limit)
    if within and within[0].drift >= CLOSE * limit:
        return None
    if within and beyond and within[0].alpha < beyond[0].alpha:
        low, high = _log_drift(within[0]), _log_drift(beyond[0])
        part = min(max((target - low) / (high - low), 0.1), 0.9)
        return within[0].alpha * (beyond[0].alpha / within[0].alpha) ** part
    nearest, *others = beyond or within
    leap = (target - _log_drift(nearest)) / _slope(nearest, others)
    return nearest.alpha * math.exp(min(max(leap, -math.log(LEAP)), math.log(LEAP)))


def _slope(nearest: Trial, others: Sequence[Trial]) -> float:
    """d log drift / d log α, kept between 1/2 and 4."""
    if not others:
        return 2.0
    rise = _log_drift(nearest) - _log_drift(others[0])
    return min(max(rise / math.log(nearest.alpha / others[0].alpha), 0.5), 4.0)


def best_of(candidates: Sequence[Trial], base: Effect) -> Trial | None:
    """The trial with the best accuracy, then margin, then the fewest units; None if none beats the base."""
    ranked = [(t.effect.accuracy, t.effect.margin, -t.k, t) for t in candidates if t.effect]
    best = max(ranked, key=lambda entry: entry[:3], default=None)
    return best[3] if best and best[0] > base.accuracy else None


def _log_drift(trial: Trial) -> float:
    return math.log(min(max(trial.drift, TINY_DRIFT), 1 / TINY_DRIFT))


def _powers_of_two(most: int) -> list[int]:
    return [1 << power for power in range(most.bit_length())]
