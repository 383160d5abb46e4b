"""rescale and compensate: scales of the residual stream as a choice of its units."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from austeer.compiler import Edit, Program, Rank1, Refused, Scale, Shift
from austeer.compiler.architectures import ARCHITECTURES
from austeer.compiler.facts import ModelFacts, read_facts
from austeer.compiler.interpreter import interpret
from austeer.compiler.stream import STREAMS
from austeer.compiler.verbs import forms
from austeer.compiler.verbs.bases import open_base
from austeer.compiler.verbs.common import Compiled
from austeer.passes.approximation import approximation_named
from austeer.passes.compensate import compensate
from austeer.passes.rescale import Rescaling, needs_rescaling, rescalings
from austeer.targets.checkpoint import Writing
from austeer.targets.tables import TARGETS
from tests.tiny import VARIANTS, Tiny, bare, load, logits, on_disk, rewritten, scratch, sharded, tokens

STREAMED = [name for name in VARIANTS if name != "opt-post"]  # there the block ends in a norm, and all is exact
UNTIED = [name for name in STREAMED if not VARIANTS[name].tied]
PAIR = (1, 3)  # units whose values are opposite, so that a LayerNorm's mean does not see them
SHARE = 1e-3  # how large they are beside the others

WRITERS = re.compile(
    r"(o_proj|down_proj|w2|c_proj|attention\.dense|dense_4h_to_h|out_proj|fc2|embed_tokens|wte|wpe|embed_in"
    r"|embed_positions)\.(weight|bias)$"
)
READERS = {
    "gemma": r"(input_layernorm|pre_feedforward_layernorm|model\.norm)\.weight$",
    "olmo2": r"([qkv]_proj|gate_proj|up_proj|model\.norm)\.weight$",
    "": r"(input_layernorm|post_attention_layernorm|model\.norm|ln_.|final_layer_norm|self_attn_layer_norm)\.weight$",
}
POST_NORMS = r"(post_attention_layernorm|post_feedforward_layernorm)\.weight$"


def family(architecture: str) -> str:
    return "gemma" if architecture.startswith("gemma") else architecture if architecture == "olmo2" else ""


def small(values: torch.Tensor, residual: int) -> torch.Tensor:
    """Along the residual axis, the last: mean 0, with the pair opposite and small."""
    values = values.clone()
    others = [unit for unit in range(residual) if unit not in PAIR]
    values[..., others] -= values[..., others].mean(-1, keepdim=True)
    values[..., PAIR[0]] *= SHARE
    values[..., PAIR[1]] = -values[..., PAIR[0]]
    return values


def changed(name: str, tensor: torch.Tensor, tiny: Tiny, residual: int) -> torch.Tensor:
    """The pair is small where it is written, and as large as the others where it is read."""
    kind = family(tiny.architecture)
    offset = 1.0 if kind == "gemma" else 0.0
    if kind and re.search(POST_NORMS, name):
        tensor = tensor.clone()
        tensor[list(PAIR)] = SHARE * 0.8 - offset
        return tensor
    if re.search(READERS[kind], name):
        tensor = tensor.clone()
        tensor[..., list(PAIR)] = (offset + tensor[..., list(PAIR)]) / SHARE - offset
        return tensor
    if not WRITERS.search(name) or (kind and "embed" not in name):
        return tensor
    rows = tensor.ndim == 2 and "embed" not in name and tiny.architecture != "gpt2"
    return small(tensor.T, residual).T if rows else small(tensor, residual)


@cache
def negligible(name: str) -> Path:
    """A model in whose stream two units have a share of about 1e-6 of the square norm, and full weight for readers."""
    tiny = VARIANTS[name]
    residual = read_facts(on_disk(tiny)).geometry.residual

    def change(tensors: dict[str, Any]) -> dict[str, Any]:
        return {name: changed(name, tensor, tiny, residual) for name, tensor in tensors.items()}

    return rewritten(on_disk(tiny), scratch() / "model", change)


def vector(width: int, seed: int) -> np.ndarray[Any, Any]:
    return small(torch.randn(width, generator=torch.Generator().manual_seed(seed)), width).numpy()


def others(name: str, residual: int) -> Iterator[Edit]:
    """Edits of every other kind, whose vectors leave the pair as small as it is."""
    heads = read_facts(on_disk(VARIANTS[name])).geometry.heads
    norms_writes = family(VARIANTS[name].architecture)
    yield Scale(1, "heads", (0, 2), (0.5, -0.5))
    yield Scale(1, "attn", PAIR, (0.3, 0.3))
    yield Rank1(1, "heads", np.linspace(-1, 1, heads), vector(residual, 1), 0.1)
    if not norms_writes and VARIANTS[name].architecture not in ("mistral", "qwen2", "mixtral", "phi3"):
        yield Shift(1, "attn", vector(residual, 2))


def rescaling_named(name: str, program: Program, facts: ModelFacts) -> Rescaling:
    choice = approximation_named(name, program, facts, TARGETS["transformers"])
    assert isinstance(choice, Rescaling)
    return choice


def compiled(program: Program, path: Path, choice: str, norms: Sequence[float] = ()) -> tuple[Compiled, Any]:
    base = open_base(str(path))
    found = replace(rescaling_named(choice, program, base.facts), fitted=tuple(norms))
    made = Compiled.of(program, base, approximation=found)
    folder = scratch()
    made.write(folder, Writing())
    return made, load(folder)


def errors(program: Program, path: Path, choice: str) -> tuple[float, float]:
    """Largest logit differences from the interpreter: of the compiled model, and of the base."""
    model, ids = load(path), tokens()
    plain = logits(model, ids)
    with interpret(model, program):
        expected = logits(model, ids)
    _, live = compiled(program, path, choice)
    scale = float(expected.abs().max())
    return float((logits(live, ids) - expected).abs().max()) / scale, float((plain - expected).abs().max()) / scale


def scales(factor: float = 1.0) -> list[Edit]:
    return [Scale(0, "residual", PAIR, factor), Scale(1, "residual", PAIR[::-1], factor / 2)]


def test_every_architecture_has_its_stream() -> None:
    assert STREAMS.keys() == ARCHITECTURES.keys()


@pytest.mark.parametrize("choice", ["rescale-later", "rescale-earlier", "rescale-both"])
@pytest.mark.parametrize("name", STREAMED)
def test_units_that_no_norm_notices_are_scaled_exactly(name: str, choice: str) -> None:
    if choice != "rescale-later" and name not in UNTIED:
        pytest.skip("the embeddings are tied: refused, which has a test of its own")
    path = negligible(name)
    residual = read_facts(path).geometry.residual
    program = Program.of([*scales(), *others(name, residual)], model=path)
    without = Program.of(others(name, residual), model=path)
    error, base = errors(program, path, choice)
    assert base > 1e-2
    assert error < 1e-4
    # The scales themselves matter: what the other edits do alone is far from it.
    model, ids = load(path), tokens()
    with interpret(model, program):
        expected = logits(model, ids)
    with interpret(model, without):
        assert float((logits(model, ids) - expected).abs().max()) > 1e-2 * float(expected.abs().max())


@pytest.mark.parametrize("choice", ["rescale-later", "rescale-earlier"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "opt", "qwen2", "gemma2", "olmo2"])
def test_a_shift_of_the_same_stream_before_or_after_the_scale(name: str, choice: str) -> None:
    path = negligible(name)
    residual = read_facts(path).geometry.residual
    shift, scale = Shift(0, "residual", 5 * vector(residual, 3)), Scale(0, "residual", PAIR, 3.0)
    later = Shift(1, "residual", vector(residual, 4))
    for edits in ([shift, scale, later], [scale, shift, later]):
        error, base = errors(Program.of(edits, model=path), path, choice)
        assert base > 1e-2
        assert error < 1e-4


def test_where_blocks_read_the_stream_as_it_is_earlier_is_exact_for_any_units() -> None:
    path = on_disk(VARIANTS["olmo2"])
    program = Program.of([Scale(0, "residual", (1, 5), (0.5, -3)), Scale(1, "residual", (5,), 1)], model=path)
    error, base = errors(program, path, "rescale-earlier")
    assert base > 1e-2
    assert error < 1e-5
    assert compiled(program, path, "rescale-earlier")[0].exact
    later, live = compiled(program, path, "rescale-later")
    assert not later.exact  # the last norm reads other units
    model, ids = load(path), tokens()
    with interpret(model, program):
        assert float((logits(live, ids) - logits(model, ids)).abs().max()) > 1e-3


def test_the_exact_route_of_a_block_that_ends_in_a_norm_needs_none_of_this() -> None:
    facts = read_facts(on_disk(VARIANTS["opt-post"]))
    assert not needs_rescaling(Scale(0, "residual", (1,), 1.0), facts)
    assert needs_rescaling(Scale(0, "residual", (1,), 1.0), read_facts(on_disk(VARIANTS["opt"])))
    assert not needs_rescaling(Scale(0, "ffn", (1,), 1.0), read_facts(on_disk(VARIANTS["opt"])))


# ---- which choices there are ------------------------------------------------------------


def names(tiny: Tiny, *edits: Edit) -> dict[str, str]:
    """Each choice, and why it is not legal."""
    facts = read_facts(on_disk(tiny))
    return {choice.name: choice.refusal for choice in rescalings(Program(facts.geometry, edits), facts)}


def test_both_is_a_choice_where_scales_lie_in_both_halves() -> None:
    tiny = Tiny("llama", layers=4)
    first, last = Scale(1, "residual", (0,), 1.0), Scale(2, "residual", (0,), 1.0)
    assert names(tiny, first) == names(tiny, last) == {"rescale-later": "", "rescale-earlier": ""}
    assert names(tiny, first, last) == {"rescale-later": "", "rescale-earlier": "", "rescale-both": ""}


@pytest.mark.parametrize("name", ["llama-tied", "gpt2-tied", "gemma2-tied"])
def test_tied_embeddings_are_not_rescaled(name: str) -> None:
    found = names(VARIANTS[name], *scales())
    assert found["rescale-later"] == ""
    assert "head shares the embeddings" in found["rescale-earlier"]
    assert "head shares the embeddings" in found["rescale-both"]
    path = on_disk(VARIANTS[name])
    with pytest.raises(Refused, match=r"rescale-earlier is not legal .* head shares"):
        compiled(Program.of(scales(), model=path), path, "rescale-earlier")


def test_embeddings_behind_a_projection_are_not_rescaled() -> None:
    facts = read_facts(on_disk(Tiny("opt")))
    program = Program(facts.geometry, tuple(scales()))
    narrow = replace(facts, config={**facts.config, "word_embed_proj_dim": facts.geometry.residual // 2})
    assert [choice.refusal for choice in rescalings(program, facts)] == ["", "", ""]
    refusals = [choice.refusal for choice in rescalings(program, narrow)]
    assert refusals == ["", *["the embeddings pass through a projection"] * 2]


def test_an_absent_key_means_what_it_means_to_the_architecture() -> None:
    for name, tied in (("llama", False), ("gpt2", True), ("smollm3", True), ("gpt_neox", False), ("opt", True)):
        facts = read_facts(on_disk(VARIANTS[name]))
        config = {key: value for key, value in facts.config.items() if key != "tie_word_embeddings"}
        found = rescalings(Program(facts.geometry, tuple(scales())), replace(facts, config=config))
        assert bool(found[1].refusal) is tied, name


def test_what_is_taken_out_of_the_stream_cannot_be_divided() -> None:
    found = names(Tiny("llama"), Scale(0, "residual", (1, 3), (0.5, -1)))
    assert found.keys() == {"rescale-later", "rescale-earlier"}
    assert all(why.startswith("scale at layer 0, site residual: unit 3 has gamma -1") for why in found.values())


def test_a_choice_that_is_not_there_is_refused() -> None:
    path = on_disk(Tiny("llama"))
    with pytest.raises(Refused, match="rescale-never is not legal"):
        compiled(Program.of(scales(), model=path), path, "rescale-never")


def test_other_forms_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forms, "FORMS", {**forms.FORMS, "lora": forms.FORMS["checkpoint"]})
    base = open_base(str(on_disk(Tiny("llama"))))
    choice = rescaling_named("rescale-later", Program(base.facts.geometry, tuple(scales())), base.facts)
    with pytest.raises(Refused, match="written as a checkpoint, not as lora"):
        Compiled.of(Program(base.facts.geometry, tuple(scales())), base, form="lora", approximation=choice)


# ---- what is declared -------------------------------------------------------------------


def declared(lowering: Sequence[dict[str, Any]], name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Where a tensor may change."""
    may = torch.zeros(tensor.shape, dtype=torch.bool)
    for entry in lowering:
        if entry["tensor"] == name:
            axes = [
                range(size) if axis is None else axis for axis, size in zip(entry["slice"], tensor.shape, strict=True)
            ]
            may[np.ix_(*axes)] = True
    return may


@pytest.mark.parametrize("choice", ["rescale-later", "rescale-earlier"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "opt", "olmo2", "gemma2", "phi3", "mixtral"])
def test_the_lowering_says_all_that_changes_and_that_it_is_approximate(name: str, choice: str) -> None:
    path = on_disk(VARIANTS[name])
    program = Program.of([Scale(0, "ffn", (7,), 1.0), Scale(0, "residual", (1, 3), 1.0)], model=path)
    made, live = compiled(program, path, choice)
    before, after = load(path).state_dict(), live.state_dict()
    stored = {entry["tensor"] for entry in made.plan.lowering}
    for key in before.keys() & stored:
        outside = ~declared(made.plan.lowering, key, before[key])
        assert torch.equal(before[key][outside], after[key][outside]), key
    touched = {key for key in before if not torch.equal(before[key], after[key])}
    assert {key for key in touched if "expert" not in key} <= stored
    flags = {entry["edit"]: entry["exact"] for entry in made.plan.lowering}
    assert flags == {0: True, 1: name == "olmo2" and choice == "rescale-earlier"}


@pytest.mark.parametrize("name", ["gpt2", "opt", "llama"])
def test_names_without_the_prefix_and_several_files(name: str, tmp_path: Path) -> None:
    tiny = VARIANTS[name]
    program = Program.of(scales(), model=on_disk(tiny))
    expected = compiled(program, on_disk(tiny), "rescale-earlier")[1].state_dict()
    for path in (bare(tiny, tmp_path / "bare"), sharded(tiny, tmp_path / "sharded")):
        found = compiled(program, path, "rescale-earlier")[1].state_dict()
        assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bits(dtype: str) -> None:
    path = on_disk(replace(VARIANTS["olmo2"], dtype=dtype))
    error, base = errors(Program.of([Scale(1, "residual", (1, 5), 1.0)], model=path), path, "rescale-earlier")
    assert error < 0.02 < 0.1 < base


# ---- compensation -----------------------------------------------------------------------


def texts(count: int = 3) -> list[tuple[int, ...]]:
    return [tuple(row) for row in tokens(count, 12, seed=5).tolist()]


def test_the_factor_of_the_last_norm_is_the_least_squares_one() -> None:
    path = on_disk(Tiny("llama"))
    program = Program.of(scales(2.0), model=path)
    model, (choice, *_) = load(path), rescalings(Program.of(scales(2.0), model=path), read_facts(path))
    (found,) = compensate(model, program, [choice], texts())
    seen: list[torch.Tensor] = []
    hook = model.model.norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0].double()))
    with interpret(model, program):
        for text in texts():
            logits(model, torch.tensor([text]))
    hook.remove()
    x = torch.cat(seen)
    stored = x.clone()
    stored[:, PAIR[0]] /= 3 * 2
    stored[:, PAIR[1]] /= 3 * 2
    wanted, got = (x / v.pow(2).mean(-1, keepdim=True).sqrt() * model.model.norm.weight for v in (x, stored))
    expected = torch.linalg.lstsq(got.reshape(-1, 1), wanted.reshape(-1, 1)).solution.item()
    assert abs(expected - 1) > 0.05
    assert found.fitted[-1] == pytest.approx(expected, rel=1e-4)
    assert found.fitted[:2] == (1.0, 1.0)  # layer 0 reads the stream before the first scale


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "gemma2", "olmo2", "gpt2", "gpt_neox", "opt", "phi3"])
def test_compensated_norms_are_nearer(name: str) -> None:
    path = on_disk(VARIANTS[name])
    program = Program.of([Scale(0, "residual", range(0, 20, 2), 2.0)], model=path)
    model = load(path)
    (choice,) = compensate(model, program, [rescaling_named("rescale-later", program, read_facts(path))], texts())
    ids = tokens(4, 12, seed=6)  # not what was fitted
    with interpret(model, program):
        expected = logits(model, ids)
    errors = [
        float((logits(compiled(program, path, choice.name, norms)[1], ids) - expected).square().mean())
        for norms in ((), choice.fitted)
    ]
    assert errors[1] < 0.8 * errors[0]
    assert len(choice.fitted) == (1 if name == "olmo2" else 5)
