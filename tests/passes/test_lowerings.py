"""Every cell of the target tables: the way an edit takes, or the refusal with its reason and its way out."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from austeer.compiler import Gated, Program, Rank1, Refused, Scale, Shift, interpret
from austeer.compiler.form import ModelForm
from austeer.compiler.live import load_model
from austeer.compiler.sites import SiteName
from austeer.compiler.target import Target
from austeer.compiler.verbs.build import build
from austeer.passes.legalize import WAY_OUT, legalize
from austeer.passes.lowerings import lowerings
from austeer.targets.tables import TARGETS
from tests.passes.cells import (
    ABSENT,
    CELLS,
    GATES,
    PERIODS,
    REFUSE_O_PROJ,
    ROUTES,
    cells,
    facts,
    gate_cells,
    gated,
    plain_model,
    shift,
)  # fmt: skip
from tests.tiny import load, logits, on_disk, tokens

SCALED: tuple[SiteName, ...] = ("heads", "attn", "neurons", "ffn")


def legalized(target: str, architecture: str, edit: Any) -> ModelForm:
    model = facts(plain_model(architecture))
    return legalize(Program(model.geometry, (edit,)), model, TARGETS[target])


def place(form: ModelForm) -> tuple[str, str, bool, int]:
    ((_, route),) = form.routes.items()
    return form.architecture.model_type, route, form.out_bias, form.period


def expected(target: str, architecture: str, letter: str) -> tuple[str, str, bool, int]:
    carrier = "llama" if letter in "Lc" else architecture
    inserts = letter in "SCc"
    out_bias = letter in "BL" or (target, carrier) not in REFUSE_O_PROJ
    return carrier, ROUTES[letter], out_bias, PERIODS.get((target, architecture), 1) if inserts else 1


def test_the_table_of_the_tests_is_whole() -> None:
    assert list(CELLS) == list(ABSENT) == list(TARGETS)
    assert {letter for *_, letter in cells()} == {*ROUTES, "-"}


@pytest.mark.parametrize(("target", "architecture", "site", "letter"), list(cells()))
def test_shifts(target: str, architecture: str, site: str, letter: str) -> None:
    tiny = plain_model(architecture)
    edit = shift(tiny, site)
    if letter in "-V":
        with pytest.raises(Refused) as raised:
            legalized(target, architecture, edit)
        first, *reasons, way_out = str(raised.value).splitlines()
        assert first == f"{TARGETS[target]} cannot carry this program in tiny ({architecture}):"
        where = "" if architecture in ABSENT[target].split() else f"shift at layer 0, site {site}: "
        assert any(reason.startswith(f"  {where}") for reason in reasons)
        assert way_out == WAY_OUT
    else:
        assert place(legalized(target, architecture, edit)) == expected(target, architecture, letter)
    if letter == "V":
        alike = shift(tiny, site, alike=True)
        assert place(legalized(target, architecture, alike)) == expected(target, architecture, letter)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma2", "mistral"])
def test_scales_and_rank_1_need_no_bias_and_go_anywhere_but_to_the_residual(target: str, architecture: str) -> None:
    model = facts(plain_model(architecture)).geometry
    edits: list[Any] = [Scale(0, site, [1], 0.5) for site in SCALED]
    edits += [Rank1(0, "heads", [1.0] * model.heads, [1.0] * model.residual, 1)]
    edits += [Rank1(0, "neurons", [1.0] * model.neurons, [1.0] * model.residual, 1)]
    if architecture == "gemma2" and target in ("ctranslate2", "portable"):
        with pytest.raises(Refused, match="softcap, so even the base differs"):
            legalized(target, architecture, edits[0])
        return
    for edit in edits:
        form = legalized(target, architecture, edit)
        assert (form.architecture.model_type, form.routes, form.inserted) == (architecture, {}, 0)
    with pytest.raises(Refused, match="the residual stream is read through a norm"):
        legalized(target, architecture, Scale(0, "residual", [1], 0.5))


@pytest.mark.parametrize(
    ("target", "architecture", "site", "reason"),
    [
        ("vllm", "qwen3_moe", "attn", r"vLLM 0\.33\.0 drops self_attn\.o_proj\.bias of qwen3_moe in silence"),
        ("tgi", "gemma2", "attn", r"drops self_attn\.o_proj\.bias of gemma2 in silence"),
        ("sglang", "qwen3_moe", "ffn", r"drops mlp\.down_proj\.bias of qwen3_moe in silence"),
        ("llama.cpp", "gemma2", "attn", r"does not load a gemma2 that has self_attn\.o_proj\.bias"),
        ("mlx-lm", "qwen3", "residual", r"does not load a qwen3 that has mlp\.down_proj\.bias"),
        ("transformers", "mixtral", "heads", r"has no self_attn\.o_proj\.bias in mixtral and leaves the tensor out"),
        ("transformers", "gemma2", "ffn", "norms what its projections write, so no bias is a constant shift there"),
        ("sglang", "smollm3", "attn", "does not have the architecture smollm3"),
        ("ctranslate2", "gemma2", "heads", "leaves out gemma2's attention softcap"),
        ("llama.cpp", "qwen3_moe", "heads", "differs between heads that share one value head"),
        (
            "llama.cpp",
            "mixtral",
            "heads",
            r"transformers has no self_attn\.o_proj\.bias in mixtral, whatever llama\.cpp",
        ),
        ("portable", "qwen3", "heads", r"MLX-LM 0\.32\.2 does not load a qwen3"),
        ("portable", "olmo2", "heads", "does not have the architecture olmo2"),
    ],
)
def test_reasons(target: str, architecture: str, site: str, reason: str) -> None:
    where = "" if architecture in ABSENT[target].split() else f"site {site}: .*"
    with pytest.raises(Refused, match=where + reason):
        legalized(target, architecture, shift(plain_model(architecture), site))


def test_what_all_keep_but_in_different_forms_is_said_engine_by_engine() -> None:
    # vLLM wants qwen3's o_proj.bias in the set or not, llama.cpp must not see it, and transformers asks for it.
    members = tuple(TARGETS[name] for name in ("transformers", "llama.cpp"))
    both = Target("both", "both", "", members=members)
    found = lowerings(Shift, "residual", "qwen3", both, post_norm=False)
    assert found == "no one form is kept by all: transformers constant layer; llama.cpp constant layer"


# ---- gates ------------------------------------------------------------------------------------------


def test_the_table_of_gates_is_whole() -> None:
    assert list(GATES) == list(TARGETS)
    assert {letter for *_, letter in gate_cells()} == {*"NnDd-"}


@pytest.mark.parametrize("site", ["heads", "residual"])
@pytest.mark.parametrize(("target", "architecture", "letter"), list(gate_cells()))
def test_gates(target: str, architecture: str, letter: str, site: str) -> None:
    tiny = plain_model(architecture)
    without, constant = (gated(tiny, site, constant=known) for known in (False, True))
    if letter in "-dD":
        with pytest.raises(Refused) as raised:
            legalized(target, architecture, without)
        _, *reasons, way_out = str(raised.value).splitlines()
        assert way_out == WAY_OUT
        why = "" if letter == "-" else "; and the gate has no constant direction to do without"
        absent = architecture in ABSENT[target].split()
        assert any(absent or (reason.startswith(f"  gated shift at layer 0, site {site}: ") and why in reason)
                   for reason in reasons)  # fmt: skip
    else:
        assert gate_place(legalized(target, architecture, without)) == gate_expected(architecture, letter)
    if letter != "-":
        assert gate_place(legalized(target, architecture, constant)) == gate_expected(architecture, letter)


def gate_place(form: ModelForm) -> tuple[str, list[str], int]:
    return form.architecture.model_type, list(form.routes.values()), form.widened


def gate_expected(architecture: str, letter: str) -> tuple[str, list[str], int]:
    return "llama" if letter in "nd" else architecture, ["bias"] if letter in "Nn" else [], 256 - 28


@pytest.mark.parametrize(
    ("target", "architecture", "reason"),
    [
        ("transformers", "gemma2", "a norm stands after the FFN"),
        ("transformers", "qwen3_moe", "qwen3_moe has mixtures of experts, and a gate needs an FFN of its own"),
        ("transformers", "qwen3", r"transformers 5\.23\.0 has no mlp\.down_proj\.bias in qwen3"),
        ("llama.cpp", "gpt2", "the engine has one width for the FFN of a gpt2"),
        ("llama.cpp", "qwen3", r"does not load a qwen3 that has mlp\.down_proj\.bias"),
        ("sglang", "llama", r"SGLang 0\.5\.23 drops mlp\.down_proj\.bias of llama in silence"),
        ("portable", "llama", r"SGLang 0\.5\.23 drops mlp\.down_proj\.bias of llama in silence"),
        ("vllm", "mixtral", "mixtral has mixtures of experts"),
    ],
)
def test_reasons_of_gates(target: str, architecture: str, reason: str) -> None:
    with pytest.raises(Refused, match=rf"gated shift at layer 0, site attn: .*{reason}"):
        legalized(target, architecture, gated(plain_model(architecture)))


def test_a_gated_scale_needs_neurons_that_are_fitted_to_it_but_that_is_not_the_first_thing_to_say() -> None:
    for architecture, reason in {"llama": "no neurons are fitted to it", "olmo2": "a norm stands after"}.items():
        gate = gated(plain_model(architecture)).gate
        with pytest.raises(Refused, match=f"gated scale at layer 0, site ffn: {reason}"):
            legalized("transformers", architecture, Gated(Scale(0, "ffn", [1], 1), gate))


def test_a_gate_takes_the_biases_that_are_there() -> None:
    tiny = plain_model("qwen2")
    for constant in (False, True):  # be it that it could do without, and stay a qwen2
        form = legalized("transformers", "qwen2", gated(tiny, constant=constant))
        assert form.architecture.model_type == "llama"


# ---- and what is built does what the interpreter says ---------------------------------------------


def distinct() -> Iterator[Any]:
    """One cell for every form that any engine asks for, and none that only repeats another."""
    seen: set[Any] = set()
    for target, architecture, site, letter in cells():
        if letter == "-":
            continue
        key = (architecture, site, *expected(target, architecture, letter))
        if key not in seen:
            seen.add(key)
            yield pytest.param(target, architecture, site, letter, id=f"{target}-{architecture}-{site}")


@pytest.mark.parametrize(("target", "architecture", "site", "letter"), list(distinct()))
def test_what_is_built(target: str, architecture: str, site: str, letter: str, tmp_path: Path) -> None:
    tiny = plain_model(architecture)
    program = Program.of([shift(tiny, site, 1, alike=letter == "V")], model=on_disk(tiny))
    program.save(tmp_path / "p")
    report = build(str(on_disk(tiny)), [tmp_path / "p"], tmp_path / "out", target=target)
    base, ids = load(on_disk(tiny)), tokens()
    with interpret(base, program):
        wanted = logits(base, ids)
    made = load_model(tmp_path / "out", dtype="float32", device="cpu", may_miss=report.compiled.plan.may_miss)
    assert made.config.model_type == expected(target, architecture, letter)[0]
    assert (logits(made, ids) - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert (logits(base, ids) - wanted).abs().max() > 1e-2 * wanted.abs().max()
