"""fold: program → patch. Each projection's edits become one affine normal form."""

from collections.abc import Iterable

import numpy as np

from austeer.compiler.edits import Edit, Floats, Rank1, Scale, Shift
from austeer.compiler.facts import ModelFacts
from austeer.compiler.patch import READS, Affine, Patch, Role, Touch, Vector, role_of
from austeer.compiler.program import Program
from austeer.compiler.sites import SITES


@np.errstate(over="ignore", invalid="ignore")  # what overflows is refused, with its tensor's name, when it is written
def fold(program: Program, facts: ModelFacts) -> Patch:
    """The patch that makes the weights do what a legal program says (legalize first).

    Edits at one site are folded in program order, sites in data-flow order, as the interpreter runs them.
    """
    forms: dict[tuple[int, Role], Affine] = {}
    in_order = sorted(program.edits, key=lambda edit: (edit.layer, SITES.index(edit.site)))
    for edit in in_order:
        key = (edit.layer, role_of(edit))
        form = forms.get(key) or _identity(*key, facts)
        forms[key] = _folded(edit, form)
    touches = [
        touch
        for number, edit in enumerate(program.edits)
        for touch in _touches(number, edit, forms[edit.layer, role_of(edit)], facts)
    ]
    return Patch(tuple(forms[key] for key in sorted(forms)), tuple(touches))


def _identity(layer: int, role: Role, facts: ModelFacts) -> Affine:
    geometry = facts.geometry
    # A mixture of experts is only ever edited at its output; what its experts read is their own affair.
    inputs = facts.expert_neurons if role == "ffn_out" and facts.has_experts(layer) else geometry.width(READS[role])
    return Affine.identity(layer, role, geometry.residual, inputs)


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
    elif isinstance(edit, Scale) and not at_input and facts.has_bias(facts.projection(form.role)):
        yield Touch(*where, "bias", edit.units)


def _support(vector: Floats) -> tuple[int, ...] | None:
    nonzero = vector.nonzero()[0].tolist()
    return None if len(nonzero) == len(vector) else tuple(nonzero)
