"""The choice of k and α: the search itself on made-up drift curves, and what it reaches on a real model."""

import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest

from austeer.compiler import UsageError
from austeer.compiler.live import live_facts, load_model, load_tokenizer
from austeer.compiler.measure import Effect, drifts, effects
from austeer.compiler.pairs import read_pairs, read_texts, split_by_prompt
from austeer.compiler.tokens import PairTokens, encode_pairs, encode_texts
from austeer.passes.localize import Scores, localize
from austeer.passes.search import CLOSE, LEAP, ROUNDS, Trial, best_of, climb, search
from tests.shared import shared, tiny

BASE = Effect(0.6, 1.0)


def measuring(drift: Callable[[int, float], float]) -> Callable[[Sequence[Trial]], list[Trial]]:
    return lambda trials: [replace(trial, drift=drift(trial.k, trial.alpha)) for trial in trials]


def strongest(tried: Sequence[Trial], k: int, limit: float) -> float:
    return max(trial.alpha for trial in tried if trial.k == k and trial.drift <= limit)


@pytest.mark.parametrize("scale", [1e-4, 1e-2, 0.3, 5.0])
@pytest.mark.parametrize("power", [1.0, 2.0, 3.5])
@pytest.mark.parametrize("limit", [0.01, 0.1, 2.0])
def test_the_climb_ends_just_within_the_limit(scale: float, power: float, limit: float) -> None:
    tried = climb(measuring(lambda k, alpha: k * scale * alpha**power), [1, 2, 4], None, limit)
    for k in (1, 2, 4):
        drifts_of_k = [trial.drift for trial in tried if trial.k == k]
        assert CLOSE * limit <= max(drift for drift in drifts_of_k if drift <= limit)
        assert len(drifts_of_k) <= ROUNDS + 1
        half = next(trial.alpha for trial in tried[-3:] if trial.k == k)
        assert half * 2 == strongest(tried[:-3], k, limit)


def test_a_wall_of_drift_is_closed_in_on() -> None:
    tried = climb(measuring(lambda _, alpha: 0.001 if alpha < 7 else 50.0), [1], None, 0.1)
    inside = max(trial.alpha for trial in tried if trial.drift <= 0.1)
    outside = min(trial.alpha for trial in tried if trial.drift > 0.1)
    assert inside < 7 <= outside < 1.6 * inside


@pytest.mark.parametrize("drift", [0.0, math.inf])
def test_units_without_influence_or_without_bound_end_the_climb(drift: float) -> None:
    tried = climb(measuring(lambda *_: drift), [1], None, 0.1)
    assert len(tried) == ROUNDS + (drift == 0)
    ratios = [after.alpha / before.alpha for before, after in itertools.pairwise(tried[:ROUNDS])]
    assert ratios == pytest.approx([LEAP if drift == 0 else 1 / LEAP] * (ROUNDS - 1))


def test_a_given_alpha_is_the_only_one() -> None:
    tried = climb(measuring(lambda *_: 1.0), [1, 2], 8.0, 0.1)
    assert tried == [Trial(1, 8.0, 1.0), Trial(2, 8.0, 1.0)]


def test_the_best_has_the_accuracy_then_the_margin_then_the_fewest_units() -> None:
    trials = [
        Trial(1, 1.0, 0.1, Effect(0.7, 9.0)),
        Trial(4, 1.0, 0.1, Effect(0.8, 2.0)),
        Trial(2, 1.0, 0.1, Effect(0.8, 2.0)),
        Trial(8, 1.0, 0.1, Effect(0.8, 1.0)),
        Trial(9, 1.0, 0.9),
    ]
    assert best_of(trials, BASE) == trials[2]
    assert best_of(trials, Effect(0.8, 0.0)) is None
    assert best_of([], BASE) is None


def tiny_case() -> tuple[Any, Scores, list[PairTokens], list[tuple[int, ...]]]:
    model = tiny("llama")
    pairs = [PairTokens((1, i % 9), (i % 5 + 20,), (i % 7 + 30, 4)) for i in range(30)]
    return model, localize(model, pairs[:20], "ffn", batch_tokens=200), pairs[20:], [(1, 2, 3, 4), (7, 8, 9)]


def test_the_table_is_what_measuring_again_gives() -> None:
    model, scores, held, neutral = tiny_case()
    found = search(model, scores, held, neutral, max_drift=0.05, batch_tokens=200)
    assert {trial.k for trial in found.table} == {1, 2, 4, 8, 16, 32}
    assert list(found.table) == sorted(found.table, key=lambda trial: (trial.k, trial.alpha))
    geometry = live_facts(model).geometry
    programs = [scores.select(trial.k, trial.alpha, geometry) for trial in found.table]
    assert [trial.drift for trial in found.table] == pytest.approx(drifts(model, neutral, programs, 200), abs=1e-6)
    again = effects(model, held, [None, *programs], 200)
    assert found.base == again[0]
    for trial, effect in zip(found.table, again[1:], strict=True):
        assert trial.effect == (effect if trial.drift <= 0.05 else None)


def test_given_k_and_alpha_narrow_the_search() -> None:
    model, scores, held, neutral = tiny_case()
    only_k = search(model, scores, held, neutral, max_drift=0.05, top_k=3, batch_tokens=200)
    assert {trial.k for trial in only_k.table} == {3}
    only_alpha = search(model, scores, held, neutral, max_drift=1e9, alpha=2.5, batch_tokens=200)
    assert [(trial.k, trial.alpha) for trial in only_alpha.table] == [(k, 2.5) for k in (1, 2, 4, 8, 16, 32)]


def test_nothing_within_the_limit_means_no_winner() -> None:
    model, scores, held, neutral = tiny_case()
    found = search(model, scores, held, neutral, max_drift=1e-9, alpha=8.0, batch_tokens=200)
    assert found.best is None
    assert {trial.effect for trial in found.table} == {None}


@pytest.mark.parametrize("limit", [0.0, -1.0, math.nan])
def test_a_limit_that_is_not_positive_is_a_usage_error(limit: float) -> None:
    model, scores, held, neutral = tiny_case()
    with pytest.raises(UsageError, match="must be a positive number"):
        search(model, scores, held, neutral, max_drift=limit, batch_tokens=200)


@cache
def emotions() -> tuple[Any, Scores, Sequence[PairTokens], Sequence[PairTokens], Sequence[tuple[int, ...]]]:
    """Model, scores fitted on train prompts, the held-out train prompts, the test split, and neutral stories."""
    folder, data = shared("models/stories260K"), shared("data/tinystories_emotion.jsonl")
    model, tokenizer = load_model(folder, dtype="float32", device="cpu"), load_tokenizer(folder)
    splits = np.array([json.loads(line)["split"] for line in data.read_text().splitlines()])
    pairs = np.array(read_pairs(data), dtype=object)
    rest, held = split_by_prompt(list(pairs[splits == "train"]), seed=0)
    fit, choose, test = (encode_pairs(tokenizer, side, 512).pairs for side in (rest, held, pairs[splits == "test"]))
    neutral, _ = encode_texts(tokenizer, read_texts(shared("data/tinystories_text.jsonl"))[100:200:20], 256)
    return model, localize(model, fit, "ffn", batch_tokens=4096), choose, test, neutral


@pytest.mark.slow
@pytest.mark.parametrize(("max_drift", "goal"), [(0.1, 0.74), (0.5, 0.85)])
def test_steering_raises_the_accuracy_on_unseen_prompts(max_drift: float, goal: float) -> None:
    """Fitted and searched on the train split alone; accuracy on the test split rises from 0.69 to the goal."""
    model, scores, choose, test, neutral = emotions()
    found = search(model, scores, choose, neutral, max_drift=max_drift, batch_tokens=4096)
    assert found.best
    assert len(found.table) <= 80
    program = scores.select(found.best.k, found.best.alpha, live_facts(model).geometry)
    base, steered = effects(model, test, [None, program], 4096)
    assert base.accuracy == pytest.approx(0.69, abs=0.01)
    assert steered.accuracy >= goal
