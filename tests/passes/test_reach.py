"""Strengths for wanted drifts, on made-up drift curves."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from austeer.passes.reach import CLOSE, LEAP, TRIES, Drift, Trial, at, next_alpha, reach


def measuring(drift: Callable[[int, float], float], seen: list[int] | None = None) -> Drift:
    def measure(trials: Sequence[Trial]) -> list[Trial]:
        if seen is not None:
            seen.append(len(trials))
        return [replace(trial, drift=drift(trial.point["k"], trial.alpha)) for trial in trials]

    return measure


@pytest.mark.parametrize("scale", [1e-4, 1e-2, 0.3, 5.0])
@pytest.mark.parametrize("power", [1.5, 2.0, 3.0])
@pytest.mark.parametrize("goal", [0.01, 0.1, 2.0])
def test_the_drift_comes_close_to_what_is_wanted(scale: float, power: float, goal: float) -> None:
    curve = measuring(lambda k, alpha: k * scale * alpha**power)
    for trial in reach([({"k": k}, goal) for k in (1, 2, 4)], [], curve):
        assert goal / CLOSE <= trial.drift <= goal * CLOSE**0.25


def test_all_points_are_measured_together_and_only_while_they_are_off() -> None:
    seen: list[int] = []
    found = reach([({"k": 1}, 1.0), ({"k": 2}, 0.5)], [], measuring(lambda k, alpha: alpha**2 / k, seen))
    assert seen == [2]
    assert [trial.alpha for trial in found] == [1.0, 1.0]


def test_a_neighbour_that_is_known_says_where_to_begin() -> None:
    known = [Trial({"k": 1, "site": "ffn"}, 2.0, 0.1), Trial({"k": 16, "site": "ffn"}, 0.5, 0.1)]
    assert next_alpha({"k": 2, "site": "ffn"}, 0.4, [], known) == pytest.approx(4.0)
    assert next_alpha({"k": 9, "site": "ffn"}, 0.1, [], known) == pytest.approx(0.5)
    heads = Trial({"k": 200, "site": "heads"}, 7.0, 0.1)
    assert next_alpha({"k": 1, "site": "heads"}, 0.1, [], [*known, heads]) == pytest.approx(7.0)


def test_a_wall_of_drift_is_closed_in_on() -> None:
    (found,) = reach([({"k": 1}, 0.1)], [], measuring(lambda _, alpha: 0.001 if alpha < 7 else 50.0))
    assert found.drift == 0.001
    assert 1 < found.alpha < 7


@pytest.mark.parametrize("drift", [0.0, math.inf])
def test_components_without_influence_or_without_bound_end_the_search(drift: float) -> None:
    alphas: list[float] = []

    def measure(trials: Sequence[Trial]) -> list[Trial]:
        alphas.extend(trial.alpha for trial in trials)
        return [replace(trial, drift=drift) for trial in trials]

    reach([({"k": 1}, 0.1)], [], measure)
    ratios = [after / before for before, after in itertools.pairwise(alphas)]
    assert ratios == pytest.approx([LEAP if drift == 0 else 1 / LEAP] * (TRIES - 1))


def test_a_given_alpha_is_measured_once_for_each_point() -> None:
    seen: list[int] = []
    known = [Trial({"k": 1}, 8.0, 0.25)]
    found = at(8.0, [{"k": 2}, {"k": 1}, {"k": 2}], known, measuring(lambda k, _: float(k), seen))
    assert [trial.drift for trial in found] == [2.0, 0.25, 2.0]
    assert seen == [1]
