"""Gates: edits whose effect depends on the input (the adaptive part of the source language)."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike

from austeer.compiler.edits import Edit, Floats, Shift, as_index, as_number, as_vector, set_field
from austeer.compiler.errors import ProgramError
from austeer.compiler.sites import SiteName, Space


@dataclass(frozen=True)
class Origin:
    """What a gate was fitted to, and what it does on held-out texts of both sides. It goes wherever the gate goes.

    `when` and `unless` are the SHA-256 of the texts for which it is to be open and closed. `auc` is that of its probe;
    the open rates are shares of tokens with g > 1/2. Raises ProgramError for what is none of that.
    """

    when: str
    unless: str
    auc: float
    open_when: float
    open_unless: float

    def __post_init__(self) -> None:
        for name in ("when", "unless"):
            if not re.fullmatch("[0-9a-f]{64}", str(getattr(self, name))):
                raise ProgramError(f"gate: {name} must be a SHA-256 in hexadecimal, got {getattr(self, name)!r:.80}")
        for name in ("auc", "open_when", "open_unless"):
            set_field(self, name, as_number(getattr(self, name), f"gate: {name}"))
            if not 0 <= getattr(self, name) <= 1:
                raise ProgramError(f"gate: {name} must be from 0 to 1, got {getattr(self, name)}")


@dataclass(frozen=True, eq=False)
class Gate:
    """g(h) = [act(z + delta) - act(z - delta)] / 2 delta with z = w·h + b: a smooth step from 0 to 1.

    h is what the FFN of the edit's own block reads (after its norm), act the activation function of that FFN. silu
    overshoots by up to 0.28 / 2 delta. `constant` is a direction in which h is about 1 everywhere, for FFNs that
    cannot have biases; empty where none is known. `origin` is None for a gate that nobody has fitted to texts. Raises
    ProgramError unless delta is above 0.
    """

    vectors: ClassVar[tuple[str, ...]] = ("w", "constant")

    w: Floats
    b: float
    delta: float
    constant: Floats = field(default_factory=lambda: np.zeros(0, np.float32))
    origin: Origin | None = None

    if TYPE_CHECKING:

        def __init__(
            self, w: ArrayLike, b: float, delta: float, constant: ArrayLike = (), origin: Origin | None = None
        ) -> None: ...

    def __post_init__(self) -> None:
        for name in self.vectors:
            set_field(self, name, as_vector(getattr(self, name), f"gate: {name}"))
        for name in ("b", "delta"):
            set_field(self, name, as_number(getattr(self, name), f"gate: {name}"))
        if not self.delta > 0:
            raise ProgramError(f"gate: delta must be above 0, got {self.delta}")


@dataclass(frozen=True, eq=False)
class Fitted:
    """n neurons that stand for what a gated edit adds: down · (act(gate·h + gate_bias) ⊙ (up·h + up_bias)).

    `gate` and `up` are [n, residual], `down` is [residual, n], the biases [n]. In an FFN without a gate they add
    down · act(gate·h + gate_bias), and `up` and `up_bias` are zero.
    """

    gate: Floats
    gate_bias: Floats
    up: Floats
    up_bias: Floats
    down: Floats

    if TYPE_CHECKING:

        def __init__(
            self, gate: ArrayLike, gate_bias: ArrayLike, up: ArrayLike, up_bias: ArrayLike, down: ArrayLike
        ) -> None: ...

    def __post_init__(self) -> None:
        for name in (part.name for part in fields(self)):
            dimensions = 1 if name.endswith("bias") else 2
            set_field(self, name, as_vector(getattr(self, name), f"fitted neurons: {name}", dimensions))
        shape = self.gate.shape
        expected = {"up": shape, "gate_bias": shape[:1], "up_bias": shape[:1], "down": shape[::-1]}
        for name, wanted in expected.items():
            if getattr(self, name).shape != wanted:
                found = getattr(self, name).shape
                raise ProgramError(f"fitted neurons: {name} has shape {found}, beside a gate of {shape}")

    @property
    def count(self) -> int:
        """How many neurons."""
        return len(self.gate)


@dataclass(frozen=True, eq=False)
class Gated(Edit):
    """What `edit` alone would add to the residual stream, times g(h), added at the end of its block.

    The edit reads its site as the edits without a gate leave it; gated edits do not see each other. As it enters
    after the block's FFN has read its input, an open gate at heads or attn is not the edit without a gate.
    `neurons` stand for it in weights, where only an approximation can; a pass fits them to activations.
    `replaces`: which neurons of the FFN give way to those that carry it, in a compiled model; none: it gets wider.
    """

    kind: ClassVar[str] = "gated"
    vectors: ClassVar[tuple[str, ...]] = ()

    layer: int = field(init=False)
    site: SiteName = field(init=False)
    edit: Edit
    gate: Gate
    neurons: Fitted | None = None
    replaces: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        inner: Any = self.edit
        if not isinstance(inner, Edit) or isinstance(inner, Gated):
            raise ProgramError(f"gated: the edit must be a scale, a shift or a rank1, got {self.edit!r}")
        if isinstance(inner, Shift) and self.neurons is not None:
            raise ProgramError(f"gated {inner.where}: two neurons do it exactly, so none are fitted to it")
        set_field(self, "layer", self.edit.layer)
        set_field(self, "site", self.edit.site)
        super().__post_init__()
        set_field(self, "replaces", tuple(as_index(place, f"{self.where}: replaces") for place in self.replaces))
        if self.replaces and len(set(self.replaces)) != len(self.replaces):
            raise ProgramError(f"{self.where}: a neuron is replaced twice")
        if self.replaces and len(self.replaces) != self.count:
            raise ProgramError(f"{self.where}: replaces {len(self.replaces)} neurons, and is carried by {self.count}")

    @property
    def where(self) -> str:
        """The address for messages."""
        return f"gated {self.edit.where}"

    @property
    def count(self) -> int:
        """How many neurons carry it; 0 where they have yet to be fitted."""
        if isinstance(self.edit, Shift):
            return 2
        return self.neurons.count if self.neurons else 0

    def scalars(self) -> dict[str, Any]:
        """All fields but the vectors as JSON values, `kind` first."""
        origin = {"origin": asdict(self.gate.origin)} if self.gate.origin else {}
        gate = {"b": self.gate.b, "delta": self.gate.delta, **origin}
        replaces = {"replaces": self.replaces} if self.replaces else {}
        edit = self.edit.scalars()
        return {"kind": self.kind, "layer": self.layer, "site": self.site, "edit": edit, "gate": gate, **replaces}

    def arrays(self) -> dict[str, Floats]:
        """The vectors of the edit, the gate and the neurons."""
        gate = {f"gate.{name}": getattr(self.gate, name) for name in Gate.vectors if len(getattr(self.gate, name))}
        parts = fields(self.neurons) if self.neurons else ()
        neurons = {f"neurons.{part.name}": getattr(self.neurons, part.name) for part in parts}
        return {**{f"edit.{name}": array for name, array in self.edit.arrays().items()}, **gate, **neurons}

    def widths(self) -> Iterable[tuple[str, Space, int]]:
        """Those of the edit; all of the gate and of the neurons is as wide as the residual space."""
        yield from self.edit.widths()
        yield "gate.w", "residual", len(self.gate.w)
        if len(self.gate.constant):
            yield "gate.constant", "residual", len(self.gate.constant)
        if self.neurons:
            yield "neurons.down", "residual", len(self.neurons.down)

    @staticmethod
    def of(parts: Mapping[str, Any], edit: Edit) -> "Gated":
        """The gated edit with these other parts, as `plain` gives them. Raises ProgramError for what is none."""
        try:
            neurons = Fitted(**parts["neurons"]) if parts.get("neurons") is not None else None
            gate: dict[str, Any] = dict(parts["gate"])
            if gate.get("origin") is not None:
                gate["origin"] = Origin(**gate["origin"])
            return Gated(edit, Gate(**gate), neurons, tuple(parts.get("replaces", ())))
        except (TypeError, KeyError, ValueError) as error:
            raise ProgramError(f"gated: needs edit, gate (w, b, delta) and, if any, neurons: {error}") from None
