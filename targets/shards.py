"""The files of a compiled checkpoint as streams: what is copied from the base, what is computed, what is zero."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from austeer.compiler.edits import Floats
from austeer.compiler.rewrite import BLOCK, Matrix, Segment, stored_values, whole
from austeer.compiler.tensors import TensorInfo, nbytes_of, storage_dtype
from austeer.targets.chunks import Chunk, Copy, Insertion, Zeros, spliced
from austeer.targets.growth import Growth


@dataclass(frozen=True)
class Job:
    """Everything that happens to one tensor of the base: its matrices are rewritten, or all its values are new.

    `name` is what it is called in the output.
    """

    name: str
    tensor: TensorInfo
    matrices: tuple[Matrix, ...]
    vector: Callable[[], Floats] | None = None

    @property
    def nbytes(self) -> int:
        """How many bytes are rewritten."""
        return self.tensor.nbytes if self.vector else sum(matrix.nbytes for matrix in self.matrices)

    def segments(self) -> Iterator[Segment]:
        """The new bytes, in file order."""
        if self.vector:
            yield whole(self.tensor, self.vector())
            return
        for matrix in self.matrices:
            yield from matrix.segments()


@dataclass(frozen=True)
class Fill:
    """A tensor that the base does not have: zeros, a vector, or a matrix that is zero but for its first column."""

    tensor: TensorInfo  # its offset and file are not known yet
    vector: Callable[[], Floats] | None = None

    @property
    def nbytes(self) -> int:
        """The size of the tensor."""
        return nbytes_of(self.tensor.dtype, self.tensor.shape)

    def chunks(self) -> Iterator[Chunk]:
        """The whole tensor."""
        if self.vector is None:
            yield Zeros(self.nbytes)
        elif len(self.tensor.shape) == 1:
            yield whole(self.tensor, self.vector())
        else:
            yield from self._column(self.vector())

    def _column(self, values: Floats) -> Iterator[Segment]:
        stored, rounding = stored_values(values, self.tensor)
        width = self.tensor.shape[1]
        step = max(1, BLOCK // width)
        for first in range(0, len(stored), step):
            rows = np.zeros((len(stored[first : first + step]), width), storage_dtype(self.tensor.dtype))
            rows[:, 0] = stored[first : first + step]
            yield Segment(0, rows.tobytes(), rounding)


@dataclass(frozen=True)
class Shard:
    """One file of weights in the output, made from a file of the base, or new.

    `header`: its first bytes, None where they are those of the base's file; the data of the base's file follow
    them as they are but for the `jobs`, which replace some, and the `growths`, which put new ones between them.
    A new file has `fills` instead.
    """

    name: str
    source: Path | None
    header: bytes | None
    size: int
    data_start: int = 0  # where the data begin in the source
    jobs: tuple[Job, ...] = ()
    fills: tuple[Fill, ...] = ()
    growths: tuple[Growth, ...] = ()  # in the order of their bytes, as the jobs

    def chunks(self, measure: Callable[[str, float], None] | None = None) -> Iterator[Chunk]:
        """All bytes in order; `measure` is told each changed tensor's name and its rounding error."""
        measure = measure or (lambda *_: None)
        if self.header is not None:
            yield Segment(0, self.header, 0.0)
        for fill in self.fills:
            for chunk in fill.chunks():
                if isinstance(chunk, Segment):
                    measure(fill.tensor.name, chunk.rounding)
                yield chunk
        if self.source is None:
            return
        position = 0 if self.header is None else self.data_start
        for piece in spliced(self._segments(measure), self._insertions(measure)):
            if piece.offset > position:
                yield Copy(position, piece.offset)
            if isinstance(piece, Insertion):
                yield piece.chunk
                position = piece.offset
            else:
                yield piece
                position = piece.offset + len(piece.data)
        yield Copy(position, self.source.stat().st_size)

    def _segments(self, measure: Callable[[str, float], None]) -> Iterator[Segment]:
        for job in self.jobs:
            for segment in job.segments():
                measure(job.name, segment.rounding)
                yield segment

    def _insertions(self, measure: Callable[[str, float], None]) -> Iterator[Insertion]:
        for growth in self.growths:
            for insertion in growth.insertions():
                if isinstance(insertion.chunk, Segment):
                    measure(growth.name, insertion.chunk.rounding)
                yield insertion
