"""The compensations of heads: V·m + b by hand, and where they go."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from austeer.compiler.live import live_facts, port
from austeer.compiler.measure import applied
from austeer.passes.head_shifts import HeadShifts
from tests.shared import tiny
from tests.tiny import Tiny

# Layers, heads, dim of a head; the authors' code takes layers and heads for equally many.
SHAPES = [(2, 4, 6), (5, 2, 6), (2, 6, 4), (1, 1, 3)]


def some_shifts(chosen: list[tuple[int, int]], dim: int, k: int = 2, seed: int = 0) -> HeadShifts:
    generator = np.random.default_rng(seed)
    directions = np.linalg.qr(generator.standard_normal((len(chosen), dim, k)))[0].astype(np.float32)
    magnitudes = generator.uniform(0.1, 2, (len(chosen), k)).astype(np.float32)
    sizes = generator.uniform(0.5, 3, len(chosen)).astype(np.float32)
    return HeadShifts(np.array(chosen, np.int64).reshape(-1, 2), directions, magnitudes, sizes)


def by_hand(shifts: HeadShifts, head: int, m: Any, b: Any) -> Any:
    return sum(shifts.directions[head, :, i] * m[i] for i in range(len(m))) + b


def test_it_starts_at_the_lost_components() -> None:
    shifts = some_shifts([(0, 1), (1, 0), (1, 3)], 6)
    made = shifts.compensation(torch.from_numpy(shifts.start)).numpy()
    for head in range(3):
        wanted = by_hand(shifts, head, shifts.magnitudes[head], np.zeros(6))
        np.testing.assert_allclose(made[head], wanted, rtol=1e-5, atol=1e-6)


def test_a_compensation_is_directions_times_magnitudes_and_a_free_vector() -> None:
    """Both in units of the head's own size."""
    shifts = some_shifts([(0, 1), (1, 0)], 6, k=3)
    trained = torch.randn(2, 3 + 6, generator=torch.Generator().manual_seed(0))
    made = shifts.compensation(trained).numpy()
    for head, row in enumerate(trained.numpy()):
        wanted = by_hand(shifts, head, shifts.sizes[head] * row[:3], shifts.sizes[head] * row[3:])
        np.testing.assert_allclose(made[head], wanted, rtol=1e-5, atol=1e-6)


def test_the_sizes_are_units_and_nothing_else() -> None:
    shifts = some_shifts([(0, 1), (1, 0)], 6)
    other = replace(shifts, sizes=7 * shifts.sizes)
    made, same = (one.compensation(torch.from_numpy(one.start)) for one in (shifts, other))
    torch.testing.assert_close(made, same)


def test_gradients_are_those_of_the_formula() -> None:
    shifts = some_shifts([(0, 1), (1, 0)], 4)
    trained = torch.from_numpy(shifts.start).requires_grad_()
    weights = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    (shifts.compensation(trained) * weights).sum().backward()
    assert trained.grad is not None
    for head in range(2):
        scaled = shifts.sizes[head] * weights[head].numpy()
        wanted = np.concatenate([shifts.directions[head].T @ scaled, scaled])
        np.testing.assert_allclose(trained.grad[head].numpy(), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("layers", "heads", "dim"), SHAPES)
def test_every_head_gets_its_own_and_the_others_nothing(layers: int, heads: int, dim: int) -> None:
    every = [(layer, head) for layer in range(layers) for head in range(heads)]
    chosen = every[::-2]  # in no order
    shifts = some_shifts(chosen, dim)
    compensation = torch.randn(len(chosen), dim, generator=torch.Generator().manual_seed(0))
    made = shifts.by_layer(compensation, heads * dim)
    assert set(made) == {layer for layer, _ in chosen} == set(shifts.layers)
    for layer, head in every:
        there = made[layer][head * dim : (head + 1) * dim] if layer in made else torch.zeros(dim)
        wanted = compensation[chosen.index((layer, head))] if (layer, head) in chosen else torch.zeros(dim)
        assert torch.equal(there, wanted)


@pytest.mark.parametrize(
    "made",
    [
        Tiny("llama", layers=5, heads=2, kv_heads=1, head_dim=6, residual=20),
        Tiny("llama", layers=2, heads=5, kv_heads=5, head_dim=6, residual=20),
        Tiny("qwen3", heads=6, kv_heads=2, head_dim=8, residual=24),
        Tiny("gpt2"),
        Tiny("opt"),
    ],
    ids=lambda made: f"{made.architecture}-{made.layers}x{made.heads}",
)
def test_the_program_adds_to_the_chosen_heads_of_a_live_model(made: Tiny) -> None:
    """Seen at the output projection of every layer: GQA, and heads that are not hidden size by heads wide."""
    model = made.in_memory()
    facts = live_facts(model)
    chosen = [(made.layers - 1, made.heads - 1), (0, 0)]
    shifts = some_shifts(chosen, made.head_dim)
    trained = torch.from_numpy(shifts.start)
    program = shifts.program(trained, facts.geometry)
    assert [(edit.layer, edit.site) for edit in program.edits] == [(0, "heads"), (made.layers - 1, "heads")]
    before, after = outputs(model, facts, None), outputs(model, facts, program)
    added = after[0] - before[0]
    wanted = torch.zeros(made.heads, made.head_dim)
    wanted[0] = shifts.compensation(trained)[1]
    torch.testing.assert_close(added, wanted.flatten().expand_as(added), rtol=1e-4, atol=1e-5)
    last = program.edits[-1].arrays()["vector"].reshape(made.heads, made.head_dim)
    np.testing.assert_array_equal(last[-1], shifts.compensation(trained)[0].numpy())
    assert not last[:-1].any()


def outputs(model: Any, facts: Any, program: Any) -> list[torch.Tensor]:
    """What each layer's output projection is given, [tokens, heads · dim]."""
    seen: list[torch.Tensor] = []
    places = [port(model, facts, layer, "heads").module for layer in range(facts.geometry.layers)]
    with applied(model, program), torch.no_grad():
        hooks = [place.register_forward_pre_hook(lambda _, args: seen.append(args[0][0].clone())) for place in places]
        model(input_ids=torch.tensor([[5, 7, 9]]))
    for hook in hooks:
        hook.remove()
    return seen


def test_a_program_fits_what_was_trained_with_gradients() -> None:
    model = tiny("llama")
    shifts = some_shifts([(1, 2)], 8)
    trained = torch.from_numpy(shifts.start).requires_grad_()
    assert len(shifts.program(trained, live_facts(model).geometry).edits) == 1
