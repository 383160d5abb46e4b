"""An edited projection as a low-rank change of its weight: W' − W = B·A, in as few terms as its edits have units.

From the normal form (patch.Affine): W' − W = (a⊙W + U Vᵀ)⊙s − W. Where a is not 1 a whole row changes, where
s is not 1 a whole column, and the rest is U Vᵀ. Held so that no entry is in two terms, rank-1 edits excepted:
the changed rows whole, the changed columns apart from those rows, U Vᵀ apart from both.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from austeer.compiler.edits import Floats
from austeer.compiler.patch import Affine
from austeer.compiler.rewrite import OVERFLOWING, Matrix

Doubles = NDArray[np.float64]
Indices = NDArray[np.int64]
PROPORTIONAL = 2.0**-22
"""Directions that differ by less, as v times a strength in float32 does, are one direction."""


@dataclass(frozen=True, eq=False)
class LowRank:
    """W' − W of one projection: `rows`, then `columns`, then `terms` (column of B, row of A)."""

    matrix: Matrix
    rows: Indices
    columns: Indices
    terms: tuple[tuple[Doubles, Doubles], ...]

    @staticmethod
    @OVERFLOWING
    def of(matrix: Matrix) -> "LowRank":
        """The change, never of a higher rank than the shorter side of the matrix."""
        form = matrix.form
        rows, columns = np.flatnonzero(form.a != 1), np.flatnonzero(form.s != 1)
        terms = _distinct(_outside(form, rows, columns))
        outputs, inputs = len(form.a), len(form.s)
        nothing = np.arange(0)
        if len(rows) + len(columns) + len(terms) <= min(outputs, inputs):
            return LowRank(matrix, rows, columns, terms)
        if outputs <= inputs:
            return LowRank(matrix, np.arange(outputs), nothing, ())
        return LowRank(matrix, nothing, np.arange(inputs), ())

    @property
    def rank(self) -> int:
        """The number of terms."""
        return len(self.rows) + len(self.columns) + len(self.terms)

    @OVERFLOWING
    def factors(self, rank: int) -> tuple[Floats, Floats]:
        """A [rank, inputs] and B [outputs, rank] in float32, zero beyond this change's own rank.

        The weight streams from the file, of which only the rows that change are read. In float64, rounded once.
        """
        form, held = self.matrix.form, len(self.rows)
        a, b = np.zeros((rank, len(form.s)), np.float32), np.zeros((len(form.a), rank), np.float32)
        for outs, ins, weight in self._weight():
            first, last = np.searchsorted(self.rows, (outs.start, outs.stop))
            rows = self.rows[first:last]
            a[first:last, ins] = _change(weight[rows - outs.start], form, rows, np.arange(ins.start, ins.stop))
            first, last = np.searchsorted(self.columns, (ins.start, ins.stop))
            columns = self.columns[first:last]
            part = _change(weight[:, columns - ins.start], form, np.arange(outs.start, outs.stop), columns)
            b[outs, held + first : held + last] = part
        b[self.rows] = 0
        b[self.rows, np.arange(held)] = 1
        a[held + np.arange(len(self.columns)), self.columns] = 1
        for number, (left, right) in enumerate(self.terms, held + len(self.columns)):
            b[:, number], a[number] = left, right
        return a, b

    def _weight(self) -> Iterator[tuple[slice, slice, Doubles]]:
        """The base weight [outputs, inputs] block by block, and where each block lies."""
        form = self.matrix.form
        for stored, block in self.matrix.rows(self.matrix.runs):
            wide = block.astype(np.float64)
            if self.matrix.transposed:
                yield slice(0, len(form.a)), stored, wide.T
            else:
                yield stored, slice(0, len(form.s)), wide


def _change(weight: Doubles, form: Affine, rows: Indices, columns: Indices) -> Doubles:
    """W' − W on some rows and columns, whose weights are given."""
    new = weight * form.a[rows, None]
    for v, k in form.terms:
        new += v[rows, None].astype(np.float64) * k[None, columns]
    return new * form.s[None, columns] - weight


def _outside(form: Affine, rows: Indices, columns: Indices) -> Iterator[tuple[Doubles, Doubles]]:
    """The rank-1 terms of the form, apart from some rows and columns."""
    for v, k in form.terms:
        left, right = v.astype(np.float64), k.astype(np.float64) * form.s
        left[rows], right[columns] = 0, 0
        yield left, right


def _distinct(terms: Iterator[tuple[Doubles, Doubles]]) -> tuple[tuple[Doubles, Doubles], ...]:
    """Terms of one direction v as one; Steer2Edit has one v for all heads, or neurons, of a layer."""
    found: list[tuple[Doubles, Doubles]] = []
    for left, right in terms:
        if not (left.any() and right.any()):
            continue
        for number, (known, sum_of_rights) in enumerate(found):
            pivot = np.abs(known).argmax()
            ratio = left[pivot] / known[pivot]
            if (np.abs(left - ratio * known) <= PROPORTIONAL * np.abs(left)).all():
                found[number] = known, sum_of_rights + ratio * right
                break
        else:
            found.append((left, right))
    return tuple(found)
