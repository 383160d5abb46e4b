"""in place: which edits a model carries without changing its form, and why not the others."""

from austeer.compiler.edits import Edit, Scale, Shift
from austeer.compiler.errors import Refused
from austeer.compiler.facts import ModelFacts
from austeer.compiler.form import ModelForm
from austeer.compiler.gates import Gated
from austeer.compiler.program import Program


def require_in_place(program: Program, facts: ModelFacts) -> ModelForm:
    """The form the model has, if every edit has an exact fold into it; Refused, naming all that have none.

    Raises ProgramError if the program was made for a model of another geometry.
    """
    program.require_fit(facts.geometry)
    reasons = [(edit, _refusal(edit, facts)) for edit in program.edits]
    refused = [f"  {edit.where}: {reason}" for edit, reason in reasons if reason]
    if refused:
        model = f"{facts.geometry.name} ({facts.geometry.architecture})"
        raise Refused("\n".join([f"{len(refused)} of {len(reasons)} edits have no exact fold into {model}:", *refused]))
    return ModelForm(facts.architecture)


def _refusal(edit: Edit, facts: ModelFacts) -> str | None:
    """Why this edit cannot be folded exactly into this model, with the way out; None if it can."""
    if isinstance(edit, Gated):
        return (
            "a gate is new neurons, which make the FFN wider; compile the model that this was made of, "
            "with --form gguf for a GGUF"
        )
    if edit.site == "neurons" and facts.has_experts(edit.layer):
        return "the layer is a mixture of experts, so a neuron has no one place; use site ffn"
    if isinstance(edit, Scale) and edit.site == "residual":
        return (
            "the residual stream is read through a norm, so no weight of a stock block scales it; "
            "use site ffn or attn, or run it with hooks"
        )
    return _no_bias(edit, facts) if isinstance(edit, Shift) else None


def _no_bias(edit: Shift, facts: ModelFacts) -> str | None:
    """Why the constant cannot be baked: it ends in the bias of an output projection, which must be there."""
    projection = facts.projection(facts.role(edit))
    if edit.site == "residual" and facts.post_norm:
        return "this model norms what its projections write, so no bias is a constant shift of the residual stream"
    if facts.has_experts(edit.layer) and facts.role(edit) == "ffn_out":
        return "the layer is a mixture of experts, which has no bias of its own; use site heads or attn"
    if not facts.has_bias(projection):
        return f"a constant needs the bias of {projection.name}, and this model has none; use Scale or Rank1"
    return None
