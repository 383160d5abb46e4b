"""Strengths for wanted drifts: α such that a program drifts about as far as it is to."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from austeer.compiler.measure import Score
from austeer.passes.study import Point

START = 1.0  # the first α: each unit about doubled
CLOSE = 1.2  # a drift within this factor of the wanted one will do
TRIES = 4  # measurements for one trial, at most
LEAP = 32.0  # the most that α changes from one measurement to the next, as a factor
TINY_DRIFT = 1e-12  # for logarithms; far below float32 noise
APART = 10.0  # the distance of points that differ in a word: farther than numbers are


@dataclass(frozen=True)
class Trial:
    """A point and its α: the drift on neutral text and, where that is within the limit, the effect."""

    point: Point
    alpha: float
    drift: float = math.nan
    effect: Score | None = None


Drift = Callable[[Sequence[Trial]], list[Trial]]
"""Fills in the drift of trials."""


def reach(wanted: Sequence[tuple[Point, float]], known: Sequence[Trial], drift: Drift) -> list[Trial]:
    """For each point and drift, a trial that drifts about so far; all of them are measured together.

    log drift is taken as linear in log α: from the nearest of the `known` trials with slope 2, as for small changes,
    then with the slope that the trials of the point itself give.
    """
    tried: list[list[Trial]] = [[] for _ in wanted]
    for _ in range(TRIES):
        open_ = [number for number, (_, goal) in enumerate(wanted) if not any(_close(t, goal) for t in tried[number])]
        trials = [Trial(wanted[n][0], next_alpha(*wanted[n], tried[n], known)) for n in open_]
        for number, trial in zip(open_, drift(trials) if trials else (), strict=True):
            tried[number].append(trial)
    return [
        min(trials, key=lambda t: (_off(t, goal), -t.alpha)) for trials, (_, goal) in zip(tried, wanted, strict=True)
    ]


def at(alpha: float, points: Sequence[Point], known: Sequence[Trial], drift: Drift) -> list[Trial]:
    """A trial of each point with the given α; what is known or comes twice is not measured again."""
    old = [trial.point for trial in known]
    new = [point for number, point in enumerate(points) if point not in old and point not in points[:number]]
    found = [*known, *(drift([Trial(point, alpha) for point in new]) if new else ())]
    return [next(trial for trial in found if trial.point == point) for point in points]


def next_alpha(point: Point, goal: float, tried: Sequence[Trial], known: Sequence[Trial]) -> float:
    """Where to look for `goal`: between two trials of the point, beyond them, or as far from its nearest neighbour."""
    if not tried and not known:
        return START
    if not tried:
        nearest, others = min(known, key=lambda t: (_distance(t.point, point), _off(t, goal))), []
    else:
        below = sorted((t for t in tried if t.drift <= goal), key=lambda t: -t.alpha)
        above = sorted((t for t in tried if t.drift > goal), key=lambda t: t.alpha)
        if below and above and below[0].alpha < above[0].alpha:
            return _between(below[0], above[0], goal)
        nearest, *others = above or below
    leap = (math.log(goal) - _log_drift(nearest)) / _slope(nearest, others)
    return nearest.alpha * math.exp(min(max(leap, -math.log(LEAP)), math.log(LEAP)))


def _between(below: Trial, above: Trial, goal: float) -> float:
    low, high = _log_drift(below), _log_drift(above)
    part = min(max((math.log(goal) - low) / (high - low), 0.1), 0.9)
    return below.alpha * (above.alpha / below.alpha) ** part


def _close(trial: Trial, goal: float) -> bool:
    return _off(trial, goal) <= math.log(CLOSE)


def _off(trial: Trial, goal: float) -> float:
    """How far a drift is from the wanted one, in logarithms; one beyond it counts four times as far."""
    off = _log_drift(trial) - math.log(goal)
    return 4 * off if off > 0 else -off


def _distance(one: Point, other: Point) -> float:
    return sum(_apart(one[name], other[name]) for name in one)


def _apart(one: str | float, other: str | float) -> float:
    if isinstance(one, str) or isinstance(other, str):
        return APART * (one != other)
    return abs(math.log(one / other))


def _slope(nearest: Trial, others: Sequence[Trial]) -> float:
    """d log drift / d log α, kept between 1/2 and 4."""
    if not others or nearest.alpha == others[0].alpha:
        return 2.0
    rise = _log_drift(nearest) - _log_drift(others[0])
    return min(max(rise / math.log(nearest.alpha / others[0].alpha), 0.5), 4.0)


def _log_drift(trial: Trial) -> float:
    return math.log(min(max(trial.drift, TINY_DRIFT), 1 / TINY_DRIFT))
