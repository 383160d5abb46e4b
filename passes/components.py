"""The space of programs that edit the first k components of a ranking."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from austeer.compiler.facts import Geometry
from austeer.compiler.program import Program
from austeer.passes.study import Dimension, Point, Range

MOST = 256  # components


class Ranking(Protocol):
    """What a find pass knows of a model: its components (units, heads, neurons) by how much they matter."""

    @property
    def size(self) -> int:
        """The number of components."""
        ...

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know, one sentence each."""
        ...

    def within(self, layers: Collection[int]) -> "Ranking":
        """The ranking of these layers alone."""
        ...

    def select(self, k: int, alpha: float, model: Geometry) -> Program:
        """The program that edits the first k components with strength α."""
        ...


@dataclass(frozen=True)
class Components:
    """The first k components of one of several rankings, by site.

    `top_k` where k is given; else k goes up to 256, or what the smallest ranking holds.
    """

    rankings: Mapping[str, Ranking]
    model: Geometry
    top_k: int | None = None

    @property
    def dimensions(self) -> Mapping[str, Dimension]:
        """Site and k."""
        counts = Range(1, self._most) if self.top_k is None else (self.top_k,)
        return {"site": tuple(self.rankings), "k": counts}

    @property
    def starts(self) -> Sequence[Point]:
        """k = 1, 2, 4, ..., dealt out to the sites."""
        counts = [self.top_k] if self.top_k else [1 << power for power in range(self._most.bit_length())]
        sites = list(self.rankings)
        many = max(len(counts), len(sites))
        return [{"site": sites[n % len(sites)], "k": counts[n % len(counts)]} for n in range(many)]

    @property
    def notes(self) -> tuple[str, ...]:
        """Those of the rankings."""
        return tuple(dict.fromkeys(note for ranking in self.rankings.values() for note in ranking.notes))

    @property
    def _most(self) -> int:
        return min(MOST, *(ranking.size for ranking in self.rankings.values()))

    def program(self, point: Point, alpha: float) -> Program:
        """The point's components with strength α."""
        return self.rankings[point["site"]].select(point["k"], alpha, self.model)

    def size(self, point: Point) -> int:
        """k."""
        return point["k"]
