"""Which neurons gated edits replace: as JSON, in files and text, and what of it contradicts itself."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from austeer.compiler import Fitted, Gate, Gated, Program, ProgramError, Scale, Shift, interpret
from austeer.compiler.facts import Geometry, read_facts
from austeer.compiler.kinds import edit_from
from austeer.compiler.text import parse, render
from tests.tiny import VARIANTS, load, logits, on_disk, tokens

MODEL = Geometry("m", "llama", layers=2, residual=3, heads=4, neurons=6)
GATE = Gate((0.5, -1.0, 0.25), 0.5, 2.0)
FITTED = Fitted(np.ones((3, 3)), [1, 2, 3], np.ones((3, 3)), [0, 0.5, 1], np.ones((3, 3)))
SHIFT = Gated(Shift(0, "ffn", [1, 2, 3]), GATE, None, (4, 0))
SCALE = Gated(Scale(0, "ffn", [2], [0.5]), GATE, FITTED, (1, 5, 2))


def test_json_file_and_text_lead_back(tmp_path: Path) -> None:
    made = Program(MODEL, (SHIFT, SCALE))
    made.save(tmp_path / "p.safetensors")
    assert Program.load(tmp_path / "p.safetensors") == made == parse(render(made))
    assert [edit_from(json.loads(json.dumps(edit.plain())), "x") for edit in made.edits] == [SHIFT, SCALE]
    assert render(made).splitlines()[1] == (
        "layer 0 ffn gated shift 1.0 2.0 3.0 replaces 4 0 gate delta 2.0 b 0.5 w 0.5 -1.0 0.25"
    )


def test_it_counts_for_identity() -> None:
    others = [SHIFT, replace(SHIFT, replaces=(0, 4)), replace(SHIFT, replaces=(4, 1)), replace(SHIFT, replaces=())]
    assert len({Program(MODEL, (edit,)).sha256 for edit in others}) == len(others)


def test_it_is_no_part_of_what_the_program_means() -> None:
    base, ids = on_disk(VARIANTS["llama"]), tokens()
    model, geometry = load(base), read_facts(base).geometry
    gated = Gated(Shift(0, "ffn", np.ones(geometry.residual)), Gate(np.ones(geometry.residual), 0, 2))
    found: list[torch.Tensor] = []
    for edit in (gated, replace(gated, replaces=(3, 8))):
        with interpret(model, Program(geometry, (edit,))):
            found.append(logits(model, ids))
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("places", "words"),
    [
        ((1,), "replaces 1 neurons, and is carried by 2"),
        ((1, 2, 3), "replaces 3 neurons, and is carried by 2"),
        ((1, 1), "a neuron is replaced twice"),
        ((1, -2), "expected a whole number"),
        ((1, 0.5), "expected a whole number"),
    ],
)
def test_what_no_edit_can_replace(places: Any, words: str) -> None:
    with pytest.raises(ProgramError, match=f"gated shift at layer 0, site ffn.*{words}"):
        replace(SHIFT, replaces=places)


def test_what_has_no_neurons_replaces_none() -> None:
    with pytest.raises(ProgramError, match="replaces 2 neurons, and is carried by 0"):
        Gated(Scale(0, "ffn", [2], [0.5]), GATE, None, (0, 1))


@pytest.mark.parametrize(
    ("edits", "words"),
    [
        ([replace(SHIFT, replaces=(4, 6))], "neuron 6 is outside the 6"),
        ([SHIFT, replace(SCALE, replaces=(1, 4, 5))], r"edit 1 .* edit 0 .* replaces neuron 4 too"),
        ([SHIFT, replace(SHIFT, replaces=(5, 0))], r"edit 1 .* edit 0 .* replaces neuron 0 too"),
        ([SHIFT, replace(SCALE, replaces=())], r"edit 0 .* replaces neurons and edit 1 .* does not"),
    ],
)
def test_what_no_program_can_replace(edits: Sequence[Gated], words: str) -> None:
    with pytest.raises(ProgramError, match=words):
        Program(MODEL, tuple(edits))


def test_the_same_numbers_in_different_layers_are_different_neurons() -> None:
    Program(MODEL, (SHIFT, replace(SHIFT, edit=Shift(1, "ffn", [1, 2, 3]))))


@pytest.mark.parametrize("words", ["replaces 1.5 2", "replaces x y", "replaces 1", "replaces 1 1"])
def test_a_text_that_cannot_be_read_names_its_line(words: str) -> None:
    line = f"layer 0 ffn gated shift 1 2 3 {words} gate delta 1 b 0 w 1 2 3"
    text = f'model "m" llama layers=2 residual=3 heads=4 neurons=6\n{line}'
    with pytest.raises(ProgramError, match="line 2"):
        parse(text)
