"""The form gguf by both routes, in llama.cpp, against the interpreter; the base must not agree."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from austeer.compiler import Edit, Program, Shift, interpret
from austeer.compiler.certificate import certify
from austeer.compiler.checkpoint import Checkpoint
from austeer.compiler.facts import read_facts
from austeer.compiler.gguf import read_gguf
from austeer.compiler.layout import Layout
from austeer.passes.fold import fold
from austeer.passes.legalize import legalize
from austeer.targets import checkpoint, gguf, gguf_patch
from austeer.targets.checkpoint import Writing
from austeer.targets.llama_cpp import convert
from tests.engines.llama_cpp import served, use_converter
from tests.tiny import VOCABULARY, Tiny, load, logits, on_disk, programs_edits, tokens

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
    "gpt_neox": Case(Tiny("gpt_neox"), GELU),
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
    return [*programs_edits(case.tiny, base, 0), *(shifts if added else [])]


def of_live(base: Path, program: Program | None) -> "np.ndarray[Any, Any]":
    """Log-probabilities [positions, vocabulary] of the base, or of the base steered by hooks."""
    live = load(base)
    if program is None:
        return logits(live, torch.tensor([IDS]))[0].double().log_softmax(-1).numpy()
    with interpret(live, program):
        return of_live_model(live)


def of_live_model(live: Any) -> "np.ndarray[Any, Any]":
    return logits(live, torch.tensor([IDS]))[0].double().log_softmax(-1).numpy()


def of_llama_cpp(path: Path) -> "np.ndarray[Any, Any]":
    return served(path, IDS, VOCABULARY, IDS[-1])


def planned(base: Path, program: Program) -> gguf.GgufPlan:
    facts = read_facts(base)
    layout = Layout.of(Checkpoint.open(base), facts)
    return gguf.plan(checkpoint.plan(fold(legalize(program, facts), facts), layout), layout)


def steered_by_converter(base: Path, program: Program, folder: Path) -> Path:
    folder.mkdir()
    plan = planned(base, program)
    gguf.write(plan, folder, Writing())
    assert [path.name for path in folder.iterdir()] == [plan.file]
    return folder / plan.file


def steered_in_place(base: Path, program: Program, folder: Path, outtype: str = "f32") -> Path:
    folder.mkdir()
    convert(base, folder.parent / f"base-{outtype}.gguf", outtype)
    plan = gguf_patch.patch_gguf(folder.parent / f"base-{outtype}.gguf", program, folder, Writing())
    return folder / plan.file


@pytest.mark.parametrize("name", [name for name in CASES if name != "gpt_neox"])
def test_converted_it_says_in_llama_cpp_what_the_interpreter_says(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    base = model(case, tmp_path)
    program = Program.of(edits(case, base, added=False), model=base)
    steered, plain = of_live(base, program), of_live(base, None)
    found = of_llama_cpp(steered_by_converter(base, program, tmp_path / "out"))
    assert np.abs(found - steered).max() < case.close
    assert np.abs(found - plain).max() > 100 * case.close


@pytest.mark.parametrize("name", CASES)
def test_patched_it_says_in_llama_cpp_what_the_interpreter_says(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    base = model(case, tmp_path)
    program = Program.of(edits(case, base, added=True), model=base)
    steered, plain = of_live(base, program), of_live(base, None)
    found = of_llama_cpp(steered_in_place(base, program, tmp_path / "out"))
    assert np.abs(found - steered).max() < case.close
    unpatched = of_llama_cpp(tmp_path / "base-f32.gguf")
    assert np.abs(unpatched - plain).max() < case.close
    assert np.abs(unpatched - steered).max() > 100 * case.close
