"""gate_neurons: gated edits → neurons of the FFN of their block, appended or in the place of others.

A smooth step is the difference of two neurons (design: g(h) = [act(z + δ) - act(z - δ)] / 2δ), so a gated shift is
exactly two: both read z, and write ± its vector / 2δ. What a gated scale or rank1 adds is not a fixed vector, and is
left to the neurons that were fitted to it.
"""

from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from austeer.compiler.edits import Edit, Rank1, Scale, Shift
from austeer.compiler.facts import ModelFacts
from austeer.compiler.form import ModelForm
from austeer.compiler.gates import Gate, Gated
from austeer.compiler.patch import Neurons
from austeer.compiler.program import Program


def gate_neurons(program: Program, facts: ModelFacts, form: ModelForm) -> tuple[Neurons, ...]:
    """The neurons of every gated edit of a legal program, in program order.

    Where the form has no FFN biases the gate's constant direction stands for them, which is approximate.
    """
    found: list[Neurons] = []
    for number, edit in enumerate(program.edits):
        if isinstance(edit, Gated):
            neurons = _neurons(number, edit)
            biased = form.routes.get((edit.layer, "ffn_out")) == "bias" or facts.has_bias(facts.architecture.ffn_out)
            neurons = neurons if biased or not needs_bias(edit) else _without_bias(neurons, edit.gate)
            # What they replace is lost, which no edit asked for.
            found.append(replace(neurons, places=edit.replaces, exact=neurons.exact and not edit.replaces))
    return tuple(found)


def needs_bias(gated: Gated) -> bool:
    """Whether its neurons have biases: the two of a shift do, those that were fitted only if they were given any."""
    fitted = gated.neurons
    return fitted is None or bool(fitted.gate_bias.any() or fitted.up_bias.any())


def most_neurons(edits: Iterable[Edit]) -> int:
    """The number of neurons that the gated edits append to a layer, in the layer with the most."""
    counts: dict[int, int] = {}
    for edit in edits:
        if isinstance(edit, Gated) and not edit.replaces:
            counts[edit.layer] = counts.get(edit.layer, 0) + edit.count
    return max(counts.values(), default=0)


def replaced(edits: Iterable[Edit]) -> dict[int, set[int]]:
    """The neurons that the gated edits replace, by layer."""
    found: dict[int, set[int]] = {}
    for edit in edits:
        if isinstance(edit, Gated) and edit.replaces:
            found.setdefault(edit.layer, set()).update(edit.replaces)
    return found


def named_neurons(edit: Edit) -> set[int]:
    """The neurons that an edit without a gate is about, which must stay. A shift of them ends in a bias."""
    if edit.site != "neurons" or not isinstance(edit, (Scale, Rank1)):
        return set()
    return set(edit.units if isinstance(edit, Scale) else edit.k.nonzero()[0].tolist())


def _neurons(number: int, gated: Gated) -> Neurons:
    fitted = gated.neurons
    if isinstance(gated.edit, Shift):
        return _step(number, gated, gated.edit)
    assert fitted is not None, gated.where
    parts = fitted.gate, fitted.gate_bias, fitted.up, fitted.up_bias, fitted.down
    return Neurons(gated.layer, *parts, edits=(number,) * fitted.count, exact=False)


def _step(number: int, gated: Gated, shift: Shift) -> Neurons:
    """The two neurons whose difference is g(h) times the vector."""
    gate, rows = gated.gate, np.stack([gated.gate.w] * 2)
    thresholds = np.array([gate.b + gate.delta, gate.b - gate.delta], np.float32)
    down = (np.stack([shift.vector, -shift.vector], axis=1) / (2 * gate.delta)).astype(np.float32)
    ones = np.ones(2, np.float32)
    return Neurons(
        gated.layer, rows, thresholds, np.zeros_like(rows), ones, down, (number, number), exact=True, space=shift.space
    )


def _without_bias(neurons: Neurons, gate: Gate) -> Neurons:
    """The same neurons with their biases as weights of the direction in which h is about 1."""
    zeros = np.zeros_like(neurons.gate_bias)
    return replace(
        neurons,
        gate=neurons.gate + np.outer(neurons.gate_bias, gate.constant),
        up=neurons.up + np.outer(neurons.up_bias, gate.constant),
        gate_bias=zeros,
        up_bias=zeros,
        exact=False,
    )
