"""Appended neurons on the tensors of a checkpoint: every FFN becomes wider, by new rows and columns."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from austeer.compiler.edits import Floats
from austeer.compiler.layout import OutputLayout
from austeer.compiler.patch import Neurons, Patch
from austeer.compiler.tensors import nbytes_of
from austeer.targets.growth import Growth


def new_neurons(patch: Patch, output: OutputLayout) -> dict[str, Floats]:
    """By the name of each tensor of the output that an appended neuron has a part in: that part, as it is stored."""
    return {name: part for neurons in patch.neurons for name, part in _parts(neurons, output)}


def growths(output: OutputLayout, values: Mapping[str, Floats]) -> Iterator[Growth]:
    """Every tensor of the base that is larger in the output, with what `new_neurons` gives for it."""
    for tensor in output.base.checkpoint.tensors.values():
        parts = output.moved[tensor.name]
        if sum(nbytes_of(tensor.dtype, shape) for _, shape in parts) == tensor.nbytes:
            continue
        step = tensor.nbytes // len(parts)
        for number, (name, shape) in enumerate(parts):
            old = (tensor.shape[0] // len(parts), *tensor.shape[1:])
            yield Growth(name, tensor, tensor.offset + number * step, old, shape, values.get(name))


def filled_biases(output: OutputLayout, values: Mapping[str, Floats]) -> dict[str, Callable[[], Floats]]:
    """The biases of the new neurons where the base has none: zero for the others."""

    def padded(name: str) -> Floats:
        whole, first = np.zeros(output.added[name].shape, np.float32), output.base.facts.geometry.neurons
        whole[first : first + len(values[name])] = values[name]
        return whole

    return {name: lambda name=name: padded(name) for name in values if name in output.added}


def neurons_lowering(patch: Patch, output: OutputLayout) -> Iterator[dict[str, Any]]:
    """The manifest's entries: each edit's own neurons; those that are zero are there for the sake of the first."""
    if not patch.neurons:
        return
    first, width = output.base.facts.geometry.neurons, output.form.widened
    grown = {growth.name: growth for growth in growths(output, {})}
    used: dict[str, int] = {}
    for neurons in patch.neurons:
        for name, _ in _parts(neurons, output):
            used[name] = len(neurons.edits)
            for edit in dict.fromkeys(neurons.edits):
                own = [first + index for index, number in enumerate(neurons.edits) if number == edit]
                axes = _axes(grown[name], own) if name in grown else [own]
                yield {"edit": edit, "tensor": name, "slice": axes, "exact": neurons.exact}
    edit = min(number for neurons in patch.neurons for number in neurons.edits)
    for name, growth in grown.items():
        zero = list(range(first + used.get(name, 0), first + width))
        yield {"edit": edit, "tensor": name, "slice": _axes(growth, zero), "exact": True}


def _axes(growth: Growth, indices: list[int]) -> list[list[int] | None]:
    return [indices if axis == growth.axis else None for axis in range(len(growth.new))]


def _parts(neurons: Neurons, output: OutputLayout) -> Iterator[tuple[str, Floats]]:
    entry = output.form.architecture
    layer = output.slot_of(neurons.layer, attention=False)
    reading = [linear for linear in entry.inputs if not linear.of_attention]
    rows = [(neurons.gate, neurons.gate_bias), (neurons.up, neurons.up_bias)]
    for linear, (weight, bias) in zip(reading, rows, strict=False):  # without a gate there is only the first
        name = output.linear_name(layer, linear)
        yield f"{name}.weight", weight.T if entry.transposed else weight
        yield f"{name}.bias", bias
    name = output.linear_name(layer, entry.ffn_out)
    yield f"{name}.weight", neurons.down.T if entry.transposed else neurons.down
