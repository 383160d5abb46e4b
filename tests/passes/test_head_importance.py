"""Head importance: against scikit-learn head by head, on planted signals, and beside the authors' scores."""

import json
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.model_selection import PredefinedSplit, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from austeer.compiler import PairsError
from austeer.compiler.edits import Floats
from austeer.compiler.head_outputs import HeadOutputs, record, record_sides
from austeer.compiler.live import load_model, load_tokenizer
from austeer.compiler.pairs import read_pairs
from austeer.compiler.tokens import encode_pairs, encode_texts
from austeer.passes.head_importance import FOLDS, folds, head_importance, importances
from tests.shared import shared

Sample = tuple[Floats, Floats, Floats]  # prompt, positive and negative, [pairs, heads, dim]


def some_outputs(pairs: int = 60, heads: int = 5, dim: int = 4, signal: dict[int, float] | None = None) -> Sample:
    """Sides that go with their prompt, and apart by `signal` in the heads that it names."""
    generator = np.random.default_rng(3)
    prompt = generator.normal(2, 1, (pairs, heads, dim))
    sides = [prompt + generator.normal(0, 0.5, prompt.shape) for _ in range(2)]
    for head, strength in (signal or {}).items():
        sides[0][:, head] += strength
    return prompt.astype(np.float32), sides[0].astype(np.float32), sides[1].astype(np.float32)


def head_by_head(classifier: Any, sample: Sample, parts: Any, lost: Floats | float = 0.0) -> Floats:
    """The definition: one pipeline of scikit-learn for each head, lost component and all."""
    prompt, positive, negative = sample
    labels = np.repeat([1, -1], len(prompt))
    split = PredefinedSplit(np.tile(parts, 2))
    found: list[float] = []
    for head in range(prompt.shape[1]):
        restored = (prompt + lost)[:, head]
        features = np.concatenate([np.hstack([restored, side[:, head]]) for side in (positive, negative)])
        steps = make_pipeline(StandardScaler(), classifier)
        found.append(np.mean(cross_val_predict(steps, features.astype(np.float64), labels, cv=split) == labels))
    return np.array(found, dtype=np.float32)


def test_equal_to_scikit_learn_head_by_head() -> None:
    sample, parts = some_outputs(signal={1: 0.3, 3: 0.6}), folds(range(60), 0)
    np.testing.assert_array_equal(head_importance(*sample, parts), head_by_head(RidgeClassifier(), sample, parts))


def test_the_lost_component_changes_no_probe() -> None:
    """It is one constant of the head, and the probe has an intercept."""
    sample, parts = some_outputs(signal={1: 0.3}), folds(range(60), 0)
    lost = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    expected = head_by_head(RidgeClassifier(), sample, parts)
    np.testing.assert_array_equal(head_by_head(RidgeClassifier(), sample, parts, lost), expected)
    np.testing.assert_array_equal(head_importance(sample[0] + lost, *sample[1:], parts), expected)


def test_a_planted_signal_is_found() -> None:
    found = head_importance(*some_outputs(signal={1: 0.25, 3: 1.0}), folds(range(60), 0))
    assert found[3] > 0.95
    assert found[3] > found[1] > found[[0, 2, 4]].max()
    assert found[[0, 2, 4]].max() < 0.65


def test_the_prompt_helps() -> None:
    """The sides are two small steps from their prompt, which varies more: without it they cannot be told apart."""
    sample, parts = some_outputs(signal={2: 0.6}), folds(range(60), 0)
    without = head_importance(np.zeros_like(sample[0]), *sample[1:], parts)[2]
    assert head_importance(*sample, parts)[2] > without + 0.1


def test_a_head_that_puts_out_nothing_is_a_coin() -> None:
    sample = some_outputs(signal=dict.fromkeys(range(5), 0.6))
    for outputs in sample:
        outputs[:, 2] = 0
    sample[1][:, 4] = sample[2][:, 4] = 7.1  # nor what never changes
    found = head_importance(*sample, folds(range(60), 0))
    np.testing.assert_array_equal(found[[2, 4]], 0.5)
    assert found[[0, 1, 3]].min() > 0.7


def test_scale_does_not_matter() -> None:
    sample, parts = some_outputs(signal={1: 0.3}), folds(range(60), 0)
    small = [1e-4 * outputs for outputs in sample]
    np.testing.assert_allclose(head_importance(*small, parts), head_importance(*sample, parts), atol=1 / 120)


def test_folds_keep_a_prompt_together_and_are_seeded() -> None:
    groups = [f"prompt {index // 3}" for index in range(60)]
    parts = folds(groups, 1)
    assert parts.shape == (60,)
    assert (parts.reshape(20, 3) == parts[::3, None]).all()
    np.testing.assert_array_equal(np.bincount(parts), 12)
    np.testing.assert_array_equal(folds(groups, 1), parts)
    assert (folds(groups, 2) != parts).any()


def test_equal_seeds_give_equal_importance() -> None:
    sample = some_outputs(signal={1: 0.3, 3: 0.3})
    first, again, other = (head_importance(*sample, folds(range(60), seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    np.testing.assert_allclose(first, other, atol=0.15)


def test_pairs_of_one_prompt_leak_nothing() -> None:
    """Twenty copies of ten pairs of noise: a probe that has seen the copies would know them all."""
    sample = [np.repeat(outputs, 20, axis=0) for outputs in some_outputs(10, 2, 12)]
    groups = np.repeat(np.arange(10), 20)
    assert head_importance(*sample, folds(groups.tolist(), 0)).max() < 0.8
    assert head_importance(*sample, folds(range(200), 0)).min() > 0.95


@pytest.mark.parametrize("prompts", [1, 9])
def test_too_few_prompts(prompts: int) -> None:
    with pytest.raises(
        PairsError, match=rf"at least 10 different prompts, two for each of 5 folds, got {prompts}: give"
    ):
        folds([index % prompts for index in range(40)], 0)
    assert set(folds(range(2 * FOLDS), 0)) == set(range(FOLDS))


@cache
def recorded() -> tuple[list[Sample], Floats]:
    """(head outputs of each layer of the parity models, the importance of each head)."""
    folders = [shared(f"models/{name}") for name in ("stories260K-magnitude50", "stories260K")]
    pairs, tokenizer = read_pairs(shared("parity/pairs.jsonl")), load_tokenizer(folders[0])
    prompts, _ = encode_texts(tokenizer, [pair.prompt for pair in pairs], 512)
    pruned, dense = (load_model(folder, dtype="float32", device="cpu") for folder in folders)
    with TemporaryDirectory() as scratch:
        places = [Path(scratch) / name for name in ("pruned", "positive", "negative")]
        made: list[HeadOutputs] = [record(pruned, prompts, places[0], batch_tokens=4096)]
        made += record_sides(dense, encode_pairs(tokenizer, pairs, 512).pairs, *places[1:], batch_tokens=4096)
        layers = [(made[0].layer(layer), made[1].layer(layer), made[2].layer(layer)) for layer in range(5)]
        return layers, importances(made[0], made[1], made[2], [pair.prompt for pair in pairs], seed=0)


def ranks(values: Any) -> Any:
    """Of tied values the mean one."""
    flat = np.ravel(values)
    return (flat[:, None] > flat).sum(1) + (flat[:, None] == flat).sum(1) / 2


def spearman(one: Any, other: Any) -> float:
    return float(np.corrcoef(ranks(one), ranks(other))[0, 1])


def test_real_heads_as_scikit_learn_has_them() -> None:
    layers, found = recorded()
    parts = folds(range(200), 0)
    for sample, of_layer in zip(layers, found, strict=True):
        np.testing.assert_allclose(of_layer, head_by_head(RidgeClassifier(), sample, parts), atol=1.01 / 400)


def test_logistic_regression_ranks_the_heads_alike() -> None:
    layers, found = recorded()
    expected = head_by_head(LogisticRegression(max_iter=5000), layers[0], folds(range(200), 0))
    np.testing.assert_allclose(found[0], expected, atol=0.05)
    assert spearman(found[0], expected) > 0.95


def test_beside_the_authors_scores() -> None:
    """Theirs come from one random start, 30% held out and no standardisation: the order is theirs by and large."""
    authors = json.loads(shared("parity/restorelcc-stories260K-magnitude50.json").read_text())["scores"]
    assert spearman(recorded()[1], authors) > 0.65
