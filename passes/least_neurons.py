"""least_neurons: gated edits → the same edits in the place of the neurons that contribute least to their FFN.

A neuron j adds x_j d_j to what its FFN writes, with x_j its activation and d_j its column of the down projection.
What it contributes is the energy of that, the mean of x_j² |d_j|² over the tokens of some texts. Without the least
contributing ones of the layers that have gates, and with those that carry the gates instead, no shape changes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from austeer.compiler.edits import Edit
from austeer.compiler.errors import Refused, UsageError
from austeer.compiler.facts import ModelFacts
from austeer.compiler.forward import run_texts
from austeer.compiler.gates import Gated
from austeer.compiler.interpreter import interpret
from austeer.compiler.live import live_facts, port, weight_of
from austeer.compiler.program import Program
from austeer.compiler.progress import track
from austeer.compiler.tokens import Tokens
from austeer.compiler.watch import watching
from austeer.passes.gate_neurons import named_neurons

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Reuse:
    """A program whose gated edits replace neurons, and what that loses.

    `lost`: for each layer with gates the contributions of the neurons that go, over the energy of what its FFN
    writes. It is as if they were uncorrelated; what it means for the model only a measurement can tell.
    """

    program: Program
    lost: Mapping[int, float]


def least_neurons(model: "PreTrainedModel", program: Program, texts: Sequence[Tokens]) -> Reuse:
    """Chooses the neurons that the gated edits replace, by what they contribute on texts under the program.

    What an edit at site neurons adds to them does not count, for it is not lost. Those that a Scale or Rank1
    without a gate is about are not taken. Ties: the lower neuron. Raises UsageError for no texts, Refused for an
    edit whose neurons are not fitted, or a layer that has too few neurons to give.
    """
    if not texts:
        raise UsageError("the contributions of neurons need at least one text to be measured on")
    facts = live_facts(model)
    program = _with(program, {})
    needed = _needed(program)
    found = _measure(model, facts, program, list(needed), texts)
    chosen = {layer: _least(layer, count, found[layer], program.edits) for layer, count in needed.items()}
    lost = {layer: found[layer].share(places) for layer, places in chosen.items()}
    return Reuse(_with(program, chosen), lost)


class _Energies:
    """Running sums over tokens, in float64: x_j² for each neuron of a layer, and |y|² of what the FFN writes."""

    def __init__(self, columns: NDArray[np.float64]) -> None:
        self.columns = columns  # |d_j|²
        self.neurons: Any = 0.0
        self.written: Any = 0.0

    def see_neurons(self, x: "Tensor") -> None:
        """Takes in activations [..., neurons]."""
        self.neurons += x.double().square().flatten(0, -2).sum(0)

    def see_written(self, y: "Tensor") -> None:
        """Takes in what the FFN writes."""
        self.written += y.double().square().sum()

    @property
    def contributions(self) -> NDArray[np.float64]:
        """Σ x_j² |d_j|² for each neuron."""
        return self.neurons.cpu().numpy() * self.columns

    def share(self, places: Sequence[int]) -> float:
        """What some neurons contribute, of all that is written."""
        return float(self.contributions[list(places)].sum() / max(float(self.written), np.finfo(float).tiny))


def _needed(program: Program) -> dict[int, int]:
    """How many neurons the gated edits of each layer need."""
    needed: dict[int, int] = {}
    for edit in program.gated.values():
        if not edit.count:
            raise Refused(f"{edit.where}: no neurons are fitted to it, so none can be put in the place of others")
        needed[edit.layer] = needed.get(edit.layer, 0) + edit.count
    return needed


def _measure(
    model: "PreTrainedModel", facts: ModelFacts, program: Program, layers: Sequence[int], texts: Sequence[Tokens]
) -> dict[int, _Energies]:
    found = {layer: _Energies(_squared_columns(model, facts, layer)) for layer in layers}
    inputs = [(port(model, facts, layer, "neurons"), energies.see_neurons) for layer, energies in found.items()]
    outputs = [(port(model, facts, layer, "ffn"), energies.see_written) for layer, energies in found.items()]
    with watching([*inputs, *outputs]), interpret(model, program):  # seen first, before edits at these sites
        for text in track(texts, "Measuring neurons", len(texts)):
            run_texts(model, [text])
    return found


def _squared_columns(model: "PreTrainedModel", facts: ModelFacts, layer: int) -> NDArray[np.float64]:
    """|d_j|² of the down projection, [neurons]."""
    projection = port(model, facts, layer, "neurons").module
    weight = weight_of(projection, transposed=facts.architecture.transposed)
    return weight.double().square().sum(0).cpu().numpy()


def _least(layer: int, count: int, energies: _Energies, edits: Sequence[Edit]) -> list[int]:
    """The neurons of a layer that contribute least, in rising order."""
    kept = {neuron for edit in edits if edit.layer == layer for neuron in named_neurons(edit)}
    ranked = np.argsort(energies.contributions, kind="stable").tolist()
    free = [neuron for neuron in ranked if neuron not in kept]
    if len(free) < count:
        raise Refused(
            f"layer {layer}: its gates need {count} neurons, and of {len(ranked)} only {len(free)} may be replaced; "
            "append neurons instead, or gate fewer edits there"
        )
    return sorted(free[:count])


def _with(program: Program, chosen: Mapping[int, Sequence[int]]) -> Program:
    """The program whose gated edits replace these neurons of their layers, in program order."""
    left = {layer: iter(places) for layer, places in chosen.items()}
    edits: list[Edit] = []
    for edit in program.edits:
        if isinstance(edit, Gated):
            places = tuple(next(left[edit.layer]) for _ in range(edit.count)) if left else ()
            edits.append(replace(edit, replaces=places))
        else:
            edits.append(edit)
    return replace(program, edits=tuple(edits))
