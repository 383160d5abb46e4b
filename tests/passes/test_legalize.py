"""legalize: what is refused is refused with its reason, and all of it at once."""

import pytest

from austeer.compiler import Edit, Program, ProgramError, Rank1, Refused, Scale, Shift
from austeer.compiler.facts import ModelFacts, read_facts
from austeer.passes.legalize import legalize, refusal
from tests.tiny import VARIANTS, Tiny, on_disk, program


def facts_of(tiny: Tiny) -> ModelFacts:
    return read_facts(on_disk(tiny))


def shift(tiny: Tiny, layer: int, site: str) -> Shift:
    model = facts_of(tiny).geometry
    return Shift(layer, site, [1.0] * {"heads": model.heads, "neurons": model.neurons}.get(site, model.residual))


MISTRAL, MOE, MIXTRAL, OPT, POST = (
    Tiny("mistral"),
    Tiny("qwen3_moe"),
    Tiny("mixtral"),
    Tiny("opt"),
    VARIANTS["opt-post"],
)


@pytest.mark.parametrize("name", VARIANTS)
def test_legal_programs_go_through_unchanged(name: str) -> None:
    made = program(VARIANTS[name])
    assert legalize(made, facts_of(VARIANTS[name])) is made


@pytest.mark.parametrize(
    ("tiny", "edit", "reason"),
    [
        (MISTRAL, Scale(0, "residual", [1], 1), "the residual stream is read through a norm, .*use site ffn or attn"),
        (MISTRAL, shift(MISTRAL, 0, "heads"), "needs the bias of self_attn.o_proj, and this model has none"),
        (MISTRAL, shift(MISTRAL, 0, "attn"), "needs the bias of self_attn.o_proj, .*use Scale or Rank1"),
        (MISTRAL, shift(MISTRAL, 0, "neurons"), "needs the bias of mlp.down_proj, and this model has none"),
        (MISTRAL, shift(MISTRAL, 1, "ffn"), "needs the bias of mlp.down_proj"),
        (MISTRAL, shift(MISTRAL, 1, "residual"), "needs the bias of mlp.down_proj"),
        (Tiny("qwen3"), shift(Tiny("qwen3"), 0, "ffn"), "needs the bias of mlp.down_proj"),
        (Tiny("olmo2"), shift(Tiny("olmo2"), 0, "residual"), "norms what its projections write"),
        (Tiny("gemma2"), shift(Tiny("gemma2"), 0, "residual"), "norms what its projections write"),
        (POST, shift(POST, 0, "residual"), "norms what its projections write"),
        (MOE, Scale(0, "neurons", [1], 1), "a mixture of experts, so a neuron has no one place; use site ffn"),
        (MOE, shift(MOE, 0, "neurons"), "a mixture of experts, so a neuron has no one place"),
        (MOE, Rank1(0, "neurons", [1.0] * 28, [1.0] * 20, 1), "a mixture of experts, so a neuron has no one place"),
        (MOE, shift(MOE, 0, "ffn"), "a mixture of experts, which has no bias of its own; use site heads or attn"),
        (MOE, shift(MOE, 0, "residual"), "a mixture of experts, which has no bias of its own"),
        (MOE, shift(MOE, 1, "ffn"), "needs the bias of mlp.down_proj"),
        (MIXTRAL, shift(MIXTRAL, 1, "attn"), "needs the bias of self_attn.o_proj"),
    ],
)
def test_refusals(tiny: Tiny, edit: Edit, reason: str) -> None:
    facts = facts_of(tiny)
    where = f"{edit.kind} at layer {edit.layer}, site {edit.site}"
    with pytest.raises(
        Refused, match=rf"1 of 1 edits have no exact fold into .*\({tiny.architecture}\):\n  {where}: .*{reason}"
    ):
        legalize(Program(facts.geometry, (edit,)), facts)


@pytest.mark.parametrize(
    ("tiny", "edit"),
    [
        (OPT, shift(OPT, 0, "residual")),
        (POST, shift(POST, 0, "ffn")),
        (Tiny("olmo2"), shift(Tiny("olmo2"), 0, "heads")),
        (MOE, Scale(0, "ffn", [1], 1)),
        (MOE, Scale(1, "neurons", [1], 1)),
        (MOE, shift(MOE, 0, "attn")),
        (MISTRAL, Rank1(0, "neurons", [1.0] * 28, [1.0] * 20, 1)),
    ],
)
def test_neighbours_of_the_refusals_are_legal(tiny: Tiny, edit: Edit) -> None:
    assert refusal(edit, facts_of(tiny)) is None


def test_all_refused_edits_are_named_and_only_those() -> None:
    facts = facts_of(MISTRAL)
    edits = (shift(MISTRAL, 1, "ffn"), Scale(0, "ffn", [1], 1), Scale(1, "residual", [0], 1))
    with pytest.raises(Refused) as raised:
        legalize(Program(facts.geometry, edits), facts)
    first, *lines = str(raised.value).splitlines()
    assert first.startswith("2 of 3 edits")
    assert [line.partition(":")[0] for line in lines] == [
        "  shift at layer 1, site ffn",
        "  scale at layer 1, site residual",
    ]


def test_a_program_for_another_geometry_does_not_fit() -> None:
    with pytest.raises(ProgramError, match=r"does not fit .*layers 2, not 3"):
        legalize(program(Tiny("llama")), facts_of(Tiny("llama", layers=3)))


def test_a_program_without_edits_is_legal() -> None:
    facts = facts_of(MISTRAL)
    assert legalize(Program(facts.geometry, ()), facts).edits == ()
