"""in_gates: a space of programs, and the gates that each of them may stand in."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from austeer.compiler import Gate, Gated, Program, Shift
from austeer.compiler.facts import Geometry
from austeer.passes.in_gates import InGates
from austeer.passes.study import Dimension, Point

MODEL = Geometry("m", "llama", layers=2, residual=3, heads=4, neurons=2)
GATE = Gate((1, 0, 0), 0, 8)


@dataclass(frozen=True)
class Shifts:
    """A shift of one of the layers."""

    model: Geometry = MODEL
    notes: tuple[str, ...] = ("a note",)

    @property
    def dimensions(self) -> Mapping[str, Dimension]:
        return {"layer": (0, 1)}

    @property
    def starts(self) -> Sequence[Point]:
        return [{"layer": 0}, {"layer": 1}]

    def program(self, point: Point, alpha: float) -> Program:
        return Program(MODEL, (Shift(point["layer"], "ffn", [alpha] * 3),))

    def size(self, point: Point) -> int:
        return point["layer"] + 1


def gated(program: Program) -> Program:
    return replace(program, edits=tuple(Gated(edit, GATE) for edit in program.edits))


SPACE = InGates(Shifts(), {"ajar": gated, "none": lambda program: program, "shut": lambda p: replace(p, edits=())})


def test_the_gate_is_one_more_choice() -> None:
    assert SPACE.dimensions == {"layer": (0, 1), "gate": ("ajar", "none", "shut")}
    assert SPACE.model == MODEL
    assert SPACE.notes == ("a note",)


def test_every_start_and_every_gate_is_tried() -> None:
    assert [(point["layer"], point["gate"]) for point in SPACE.starts] == [(0, "ajar"), (1, "none"), (0, "shut")]


def test_the_program_of_a_point_is_that_of_the_inner_one_in_its_gate() -> None:
    shift = Shift(1, "ffn", [0.5] * 3)
    assert SPACE.program({"layer": 1, "gate": "ajar"}, 0.5).edits == (Gated(shift, GATE),)
    assert SPACE.program({"layer": 1, "gate": "none"}, 0.5).edits == (shift,)
    assert SPACE.program({"layer": 1, "gate": "shut"}, 0.5).edits == ()
    assert SPACE.size({"layer": 1, "gate": "shut"}) == 2
