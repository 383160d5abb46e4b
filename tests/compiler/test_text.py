"""The text form of a program: golden text, exact round trip, and errors that name their line."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from austeer.compiler import Program, ProgramError, Rank1, Scale, Shift, SpaceError
from austeer.compiler.facts import Geometry
from austeer.compiler.text import is_text, parse, render
from tests.tiny import scratch

MODEL = Geometry('a "b" #é', "llama", layers=2, residual=3, heads=4, neurons=2)
PROGRAM = Program(
    MODEL,
    (
        Scale(1, "ffn", [2, 0], [0.1, -0.25]),
        Shift(0, "heads", [1, -0.0, 1e-7, 3.4e38]),
        Rank1(0, "neurons", [1, 0.5], [0, 1, -2], 1 / 3),
        Scale(0, "residual", [], []),
    ),
)
GOLDEN = r"""model "a \"b\" #\u00e9" llama layers=2 residual=3 heads=4 neurons=2
layer 1 ffn scale 2:0.1 0:-0.25
layer 0 heads shift 1.0 -0.0 1e-07 3.4e+38
layer 0 neurons rank1 strength 0.33333334 k 1.0 0.5 v 0.0 1.0 -2.0
layer 0 residual scale
"""


def bits(program: Program) -> list[Any]:
    """Every field, vectors as bytes: -0.0 is not 0.0."""
    return [
        [value.tobytes() if isinstance(value, np.ndarray) else value for value in vars(edit).values()]
        for edit in program.edits
    ]


def test_the_golden_text() -> None:
    assert [line.rstrip() for line in render(PROGRAM).splitlines()] == GOLDEN.splitlines()
    assert parse(GOLDEN) == PROGRAM
    assert bits(parse(GOLDEN)) == bits(PROGRAM)


def test_comments_and_blank_lines_say_nothing() -> None:
    lines = GOLDEN.splitlines()
    text = "\n".join(["# first", "", *lines[:2], "   # within", "\t", *(f"  {line}  " for line in lines[2:])])
    assert parse(text.replace("\n", "\r\n")) == PROGRAM


FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
NAMES = st.text(max_size=12)


@st.composite
def programs(draw: Any) -> Program:
    model = Geometry(draw(NAMES), "llama", *(draw(st.integers(1, 5)) for _ in range(4)))

    def vector(width: int) -> list[float]:
        return draw(st.lists(FLOATS, min_size=width, max_size=width))

    edits: list[Any] = []
    free = {
        (layer, site, unit)
        for layer in range(model.layers)
        for site in ("heads", "attn", "neurons", "ffn", "residual")
        for unit in range({"heads": model.heads, "neurons": model.neurons}.get(site, model.residual))
    }
    for kind in draw(st.lists(st.sampled_from(("scale", "shift", "rank1")), max_size=4)):
        layer = draw(st.integers(0, model.layers - 1))
        sites = ("heads", "neurons") if kind == "rank1" else ("heads", "attn", "neurons", "ffn", "residual")
        site = draw(st.sampled_from(sites))
        width = {"heads": model.heads, "neurons": model.neurons}.get(site, model.residual)
        if kind == "shift":
            edits.append(Shift(layer, site, vector(width)))
        elif kind == "rank1":
            edits.append(Rank1(layer, site, vector(width), vector(model.residual), draw(FLOATS)))
        else:
            units = sorted(unit for where, name, unit in free if (where, name) == (layer, site))
            units = draw(st.permutations(units))[: draw(st.integers(0, len(units)))]
            free -= {(layer, site, unit) for unit in units}
            edits.append(Scale(layer, site, units, vector(len(units))))
    return Program(model, tuple(edits))


@settings(derandomize=True, max_examples=60, deadline=None, database=None)
@given(programs())
def test_round_trip(program: Program) -> None:
    again = parse(render(program))
    assert again == program
    assert again.sha256 == program.sha256
    assert bits(again) == bits(program)


@settings(derandomize=True, max_examples=25, deadline=None, database=None)
@given(programs())
def test_both_file_forms_are_told_apart(program: Program) -> None:
    assert is_text(render(program).encode())
    assert Program.load(written(render(program))) == program


def written(text: str) -> Path:
    """A file of its own for each text: hypothesis runs many in one test."""
    path = scratch() / "program.txt"
    path.write_text(text, encoding="utf-8")
    return path


HEAD = 'model "m" llama layers=2 residual=3 heads=4 neurons=2'


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "an empty text"),
        ("# only a comment\n", "an empty text"),
        ("model", "line 1: cannot be read"),
        ("layer 0 ffn scale 1:1", "line 1: cannot be read .expected: model"),
        ("model m llama layers=2", "line 1: cannot be read"),
        ('model "m" llama layers=2', "line 1: a program's model needs"),
        ('model "m" llama layers=2 residual=3 heads=4 neurons=2 more=1', "line 1: a program's model needs"),
        ('model "m" llama layers=0 residual=3 heads=4 neurons=2', "line 1: .*not positive whole numbers"),
        ('model "m" llama layers=x residual=3 heads=4 neurons=2', "line 1: cannot be read"),
        (f"{HEAD}\n\nblock 0 ffn scale 1:1", "line 3: cannot be read .expected: layer"),
        (f"{HEAD}\nlayer 0", "line 2: cannot be read"),
        (f"{HEAD}\nlayer x ffn scale 1:1", "line 2: cannot be read"),
        (f"{HEAD}\nlayer 0 ffn gate 1:1", "line 2: cannot be read .unknown kind 'gate'"),
        (f"{HEAD}\nlayer 0 ffn scale 1", "line 2: cannot be read"),
        (f"{HEAD}\nlayer 0 ffn scale 1:x", "line 2: cannot be read"),
        (f"{HEAD}\nlayer 0 ffn scale 1:1:1", "line 2: cannot be read"),
        (f"{HEAD}\nlayer 0 ffn scale -1:1", "line 2: scale at layer 0, site ffn: unit"),
        (f"{HEAD}\nlayer 0 ffn scale 1:nan", "line 2: .*nan or infinity"),
        (f"{HEAD}\nlayer 0 ffn scale 1:1e39", "line 2: .*nan or infinity"),
        (f"{HEAD}\nlayer 0 mlp scale 1:1", "line 2: .*site 'mlp'"),
        (f"{HEAD}\nlayer 0 heads rank1 k 1 2 3 4 v 1 2 3", "line 2: cannot be read .expected: rank1"),
        (f"{HEAD}\nlayer 0 heads rank1 strength 1 v 1 2 3 k 1 2 3 4", "line 2: cannot be read .expected: rank1"),
        (f"{HEAD}\nlayer 0 heads rank1", "line 2: cannot be read"),
        (f"{HEAD}\nlayer 7 ffn scale 1:1", "layers 0 to 1"),
        (f"{HEAD}\nlayer 0 ffn scale 1:1\nlayer 0 ffn scale 1:1", "scaled twice"),
    ],
)
def test_what_cannot_be_read_names_its_line(text: str, reason: str) -> None:
    with pytest.raises(ProgramError, match=reason):
        parse(text)


def test_a_vector_of_the_wrong_width_is_a_space_error() -> None:
    with pytest.raises(SpaceError, match="vector has 3 values; the heads space of m has 4"):
        parse(f"{HEAD}\nlayer 0 heads shift 1 2 3")


@pytest.mark.parametrize("data", [b"# \xff", b'model "\xe9" llama layers=1', b"\xff\xfe#\0m\0"])
def test_a_text_in_another_encoding_is_a_program_error(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes(data)
    with pytest.raises(ProgramError, match=r"p\.txt"):
        Program.load(tmp_path / "p.txt")
