"""The study: what it asks for, how it is kept, and which file it refuses."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from austeer.compiler import InputError, OutputError
from austeer.passes.study import ROUND, Point, Range, Study

DIMENSIONS = {"site": ("ffn", "heads"), "k": Range(1, 256), "aim": Range(0.1, 0.9, log=False)}
STARTS: list[Point] = [{"site": "ffn", "k": 1, "aim": 0.9}, {"site": "heads", "k": 256, "aim": 0.9}]


def value(point: Point) -> float:
    return -abs(point["k"] - 40) / 40 - abs(point["aim"] - 0.5) - (point["site"] == "ffn")


def study(file: Path | None = None, seed: int = 0, **identity: str) -> Study:
    return Study(DIMENSIONS, STARTS, seed=seed, file=file, identity=identity)


def run(made: Study, most: int, stop_after: int | None = None) -> list[Point]:
    """All points that were asked for; KeyboardInterrupt after some."""
    told = 0
    while asked := made.ask(most):
        for point in asked:
            if told == stop_after:
                raise KeyboardInterrupt
            made.tell(point, value(point), {"point": point})
            told += 1
    return [record["point"] for record in made.records]


def test_the_starts_come_first_and_the_values_guide_the_rest() -> None:
    points = run(study(), 40)
    assert points[:2] == STARTS
    assert len(points) == 40
    assert all(1 <= point["k"] <= 256 and isinstance(point["k"], int) for point in points)
    late: Sequence[float] = sorted(value(point) for point in points[24:])
    early: Sequence[float] = sorted(value(point) for point in points[2:10])
    assert late[8] > early[4]  # the medians


def test_the_seed_decides() -> None:
    assert run(study(), 20) == run(study(), 20)
    assert run(study(seed=1), 20) != run(study(), 20)
    assert run(study(seed=-1), 10)


@pytest.mark.parametrize("stop_after", [0, 3, ROUND, ROUND + 5])
def test_an_interrupted_study_goes_on_as_if_it_had_not_been(stop_after: int, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(study(tmp_path / "study", model="a"), 20, stop_after)
    again = study(tmp_path / "study", model="a")
    assert len(again.records) == stop_after
    assert run(again, 20) == run(study(model="a"), 20)


def test_a_finished_study_is_extended_by_more_trials(tmp_path: Path) -> None:
    run(study(tmp_path / "study"), 13)
    assert study(tmp_path / "study").ask(13) == []
    assert run(study(tmp_path / "study"), 20) == run(study(), 20)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"model": "b", "pairs": "x"}, "another model;"),
        ({"model": "b", "pairs": "y"}, "another model and another pairs;"),
        ({"model": "a", "pairs": "x", "seed": 1}, "another seed;"),
        ({"model": "a"}, "another version;"),
    ],
)
def test_the_study_of_something_else_is_refused(other: dict[str, Any], message: str, tmp_path: Path) -> None:
    run(study(tmp_path / "study", model="a", pairs="x"), 2)
    before = (tmp_path / "study").read_bytes()
    with pytest.raises(InputError, match=message):
        study(tmp_path / "study", **other)
    assert (tmp_path / "study").read_bytes() == before


@pytest.mark.parametrize("content", [b"my notes", b"my notes\n", b'{"k": 1}\n', b"[1]\n2\n", b"\xff\xfe\n"])
def test_a_file_that_is_no_study_is_refused_and_left_alone(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "study").write_bytes(content)
    with pytest.raises(InputError, match="no stored study"):
        study(tmp_path / "study")
    assert (tmp_path / "study").read_bytes() == content


def test_a_line_that_was_cut_while_it_was_written_is_asked_for_again(tmp_path: Path) -> None:
    run(study(tmp_path / "study"), 10)
    data = (tmp_path / "study").read_bytes()
    (tmp_path / "study").write_bytes(data[:-20])
    assert len(study(tmp_path / "study").records) == 9
    assert run(study(tmp_path / "study"), 20) == run(study(), 20)


def test_a_folder_is_needed_for_the_file(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="no directory"):
        study(tmp_path / "gone" / "study")
    with pytest.raises(InputError, match="no stored study"):
        study(tmp_path)
