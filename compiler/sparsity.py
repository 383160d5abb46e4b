"""The zeros of a checkpoint's weight matrices, counted as the matrices stream by, and whether another keeps them."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from austeer.compiler.checkpoint import Checkpoint
from austeer.compiler.errors import CheckFailed, CheckpointError
from austeer.compiler.layout import Layout, Shape
from austeer.compiler.tensors import STORAGE, TensorInfo, storage_dtype

BLOCK = 2**19
"""Values held at once, in whole rows: with what is made of them less than 16 MB, whatever the dtype."""

Pattern = Literal["", "2:4", "structured"]
Zeros: TypeAlias = NDArray[np.bool_]  # [rows, columns] of a block: where it is zero, of either sign
Source: TypeAlias = tuple[TensorInfo, int]  # a tensor, and the first of its rows that is meant


@dataclass(frozen=True)
class TensorSparsity:
    """The exact zeros, of either sign, of one weight matrix (or stack of matrices).

    `pattern`: "2:4" if of any four consecutive inputs of an output at least two have the weight 0, in every row and
    group; else "structured" if the zeros are whole rows and columns; else, and where there are no zeros, "".
    """

    name: str
    shape: Shape
    zeros: int
    pattern: Pattern = ""

    @property
    def values(self) -> int:
        """How many values it has."""
        return math.prod(self.shape)

    @property
    def share(self) -> float:
        """The zeros' share of the values."""
        return self.zeros / max(1, self.values)

    def plain(self) -> dict[str, Any]:
        """As JSON values."""
        return {**asdict(self), "shape": list(self.shape), "share": self.share}


@dataclass(frozen=True)
class KeptZeros:
    """What became of a checkpoint's zeros in another.

    `filled` has name and number for each matrix of the other where values that were zero are not any more.
    """

    after: tuple[TensorSparsity, ...]
    filled: tuple[tuple[str, int], ...]


def sparsity(layout: Layout) -> tuple[TensorSparsity, ...]:
    """The zeros of every weight matrix, in the order of the file. Nothing larger than a block is in memory."""
    flipped = _transposed(layout)
    return tuple(_count(tensor, transposed=tensor.name in flipped)[0] for tensor in _matrices(layout.checkpoint))


def kept_zeros(
    before: Checkpoint, after: Layout, moved: Mapping[str, tuple[tuple[str, Shape], ...]] | None = None
) -> KeptZeros:
    """The zeros of the matrices of `after`, and which zeros of `before` are none there; both are read once.

    `moved` says what became of a tensor as `OutputLayout.moved` does; without it every name is as it was. Raises
    CheckFailed for a matrix that is gone or has another shape.
    """
    sources = dict(_sources(before, after.checkpoint, moved or {}))
    flipped = _transposed(after)
    counts = [
        _count(tensor, sources.get(tensor.name), transposed=tensor.name in flipped)
        for tensor in _matrices(after.checkpoint)
    ]
    filled = tuple((found.name, count) for found, count in counts if count)
    return KeptZeros(tuple(found for found, _ in counts), filled)


def _matrices(checkpoint: Checkpoint) -> list[TensorInfo]:
    # GPT-2 and its kin store causal masks, which are no weights, as `bias`.
    return [
        tensor
        for tensor in checkpoint.tensors.values()
        if len(tensor.shape) > 1 and tensor.nbytes and tensor.dtype in STORAGE and not tensor.name.endswith("bias")
    ]


def _transposed(layout: Layout) -> set[str]:
    """The matrices that are stored [in, out]."""
    entry, layers = layout.facts.architecture, range(layout.facts.geometry.layers)
    linears = entry.linears if entry.transposed else ()
    return {f"{layout.name(layer, linear)}.weight" for layer in layers for linear in linears}


def _sources(
    before: Checkpoint, after: Checkpoint, moved: Mapping[str, tuple[tuple[str, Shape], ...]]
) -> Iterator[tuple[str, Source]]:
    """For each matrix of `after` that comes from one of `before`, where it lies there."""
    for tensor in _matrices(before):
        parts = moved.get(tensor.name, ((tensor.name, tensor.shape),))
        rows = 0
        for name, shape in parts:
            found = after.tensors.get(name)
            if found is None or found.shape != shape:
                has = f"has the shape {list(found.shape)}" if found else "is not there"
                raise CheckFailed(f"{after.path}: {name} {has}, but it must have {list(shape)}, as it had; report this")
            yield name, (tensor, rows)
            rows += shape[0]
        if tensor.shape != (rows, *parts[0][1][1:]):
            names = ", ".join(name for name, _ in parts)
            raise CheckFailed(f"{after.path}: {names} cannot hold {tensor.name} {list(tensor.shape)}; report this")


def _count(tensor: TensorInfo, source: Source | None = None, *, transposed: bool) -> tuple[TensorSparsity, int]:
    """The zeros of a matrix, and how many zeros of its source it lacks."""
    tally, filled = _Tally(tensor.shape, transposed=transposed), 0
    old = _blocks(*source, tensor.shape) if source else None
    for block in _blocks(tensor, 0, tensor.shape):
        tally.see(block)
        if old:
            filled += int(np.count_nonzero(next(old) > block))
    return TensorSparsity(tensor.name, tensor.shape, tally.zeros, tally.pattern), filled


class _Tally:
    """What the blocks of a matrix add up to."""

    def __init__(self, shape: Shape, *, transposed: bool) -> None:
        self.rows, self.columns = _flat(shape)
        self.transposed = transposed
        self.zeros = self.empty_rows = 0
        self.empty_columns = np.ones(self.columns, bool)
        self.two_of_four = (self.rows if transposed else self.columns) % 4 == 0

    def see(self, block: Zeros) -> None:
        """Takes in the next rows."""
        self.zeros += int(np.count_nonzero(block))
        self.empty_rows += int(block.all(axis=1).sum())
        self.empty_columns &= block.all(axis=0)
        self.two_of_four = self.two_of_four and _two_of_four(block if self.transposed else block.T)

    @property
    def pattern(self) -> Pattern:
        """That of all blocks together."""
        if not self.zeros:
            return ""
        if self.two_of_four:
            return "2:4"
        columns = int(self.empty_columns.sum())
        whole = self.empty_rows * self.columns + columns * (self.rows - self.empty_rows)
        return "structured" if self.zeros == whole else ""


def _two_of_four(zeros: Zeros) -> bool:
    """Whether each four consecutive values along the first axis hold two zeros."""
    count = sum(zeros[start::4].astype(np.uint8) for start in range(4))
    return bool(np.all(count >= 2))


def _flat(shape: Shape) -> tuple[int, int]:
    return math.prod(shape[:-1]), shape[-1]


def _blocks(tensor: TensorInfo, start: int, shape: Shape) -> Iterator[Zeros]:
    """Where a matrix of this shape, which begins at a row of a tensor, is zero: blocks of rows, a multiple of four."""
    rows, columns = _flat(shape)
    width = storage_dtype(tensor.dtype).itemsize
    step = max(1, BLOCK // max(1, 4 * columns)) * 4
    with tensor.file.open("rb") as file:
        file.seek(tensor.offset + start * math.prod(shape[1:]) * width)
        for first in range(0, rows, step):
            count = min(step, rows - first) * columns
            raw = file.read(count * width)
            if len(raw) < count * width:
                raise CheckpointError(f"{tensor.file}: ends inside {tensor.name}; did it change meanwhile?")
            bits = np.frombuffer(raw, f"<u{width}").reshape(-1, columns)
            yield bits << 1 == 0  # all but the sign
