"""The neurons that contribute least: against their definition, one text at a time."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from austeer.compiler import Fitted, Gate, Gated, Program, Rank1, Refused, Scale, Shift, UsageError, interpret
from austeer.compiler.facts import Geometry, read_facts
from austeer.compiler.live import block_of, live_facts
from austeer.passes.least_neurons import Reuse, least_neurons
from tests.tiny import VARIANTS, load, on_disk, tokens

TEXTS = [tuple(row.tolist()) for row in tokens(3, 9)] + [tuple(tokens(1, 4, seed=1)[0].tolist())]
NAMES = ["llama", "gpt2", "opt", "phi3"]


def gate(model: Geometry) -> Gate:
    return Gate(np.ones(model.residual), 0.5, 2.0)


def program(model: Geometry) -> Program:
    """One gate in layer 0, two in layer 1, and edits beside them."""
    rng = np.random.default_rng(0)
    wide, k = model.residual, np.zeros(model.neurons)
    k[[2, 11]] = 1
    fitted = Fitted(np.ones((3, wide)), np.ones(3), np.zeros((3, wide)), np.zeros(3), np.ones((wide, 3)))
    return Program(
        model,
        (
            Gated(Shift(1, "ffn", rng.normal(size=wide)), gate(model)),
            Scale(1, "neurons", (0, 5, 20), (3.0, -1.0, 2.0)),
            Rank1(1, "neurons", k, np.ones(wide), 0.1),
            Shift(1, "neurons", rng.normal(size=model.neurons)),
            Gated(Scale(1, "ffn", (2,), 1.0), gate(model), fitted),
            Gated(Shift(0, "heads", rng.normal(size=model.heads)), gate(model)),
        ),
    )


def by_definition(model: Any, made: Program, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(Σ x_j² |d_j|² of each neuron, Σ |y|²) over all tokens, with every token's contributions written out."""
    facts = live_facts(model)
    projection: Any = block_of(model, facts, layer).get_submodule(facts.architecture.ffn_out.name)
    columns = projection.weight if facts.architecture.transposed else projection.weight.T  # [neurons, residual]
    rows: list[torch.Tensor] = []
    written: list[torch.Tensor] = []
    handles = [  # before those of the interpreter
        projection.register_forward_pre_hook(lambda _, args: rows.append(args[0].flatten(0, -2))),
        projection.register_forward_hook(lambda _, __, y: written.append(y.flatten(0, -2))),
    ]
    with interpret(model, made), torch.no_grad():
        for text in TEXTS:
            model(input_ids=torch.tensor([text]))
    for handle in handles:
        handle.remove()
    each = torch.cat(rows)[:, :, None] * columns  # [tokens, neurons, residual]
    return each.double().square().sum((0, 2)), torch.cat(written).double().square().sum()


@pytest.mark.parametrize("name", NAMES)
def test_those_of_least_energy_give_way_but_for_those_that_other_edits_are_about(name: str) -> None:
    base = on_disk(VARIANTS[name])
    model, made = load(base), program(read_facts(base).geometry)
    found = least_neurons(model, made, TEXTS)
    for layer, count, kept in ((0, 2, set[int]()), (1, 5, {0, 5, 20, 2, 11})):
        energies, written = by_definition(model, made, layer)
        ranked = [neuron for neuron in energies.argsort().tolist() if neuron not in kept]
        chosen = [place for edit in gated(found) if edit.layer == layer for place in edit.replaces]
        assert chosen == sorted(ranked[:count])
        share = float(energies[chosen].sum() / written)
        assert 0 < share < 1
        assert found.lost[layer] == pytest.approx(share, rel=1e-5)
    assert found.lost.keys() == {0, 1}
    assert Program(made.model, tuple(bare(found.program))) == made


def gated(found: Reuse) -> list[Gated]:
    return [edit for edit in found.program.edits if isinstance(edit, Gated)]


def bare(made: Program) -> Sequence[Any]:
    return [replace(edit, replaces=()) if isinstance(edit, Gated) else edit for edit in made.edits]


def test_a_program_that_replaces_already_is_done_anew() -> None:
    base = on_disk(VARIANTS["llama"])
    model, made = load(base), program(read_facts(base).geometry)
    first = least_neurons(model, made, TEXTS)
    assert least_neurons(model, first.program, TEXTS) == first


def test_without_gates_there_is_nothing_to_replace() -> None:
    base = on_disk(VARIANTS["llama"])
    made = Program(read_facts(base).geometry, (Scale(0, "ffn", (1,), 1.0),))
    assert least_neurons(load(base), made, TEXTS) == Reuse(made, {})


def test_a_dead_neuron_is_the_first_to_go() -> None:
    base = on_disk(VARIANTS["llama"])
    model, geometry = load(base), read_facts(base).geometry
    model.model.layers[0].mlp.down_proj.weight[:, [7, 23]] = 0
    made = Program(geometry, (Gated(Shift(0, "ffn", np.ones(geometry.residual)), gate(geometry)),))
    found = least_neurons(model, made, TEXTS)
    assert (gated(found)[0].replaces, found.lost) == ((7, 23), {0: 0.0})


def test_what_is_refused() -> None:
    base = on_disk(VARIANTS["llama"])
    model, geometry = load(base), read_facts(base).geometry
    made = program(geometry)
    with pytest.raises(UsageError, match="at least one text"):
        least_neurons(model, made, [])
    bare_scale = Program(geometry, (Gated(Scale(0, "ffn", (1,), 1.0), gate(geometry)),))
    with pytest.raises(Refused, match="gated scale at layer 0, site ffn: no neurons are fitted"):
        least_neurons(model, bare_scale, TEXTS)
    about_all = Rank1(1, "neurons", np.ones(geometry.neurons), np.ones(geometry.residual), 0.1)
    with pytest.raises(Refused, match="layer 1: its gates need 5 neurons, and of 28 only 0 may be replaced"):
        least_neurons(model, Program(geometry, (*made.edits, about_all)), TEXTS)
