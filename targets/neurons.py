"""New neurons on the tensors of a checkpoint. Appended ones make every FFN wider, by new rows and columns."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, TypeAlias

import numpy as np

from austeer.compiler.edits import Floats
from austeer.compiler.layout import OutputLayout
from austeer.compiler.patch import Affine, Neurons, Patch, Role
from austeer.compiler.rewrite import Matrix, product
from austeer.compiler.tensors import nbytes_of
from austeer.targets.growth import Growth

Part: TypeAlias = Callable[[], Floats]


def new_neurons(patch: Patch, output: OutputLayout) -> dict[str, Part]:
    """By the name of each tensor of the output that an appended neuron has a part in: that part, as it is stored.

    Parts are made when they are called for, since some need the base's weights.
    """
    return {name: part for group in by_layer(patch).values() for name, _, part in parts_of(group, output)}


def growths(output: OutputLayout, values: Mapping[str, Part]) -> Iterator[Growth]:
    """Every tensor of the base that is larger in the output, with what `new_neurons` gives for it."""
    for tensor in output.base.checkpoint.tensors.values():
        parts = output.moved[tensor.name]
        if sum(nbytes_of(tensor.dtype, shape) for _, shape in parts) == tensor.nbytes:
            continue
        pieces = [piece for name, shape in parts for piece in _pieces(output, name, shape, values.get(name))]
        step = tensor.nbytes // len(pieces)
        for number, (name, shape, part) in enumerate(pieces):
            old = (tensor.shape[0] // len(pieces), *tensor.shape[1:])
            yield Growth(name, tensor, tensor.offset + number * step, old, shape, part)


def _pieces(
    output: OutputLayout, name: str, shape: tuple[int, ...], part: Part | None
) -> Iterator[tuple[str, tuple[int, ...], Part | None]]:
    """The maps that a tensor of the output fuses, each of which grows by itself, with their parts."""
    fused = _fused(output, name)
    for number in range(fused):
        own = None if part is None else (lambda number=number: np.array_split(part(), fused)[number])
        yield name, (shape[0] // fused, *shape[1:]), own


def _fused(output: OutputLayout, name: str) -> int:
    """How many maps into neurons a tensor of the output fuses."""
    reading = (linear for linear in output.form.architecture.inputs if not linear.of_attention)
    return next((len(linear.outputs) for linear in reading if f".{linear.name}." in name), 1)


def filled_biases(output: OutputLayout, values: Mapping[str, Part]) -> dict[str, Part]:
    """The biases of the new neurons where the base has none: zero for the others."""

    def padded(name: str) -> Floats:
        whole, first = np.zeros(output.added[name].shape, np.float32), output.base.facts.geometry.neurons
        part = values[name]()
        whole[first : first + len(part)] = part
        return whole

    return {name: lambda name=name: padded(name) for name in values if name in output.added}


def neurons_lowering(patch: Patch, output: OutputLayout) -> Iterator[dict[str, Any]]:
    """The manifest's entries: each edit's own neurons; those that are zero are there for the sake of the first."""
    groups = by_layer(patch)
    if not groups:
        return
    first, width = output.base.facts.geometry.neurons, output.form.widened
    grown = {growth.name: growth for growth in growths(output, {})}
    used: dict[str, int] = {}

    def everywhere(name: str, indices: list[int]) -> list[int]:
        return [number * (first + width) + index for number in range(_fused(output, name)) for index in indices]

    for group in groups.values():
        owners = [(edit, neurons.exact) for neurons in group for edit in neurons.edits]
        for name, _, _ in parts_of(group, output):
            used[name] = len(owners)
            for edit, exact in dict.fromkeys(owners):
                own = everywhere(name, [first + index for index, (number, _) in enumerate(owners) if number == edit])
                axes = _axes(grown[name], own) if name in grown else [own]
                yield {"edit": edit, "tensor": name, "slice": axes, "exact": exact}
    edit = min(number for group in groups.values() for neurons in group for number in neurons.edits)
    for name, growth in grown.items():
        zero = everywhere(name, list(range(first + used.get(name, 0), first + width)))
        yield {"edit": edit, "tensor": name, "slice": _axes(growth, zero), "exact": True}


def _axes(growth: Growth, indices: list[int]) -> list[list[int] | None]:
    return [indices if axis == growth.axis else None for axis in range(len(growth.new))]


def by_layer(patch: Patch, *, replacing: bool = False) -> dict[int, list[Neurons]]:
    """The appended neurons of each layer that has any, or those that replace others."""
    groups: dict[int, list[Neurons]] = {}
    for neurons in patch.neurons:
        if bool(neurons.places) == replacing:
            groups.setdefault(neurons.layer, []).append(neurons)
    return groups


def parts_of(group: Sequence[Neurons], output: OutputLayout) -> Iterator[tuple[str, int, Part]]:
    """What the neurons of a layer are in each of its tensors, and how many maps of theirs the tensor fuses."""
    entry = output.form.architecture
    layer = output.slot_of(group[0].layer, attention=False)
    reading = [linear for linear in entry.inputs if not linear.of_attention]
    maps = iter(("gate", "up"))  # without a gate there is only the first
    for linear in reading:
        name, fused = output.linear_name(layer, linear), len(linear.outputs)
        own = list(islice(maps, fused))
        yield f"{name}.weight", fused, _rows(group, own, transposed=entry.transposed)
        if output.has_bias(linear):
            yield f"{name}.bias", fused, _rows(group, [f"{part}_bias" for part in own])
    name = output.linear_name(layer, entry.ffn_out)
    yield f"{name}.weight", 1, lambda: _down(group, output)


def _rows(group: Sequence[Neurons], parts: Sequence[str], *, transposed: bool = False) -> Part:
    def rows() -> Floats:
        whole = np.concatenate([getattr(neurons, part) for part in parts for neurons in group])
        return whole.T if transposed else whole

    return rows


def _down(group: Sequence[Neurons], output: OutputLayout) -> Floats:
    columns = [carried(neurons, output) for neurons in group]
    whole = np.concatenate(columns, axis=1)
    return whole.T if output.form.architecture.transposed else whole


def carried(neurons: Neurons, output: OutputLayout) -> Floats:
    """What the neurons write, [residual, n], in the residual space: through the base's projection if need be."""
    if neurons.space == "residual":
        return neurons.down
    matrix = _projection(neurons, output)
    return np.stack([product(matrix, column) for column in neurons.down.T], axis=1).astype(np.float32)


def _projection(neurons: Neurons, output: OutputLayout) -> Matrix:
    """The base's projection that reads the space of what the neurons write."""
    layout = output.base
    role: Role = "attn_out" if neurons.space == "heads" else "ffn_out"
    (tensor,) = layout.weights(neurons.layer, role)
    transposed = layout.facts.architecture.transposed
    rows, columns = layout.facts.geometry.residual, len(neurons.down)
    form = Affine.identity(neurons.layer, role, rows, columns)
    return Matrix(tensor, tensor.offset, (columns, rows) if transposed else (rows, columns), transposed, form)
