"""Targets: what an inference engine does with weights that not every model of a family has, as data."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from austeer.compiler.errors import UsageError

Treatment = Literal["loads", "optional", "drops", "warns", "refuses", "differs"]
"""What happens to a bias that the stock model of the family lacks.

loads: honoured where config.json announces it, and then the complete set has to be there
optional: honoured wherever the tensor is, no flag needed
drops: left out without a word; the model runs unedited
warns: left out, with a line in the log
refuses: the model does not load
differs: honoured by this engine and not by transformers, so one checkpoint would be two models
"""

KEEPS: tuple[Treatment, ...] = ("loads", "optional")


@dataclass(frozen=True)
class Row:
    """How one engine treats one architecture.

    `attn`, `qkv` and `ffn` are the biases of the attention output, of queries, keys and values, and of the
    FFN. `layers`: whether a layer may be inserted, shown by a run or by reading its source. `period`: how many
    layers to insert at once, where the engine derives from a layer's index whether its attention slides. `widens`:
    whether FFNs may have another width than is usual.
    """

    attn: Treatment
    qkv: Treatment
    ffn: Treatment
    layers: bool = False
    period: int = 1
    widens: bool = True


@dataclass(frozen=True)
class Target:
    """One engine: the version its rows were established on, and a row or a reason for each architecture.

    A target of `members` is what they all keep.
    """

    name: str
    title: str
    version: str
    rows: Mapping[str, Row | str] = field(default_factory=dict[str, "Row | str"])
    members: tuple["Target", ...] = ()

    def row(self, architecture: str) -> Row | str:
        """The row, or why there is none."""
        return self.rows.get(architecture, f"{self} does not have the architecture {architecture}")

    def __str__(self) -> str:
        return f"{self.title} {self.version}".rstrip()


def widens(target: Target, architecture: str) -> bool:
    """Whether FFNs may have another width than is usual."""
    if target.members:
        return all(widens(member, architecture) for member in target.members)
    row = target.row(architecture)
    return isinstance(row, Row) and row.widens


def of_any_width(target: Target) -> Target:
    """The target as it is to programs that leave every FFN as wide as it was."""
    rows = {name: replace(row, widens=True) if isinstance(row, Row) else row for name, row in target.rows.items()}
    return replace(target, rows=rows, members=tuple(map(of_any_width, target.members)))


def target_named(name: str, known: Mapping[str, Target]) -> Target:
    """The target of this name; UsageError, naming all, if there is none."""
    if name not in known:
        raise UsageError(f"there is no target {name!r}; there are {', '.join(known)}")
    return known[name]
