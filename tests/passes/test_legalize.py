"""legalize: the form of a whole program, and what is refused, all of it at once. (Cell by cell: test_lowerings.)"""

from typing import Any

import pytest

from austeer.compiler import Edit, Program, ProgramError, Rank1, Refused, Scale, Shift
from austeer.compiler.facts import ModelFacts, read_facts
from austeer.compiler.form import ModelForm
from austeer.passes.legalize import WAY_OUT, legalize
from austeer.targets.tables import TARGETS
from tests.passes.cells import facts, shift
from tests.tiny import VARIANTS, Tiny, on_disk, program

MISTRAL, MOE, MIXTRAL, OPT, POST = (
    Tiny("mistral"),
    Tiny("qwen3_moe"),
    Tiny("mixtral"),
    Tiny("opt"),
    VARIANTS["opt-post"],
)
BARE_MOE = Tiny("qwen3_moe", biases=False, dense=())


def form_of(tiny: Tiny, *edits: Edit, target: str = "transformers", model: ModelFacts | None = None) -> ModelForm:
    model = model or facts(tiny)
    return legalize(Program(model.geometry, edits), model, TARGETS[target])


def neurons(tiny: Tiny, layer: int) -> Shift:
    return Shift(layer, "neurons", [1.0] * facts(tiny).geometry.neurons)


@pytest.mark.parametrize("name", VARIANTS)
def test_legal_programs_have_a_form(name: str) -> None:
    tiny = VARIANTS[name]
    form = legalize(program(tiny), read_facts(on_disk(tiny)), TARGETS["transformers"])
    carriers = {"mistral": "llama", "qwen2": "llama", "phi3": "llama"}
    assert form.architecture.model_type == carriers.get(tiny.architecture, tiny.architecture)
    assert bool(form.inserted) is (tiny.architecture in ("qwen3", "qwen3_moe", "gemma2", "gemma3_text", "olmo2"))
    assert form.out_bias


@pytest.mark.parametrize(
    ("tiny", "edit", "reason"),
    [
        (MISTRAL, Scale(0, "residual", [1], 1), "the residual stream is read through a norm"),
        (Tiny("olmo2"), shift(Tiny("olmo2"), "ffn"), "norms what its projections write"),
        (Tiny("gemma2"), neurons(Tiny("gemma2"), 0), "norms what its projections write"),
        (MOE, Scale(0, "neurons", [1], 1), "a mixture of experts, so a neuron has no one place; use site ffn"),
        (MOE, neurons(MOE, 0), "a mixture of experts, so a neuron has no one place"),
        (MOE, Rank1(0, "neurons", [1.0] * 28, [1.0] * 20, 1), "a mixture of experts, so a neuron has no one place"),
        (MIXTRAL, shift(MIXTRAL, "attn", 1), r"transformers 5\.23\.0 has no self_attn\.o_proj\.bias in mixtral"),
        (MIXTRAL, shift(MIXTRAL, "ffn", 1), r"has no mlp\.down_proj\.bias in mixtral"),
    ],
)
def test_refusals(tiny: Tiny, edit: Edit, reason: str) -> None:
    where = f"{edit.kind} at layer {edit.layer}, site {edit.site}"
    with pytest.raises(Refused, match=rf"carry this program in tiny \({tiny.architecture}\):\n  {where}: .*{reason}"):
        form_of(tiny, edit)


@pytest.mark.parametrize(
    ("tiny", "edit"),
    [
        (OPT, shift(OPT, "residual")),
        (POST, shift(POST, "ffn")),
        (POST, shift(POST, "residual")),
        (POST, Scale(0, "residual", [1], 1)),
        (Tiny("olmo2"), shift(Tiny("olmo2"), "heads")),
        (Tiny("olmo2"), shift(Tiny("olmo2"), "residual")),
        (MOE, Scale(0, "ffn", [1], 1)),
        (MOE, Scale(1, "neurons", [1], 1)),
        (MOE, neurons(MOE, 1)),
        (MOE, shift(MOE, "ffn", 0)),
        (MIXTRAL, Scale(0, "ffn", [1], 1)),
        (MISTRAL, Rank1(0, "neurons", [1.0] * 28, [1.0] * 20, 1)),
    ],
)
def test_neighbours_of_the_refusals_are_legal(tiny: Tiny, edit: Edit) -> None:
    form_of(tiny, edit)


def test_all_refused_edits_are_named_and_only_those() -> None:
    edits = (shift(MIXTRAL, "ffn", 1), Scale(0, "ffn", [1], 1), Scale(1, "residual", [0], 1))
    with pytest.raises(Refused) as raised:
        form_of(MIXTRAL, *edits)
    first, *lines, last = str(raised.value).splitlines()
    assert first == "transformers 5.23.0 cannot carry this program in tiny (mixtral):"
    assert [line.partition(":")[0] for line in lines] == [
        "  shift at layer 1, site ffn",
        "  scale at layer 1, site residual",
    ]
    assert last == WAY_OUT


def test_a_program_for_another_geometry_does_not_fit() -> None:
    with pytest.raises(ProgramError, match=r"does not fit .*layers 2, not 3"):
        legalize(program(Tiny("llama")), facts(Tiny("llama", layers=3)), TARGETS["transformers"])


@pytest.mark.parametrize("target", ["transformers", "llama.cpp", "sglang"])
def test_a_program_without_edits_leaves_the_form_as_it_is(target: str) -> None:
    form = form_of(MISTRAL, target=target)
    assert (form.architecture.model_type, form.routes, form.inserted) == ("mistral", {}, 0)


# ---- which form ------------------------------------------------------------------------------------


def test_the_form_with_the_fewest_layers_wins() -> None:
    tiny = Tiny("qwen2")  # whose own way to a residual shift is a layer; as llama it needs none
    assert form_of(tiny, shift(tiny, "residual")).architecture.model_type == "llama"
    alike = form_of(tiny, shift(tiny, "heads", alike=True))
    assert (alike.architecture.model_type, set(alike.routes.values())) == ("qwen2", {"value-bias"})


def test_places_have_their_own_routes() -> None:
    tiny = Tiny("llama", biases=False)
    edits = [shift(tiny, "attn", 0), shift(tiny, "ffn", 0), shift(tiny, "residual", 1), Scale(1, "attn", [1], 1)]
    form = form_of(tiny, *edits, target="sglang")
    assert form.routes == {(0, "attn_out"): "bias", (0, "ffn_out"): "constant-layer", (1, "ffn_out"): "constant-layer"}
    assert form.inserted == 2


def test_edits_of_one_place_share_a_route() -> None:
    tiny = Tiny("qwen3", biases=False)
    alike = shift(tiny, "heads", alike=True)
    assert set(form_of(tiny, alike, target="vllm").routes.values()) == {"value-bias"}
    both = form_of(tiny, alike, shift(tiny, "attn"), Scale(0, "heads", [1], 1), target="vllm")
    assert both.routes == {(0, "attn_out"): "split-layer"}


def test_a_scale_before_the_shift_keeps_it_out_of_v_proj() -> None:
    alike, scale = shift(BARE_MOE, "heads", alike=True), Scale(0, "heads", [1], 1)
    assert form_of(BARE_MOE, alike, scale, target="vllm").routes == {(0, "attn_out"): "value-bias"}
    with pytest.raises(Refused, match=r"v_proj\.bias comes before a scale that the program puts before the shift"):
        form_of(BARE_MOE, scale, alike, target="vllm")


# ---- what the base itself needs -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "architecture", "lost"),
    [
        ("vllm", "qwen3", "vLLM 0.33.0 drops self_attn.o_proj.bias of qwen3 in silence"),
        ("sglang", "llama", "SGLang 0.5.23 drops mlp.down_proj.bias of llama in silence"),
        ("llama.cpp", "gemma2", "llama.cpp 0c1e57098 does not load a gemma2 that has self_attn.o_proj.bias"),
        ("portable", "llama", "SGLang 0.5.23 drops mlp.down_proj.bias of llama in silence"),
    ],
)
def test_a_base_whose_own_biases_the_target_loses_is_refused_for_any_edit(
    target: str, architecture: str, lost: str
) -> None:
    edit: Any = Scale(0, "heads", [1], 1)
    with pytest.raises(Refused) as raised:
        form_of(Tiny(architecture, biases=True), edit, target=target)
    linear = lost.split("drops " if "drops" in lost else "has ")[1].split(" ", maxsplit=1)[0]
    assert f"\n  the base has {linear}, and {lost}\n" in str(raised.value)
    form_of(Tiny(architecture, biases=False), edit, target=target)
