"""Fusion Steering: the deltas against activations taken by hand, and the programs that they make."""

from typing import Any

import numpy as np
import pytest
import torch

from austeer.compiler import PairsError, Shift, UsageError
from austeer.compiler.live import live_facts
from austeer.compiler.tokens import PairTokens
from austeer.passes.fusion import WEIGHTS, Fusion, fusion
from tests.shared import tiny

PAIRS = [
    PairTokens((1, 5, 9, 11), (20, 21, 22), (30,)),
    PairTokens((1,), (23, 24), (30, 31)),
    PairTokens((1, 7), (25,), (32,)),
]


def outputs(model: Any, text: tuple[int, ...]) -> list[Any]:
    """What each block puts out, float [layers][tokens, residual]."""
    seen: list[Any] = []
    blocks = model.model.layers
    take = lambda _m, _i, out: seen.append((out[0] if isinstance(out, tuple) else out).reshape(-1, 24))  # noqa: E731
    hooks = [block.register_forward_hook(take) for block in blocks]
    model(torch.tensor([text]))
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("batch_tokens", [7, 100])
def test_a_delta_is_the_completion_less_the_prompt(batch_tokens: int) -> None:
    model = tiny("llama")
    found = fusion(model, [*PAIRS, PairTokens((), (4, 5), (6,))], 1, batch_tokens=batch_tokens)
    expected = torch.zeros(2, 24)
    for pair in PAIRS:
        first, end = int(len(pair.prefix) > 1), len(pair.prefix)  # the first token is a sink
        for layer, stream in enumerate(outputs(model, pair.prefix + pair.positive)):
            expected[layer] += (stream[end:].mean(0) - stream[first:end].mean(0)) / len(PAIRS)
    assert found.deltas.dtype == np.float32
    np.testing.assert_allclose(found.deltas, expected.numpy(), rtol=1e-4, atol=1e-5)


def some(segments: int) -> Fusion:
    deltas = np.random.default_rng(0).normal(size=(2, 24)).astype(np.float32)
    return Fusion(deltas, live_facts(tiny("llama")).geometry, segments)


def test_one_weight_is_alpha_alone() -> None:
    full = some(1)
    assert full.dimensions == {}
    assert full.starts == [{}]
    edits = full.program({}, 0.25).edits
    assert [(edit.layer, edit.site) for edit in edits] == [(0, "residual"), (1, "residual")]
    for edit, delta in zip(edits, full.deltas, strict=True):
        assert isinstance(edit, Shift)
        np.testing.assert_allclose(edit.vector, 0.25 * delta, rtol=1e-6)
    assert full.size({}) == 2


def test_every_segment_has_its_weight() -> None:
    halves = some(2)
    assert halves.dimensions == {"weight 1": WEIGHTS, "weight 2": WEIGHTS}
    assert len(halves.starts) == 3
    first, second = halves.program({"weight 1": 0.5, "weight 2": 0.1}, 2.0).edits
    assert isinstance(first, Shift)
    assert isinstance(second, Shift)
    np.testing.assert_allclose(first.vector, halves.deltas[0], rtol=1e-6)
    np.testing.assert_allclose(second.vector, 0.2 * halves.deltas[1], rtol=1e-6)


@pytest.mark.parametrize("segments", [0, 3, -1])
def test_segments_that_the_layers_do_not_make(segments: int) -> None:
    with pytest.raises(UsageError, match=f"must be from 1 to the 2 layers, got {segments}"):
        some(segments)


def test_references_need_prompts() -> None:
    with pytest.raises(PairsError, match="no pair has a prompt"):
        fusion(tiny("llama"), [PairTokens((), (4, 5), (6,))], 1, batch_tokens=100)
