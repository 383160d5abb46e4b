"""The arithmetic of a patch: the changed bytes of one tensor, block by block, straight from the file.

Everything is elementwise float32, and sums over a fixed tree, so that equal inputs give equal bytes on
every machine: no BLAS, whose order of summation is its own affair.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from austeer.compiler.edits import Floats
from austeer.compiler.errors import CheckpointError
from austeer.compiler.patch import Affine
from austeer.compiler.tensors import TensorInfo, from_float32, storage_dtype, to_float32

BLOCK = 2**22
"""Values held at once: 16 MB in float32, and a few temporaries of that size."""

Index: TypeAlias = "NDArray[np.int64] | None"


@dataclass(frozen=True)
class Segment:
    """New bytes for a place in a file; `rounding` is the largest relative error of the cast to the stored dtype."""

    offset: int
    data: bytes | memoryview
    rounding: float


@dataclass(frozen=True)
class Matrix:
    """One [out, in] matrix inside a file, stored transposed or not, with its affine form."""

    tensor: TensorInfo
    offset: int
    shape: tuple[int, int]  # as stored
    transposed: bool
    form: Affine

    @property
    def runs(self) -> list[tuple[int, int]]:
        """The ranges of stored rows that change."""
        return _runs(self._changed()[0], self.shape[0])

    @property
    def nbytes(self) -> int:
        """How many bytes `segments` rewrites: whole stored rows."""
        return sum(end - start for start, end in self.runs) * self.row_bytes

    @property
    def row_bytes(self) -> int:
        """The length of one stored row."""
        return self.shape[1] * storage_dtype(self.tensor.dtype).itemsize

    def segments(self) -> Iterator[Segment]:
        """The changed stored rows, in file order. Raises CheckpointError for a non-finite result."""
        columns = self._changed()[1]
        with self.tensor.file.open("rb") as file:
            for start, end in self.runs:
                for first, last in _blocks(start, end, self.shape[1]):
                    yield self._segment(file, first, last, columns)

    def rows(self) -> Iterator[tuple[slice, Floats]]:
        """The whole base matrix in float32, as blocks of stored rows [rows, stored columns]."""
        with self.tensor.file.open("rb") as file:
            for first, last in _blocks(0, self.shape[0], self.shape[1]):
                yield slice(first, last), to_float32(self._read(file, first, last), self.tensor.dtype)

    def _segment(self, file: IO[bytes], first: int, last: int, columns: Index) -> Segment:
        stored = self._read(file, first, last)
        kept = slice(None) if columns is None else columns
        base = to_float32(stored[:, kept], self.tensor.dtype)
        new = self._rewritten(base, slice(first, last), kept)
        stored[:, kept], rounding = stored_values(new, self.tensor)
        return Segment(self.offset + first * self.row_bytes, stored.data.cast("B"), rounding)

    def _rewritten(self, base: Floats, first: Any, second: Any) -> Floats:
        """W' = (a⊙W + U Vᵀ)⊙s on a block of the stored matrix."""
        rows, columns = (second, first) if self.transposed else (first, second)
        weight = base.T if self.transposed else base
        weight = weight * self.form.a[rows, None]
        for v, k in self.form.terms:
            term = v[rows, None] * k[None, columns]
            weight += np.where(term == 0, np.float32(-0.0), term)  # x + -0.0 keeps every bit of x, +0.0 does not
        weight *= self.form.s[None, columns]
        return weight.T if self.transposed else weight

    def _read(self, file: IO[bytes], first: int, last: int) -> NDArray[Any]:
        file.seek(self.offset + first * self.row_bytes)
        data = file.read((last - first) * self.row_bytes)
        if len(data) != (last - first) * self.row_bytes:
            raise CheckpointError(f"{self.tensor.file}: ends inside {self.tensor.name}; did it change meanwhile?")
        kind = storage_dtype(self.tensor.dtype)
        return np.frombuffer(bytearray(data), kind).reshape(last - first, self.shape[1])

    def _changed(self) -> tuple[Index, Index]:
        """The stored rows and stored columns whose product holds all changes; None is all."""
        form = self.form
        scaled_rows, scaled_columns = np.flatnonzero(form.a != 1), np.flatnonzero(form.s != 1)
        rows = _union(scaled_rows, [v for v, _ in form.terms])
        columns = _union(scaled_columns, [k for _, k in form.terms])
        changed = (None if scaled_columns.size else rows, None if scaled_rows.size else columns)
        return changed[::-1] if self.transposed else changed


def rewritten_bias(tensor: TensorInfo, matrix: Matrix) -> Segment:
    """b' = a⊙(b + W t) + U(Vᵀt) + u, as the new bytes of the whole bias."""
    form = matrix.form
    with tensor.file.open("rb") as file:
        file.seek(tensor.offset)
        bias = to_float32(file.read(tensor.nbytes), tensor.dtype)
    new = bias.astype(np.float64)
    if form.t.any():
        new += product(matrix, form.t)
    new *= form.a
    for v, k in form.terms:
        new += v * tree_sum(k.astype(np.float64) * form.t, axis=0)
    data, rounding = stored_values((new + form.u).astype(np.float32), tensor)
    return Segment(tensor.offset, data.tobytes(), rounding)


def product(matrix: Matrix, t: Floats) -> NDArray[np.float64]:
    """W t in float64, streaming the base weight; products of float32 are exact there."""
    result = np.zeros(matrix.shape[1] if matrix.transposed else matrix.shape[0])
    for rows, block in matrix.rows():
        wide = block.astype(np.float64)
        if matrix.transposed:
            result += tree_sum(wide * t[rows, None], axis=0)
        else:
            result[rows] = tree_sum(wide * t, axis=1)
    return result


def tree_sum(values: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
    """The sum along an axis by halving: elementwise additions only, so the same on every machine."""
    values = np.moveaxis(values, axis, 0)
    while len(values) > 1:
        half = len(values) // 2
        rest = values[2 * half :]
        values = np.concatenate([values[:half] + values[half : 2 * half], rest])
    return values[0] if len(values) else np.zeros(values.shape[1:])


def stored_values(new: Floats, tensor: TensorInfo) -> tuple[NDArray[Any], float]:
    """`new` cast once to the tensor's dtype, and the largest relative error of that; CheckpointError if not finite."""
    stored = from_float32(new, tensor.dtype)
    back = to_float32(stored, tensor.dtype)
    if not np.isfinite(back).all():
        raise CheckpointError(
            f"{tensor.name}: the edited values do not fit {tensor.dtype} (infinity or nan in the result); "
            "use a smaller strength, or check the base for non-finite weights"
        )
    scale = float(np.abs(new).max(initial=0.0))
    return stored, float(np.abs(back - new).max(initial=0.0)) / scale if scale else 0.0


def _union(indices: NDArray[np.int64], vectors: list[Floats]) -> NDArray[np.int64]:
    for vector in vectors:
        indices = np.union1d(indices, np.flatnonzero(vector))
    return indices


def _runs(indices: Index, length: int) -> list[tuple[int, int]]:
    """Maximal ranges [start, end) of consecutive indices."""
    if indices is None:
        return [(0, length)]
    if not indices.size:
        return []
    breaks = np.flatnonzero(np.diff(indices) > 1) + 1
    return [(int(part[0]), int(part[-1]) + 1) for part in np.split(indices, breaks)]


def _blocks(start: int, end: int, width: int) -> Iterator[tuple[int, int]]:
    step = max(1, BLOCK // max(1, width))
    for first in range(start, end, step):
        yield first, min(end, first + step)
