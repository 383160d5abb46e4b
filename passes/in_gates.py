"""The space of programs of another space, in one of several sets of gates."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from austeer.compiler.facts import Geometry
from austeer.compiler.program import Program
from austeer.passes.search import Space
from austeer.passes.study import Dimension, Point

GATE = "gate"  # the dimension
Variant: TypeAlias = Callable[[Program], Program]


@dataclass(frozen=True)
class InGates:
    """A space and, by name, what puts a program's edits into gates."""

    inner: Space
    gates: Mapping[str, Variant]

    @property
    def model(self) -> Geometry:
        """That of the inner space."""
        return self.inner.model

    @property
    def dimensions(self) -> Mapping[str, Dimension]:
        """Those of the inner space, and the gates."""
        return {**self.inner.dimensions, GATE: tuple(self.gates)}

    @property
    def starts(self) -> Sequence[Point]:
        """Those of the inner space, the gates dealt out to them."""
        names, starts = list(self.gates), list(self.inner.starts)
        many = max(len(names), len(starts))
        return [{**starts[n % len(starts)], GATE: names[n % len(names)]} for n in range(many)]

    @property
    def notes(self) -> tuple[str, ...]:
        """Those of the inner space."""
        return self.inner.notes

    def program(self, point: Point, alpha: float) -> Program:
        """The inner program with strength α, in the point's gates."""
        return self.gates[point[GATE]](self.inner.program(_inner(point), alpha))

    def size(self, point: Point) -> int:
        """That of the inner point."""
        return self.inner.size(_inner(point))


def _inner(point: Point) -> Point:
    return {name: value for name, value in point.items() if name != GATE}
