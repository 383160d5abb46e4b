"""Edits: the statements of the source language (what happens to one activation of one layer)."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from austeer.compiler.errors import ProgramError
from austeer.compiler.sites import SITES, SPACE, SiteName, Space

Floats: TypeAlias = NDArray[np.float32]


def as_vector(values: Any, what: str, dimensions: int = 1) -> Floats:
    """A private, read-only float32 copy of `values` (list, numpy array or torch tensor of any device).

    Raises ProgramError unless it is finite and has so many dimensions.
    """
    if hasattr(values, "detach"):  # a torch tensor, without importing torch for those who do not use it
        values = values.detach().cpu().float().numpy()
    try:
        if np.iscomplexobj(values):
            raise TypeError("they are complex")
        with np.errstate(over="ignore"):  # too large for float32 becomes infinite, and is refused below
            vector = np.array(values, dtype=np.float32, order="C")  # as files store it
    except (TypeError, ValueError) as error:
        raise ProgramError(f"{what}: not a vector of numbers ({error})") from None
    if vector.ndim != dimensions:
        expected = "one dimension" if dimensions == 1 else f"{dimensions} dimensions"
        raise ProgramError(f"{what}: expected {expected}, got shape {vector.shape}")
    if not np.isfinite(vector).all():
        raise ProgramError(f"{what}: holds nan or infinity; every value must be a finite float32 number")
    vector.setflags(write=False)
    return vector


def as_index(value: Any, what: str) -> int:
    """`value` as a non-negative int; ProgramError otherwise (booleans and fractions included)."""
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool) and value >= 0:
        return int(value)
    raise ProgramError(f"{what}: expected a whole number from 0, got {value!r}")


def as_number(value: Any, what: str) -> float:
    """`value` rounded to float32; ProgramError unless finite."""
    return float(as_vector([value], what)[0])


@dataclass(frozen=True, eq=False)
class Edit:
    """One change to the activation at `site` of `layer` (from 0). Equal when all fields are equal.

    A kind names its float32 vectors in `vectors`; its other fields are plain JSON values. Vectors are given as
    lists, numpy arrays or torch tensors, and kept as private, read-only arrays.
    """

    kind: ClassVar[str]
    vectors: ClassVar[tuple[str, ...]]
    sites: ClassVar[tuple[SiteName, ...]] = SITES

    layer: int
    site: SiteName

    def __post_init__(self) -> None:
        set_field(self, "layer", as_index(self.layer, f"{self.kind}: layer"))
        if self.site not in self.sites:
            raise ProgramError(f"{self.kind}: site {self.site!r} is not one of {', '.join(self.sites)}")

    @property
    def space(self) -> Space:
        """The space of this edit's site."""
        return SPACE[self.site]

    @property
    def where(self) -> str:
        """The address for messages."""
        return f"{self.kind} at layer {self.layer}, site {self.site}"

    @classmethod
    def names(cls) -> list[str]:
        """The names of the fields, in order."""
        return [field.name for field in fields(cls)]

    def scalars(self) -> dict[str, Any]:
        """All fields but the vectors as JSON values, `kind` first."""
        names = (name for name in self.names() if name not in self.vectors)
        return {"kind": self.kind, **{name: getattr(self, name) for name in names}}

    def arrays(self) -> dict[str, Floats]:
        """The vectors by name; a dot in a name leads into a part of the edit."""
        return {name: getattr(self, name) for name in self.vectors}

    def plain(self) -> dict[str, Any]:
        """All fields as JSON values; float32 vectors become lists of Python floats."""
        return nested(self.scalars(), {name: array.tolist() for name, array in self.arrays().items()})

    def widths(self) -> Iterable[tuple[str, Space, int]]:
        """(field, space, length) of each vector that spans a whole space."""
        return ()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Edit) and self.plain() == other.plain()

    def __hash__(self) -> int:
        return hash((self.kind, self.layer, self.site))


def set_field(edit: object, name: str, value: Any) -> None:
    """Normalises a field while the frozen object is being made, and at no other time."""
    object.__setattr__(edit, name, value)


def nested(fields: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields with the values put in by their dotted names; ProgramError where a name leads nowhere."""
    made = dict(fields)
    for name, value in values.items():
        first, _, rest = name.partition(".")
        within = made.get(first, {}) if rest else {}
        if not isinstance(within, Mapping):
            raise ProgramError(f"{name}: there is no place for it, since {first} is {within!r}")
        made[first] = nested(within, {rest: value}) if rest else value
    return made


@dataclass(frozen=True, eq=False)
class Scale(Edit):
    """x_i ← (1 + gamma_i)·x_i for the listed units i; one number for gamma means the same for all.

    Raises ProgramError for a unit listed twice or lists of different lengths.
    """

    kind: ClassVar[str] = "scale"
    vectors: ClassVar[tuple[str, ...]] = ("gamma",)

    units: tuple[int, ...]
    gamma: Floats

    if TYPE_CHECKING:

        def __init__(self, layer: int, site: SiteName, units: Iterable[int], gamma: ArrayLike) -> None: ...

    def __post_init__(self) -> None:
        super().__post_init__()
        listed: Any = self.units
        if not isinstance(listed, Iterable):
            raise ProgramError(f"{self.where}: units must be a list, got {listed!r}")
        units = tuple(as_index(unit, f"{self.where}: unit") for unit in listed)
        gamma: Any = self.gamma
        if isinstance(gamma, (int, float, np.floating)):
            gamma = [gamma] * len(units)
        set_field(self, "units", units)
        set_field(self, "gamma", as_vector(gamma, f"{self.where}: gamma"))
        if len(units) != len(self.gamma):
            raise ProgramError(f"{self.where}: {len(units)} units but {len(self.gamma)} values of gamma")
        if len(set(units)) != len(units):
            raise ProgramError(f"{self.where}: a unit is listed twice")


@dataclass(frozen=True, eq=False)
class Shift(Edit):
    """x ← x + vector; the vector spans the site's space."""

    kind: ClassVar[str] = "shift"
    vectors: ClassVar[tuple[str, ...]] = ("vector",)

    vector: Floats

    if TYPE_CHECKING:

        def __init__(self, layer: int, site: SiteName, vector: ArrayLike) -> None: ...

    def __post_init__(self) -> None:
        super().__post_init__()
        set_field(self, "vector", as_vector(self.vector, f"{self.where}: vector"))

    def widths(self) -> Iterable[tuple[str, Space, int]]:
        """The vector spans the site's space."""
        return (("vector", self.space, len(self.vector)),)


@dataclass(frozen=True, eq=False)
class Rank1(Edit):
    """The output of the projection that reads `site`, before any post-norm, += strength·v·(kᵀ·input).

    The input is what the projection receives, that is after every other edit at the site. k spans the
    site's space, v the residual space (Steer2Edit, arXiv 2602.09870: ΔW = λ v kᵀ on o_proj or down_proj).
    """

    kind: ClassVar[str] = "rank1"
    vectors: ClassVar[tuple[str, ...]] = ("k", "v")
    sites: ClassVar[tuple[SiteName, ...]] = ("heads", "neurons")

    k: Floats
    v: Floats
    strength: float

    if TYPE_CHECKING:

        def __init__(self, layer: int, site: SiteName, k: ArrayLike, v: ArrayLike, strength: float) -> None: ...

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.vectors:
            set_field(self, name, as_vector(getattr(self, name), f"{self.where}: {name}"))
        set_field(self, "strength", as_number(self.strength, f"{self.where}: strength"))

    def widths(self) -> Iterable[tuple[str, Space, int]]:
        """k spans the site's space, v the residual space."""
        return (("k", self.space, len(self.k)), ("v", "residual", len(self.v)))
