"""The arithmetic of a patch: the changed bytes of one tensor, block by block, straight from the file.

Everything is elementwise float32, and sums over a fixed tree, so that equal inputs give equal bytes on
every machine: no BLAS, whose order of summation is its own affair.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from io import BufferedReader
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from austeer.compiler.edits import Floats
from austeer.compiler.errors import CheckpointError
from austeer.compiler.patch import Affine
from austeer.compiler.tensors import TensorInfo, from_float32, storage_dtype, to_float32

BLOCK = 2**18
"""Values held at once: 1 MB in float32, so that they and a few temporaries stay in the processor's cache."""

Index: TypeAlias = NDArray[np.int64] | slice  # a slice is all
Part: TypeAlias = tuple[Index, Index]
ALL = slice(None)
OVERFLOWING = np.errstate(over="ignore", invalid="ignore")  # what is not finite then is an error in stored_values


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
        return _runs(np.flatnonzero(self.changed))

    @property
    def changed(self) -> NDArray[np.bool_]:
        """For each stored row whether it changes."""
        changed = np.zeros(self.shape[0], bool)
        for rows, _ in self._parts:
            changed[rows] = True
        return changed

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
        with self.tensor.file.open("rb") as file:
            for start, end in self.runs:
                for first, last in _blocks(start, end, self.shape[1]):
                    yield self._segment(file, first, last)

    def rows(self, runs: Sequence[tuple[int, int]] | None = None) -> Iterator[tuple[slice, Floats]]:
        """The base matrix in float32, as blocks of stored rows [rows, stored columns]: all, or those in `runs`."""
        with self.tensor.file.open("rb") as file:
            for start, end in [(0, self.shape[0])] if runs is None else runs:
                for first, last in _blocks(start, end, self.shape[1]):
                    yield slice(first, last), to_float32(self._read(file, first, last), self.tensor.dtype)

    def _segment(self, file: BufferedReader, first: int, last: int) -> Segment:
        stored = self._read(file, first, last)
        places = [place for part in self._parts if not _is_empty(place := _within(part, first, last))]
        # Parts may overlap: each is computed from the base, so all are, before any is stored.
        changes = [(place, *self._changed(stored, first, place)) for place in places]
        for place, new, _ in changes:
            stored[_cross(place)] = new
        rounding = max((error for _, _, error in changes), default=0.0)
        return Segment(self.offset + first * self.row_bytes, stored.data.cast("B"), rounding)

    def _changed(self, stored: NDArray[Any], first: int, place: Part) -> tuple[NDArray[Any], float]:
        """The new stored values at a place in the block that begins at row `first`, and their rounding."""
        rows, columns = place
        base = to_float32(stored[_cross(place)], self.tensor.dtype)
        absolute = slice(first, first + len(stored)) if isinstance(rows, slice) else rows + first
        return stored_values(self._rewritten(base, absolute, columns), self.tensor)

    @OVERFLOWING
    def _rewritten(self, base: Floats, first: Any, second: Any) -> Floats:
        """W' = (a⊙W + U Vᵀ)⊙s on some stored rows and columns."""
        rows, columns = (second, first) if self.transposed else (first, second)
        weight = base.T if self.transposed else base
        weight = weight * self.form.a[rows, None]
        for v, k in self.form.terms:
            term = v[rows, None] * k[None, columns]
            term[term == 0] = -0.0  # x + -0.0 keeps every bit of x, +0.0 does not
            weight += term
        weight *= self.form.s[None, columns]
        return weight.T if self.transposed else weight

    def _read(self, file: BufferedReader, first: int, last: int) -> NDArray[Any]:
        file.seek(self.offset + first * self.row_bytes)
        data = bytearray((last - first) * self.row_bytes)
        if file.readinto(data) != len(data):
            raise CheckpointError(f"{self.tensor.file}: ends inside {self.tensor.name}; did it change meanwhile?")
        kind = storage_dtype(self.tensor.dtype)
        return np.frombuffer(data, kind).reshape(last - first, self.shape[1])

    @cached_property
    def _parts(self) -> list[Part]:
        """Stored rows × stored columns that together hold all changes; they may overlap."""
        form = self.form
        parts: list[Part] = [(_indices(form.a != 1), ALL), (ALL, _indices(form.s != 1))]
        if form.terms:
            v, k = (np.any(np.stack(side), axis=0) for side in zip(*form.terms, strict=True))
            parts.append((_indices(v), _indices(k)))
        if self.transposed:
            parts = [(second, first) for first, second in parts]
        return [part for part in parts if not _is_empty(part)]


@OVERFLOWING
def constant(matrix: Matrix, bias: TensorInfo | None) -> Floats:
    """b' = a⊙(b + W t) + U(Vᵀt) + u, float32 [out]; b is 0 where there is no bias yet."""
    form = matrix.form
    new = stored_vector(bias).astype(np.float64) if bias else np.zeros(len(form.a))
    if form.t.any():
        new += product(matrix, form.t)
    new *= form.a
    for v, k in form.terms:
        new += v.astype(np.float64) * tree_sum(k.astype(np.float64) * form.t, axis=0)
    return (new + form.u).astype(np.float32)


def stored_vector(tensor: TensorInfo) -> Floats:
    """All values of a tensor, flat; for vectors only."""
    with tensor.file.open("rb") as file:
        file.seek(tensor.offset)
        return to_float32(file.read(tensor.nbytes), tensor.dtype)


def whole(tensor: TensorInfo, values: Floats) -> Segment:
    """The bytes of a whole tensor that is to hold these values."""
    data, rounding = stored_values(values, tensor)
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


def recycle_blocks() -> None:
    """Makes malloc keep the memory of freed blocks for the next ones, where it can learn that (glibc).

    Else each array of a block costs fresh pages from the kernel, which take longer than the arithmetic on them.
    """
    # glibc takes the largest array freed so far as the measure of what is worth keeping; this one is never touched.
    np.empty(16 * BLOCK * 4, np.uint8)


def _indices(changed: NDArray[np.bool_]) -> Index:
    return ALL if changed.all() else np.flatnonzero(changed)


def _is_empty(part: Part) -> bool:
    return any(not isinstance(index, slice) and not index.size for index in part)


def _within(part: Part, first: int, last: int) -> Part:
    """What of a part lies in the rows first..last, counted from `first`."""
    rows, columns = part
    if not isinstance(rows, slice):
        rows = rows[np.searchsorted(rows, first) : np.searchsorted(rows, last)] - first
    return rows, columns


def _cross(place: Part) -> Any:
    """What numpy takes for all combinations of these rows and columns."""
    rows, columns = place
    return place if isinstance(rows, slice) or isinstance(columns, slice) else np.ix_(rows, columns)


def _runs(indices: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Maximal ranges [start, end) of consecutive indices."""
    if not indices.size:
        return []
    breaks = np.flatnonzero(np.diff(indices) > 1) + 1
    return [(int(part[0]), int(part[-1]) + 1) for part in np.split(indices, breaks)]


def _blocks(start: int, end: int, width: int) -> Iterator[tuple[int, int]]:
    step = max(1, BLOCK // max(1, width))
    for first in range(start, end, step):
        yield first, min(end, first + step)
