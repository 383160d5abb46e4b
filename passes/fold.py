"""fold: program and form → patch. Each projection's edits become one affine normal form."""

from collections.abc import Iterable

import numpy as np

from austeer.compiler.edits import Edit, Floats, Rank1, Scale, Shift
from austeer.compiler.facts import ModelFacts
from austeer.compiler.form import ModelForm
from austeer.compiler.gates import Gated
from austeer.compiler.patch import READS, Affine, Patch, Role, Touch, Vector
from austeer.compiler.program import Program
from austeer.compiler.sites import SITES
from austeer.passes.gate_neurons import gate_neurons


@np.errstate(over="ignore", invalid="ignore")  # what overflows is refused, with its tensor's name, when it is written
def fold(program: Program, facts: ModelFacts, form: ModelForm) -> Patch:
    """The patch that makes the weights of a model in this form do what a legal program says (legalize first).

    Edits at one site are folded in program order, sites in data-flow order, as the interpreter runs them.
    """
    forms: dict[tuple[int, Role], Affine] = {}
    values: dict[int, Vector] = {}
    plain = [edit for edit in program.edits if not isinstance(edit, Gated)]
    in_order = sorted(plain, key=lambda edit: (edit.layer, SITES.index(edit.site)))
    for edit in in_order:
        key = (edit.layer, facts.role(edit))
        forms.setdefault(key, identity(*key, facts))
        if isinstance(edit, Shift) and form.routes.get(key) == "value-bias":
            values[edit.layer] = _sum(values.get(edit.layer), Vector(edit.space, edit.vector))
        else:
            forms[key] = _folded(edit, forms[key])
    touches = [
        touch
        for number, edit in enumerate(program.edits)
        if not isinstance(edit, Gated)
        for touch in _touches(number, edit, forms[edit.layer, facts.role(edit)], facts)
    ]
    neurons = gate_neurons(program, facts, form)
    return Patch(tuple(forms[key] for key in sorted(forms)), tuple(touches), values, neurons=neurons)


def identity(layer: int, role: Role, facts: ModelFacts) -> Affine:
    """A projection of this model as it is."""
    geometry = facts.geometry
    if role == "block":
        return Affine.identity(layer, role, geometry.residual, 1)  # a norm's weight: one column
    # A mixture of experts is only ever edited at its output; what its experts read is their own affair.
    inputs = facts.expert_neurons if role == "ffn_out" and facts.has_experts(layer) else geometry.width(READS[role])
    return Affine.identity(layer, role, geometry.residual, inputs)


def _sum(first: Vector | None, second: Vector) -> Vector:
    return second if first is None else Vector(second.space, first.within(second.space) + second.values)


def _folded(edit: Edit, form: Affine) -> Affine:
    at_input = edit.site in ("heads", "neurons")
    if isinstance(edit, Scale):
        scale = form.scale_input if at_input else form.scale_output
        return scale(edit.units, 1 + edit.gamma)
    if isinstance(edit, Shift):
        shift = form.shift_input if at_input else form.shift_output
        return shift(Vector(edit.space, edit.vector))
    assert isinstance(edit, Rank1), edit
    return form.add_rank1(Vector("residual", _times(edit.strength, edit.v)), Vector(edit.space, edit.k))


def _times(strength: float, v: Floats) -> Floats:
    return v * v.dtype.type(strength)


def _touches(number: int, edit: Edit, form: Affine, facts: ModelFacts) -> Iterable[Touch]:
    """What the edit changes in the end, in the finished form of its projection."""
    where = (number, edit.layer, form.role)
    at_input = edit.site in ("heads", "neurons")
    if isinstance(edit, Shift):
        yield Touch(*where, "bias", None)
        return
    if isinstance(edit, Rank1):
        yield Touch(*where, "weight", _support(edit.v), _support(edit.k))
    elif isinstance(edit, Scale):
        yield Touch(*where, "weight", None if at_input else edit.units, edit.units if at_input else None)
    if at_input and form.t.any():
        yield Touch(*where, "bias", None)  # the constant passes through what this edit changed
    elif isinstance(edit, Scale) and not at_input and (form.adds_bias or has_bias(form.role, facts)):
        yield Touch(*where, "bias", edit.units)


def has_bias(role: Role, facts: ModelFacts) -> bool:
    """Whether the base has a bias there."""
    return role == "block" or facts.has_bias(facts.projection(role))


def _support(vector: Floats) -> tuple[int, ...] | None:
    nonzero = vector.nonzero()[0].tolist()
    return None if len(nonzero) == len(vector) else tuple(nonzero)
