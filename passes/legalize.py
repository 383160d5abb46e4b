"""legalize: program and target → the form of the model that lets the target keep every edit, or a refusal."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from austeer.compiler.architectures import ARCHITECTURES, Linear
from austeer.compiler.edits import Edit, Scale, Shift
from austeer.compiler.errors import Refused
from austeer.compiler.facts import ModelFacts
from austeer.compiler.form import ModelForm, Route, widening
from austeer.compiler.gates import Gated
from austeer.compiler.patch import Role
from austeer.compiler.program import Program
from austeer.compiler.reexpress import carriers, reexpression
from austeer.compiler.target import Target, of_any_width
from austeer.passes.gate_neurons import most_neurons, named_neurons, needs_bias, replaced
from austeer.passes.lowerings import Lowering, biasless, lowerings, unkept, why_not

WAY_OUT = (
    "Use Scale at heads, attn, neurons or ffn, or Rank1, without a gate; another --target; "
    "or --form model-code, which carries every edit"
)


def legalize(program: Program, facts: ModelFacts, target: Target) -> ModelForm:
    """The form with the fewest inserted layers in which the target honours every edit of the program.

    All lowerings used are exact, but for gates with fitted neurons, or with a constant direction for a bias. Raises
    Refused, naming each edit that has none, with the reason and the way out, and ProgramError if the program was made
    for a model of another geometry.
    """
    program.require_fit(facts.geometry)
    lost = replaced(program.edits)
    if lost:
        _require_kept(program, lost)
        target = of_any_width(target)
    places = _by_place(program.edits, facts)
    tried = [_in_carrier(carrier, places, facts, target) for carrier in carriers(facts.architecture.model_type)]
    forms = [form for form in tried if isinstance(form, ModelForm)]
    if forms:  # of equals the first: the model's own architecture
        return min(forms, key=lambda form: (_without_bias(program, form), form.inserted))
    reasons = dict.fromkeys(reason for form in tried if not isinstance(form, ModelForm) for reason in form)
    model = f"{facts.geometry.name} ({facts.architecture.model_type})"
    raise Refused("\n".join([f"{target} cannot carry this program in {model}:", *reasons, WAY_OUT]))


def _require_kept(program: Program, lost: dict[int, set[int]]) -> None:
    """Refused where a neuron that gives way to a gate's is one that another edit is about."""
    both = ((edit, sorted(named_neurons(edit) & lost.get(edit.layer, set()))) for edit in program.edits)
    refused = [f"  {edit.where}: neuron {shared[0]}" for edit, shared in both if shared]
    if refused:
        head = "gated edits replace neurons that other edits are about, and what those do would be lost:"
        raise Refused("\n".join([head, *refused, "Choose the neurons of the gates anew, for the whole program"]))


Places = dict[tuple[int, Role], list[Edit]]


def _by_place(edits: Iterable[Edit], facts: ModelFacts) -> Places:
    places: Places = {}
    for edit in edits:
        places.setdefault((edit.layer, facts.role(edit)), []).append(edit)
    return places


def _in_carrier(carrier: str, places: Places, facts: ModelFacts, target: Target) -> ModelForm | list[str]:
    """The form with this architecture, or why some edits have none."""
    home = facts.architecture.model_type
    blocked = reexpression(home, carrier).blocked(facts.config) if carrier != home else None
    if blocked:
        return [f"  as {carrier} it cannot be written: {blocked}"]
    lost = unkept(_biased(carrier, facts), carrier, target)
    if lost:
        return [f"  {lost}"]
    chosen = {place: _choose(edits, carrier, facts, target) for place, edits in places.items()}
    refused = [reason for choice in chosen.values() if isinstance(choice, list) for reason in choice]
    if refused:
        return refused
    legal = {place: choice for place, choice in chosen.items() if isinstance(choice, Lowering)}
    routes: dict[tuple[int, Role], Route] = {place: choice.route for place, choice in legal.items() if choice.route}
    return ModelForm(
        ARCHITECTURES[carrier],
        routes,
        period=max((choice.period for choice in legal.values()), default=1),
        out_bias=all(choice.out_bias for choice in legal.values()),
        widened=widening(facts.geometry.neurons, most_neurons(edit for edits in places.values() for edit in edits)),
    )


def _without_bias(program: Program, form: ModelForm) -> int:
    """How many gates have to do without the biases of their neurons."""
    gated = (edit for edit in program.gated.values() if needs_bias(edit))
    return sum(form.routes.get((edit.layer, "ffn_out")) != "bias" for edit in gated)


def _biased(carrier: str, facts: ModelFacts) -> list[Linear]:
    """The linear maps that, written in this architecture, have a bias for the base's own sake."""
    own = [linear for linear in facts.architecture.linears if facts.has_bias(linear)]
    if carrier == facts.architecture.model_type:
        return own
    complete = {linear.of_attention for linear in own}  # a family with flags has all biases of a part, or none
    return [linear for linear in ARCHITECTURES[carrier].linears if linear.of_attention in complete]


def _choose(edits: Sequence[Edit], carrier: str, facts: ModelFacts, target: Target) -> Lowering | list[str]:
    """The one lowering for all edits of a place: the first that each of them allows; else the reasons."""
    reasons = [f"  {edit.where}: {reason}" for edit in edits if (reason := refusal(edit, facts, target))]
    if reasons:
        return reasons
    shared: list[Lowering] | None = None
    for edit in edits:
        allowed = [lowering for lowering in _lowerings(edit, facts, target) if lowering.carrier == carrier]
        if all(lowering.route is None for lowering in allowed) and allowed:
            continue  # goes with any route
        shared = [lowering for lowering in (allowed if shared is None else shared) if lowering in allowed]
    if shared is None:
        return Lowering(carrier)
    possible = [lowering for lowering in shared if not _hindrance(lowering, edits, facts)]
    if possible:
        return possible[0]
    hindered = {_hindrance(lowering, edits, facts) for lowering in shared} - {""}
    edit = next(edit for edit in edits if isinstance(edit, (Shift, Gated)))
    why = sorted(hindered) or [_why_not(edit, carrier, facts, target)]
    return [f"  {edit.where}: {'; '.join(why)}"]


def _why_not(edit: Edit, carrier: str, facts: ModelFacts, target: Target) -> str:
    if isinstance(edit, Gated):
        why = biasless(carrier, target)
        return f"{why}; and the gate has no constant direction to do without, which `steer --adaptive` fits"
    return why_not(type(edit), edit.site, carrier, target, post_norm=facts.post_norm)


def _lowerings(edit: Edit, facts: ModelFacts, target: Target) -> list[Lowering]:
    architecture = facts.architecture.model_type
    found = lowerings(type(edit), edit.site, architecture, target, post_norm=facts.post_norm)
    if isinstance(found, str):
        return []
    if isinstance(edit, Gated) and not needs_bias(edit):
        return [lowering for lowering in found if not lowering.route]
    if isinstance(edit, Gated) and not len(edit.gate.constant) and not facts.has_bias(facts.architecture.ffn_out):
        return [lowering for lowering in found if lowering.route]
    return found


def refusal(edit: Edit, facts: ModelFacts, target: Target) -> str | None:
    """Why this edit has no lowering at all, in any architecture the model could be written as."""
    gated = isinstance(edit, Gated)
    if edit.site == "neurons" and facts.has_experts(edit.layer) and not gated:
        return "the layer is a mixture of experts, so a neuron has no one place; use site ffn"
    found = lowerings(type(edit), edit.site, facts.architecture.model_type, target, post_norm=facts.post_norm)
    if isinstance(found, str):
        return found
    if gated and not isinstance(edit.edit, Shift) and edit.neurons is None:
        return "no neurons are fitted to it, and no weight does it exactly; `steer --adaptive` fits them"
    return None


def _hindrance(lowering: Lowering, edits: Sequence[Edit], facts: ModelFacts) -> str:
    """Why these very edits cannot go this way; empty if they can."""
    if lowering.route == "value-bias":
        return "; ".join(_not_by_values(edits, facts))
    return ""


def _not_by_values(edits: Sequence[Edit], facts: ModelFacts) -> Iterator[str]:
    """v_proj adds its constant to all heads of a group alike, and before anything else happens to them."""
    if any(isinstance(edit, Shift) and edit.site != "heads" for edit in edits):
        yield "v_proj.bias cannot shift what comes after the heads"
        return
    at_heads = [edit for edit in edits if edit.site == "heads" and isinstance(edit, (Scale, Shift))]
    last_shift = max(number for number, edit in enumerate(at_heads) if isinstance(edit, Shift))
    if any(isinstance(edit, Scale) for edit in at_heads[:last_shift]):
        yield "v_proj.bias comes before a scale that the program puts before the shift"
    if not all(_alike_in_groups(edit, facts) for edit in at_heads if isinstance(edit, Shift)):
        yield "the vector differs between heads that share one value head, so v_proj.bias cannot hold it"


def _alike_in_groups(edit: Shift, facts: ModelFacts) -> bool:
    heads = edit.vector.reshape(facts.kv // facts.head_dim, -1, facts.head_dim)
    return bool(np.array_equal(heads, np.broadcast_to(heads[:, :1], heads.shape)))
