"""rescale: scales of the residual stream → rescaled writes and compensated reads.

No weight of a stock block scales the stream. But the stream can be kept in other units: where the reference has x,
the model has x / d, with its own d for each layer, so that the scale at the end of a block is nothing but a change
of units. What writes is divided by d, what reads is multiplied by it: exact for a linear map, and for a norm up to
its denominator (and its mean, if it subtracts one), which is that of x / d. One number for each norm, fitted to a
live model (passes.compensate), makes that right on average. Whether it is near enough only a measurement can tell,
and in which layers the units had better be those of the base.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from austeer.compiler.architectures import holds
from austeer.compiler.edits import Edit, Scale, Shift
from austeer.compiler.facts import ModelFacts
from austeer.compiler.form import ModelForm
from austeer.compiler.patch import Affine, Patch, Rescale, Role, Touch
from austeer.compiler.program import Program
from austeer.compiler.stream import STREAMS, StreamRole
from austeer.compiler.target import Target
from austeer.passes.fold import fold, has_bias, identity
from austeer.passes.legalize import legalize

Numbered: TypeAlias = list[tuple[int, Scale]]


LATER, EARLIER, BOTH = RESCALINGS = ("rescale-later", "rescale-earlier", "rescale-both")


@dataclass(frozen=True)
class Rescaling:
    """One choice of units: those of the base before layer `anchor`; `refusal` says why it is not legal, if so.

    `fitted`: what the norms that read the stream are multiplied with, in the order of `reading_norms`; none: 1.
    """

    name: str
    anchor: int
    refusal: str = ""
    fitted: tuple[float, ...] = ()


def needs_rescaling(edit: Edit, facts: ModelFacts) -> bool:
    """Whether an edit has no exact fold in any stock block, but is a scale of the stream."""
    ends_in_norm = facts.post_norm and facts.architecture.block_norm
    return isinstance(edit, Scale) and edit.site == "residual" and not ends_in_norm


def rescalings(program: Program, facts: ModelFacts) -> list[Rescaling]:
    """All choices of units that differ for this program.

    rescale-later changes what comes after each scale, rescale-earlier what comes before, rescale-both the shorter
    of the two. None is legal with a factor of 0, for what that takes out of the stream no later layer brings back.
    """
    scales = [edit for _, edit in _scales(program, facts)]
    middle = facts.geometry.layers // 2
    found = [Rescaling(LATER, 0), _before(EARLIER, facts.geometry.layers, facts)]
    if any(edit.layer < middle for edit in scales) and any(edit.layer >= middle for edit in scales):
        found.append(_before(BOTH, middle, facts))
    refusal = next(map(_zero, filter(_has_zero, scales)), "")
    return [replace(choice, refusal=refusal) for choice in found] if refusal else found


def rescale(program: Program, facts: ModelFacts, target: Target, choice: Rescaling) -> tuple[ModelForm, Patch]:
    """The form and the patch of a program whose scales of the stream become a choice of units.

    Everything else is legalized and folded as ever, and refused as ever.
    """
    rest, numbers = _without_scales(program, facts)
    form = legalize(rest, facts, target)
    patch = fold(rest, facts, form)
    patch = replace(patch, touches=tuple(replace(touch, edit=numbers[touch.edit]) for touch in patch.touches))
    return form, _Rescaled(choice, program, facts).applied(patch)


def units_of(choice: Rescaling, program: Program, facts: ModelFacts) -> NDArray[np.float64]:
    """The units d of the stream before each layer, and after the last: [layers + 1, residual]."""
    d = np.ones((facts.geometry.layers + 1, facts.geometry.residual))
    for _, edit in _scales(program, facts):
        d[edit.layer + 1 :, list(edit.units)] *= 1 + edit.gamma
    return d / d[choice.anchor]


def reading_norms(facts: ModelFacts) -> list[tuple[int, StreamRole]]:
    """The norms that read the stream: before which layer (the head: after the last), and which."""
    layers, roles = facts.geometry.layers, tuple[StreamRole, ...]()
    if STREAMS[facts.architecture.model_type].reads_normed:
        roles = ("attn_in", "ffn_in")
    return [*((layer, role) for layer in range(layers) for role in roles), (layers, "head_in")]


def _before(name: str, anchor: int, facts: ModelFacts) -> Rescaling:
    """Units that differ from the first layer on, so that the embeddings have to be in them."""
    stream, config = STREAMS[facts.architecture.model_type], facts.config
    if holds(stream.tied, config):
        return Rescaling(name, anchor, "the head shares the embeddings' weight, which would have to be scaled")
    if config.get("word_embed_proj_dim", facts.geometry.residual) != facts.geometry.residual:
        return Rescaling(name, anchor, "the embeddings pass through a projection")
    return Rescaling(name, anchor)


def _has_zero(edit: Scale) -> bool:
    return bool((1 + edit.gamma == 0).any())


def _zero(edit: Scale) -> str:
    unit = edit.units[int(np.argmin(abs(1 + edit.gamma)))]
    return f"{edit.where}: unit {unit} has gamma -1, and units of the stream cannot be divided by 0"


def _place(form: Affine) -> tuple[int, Role]:
    return form.layer, form.role


def _outputs(layer: int) -> tuple[tuple[int, Role], ...]:
    return (layer, "attn_out"), (layer, "ffn_out")


def _scales(program: Program, facts: ModelFacts) -> Numbered:
    edits = enumerate(program.edits)
    return [(number, edit) for number, edit in edits if isinstance(edit, Scale) and needs_rescaling(edit, facts)]


def _without_scales(program: Program, facts: ModelFacts) -> tuple[Program, list[int]]:
    """The other edits, and their numbers. A shift after a scale of the same stream is made in the units before it."""
    kept, numbers = list[Edit](), list[int]()
    factors = np.ones((facts.geometry.layers, facts.geometry.residual), np.float32)
    for number, edit in enumerate(program.edits):
        if isinstance(edit, Scale) and needs_rescaling(edit, facts):
            factors[edit.layer, list(edit.units)] *= 1 + edit.gamma
            continue
        if isinstance(edit, Shift) and edit.site == "residual":
            edit = Shift(edit.layer, edit.site, edit.vector / factors[edit.layer])  # noqa: PLW2901
        kept.append(edit)
        numbers.append(number)
    return Program(program.model, tuple(kept)), numbers


class _Rescaled:
    """What a choice of units makes of a patch."""

    def __init__(self, choice: Rescaling, program: Program, facts: ModelFacts) -> None:
        self.anchor, self.facts = choice.anchor, facts
        self.scales, self.d = _scales(program, facts), units_of(choice, program, facts)
        self.stream = STREAMS[facts.architecture.model_type]
        places = reading_norms(facts)
        self.norms = dict(zip(places, choice.fitted or [1.0] * len(places), strict=True))
        self.exact = all((self.d[before] == 1).all() for before, _ in places)

    def applied(self, patch: Patch) -> Patch:
        """The patch with everything that writes to the stream or reads it in these units."""
        forms = {_place(form): form for form in patch.operations}
        touches = list(patch.touches)
        for place in self._writers(patch.operations):
            forms[place] = self._written(forms.get(place) or identity(*place, self.facts))
            touches += self._touches(forms[place])
        operations = tuple(forms[place] for place in sorted(forms))
        return replace(patch, operations=operations, touches=tuple(touches), stream=tuple(self._rescales()))

    def _writers(self, operations: Sequence[Affine]) -> list[tuple[int, Role]]:
        """The projections whose outputs are added to the stream as they are, where its units are not the base's."""
        if self.facts.post_norm:  # what they write is normed first; a constant of the whole block is not
            places = [_place(form) for form in operations if form.role == "block"]
        else:
            places = [place for layer in range(self.facts.geometry.layers) for place in _outputs(layer)]
        return [place for place in places if (self.d[place[0]] != 1).any()]

    def _written(self, form: Affine) -> Affine:
        d = self.d[form.layer]
        units = np.flatnonzero(d != 1)
        return form.scale_output(tuple(units.tolist()), (1 / d[units]).astype(np.float32))

    def _touches(self, form: Affine) -> Iterator[Touch]:
        biased = form.adds_bias or has_bias(form.role, self.facts)
        for number, units in self._edits(form.layer):
            yield Touch(number, form.layer, form.role, "weight", units, exact=self.exact)
            if biased:
                yield Touch(number, form.layer, form.role, "bias", units, exact=self.exact)

    def _rescales(self) -> Iterator[Rescale]:
        layers = self.facts.geometry.layers
        yield from self._rescale(0, "embeddings", None, reads=False)
        for layer in range(layers):
            yield from self._rescale(layer, "attn_in", layer, reads=True)
            yield from self._rescale(layer, "attn_norm", layer, reads=False)
            yield from self._rescale(layer, "ffn_in", layer, reads=True)
            yield from self._rescale(layer, "ffn_norm", layer, reads=False)
        yield from self._rescale(layers, "head_in", None, reads=True)

    def _rescale(self, before: int, role: StreamRole, layer: int | None, *, reads: bool) -> Iterator[Rescale]:
        d = self.d[before]
        if (d != 1).any() and self.stream.names(role):
            norm = self.norms.get((before, role), 1.0)
            factors = (d * norm if reads else 1 / d).astype(np.float32)
            touches = ((number, units if norm == 1 else None) for number, units in self._edits(before))
            yield Rescale(layer, role, factors, tuple(touches), self.exact)

    def _edits(self, before: int) -> Iterator[tuple[int, tuple[int, ...]]]:
        """The scales that the units before a layer come from: those between it and the anchor."""
        for number, edit in self.scales:
            if (edit.layer < before) != (edit.layer < self.anchor):
                yield number, edit.units
