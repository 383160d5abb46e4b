"""The choice of k and α: the best accuracy on held-out pairs within a limit of drift."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from austeer.compiler.errors import UsageError
from austeer.compiler.facts import Geometry
from austeer.compiler.live import live_facts
from austeer.compiler.measure import Effect, drifts, effects
from austeer.compiler.program import Program
from austeer.compiler.tokens import PairTokens, Tokens
from austeer.passes.localize import Scores, select

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MOST_UNITS = 256
ROUNDS = 5  # drift measurements per k, at most
CLOSE = 0.8  # an α whose drift is this part of the limit is as strong as need be
LEAP = 32.0  # the most that α changes from one measurement to the next


@dataclass(frozen=True)
class Trial:
    """One (k, α) and its drift on neutral text; the effect on held-out pairs where the drift is within the limit."""

    k: int
    alpha: float
    drift: float
    effect: Effect | None = None


@dataclass(frozen=True)
class Search:
    """All trials in order of k and α, the base's effect, and the winner: None where nothing beats the base."""

    table: tuple[Trial, ...]
    base: Effect
    best: Trial | None


def search(
    model: "PreTrainedModel",
    scores: Scores,
    held_out: Sequence[PairTokens],
    neutral: Sequence[Tokens],
    *,
    max_drift: float,
    top_k: int | None = None,
    alpha: float | None = None,
    batch_tokens: int,
) -> Search:
    """Tries k = 1, 2, 4, ... (or `top_k`), each with the strongest α (or `alpha`) within `max_drift` nats per token.

    Drift grows about with α², so each measurement says where to look next. `scores` must not have seen
    `held_out`. Raises UsageError for a `max_drift` that is not positive.
    """
    if not max_drift > 0:
        raise UsageError(f"the drift limit must be positive, got {max_drift}")
    geometry = live_facts(model).geometry
    trials = _climb(model, scores, neutral, geometry, _counts(scores, top_k), alpha, max_drift, batch_tokens)
    within = [trial for trial in trials if trial.drift <= max_drift]
    programs = [None, *(select(scores, trial.k, trial.alpha, geometry) for trial in within)]
    base, *found = effects(model, held_out, programs, batch_tokens)
    measured = [Trial(t.k, t.alpha, t.drift, effect) for t, effect in zip(within, found, strict=True)]
    table = sorted([*measured, *(t for t in trials if t.drift > max_drift)], key=lambda t: (t.k, t.alpha))
    return Search(tuple(table), base, None)


def _counts(scores: Scores, top_k: int | None) -> list[int]:
    if top_k is not None:
        return [top_k]
    return [1 << power for power in range(min(MOST_UNITS, scores.beta.size).bit_length())]


def _climb(model, scores, neutral, geometry, counts, alpha, limit, batch_tokens) -> list[Trial]:
    tried: list[Trial] = []
    wanted = {k: alpha or 1.0 for k in counts}
    for _ in range(1 if alpha else ROUNDS):
        programs = [select(scores, k, strength, geometry) for k, strength in wanted.items()]
        found = drifts(model, neutral, programs, batch_tokens)
        tried += [Trial(k, a, drift) for (k, a), drift in zip(wanted.items(), found, strict=True)]
        wanted = {k: a for k in counts if (a := _next_alpha([t for t in tried if t.k == k], limit))}
        if not wanted:
            break
    return tried


def _next_alpha(tried: list[Trial], limit: float) -> float | None:
    within = max((t for t in tried if t.drift <= limit), key=lambda t: t.alpha, default=None)
    beyond = min((t for t in tried if t.drift > limit), key=lambda t: t.alpha, default=None)
    if within and within.drift >= CLOSE * limit:
        return None
    target = (1 + CLOSE) / 2 * limit
    if within and beyond:
        part = math.log(target / max(within.drift, 1e-12)) / math.log(beyond.drift / max(within.drift, 1e-12))
        return within.alpha * (beyond.alpha / within.alpha) ** min(max(part, 0.1), 0.9)
    near = within or beyond
    assert near
    return near.alpha * min(max(math.sqrt(target / max(near.drift, 1e-12)), 1 / LEAP), LEAP)
