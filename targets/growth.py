"""Tensors with more rows or columns than in the base: the old bytes as they are, and new ones between or after."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from austeer.compiler.edits import Floats
from austeer.compiler.rewrite import BLOCK, Segment, stored_values
from austeer.compiler.tensors import TensorInfo, nbytes_of
from austeer.targets.chunks import Insertion, Zeros


@dataclass(frozen=True)
class Growth:
    """A tensor of the output that is one of the base, or a part of one, with more rows or more columns.

    `start`: where what it grows from begins in the base's file. `values` makes the first of the new rows or columns
    (None: there are none); the others are zero.
    """

    name: str
    tensor: TensorInfo
    start: int
    old: tuple[int, ...]
    new: tuple[int, ...]
    values: Callable[[], Floats] | None

    @property
    def nbytes(self) -> int:
        """How many bytes are new."""
        return nbytes_of(self.tensor.dtype, self.new) - nbytes_of(self.tensor.dtype, self.old)

    @property
    def axis(self) -> int:
        """Along which it grows."""
        return 0 if self.new[0] != self.old[0] else 1

    def insertions(self) -> Iterator[Insertion]:
        """The new bytes, in file order."""
        values = None if self.values is None else self.values()
        return self._columns(values) if self.axis else self._rows(values)

    def _rows(self, rows: Floats | None) -> Iterator[Insertion]:
        end, missing = self.start + nbytes_of(self.tensor.dtype, self.old), self.nbytes
        values = np.zeros(0, np.float32) if rows is None else rows.reshape(-1)
        for first in range(0, len(values), BLOCK):
            segment = self._segment(values[first : first + BLOCK])
            missing -= len(segment.data)
            yield Insertion(end, segment)
        yield Insertion(end, Zeros(missing))

    def _columns(self, values: Floats | None) -> Iterator[Insertion]:
        rows, missing = self.old[0], self.nbytes // self.old[0]
        step = nbytes_of(self.tensor.dtype, self.old) // rows
        for row in range(rows):
            end, given = self.start + (row + 1) * step, 0
            if values is not None:
                segment = self._segment(values[row])
                given = len(segment.data)
                yield Insertion(end, segment)
            yield Insertion(end, Zeros(missing - given))

    def _segment(self, values: Floats) -> Segment:
        stored, rounding = stored_values(values, self.tensor)
        return Segment(0, stored.tobytes(), rounding)
