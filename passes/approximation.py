"""The approximations of a program that no stock block carries exactly: which there are, what they fit, what they make.

All of them are of scales of the residual stream: its units changed (rescale), or its multiples added (linear_neurons).
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

from austeer.compiler.errors import Refused
from austeer.compiler.facts import ModelFacts
from austeer.compiler.form import ModelForm
from austeer.compiler.patch import Patch
from austeer.compiler.program import Program
from austeer.compiler.target import Target
from austeer.compiler.tokens import Tokens
from austeer.passes.compensate import compensate
from austeer.passes.legalize import WAY_OUT
from austeer.passes.linear_neurons import LinearNeurons, fit_slopes, linear_neurons, with_neurons
from austeer.passes.rescale import Rescaling, rescale, rescalings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Approximation: TypeAlias = Rescaling | LinearNeurons
"""All have a `name`, a `refusal`, empty where it is legal, and what is `fitted` to a live model, if it is yet."""


def approximations(program: Program, facts: ModelFacts, target: Target) -> list[Approximation]:
    """All that differ for this program, those that are not legal too. Refused if none is legal, or beside gates."""
    _refuse_gates(program)
    found: list[Approximation] = [*rescalings(program, facts), linear_neurons(program, facts, target)]
    if all(choice.refusal for choice in found):
        reasons = (f"  {choice.name}: {choice.refusal}" for choice in found)
        raise Refused("\n".join(["no approximation of this program is legal:", *reasons, WAY_OUT]))
    return found


def _refuse_gates(program: Program) -> None:
    gated = next(iter(program.gated.values()), None)
    if gated is not None:
        raise Refused(
            f"{gated.where}: the approximations of a scale at site residual change what the gate reads, or how wide "
            "the FFN is, and are not made beside one. Compile one without the other, or use --form model-code"
        )


def approximation_named(name: str, program: Program, facts: ModelFacts, target: Target) -> Approximation:
    """The legal one of this name; Refused if there is none."""
    choice = next((choice for choice in approximations(program, facts, target) if choice.name == name), None)
    if choice is None or choice.refusal:
        why = choice.refusal if choice else "it has no such approximation"
        raise Refused(f"{name} is not legal for this program: {why}")
    return choice


def fit(
    model: "PreTrainedModel", program: Program, choices: Sequence[Approximation], texts: Sequence[Tokens]
) -> list[Approximation]:
    """The choices, with what they leave open fitted to a live model."""
    units = compensate(model, program, [choice for choice in choices if isinstance(choice, Rescaling)], texts)
    neurons = [choice for choice in choices if isinstance(choice, LinearNeurons)]
    return [*units, *(fit_slopes(model, program, choice, texts) for choice in neurons)]


def approximated(program: Program, facts: ModelFacts, target: Target, choice: Approximation) -> tuple[ModelForm, Patch]:
    """The form and the patch of a program by one of its approximations. Refused as legalize does."""
    if isinstance(choice, Rescaling):
        return rescale(program, facts, target, choice)
    return with_neurons(program, facts, target, choice)
