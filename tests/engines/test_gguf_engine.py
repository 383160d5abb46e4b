"""The form gguf by both routes, in llama.cpp, against the interpreter; the base must not agree."""

import json
import shutil
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from austeer.compiler import Edit, Program, Shift, interpret
from austeer.compiler.checkpoint import Checkpoint
from austeer.compiler.errors import CheckFailed
from austeer.compiler.facts import read_facts
from austeer.compiler.gguf import read_gguf
from austeer.compiler.layout import Layout
from austeer.targets import gguf, gguf_patch
from austeer.targets.checkpoint import Writing
from austeer.targets.llama_cpp import convert
from tests.compiler.test_gates import gates
from tests.engines.llama_cpp import served, use_converter
from tests.tiny import VOCABULARY, Tiny, in_place, load, logits, on_disk, planned_checkpoint, tokens

pytestmark = [pytest.mark.engine, pytest.mark.slow]


@dataclass(frozen=True)
class Case:
    """A tiny model that llama.cpp runs as transformers does, but for `close`, and what else config.json says."""

    tiny: Tiny
    close: float = 1e-4
    config: dict[str, Any] = field(default_factory=dict[str, Any])
    shifts: tuple[str, ...] = ()  # sites whose constant only a GGUF can hold: its architecture reads an added bias


GELU = 1e-2  # ggml looks GELU up in a table of 16-bit floats
SQUARE = {"residual": 24, "biases": False}  # some architectures of llama.cpp take heads × head_dim to be residual
CASES = {
    "llama": Case(Tiny("llama")),
    "llama-unbiased": Case(Tiny("llama", biases=False), shifts=("heads", "attn", "neurons", "ffn", "residual")),
    "mistral": Case(Tiny("mistral"), shifts=("heads", "ffn")),
    "mixtral": Case(Tiny("mixtral"), shifts=("attn", "heads")),
    "qwen2": Case(Tiny("qwen2", residual=24)),
    "qwen3": Case(Tiny("qwen3", biases=False)),
    "qwen3_moe": Case(Tiny("qwen3_moe", biases=False, dense=())),
    "gemma2": Case(Tiny("gemma2", biases=False, tied=True), GELU, {"query_pre_attn_scalar": 6}),
    "gemma3": Case(Tiny("gemma3_text", biases=False, tied=True), GELU, {"query_pre_attn_scalar": 6}),
    "phi3": Case(Tiny("phi3", **SQUARE)),
    "olmo2": Case(Tiny("olmo2", **SQUARE)),
    "gpt2": Case(Tiny("gpt2", neurons=96), GELU),
    "gpt_neox": Case(Tiny("gpt_neox", head_dim=8), GELU),  # a quarter of a head is rotated: two numbers
}
IDS = tokens(1, 7)[0].tolist()


@pytest.fixture(autouse=True)
def converter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use_converter(monkeypatch, tmp_path / "llama.cpp")


def model(case: Case, folder: Path) -> Path:
    """The case's model on disk; the converter for gemma3 wants to count the tokens of a tokenizer."""
    base = shutil.copytree(on_disk(case.tiny), folder / "tiny")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, **case.config}))
    vocabulary = {f"t{number}": number for number in range(VOCABULARY)}
    (base / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}, "added_tokens": []}))
    return base


def edits(case: Case, base: Path, *, added: bool) -> list[Edit]:
    """Every legal edit of a tiny model, and with `added` constants that need a bias the base has not."""
    rng, geometry = np.random.default_rng(1), read_facts(base).geometry
    widths = {"heads": geometry.heads, "neurons": geometry.neurons}
    shifts = [
        Shift(layer, site, 0.3 * rng.normal(size=widths.get(site, geometry.residual)))
        for layer in range(geometry.layers)
        for site in case.shifts
    ]
    return [*in_place(case.tiny, base).edits, *(shifts if added else [])]


def of_live(base: Path, program: Program | None) -> "np.ndarray[Any, Any]":
    """Log-probabilities [positions, vocabulary] of the base, or of the base steered by hooks."""
    live = load(base)
    with interpret(live, program) if program else nullcontext():
        return said(live)


def said(live: Any) -> "np.ndarray[Any, Any]":
    return logits(live, torch.tensor([IDS]))[0].double().log_softmax(-1).numpy()


def of_llama_cpp(path: Path) -> "np.ndarray[Any, Any]":
    return served(path, IDS, VOCABULARY, IDS[-1])


def planned(base: Path, program: Program) -> gguf.GgufPlan:
    facts = read_facts(base)
    layout = Layout.of(Checkpoint.open(base), facts)
    return gguf.plan(planned_checkpoint(program, layout), layout)


def steered_by_converter(base: Path, program: Program, folder: Path) -> Path:
    folder.mkdir()
    plan = planned(base, program)
    gguf.write(plan, folder, Writing())
    assert {path.name for path in folder.iterdir()} == {plan.file, *plan.licences}
    return folder / plan.file


def steered_in_place(base: Path, program: Program, folder: Path, outtype: str = "f32") -> Path:
    folder.mkdir()
    convert(base, folder.parent / f"base-{outtype}.gguf", outtype)
    plan = gguf_patch.patch_gguf(folder.parent / f"base-{outtype}.gguf", program, folder, Writing())
    return folder / plan.file


@pytest.mark.parametrize("name", ["llama", "mixtral", "gemma2", "gpt2"])
def test_converted_it_says_in_llama_cpp_what_the_interpreter_says(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    base = model(case, tmp_path)
    program = Program.of(edits(case, base, added=False), model=base)
    steered, plain = of_live(base, program), of_live(base, None)
    found = of_llama_cpp(steered_by_converter(base, program, tmp_path / "out"))
    assert np.abs(found - steered).max() < case.close
    assert np.abs(found - plain).max() > 100 * case.close


@pytest.mark.parametrize("name", ["llama-unbiased", "phi3", "gpt_neox"])
def test_gates_converted_are_open_in_llama_cpp_where_the_interpreter_says(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    base = model(case, tmp_path)
    gated = [edit for edit in gates(case.tiny) if isinstance(edit.edit, Shift)]
    program = Program.of([*in_place(case.tiny, base).edits, *gated], model=base)
    steered, plain = of_live(base, program), of_live(base, None)
    path = steered_by_converter(base, program, tmp_path / "out")
    assert np.abs((found := of_llama_cpp(path)) - steered).max() < case.close
    assert np.abs(found - plain).max() > 100 * case.close
    assert read_gguf(path).tensors["blk.0.ffn_up.weight"].shape[0] == 256


@pytest.mark.parametrize("name", CASES)
def test_patched_it_says_in_llama_cpp_what_the_interpreter_says(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    base = model(replace(case, config={**case.config, "n_ctx": 64}), tmp_path)  # of gpt2, for the converter alone
    program = Program.of(edits(case, base, added=True), model=base)
    steered, plain = of_live(base, program), of_live(base, None)
    found = of_llama_cpp(steered_in_place(base, program, tmp_path / "out"))
    assert np.abs(found - steered).max() < case.close
    unpatched = of_llama_cpp(tmp_path / "base-f32.gguf")
    assert np.abs(unpatched - plain).max() < case.close
    assert np.abs(unpatched - steered).max() > 100 * case.close


def test_both_routes_give_the_same_tensors(tmp_path: Path) -> None:
    base = model(CASES["llama"], tmp_path)
    program = Program.of(edits(CASES["llama"], base, added=False), model=base)
    one = read_gguf(steered_by_converter(base, program, tmp_path / "one"))
    other = read_gguf(steered_in_place(base, program, tmp_path / "other"))
    before = read_gguf(tmp_path / "base-f32.gguf")
    assert one.tensors.keys() == other.tensors.keys()
    changed = set[str]()
    for name in one.tensors:
        found, values = one.values(one.tensors[name]), other.values(other.tensors[name])
        np.testing.assert_array_equal(found, values, err_msg=name)
        if not np.array_equal(values, before.values(before.tensors[name])):
            changed.add(name)
    stems = ("attn_output.weight", "attn_output.bias", "ffn_down.weight", "ffn_down.bias")
    assert changed == {f"blk.{layer}.{stem}" for layer in range(2) for stem in stems}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sixteen_bits_stay_sixteen_bits_and_biases_are_float32(dtype: str, tmp_path: Path) -> None:
    case = Case(replace(CASES["llama"].tiny, dtype=dtype))
    base = model(case, tmp_path)
    program = Program.of(edits(case, base, added=False), model=base)
    path = steered_by_converter(base, program, tmp_path / "out")
    short = {"float16": "F16", "bfloat16": "BF16"}[dtype]
    kinds = {name: tensor.kind for name, tensor in read_gguf(path).tensors.items()}
    assert path.name == f"tiny-steered-{short}.gguf"
    assert (kinds["blk.0.ffn_down.weight"], kinds["blk.0.ffn_down.bias"]) == (short, "F32")
    found = of_llama_cpp(path)
    error, effect = (np.abs(found - of_live(base, which)).max() for which in (program, None))
    assert error < 0.1 * effect


def test_equal_inputs_give_equal_bytes_and_damage_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = model(CASES["llama"], tmp_path)
    (base / "LICENSE").write_text("as you like")
    program = Program.of(edits(CASES["llama"], base, added=False), model=base)
    one = steered_by_converter(base, program, tmp_path / "one")
    assert (one.parent / "LICENSE").read_text() == "as you like"
    plan, good = planned(base, program), one.read_bytes()
    assert "LICENSE" not in plan.left_out
    assert {"config.json", "model.safetensors"} <= {*plan.left_out}
    assert gguf.problems(one.parent, plan) == {plan.file: "ok"}
    monkeypatch.setattr(gguf, "convert", lambda _, out, __: out.write_bytes(good))  # to be quick: it was just shown
    for name, verdict in {
        "blk.1.ffn_down.weight": "blk.1.ffn_down.weight does not hold the values",
        "blk.1.ffn_up.weight": "outside the edited tensors",
    }.items():
        damaged = bytearray(good)
        damaged[read_gguf(one).tensors[name].offset] ^= 1
        one.write_bytes(damaged)
        assert verdict in gguf.problems(one.parent, plan)[plan.file]
        one.write_bytes(good)


def test_what_the_certificate_measures_is_what_llama_cpp_runs(tmp_path: Path) -> None:
    for name in ("mixtral", "gpt2"):
        (folder := tmp_path / name).mkdir()
        base = model(CASES[name], folder)
        program = Program.of(edits(CASES[name], base, added=False), model=base)
        live = gguf.load(planned(base, program), dtype="float32", device="cpu")
        assert np.abs(said(live) - of_live(base, program)).max() < 1e-4
        assert np.abs(said(live) - of_live(base, None)).max() > 0.1


def test_a_converter_that_drops_the_edits_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = model(CASES["llama"], tmp_path)
    program = Program.of(edits(CASES["llama"], base, added=False), model=base)
    monkeypatch.setattr(gguf, "convert", lambda _, out, outtype: convert(base, out, outtype))
    with pytest.raises(CheckFailed, match=r"blk.0.attn_output.weight does not hold"):
        steered_by_converter(base, program, tmp_path / "out")
