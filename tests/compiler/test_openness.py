"""How often gates are open, against their definition, one text at a time."""

from typing import Any

import numpy as np
import pytest
import torch

from austeer.compiler import Program, Scale, Shift, interpret
from austeer.compiler.gates import Gate, Gated
from austeer.compiler.gating import gate_value
from austeer.compiler.live import activation_of, ffn_input, live_facts
from austeer.compiler.openness import Openness, open_rates
from tests.shared import tiny

TEXTS = [(1, 2, 3), (4, 5, 6, 7, 8, 9), (10,), (11, 12, 13, 14)]


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gemma2"])
def test_open_rates_by_definition(name: str) -> None:
    model = tiny(name)
    facts = live_facts(model)
    generator = np.random.default_rng(0)
    gates = [Gate(generator.normal(size=24), bias, 2.0) for bias in (0.5, 0.0)]
    shift = Shift(0, "residual", generator.normal(size=24))
    edits = [
        shift,
        Gated(Scale(1, "ffn", [2], [0.5]), gates[0]),
        Gated(Shift(0, "heads", np.ones(facts.geometry.heads)), gates[1]),
    ]
    program = Program.of(edits, model=facts.geometry)
    found = open_rates(model, program, TEXTS, batch_tokens=8)
    numbers = {edit.layer: number for number, edit in enumerate(program.edits) if isinstance(edit, Gated)}
    assert found.keys() == set(numbers.values())
    for layer, gate in ((1, gates[0]), (0, gates[1])):
        with interpret(model, program):
            h = torch.cat([ffn_inputs(model, layer, text) for text in TEXTS])
        expected = Openness.of(gate_value(gate, activation_of(facts))(h)[:, 0])
        assert 0 < expected.open < 1
        assert found[numbers[layer]].tokens == expected.tokens == 14
        assert found[numbers[layer]].open == expected.open
        assert found[numbers[layer]].mean == pytest.approx(expected.mean, abs=1e-5)


def ffn_inputs(model: Any, layer: int, text: tuple[int, ...]) -> torch.Tensor:
    seen: list[torch.Tensor] = []
    module = ffn_input(model, live_facts(model), layer).module
    with module.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2))):
        model(input_ids=torch.tensor([text]), use_cache=False)
    return seen[0]


def test_a_program_without_gates_has_none() -> None:
    model = tiny("llama")
    program = Program.of([Shift(0, "ffn", np.ones(24))], model=live_facts(model).geometry)
    assert open_rates(model, program, TEXTS, batch_tokens=8) == {}
