"""Whether a GGUF holds the tensors of a compiled checkpoint: they are found by name and compared value by value."""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from austeer.compiler.checkpoint import Checkpoint
from austeer.compiler.facts import ModelFacts
from austeer.compiler.gguf import KINDS, Gguf
from austeer.compiler.tensors import TensorInfo, from_float32, storage_dtype, to_float32
from austeer.targets.gguf_names import Place, dialect_of, place_of

_BLOCK = 2**22  # values compared at once


def differences(gguf: Gguf, checkpoint: Checkpoint, facts: ModelFacts, changed: Iterable[str]) -> Iterator[str]:
    """What is wrong in a GGUF made of a checkpoint with these facts: its architecture, block count, changed tensors.

    A value is right if it is that of the checkpoint, cast once to the type that the GGUF has for the tensor.
    """
    dialect = dialect_of(facts.geometry.architecture)
    found = gguf.metadata.get("general.architecture")
    if dialect is None or found != dialect.name:
        yield f"the architecture is {found!r}, not {dialect.name if dialect else None!r}"
        return
    blocks = gguf.metadata.get(f"{dialect.name}.block_count")
    if blocks != facts.geometry.layers:
        yield f"there are {blocks} blocks, not {facts.geometry.layers}"
    for name in changed:
        place = place_of(name, transposed=facts.architecture.transposed)
        problem = _difference(gguf, checkpoint.tensors[name], place) if place.same else None
        if problem:
            yield f"{place.name} {problem}"


def _difference(gguf: Gguf, tensor: TensorInfo, place: Place) -> str | None:
    there = gguf.tensors.get(place.name)
    if there is None:
        return "is missing"
    if there.kind not in KINDS.values():
        return f"is quantised ({there.kind})"
    values = _mapped(TensorInfo(there.name, gguf.path, there.kind, there.shape, there.offset, there.nbytes))
    values = values if place.expert is None else values[place.expert]
    expected = _mapped(tensor)
    expected = expected.T if place.transposed else expected
    if values.shape != expected.shape:
        return f"has shape {list(values.shape)}, not {list(expected.shape)}"
    same = all(
        np.array_equal(values[rows], _cast(expected[rows], tensor.dtype, there.kind)) for rows in _blocks(values)
    )
    return None if same else "does not hold the values of the compiled checkpoint"


def _mapped(tensor: TensorInfo) -> NDArray[Any]:
    return np.memmap(tensor.file, storage_dtype(tensor.dtype), "r", tensor.offset, tensor.shape)


def _cast(stored: NDArray[Any], old: str, new: str) -> NDArray[Any]:
    return stored if old == new else from_float32(to_float32(np.ascontiguousarray(stored), old), new)


def _blocks(values: NDArray[Any]) -> Iterator[slice]:
    step = max(1, _BLOCK * len(values) // max(1, values.size))
    return (slice(first, first + step) for first in range(0, len(values), step))
