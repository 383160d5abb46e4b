"""Repeated measurements taken in turns, and what they say about a ratio."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from time import perf_counter, process_time

import numpy as np

INTERVAL = "95% bootstrap interval of the median"


@dataclass(frozen=True)
class Estimate:
    """A median, and its interval."""

    value: float
    low: float
    high: float


def interleaved(
    measures: Mapping[str, Callable[[], float]], rounds: int, until: float = inf, least: int = 3
) -> dict[str, list[float]]:
    """Every measure once a round, each round beginning with the next one.

    What drifts (clock, cache, other jobs) then meets all of them alike. After the moment `until` (perf_counter)
    no new round begins, once there are `least`.
    """
    names = list(measures)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        if number >= least and perf_counter() > until:
            break
        for name in np.roll(names, -number).tolist():
            samples[name].append(measures[name]())
    return samples


def seconds(work: Callable[[], object], clock: Callable[[], float] = perf_counter) -> float:
    """The time of one call, by the wall clock if no other is given."""
    start = clock()
    work()
    return clock() - start


def clock_for(device: str) -> Callable[[], float]:
    """How to time a model: by the wall clock, but on the CPU by this process's own processor time.

    There one thread does nothing but compute, so that on an idle machine the two agree, and on a busy one only the
    second means anything.
    """
    return process_time if device == "cpu" else perf_counter


def estimate(values: Sequence[float]) -> Estimate:
    """The median of some measurements."""
    given = np.asarray(values)
    drawn = np.random.default_rng(0).choice(given, (2000, len(given)))
    low, high = np.percentile(np.median(drawn, axis=1), (2.5, 97.5))
    return Estimate(float(np.median(given)), float(low), float(high))


def ratio(above: Sequence[float], below: Sequence[float]) -> Estimate:
    """The median over the rounds of one measurement divided by another of the same round."""
    return estimate([a / b for a, b in zip(above, below, strict=True)])
