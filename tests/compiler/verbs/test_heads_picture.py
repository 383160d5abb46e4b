"""The picture of heads shows which were chosen, and is the same file for the same heads."""

from pathlib import Path

import numpy as np
import pytest

from austeer.compiler.verbs.heads_picture import draw_heads

IMPORTANCE = np.random.default_rng(0).random((5, 8), np.float32)


def test_chosen_heads_are_marked(tmp_path: Path) -> None:
    draw_heads(IMPORTANCE, IMPORTANCE > 0.7, tmp_path / "heads.svg")
    drawn = (tmp_path / "heads.svg").read_text()
    count = int((IMPORTANCE > 0.7).sum())
    assert all(f">{word}<" in drawn for word in (f"chosen: {count} of 40 heads", "layer", "head"))
    marks = drawn.partition('<g id="PathCollection_1">')[2].partition("</g>\n   </g>")[0]
    assert marks.count("<use ") == count


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_equal_heads_give_equal_bytes(suffix: str, tmp_path: Path) -> None:
    for name, chosen in (("a", IMPORTANCE > 0.7), ("b", IMPORTANCE > 0.7), ("c", IMPORTANCE > 0.8)):
        draw_heads(IMPORTANCE, chosen, tmp_path / f"{name}{suffix}")
    first, same, other = ((tmp_path / f"{name}{suffix}").read_bytes() for name in "abc")
    assert first == same != other
    assert (first[1:4] == b"PNG") == (suffix == ".png")


def test_large_models_and_empty_choices_can_be_drawn(tmp_path: Path) -> None:
    importance = np.full((80, 64), 0.5, np.float32)
    draw_heads(importance, importance > 1, tmp_path / "none.png")
    draw_heads(importance, importance < 1, tmp_path / "all.png")
