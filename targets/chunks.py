"""The parts that a file of a compiled checkpoint is made of, in order: copied, computed, zero, or put in between."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TypeAlias

from austeer.compiler.rewrite import Segment


@dataclass(frozen=True)
class Copy:
    """Bytes start..end of a file of the base."""

    start: int
    end: int


@dataclass(frozen=True)
class Zeros:
    """So many zero bytes."""

    count: int


Chunk: TypeAlias = "Copy | Zeros | Segment"


@dataclass(frozen=True)
class Insertion:
    """New bytes that come before byte `offset` of a file of the base."""

    offset: int
    chunk: Zeros | Segment


def spliced(segments: Iterator[Segment], insertions: Iterator[Insertion]) -> Iterator[Segment | Insertion]:
    """Both in the order of their offsets; segments are cut where something is inserted."""
    waiting = next(insertions, None)
    for whole_segment in segments:
        segment = whole_segment
        while waiting is not None and waiting.offset < segment.offset + len(segment.data):
            head, segment = _cut(segment, waiting.offset)
            yield from head
            yield waiting
            waiting = next(insertions, None)
        yield segment
    if waiting is not None:
        yield waiting
    yield from insertions


def _cut(segment: Segment, offset: int) -> tuple[list[Segment], Segment]:
    """What of a segment comes before an offset, if anything, and what does not."""
    if offset <= segment.offset:
        return [], segment
    view, length = memoryview(segment.data), offset - segment.offset
    head = replace(segment, data=view[:length])
    return [head], replace(segment, offset=offset, data=view[length:])
