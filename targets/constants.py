"""Where the constants of a patch go: into biases that are there, into new ones, or into inserted layers."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from austeer.compiler.edits import Floats
from austeer.compiler.errors import Refused
from austeer.compiler.layout import OutputLayout
from austeer.compiler.patch import Affine, Patch, Role
from austeer.compiler.rewrite import Matrix, constant, stored_vector
from austeer.compiler.tensors import TensorInfo

Values: TypeAlias = Callable[[], Floats]
Place: TypeAlias = tuple[int, Role]
Slice: TypeAlias = tuple[Any, ...]

ROWS = "rows"
"""In the slice of a tensor that holds a constant: the units of the constant itself, whichever they are."""
ALL_ROWS, COLUMN, FIRST = (ROWS,), (ROWS, [0]), ([0],)


@dataclass
class Constants:
    """New values of biases of the base, and of tensors the base does not have (by their names in the output)."""

    rewritten: dict[TensorInfo, Values] = field(default_factory=dict[TensorInfo, Values])
    filled: dict[str, Values] = field(default_factory=dict[str, Values])
    held: dict[Place, list[tuple[str, Slice]]] = field(default_factory=dict[Place, list[tuple[str, Slice]]])

    def places(self, layer: int, role: Role, rows: list[int] | None) -> Iterator[tuple[str, list[Any]]]:
        """The tensors that hold the constant of a projection, and the slice of each that `rows` are."""
        for name, axes in self.held.get((layer, role), []):
            yield name, [rows if axis == ROWS else axis for axis in axes]


def constants_of(patch: Patch, output: OutputLayout, matrices: Mapping[Place, Matrix]) -> Constants:
    """Places every constant of a patch; `matrices` are the edited projections. Refused for one without a place."""
    made = Constants()
    for affine in patch.operations:
        place = (affine.layer, affine.role)
        if affine.layer in patch.values and affine.role == "attn_out":
            _into_values(made, output, affine.layer, patch.values[affine.layer].within("heads"))
        if output.form.inserts(*place):
            _into_layer(made, output, place, _constant(affine, matrices.get(place), None))
        else:
            _into_bias(made, output, affine, matrices.get(place))
    return made


def _constant(affine: Affine, matrix: Matrix | None, bias: TensorInfo | None) -> Values:
    """The constant of a projection, or, where there is none, what is added at that place."""
    return (lambda: affine.u) if matrix is None else (lambda: constant(matrix, bias))


def _into_bias(made: Constants, output: OutputLayout, affine: Affine, matrix: Matrix | None) -> None:
    place = (affine.layer, affine.role)
    bias = output.base.bias(*place)
    if bias is not None and affine.changes_bias:
        made.rewritten[bias] = _constant(affine, matrix, bias)
        made.held.setdefault(place, []).append((output.moved[bias.name][0][0], ALL_ROWS))
    elif bias is None and affine.adds_bias:
        linear = output.form.architecture.attn_out if affine.role == "attn_out" else output.form.architecture.ffn_out
        slot = output.slot_of(affine.layer, attention=affine.role == "attn_out")
        name = output.linear_name(slot, linear) + ".bias"
        if name not in output.added:
            raise Refused(f"layer {affine.layer}: {affine.role} has no bias to hold a constant; legalize first")
        _fill(made, place, name, _constant(affine, matrix, None))


def _into_values(made: Constants, output: OutputLayout, layer: int, shift: Floats) -> None:
    """Head outputs are weighted means of values, so a constant of the values is one of the heads."""
    facts = output.base.facts
    heads = shift.reshape(facts.kv // facts.head_dim, -1, facts.head_dim)
    values = heads[:, 0].reshape(-1)
    slot = output.slot_of(layer, attention=True)
    name = _value_bias(output, slot)
    if name in output.added:
        _fill(made, (layer, "attn_out"), name, lambda: values, (None,))
        return
    bias = next(t for t in output.base.checkpoint.tensors.values() if output.moved[t.name][0][0] == name)
    made.rewritten[bias] = lambda: stored_vector(bias) + values
    made.held.setdefault((layer, "attn_out"), []).append((name, (None,)))


def _into_layer(made: Constants, output: OutputLayout, place: Place, values: Values) -> None:
    """A layer whose attention gives the constant: the value of every token is e₀, which o_proj makes of it.

    Queries and keys are zero, so every token attends to all alike, and the mean of equal values is that value.
    """
    number = next(index for index, slot in enumerate(output.slots) if slot.constant == place)
    entry = output.form.architecture
    bias = _value_bias(output, number)
    _fill(made, place, bias, lambda: _first_unit(output.base.facts.kv), FIRST)
    name = output.linear_name(number, entry.attn_out) + ".weight"
    norm = entry.attn_norm
    if norm is None:
        _fill(made, place, name, values, COLUMN)
        return
    eps = float(output.config.get("rms_norm_eps", norm.eps))
    split = _through_unit_norm if norm.plus_one else _through_norm
    _fill(made, place, name, lambda: split(values(), eps)[0], COLUMN)
    weight = output.norm_name(number, norm.name)
    _fill(made, place, weight, lambda: split(values(), eps)[1])


def _through_norm(r: Floats, eps: float) -> tuple[Floats, Floats]:
    """(x, w) with RMSNorm(x)·w = r: the norm of ones is nearly ones, and the weight is the rest."""
    return np.ones_like(r), r * np.float32(np.sqrt(1 + eps))


def _through_unit_norm(r: Floats, eps: float) -> tuple[Floats, Floats]:
    """(x, w) with RMSNorm(x)·(1 + w) = r.

    1 + w is a power of two, for a small 1 + w would lose its digits in 16 bits. What remains, r' = r / (1 + w),
    has a mean square m below 1/2, and x = κ r' with κ² = eps / (1 - m) goes through the norm as r'.
    """
    wide = r.astype(np.float64)
    power = max(0, int(np.ceil(np.log2(2 * np.mean(wide**2) + 1e-300) / 2)))
    rest = wide / 2.0**power
    x = rest * np.sqrt(eps / (1 - np.mean(rest**2)))
    return x.astype(np.float32), np.full_like(r, 2.0**power - 1)


def _fill(made: Constants, place: Place, name: str, values: Values, axes: Slice = ALL_ROWS) -> None:
    made.filled[name] = values
    made.held.setdefault(place, []).append((name, axes))


def _value_bias(output: OutputLayout, layer: int) -> str:
    values = output.form.architecture.values
    assert values is not None, "legalize chose a route by v_proj"
    return output.linear_name(layer, values) + ".bias"


def _first_unit(width: int) -> Floats:
    unit = np.zeros(width, np.float32)
    unit[0] = 1
    return unit
