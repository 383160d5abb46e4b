"""Neurons in the place of others on the tensors of a checkpoint: rows and columns given anew, in shapes that stay."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from austeer.compiler.edits import Floats
from austeer.compiler.layout import OutputLayout
from austeer.compiler.patch import Affine, Neurons, Patch
from austeer.compiler.rewrite import Matrix, Segment, stored_values
from austeer.compiler.tensors import TensorInfo, storage_dtype
from austeer.targets.neurons import Part, by_layer, parts_of
from austeer.targets.shards import Job


@dataclass(frozen=True)
class Replaced:
    """What the new neurons of a layer are in one tensor of the output, which fuses one map of all neurons, or more.

    `values` makes it, as it is stored; the neurons are along `axis`. `width`: how many neurons the layer has.
    """

    name: str
    axis: int
    fused: int
    width: int
    group: Sequence[Neurons]
    values: Part

    @property
    def places(self) -> list[int]:
        """The rows or columns, in the order of the values."""
        return self._fused([place for neurons in self.group for place in neurons.places])

    def lowering(self, dimensions: int) -> Iterator[dict[str, Any]]:
        """The manifest's entries."""
        owners = [owner for neurons in self.group for owner in zip(neurons.edits, neurons.places, strict=True)]
        for edit in dict.fromkeys(edit for edit, _ in owners):
            own = self._fused([place for owner, place in owners if owner == edit])
            axes = [own if axis == self.axis else None for axis in range(dimensions)]
            yield {"edit": edit, "tensor": self.name, "slice": axes, "exact": False}

    def _fused(self, places: list[int]) -> list[int]:
        return [number * self.width + place for number in range(self.fused) for place in places]


@dataclass(frozen=True)
class Overwritten(Matrix):
    """A matrix of which some stored rows (axis 0) or columns (axis 1) have these values, whatever its form.

    `values` makes them when they are written: as stored, with `places` along the axis.
    """

    axis: int
    places: tuple[int, ...]
    values: Part

    @property
    def changed(self) -> NDArray[np.bool_]:
        """For each stored row whether it changes."""
        changed = super().changed
        changed[slice(None) if self.axis else list(self.places)] = True
        return changed

    def segments(self) -> Iterator[Segment]:
        """The changed stored rows, in file order. Raises CheckpointError for a non-finite result."""
        values = self.values()
        for segment in super().segments():
            yield self._with(values, segment)

    def _with(self, values: Floats, segment: Segment) -> Segment:
        stored = np.frombuffer(segment.data, storage_dtype(self.tensor.dtype)).reshape(-1, self.shape[1]).copy()
        first = (segment.offset - self.offset) // self.row_bytes
        places = np.array(self.places)
        if self.axis:
            new, rounding = stored_values(values[first : first + len(stored)], self.tensor)
            stored[:, places] = new
        else:
            here = (places >= first) & (places < first + len(stored))
            new, rounding = stored_values(values[here], self.tensor)
            stored[places[here] - first] = new.reshape(-1, self.shape[1])
        return replace(segment, data=stored.data.cast("B"), rounding=max(rounding, segment.rounding))


def replaced_neurons(patch: Patch, output: OutputLayout) -> tuple[Replaced, ...]:
    """All neurons of a patch that replace others, tensor by tensor."""
    entry, width = output.form.architecture, output.base.facts.geometry.neurons
    made: list[Replaced] = []
    for layer, group in by_layer(patch, replacing=True).items():
        down = f"{output.linear_name(output.slot_of(layer, attention=False), entry.ffn_out)}.weight"
        for name, fused, values in parts_of(group, output):
            axis = int(name.endswith(".weight") and (name == down) != entry.transposed)
            made.append(Replaced(name, axis, fused, width, group, values))
    return tuple(made)


def with_replaced(jobs: Sequence[Job], output: OutputLayout, replaced: Sequence[Replaced]) -> list[Job]:
    """The jobs and those of the replaced neurons; what changes the same tensor is one job, the neurons' part last."""
    made = {job.name: job for job in jobs}
    origins = _origins(output, {part.name for part in replaced})
    for part in replaced:
        if part.name in origins:
            made[part.name] = _job(part, made.get(part.name), *origins[part.name])
    return list(made.values())


def replaced_biases(output: OutputLayout, replaced: Sequence[Replaced]) -> dict[str, Part]:
    """The biases of the new neurons where the base has none: zero for the others."""

    def padded(part: Replaced) -> Floats:
        whole = np.zeros(output.added[part.name].shape, np.float32)
        whole[part.places] = part.values()
        return whole

    return {part.name: lambda part=part: padded(part) for part in replaced if part.name in output.added}


def replaced_lowering(replaced: Sequence[Replaced]) -> Iterator[dict[str, Any]]:
    """The manifest's entries: never exact, for what the old neurons did is lost."""
    for part in replaced:
        yield from part.lowering(1 if part.name.endswith(".bias") else 2)


Origin: TypeAlias = tuple[TensorInfo, int, tuple[int, ...]]


def _origins(output: OutputLayout, names: Collection[str]) -> dict[str, Origin]:
    """For each of these tensors that comes from the base: from which, where it begins, its stored shape."""
    found: dict[str, Origin] = {}
    for tensor in output.base.checkpoint.tensors.values():
        parts = output.moved[tensor.name]
        for number, name in ((number, name) for number, (name, _) in enumerate(parts) if name in names):
            start = tensor.offset + number * (tensor.nbytes // len(parts))
            found[name] = tensor, start, (tensor.shape[0] // len(parts), *tensor.shape[1:])
    return found


def _job(part: Replaced, job: Job | None, tensor: TensorInfo, start: int, shape: Sequence[int]) -> Job:
    rows, columns = (*shape, 1)[:2]
    if job is not None:
        (old,) = job.matrices
    else:
        old = Matrix(tensor, start, (rows, columns), False, Affine.identity(0, "ffn_out", rows, columns))
    places = tuple(part.places)
    new = Overwritten(
        tensor, old.offset, old.shape, old.transposed, old.form, axis=part.axis, places=places, values=part.values
    )
    return Job(part.name, tensor, (new,))
