"""Patches: the target language. What happens to the weights, by (layer, role), never by tensor name."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from austeer.compiler.edits import Edit, Floats
from austeer.compiler.errors import SpaceError
from austeer.compiler.gates import Gated
from austeer.compiler.sites import Space
from austeer.compiler.stream import StreamRole

Role = Literal["attn_out", "ffn_out", "block"]
"""The output projection of the attention or the FFN; `block` is what comes last in a block that norms their outputs."""

Part = Literal["weight", "bias"]

READS: Mapping[Role, Space] = {"attn_out": "heads", "ffn_out": "neurons"}  # all write to the residual space


def role_of(edit: Edit, *, post_norm: bool) -> Role:
    """Where an edit ends up: without a norm after it, the FFN's projection is the last thing in its block."""
    if isinstance(edit, Gated):  # in neurons, wherever it reads
        return "ffn_out"
    if edit.site == "residual" and post_norm:
        return "block"
    return "attn_out" if edit.site in ("heads", "attn") else "ffn_out"


@dataclass(frozen=True, eq=False)
class Vector:
    """A float32 vector and the space it lives in."""

    space: Space
    values: Floats

    def within(self, space: Space) -> Floats:
        """The values, if they live in `space`; SpaceError otherwise, even where the lengths agree."""
        if self.space != space:
            raise SpaceError(f"a vector of the {self.space} space cannot be used in the {space} space")
        return self.values


@dataclass(frozen=True, eq=False)
class Affine:
    """The normal form of one edited projection: y ← a⊙W(s⊙x + t) + U Vᵀ(s⊙x + t) + a⊙b + u.

    a, u and the columns of U are in the residual space, s, t and the columns of V in the space the
    projection reads; all float32. Built edit by edit in the order of the program, then applied to the
    *base* weight once: W' = (a⊙W + U Vᵀ)⊙s and b' = a⊙(b + W t) + U(Vᵀt) + u. Scaling the output scales
    the rank-1 terms that are there, so the terms of U need no factor of their own.
    """

    layer: int
    role: Role
    a: Floats
    s: Floats
    t: Floats
    u: Floats
    terms: tuple[tuple[Floats, Floats], ...] = ()  # (column of U, column of V)

    @staticmethod
    def identity(layer: int, role: Role, residual: int, inputs: int) -> "Affine":
        """The projection as it is in the base."""
        ones, zeros = np.ones, np.zeros
        return Affine(
            layer, role, ones(residual, np.float32), ones(inputs, np.float32),
            zeros(inputs, np.float32), zeros(residual, np.float32),
        )  # fmt: skip

    def scale_input(self, units: tuple[int, ...], factors: Floats) -> "Affine":
        """x_i ← factor_i·x_i before the projection."""
        return replace(self, s=_scaled(self.s, units, factors), t=_scaled(self.t, units, factors))

    def shift_input(self, vector: Vector) -> "Affine":
        """x ← x + vector before the projection."""
        return replace(self, t=self.t + vector.within(READS[self.role]))

    def add_rank1(self, v: Vector, k: Vector) -> "Affine":
        """y ← y + v·(kᵀ·input) after the projection."""
        return replace(self, terms=(*self.terms, (v.within("residual"), k.within(READS[self.role]))))

    def scale_output(self, units: tuple[int, ...], factors: Floats) -> "Affine":
        """y_i ← factor_i·y_i after the projection."""
        terms = tuple((_scaled(v, units, factors), k) for v, k in self.terms)
        return replace(self, a=_scaled(self.a, units, factors), u=_scaled(self.u, units, factors), terms=terms)

    def shift_output(self, vector: Vector) -> "Affine":
        """y ← y + vector after the projection."""
        return replace(self, u=self.u + vector.within("residual"))

    @property
    def changes_bias(self) -> bool:
        """Whether b' can differ from b; without a shift it only does where there is a b and a row scale."""
        return self.adds_bias or bool((self.a != 1).any())

    @property
    def adds_bias(self) -> bool:
        """Whether the projection needs a bias even where the base has none."""
        return bool(self.t.any() or self.u.any())


@dataclass(frozen=True)
class Touch:
    """Edit number `edit` of the program changes these rows and columns of a projection's part; None is all.

    `exact`: whether that, with the edit's other touches, does exactly what the edit says.
    """

    edit: int
    layer: int
    role: Role
    part: Part
    rows: tuple[int, ...] | None
    columns: tuple[int, ...] | None = None
    exact: bool = True


@dataclass(frozen=True, eq=False)
class Rescale:
    """What begins, reads or norms the residual stream: its weight, along the residual axis, times `factors`.

    `layer` is None outside the blocks. `touches` are the numbers of the edits it is for, each with its units;
    None is all.
    """

    layer: int | None
    role: StreamRole
    factors: Floats  # [residual]
    touches: tuple[tuple[int, tuple[int, ...] | None], ...]
    exact: bool


@dataclass(frozen=True, eq=False)
class Neurons:
    """n new neurons in the FFN of a layer, which add down · (act(gate·h + gate_bias) ⊙ (up·h + up_bias)).

    h is the input of the FFN. In an FFN without a gate, `gate` is what it reads with, and `up` and `up_bias` are
    not used. No scale of the output reaches them: `down` is what they add in the end, as vectors of `space`: those
    of another space than the residual pass through the base's output projection that reads it. `edits`: for each
    neuron the number of the edit that it is for. `places`: for each the one of the base that it replaces; none:
    they are appended.
    """

    layer: int
    gate: Floats  # [n, residual]
    gate_bias: Floats  # [n]
    up: Floats  # [n, residual]
    up_bias: Floats  # [n]
    down: Floats  # [width of the space, n]
    edits: tuple[int, ...]
    exact: bool
    space: Space = "residual"
    places: tuple[int, ...] = ()


@dataclass(frozen=True)
class Patch:
    """At most one Affine per place, which edit touches what, and the head shifts that v_proj takes, by layer.

    `stream`: at most one Rescale per layer and role, where the residual stream is kept in other units.
    `neurons`: what is new in FFNs, those of a layer that are appended side by side.
    """

    operations: tuple[Affine, ...]
    touches: tuple[Touch, ...]
    values: Mapping[int, Vector] = field(default_factory=dict[int, Vector])
    stream: tuple[Rescale, ...] = ()
    neurons: tuple[Neurons, ...] = ()


def _scaled(vector: Floats, units: tuple[int, ...], factors: Floats) -> Floats:
    result = vector.copy()
    result[list(units)] *= factors
    return result
