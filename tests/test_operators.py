"""Edits that keep the shapes cost nothing to run: compiled, they ask for the operators of the base; hooks do not."""

from pathlib import Path

import pytest

from austeer.compiler import interpret
from austeer.compiler.facts import read_facts
from austeer.compiler.verbs.build import build
from benchmarks.in_place import compiled_twin
from benchmarks.operators import operators
from benchmarks.programs import mixed
from tests.tiny import Tiny, load, on_disk, tokens


@pytest.mark.parametrize("every_rank1", [0, 2])
def test_compiled_model_runs_the_operators_of_the_base(tmp_path: Path, every_rank1: int):
    folder = on_disk(Tiny("llama", biases=False))
    program = mixed(read_facts(folder).geometry, 6, every_rank1=every_rank1, units=3)
    program.save(tmp_path / "program.safetensors")
    build(str(folder), [tmp_path / "program.safetensors"], tmp_path / "out")
    base, compiled = load(folder), load(tmp_path / "out")
    expected = operators(base, tokens())
    assert len(expected) > 50
    assert operators(compiled, tokens()) == expected
    with interpret(base, program):
        assert operators(base, tokens()) != expected
    # What the benchmark on an accelerator runs is the same model.
    state, in_place = compiled.state_dict(), compiled_twin(base, program).state_dict()
    assert all((state[name] - in_place[name]).abs().max() <= 1e-6 for name in state)
