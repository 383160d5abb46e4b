"""Gates in the place of neurons, in llama.cpp: in its gpt2 too, whose FFNs cannot get wider."""

from pathlib import Path

import numpy as np
import pytest

from austeer.compiler import Gate, Gated, Program, Shift
from austeer.compiler.facts import read_facts
from austeer.targets import gguf
from tests.engines.llama_cpp import use_converter
from tests.engines.test_gguf_engine import (
    CASES,
    model,
    of_live,
    of_llama_cpp,
    planned,
    said,
    steered_by_converter,
)

pytestmark = [pytest.mark.engine, pytest.mark.slow]


@pytest.fixture(autouse=True)
def converter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use_converter(monkeypatch, tmp_path / "llama.cpp")


@pytest.mark.parametrize("name", ["gpt2", "llama", "llama-unbiased"])
def test_converted_it_says_what_the_checkpoint_says(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    base = model(case, tmp_path)
    geometry, rng = read_facts(base).geometry, np.random.default_rng(0)
    w = 0.3 * rng.normal(size=(2, geometry.residual))
    edits = (
        Gated(Shift(0, "residual", rng.normal(size=geometry.residual)), Gate(w[0], 0.1, 2), None, (20, 3)),
        Gated(Shift(1, "heads", rng.normal(size=geometry.heads)), Gate(w[1], 0.1, 2), None, (0, geometry.neurons - 1)),
    )
    program = Program(geometry, edits)
    expected, plan = said(gguf.load(planned(base, program), dtype="float32", device="cpu")), planned(base, program)
    found = of_llama_cpp(steered_by_converter(base, program, tmp_path / "out"))
    assert np.abs(found - expected).max() < case.close
    assert np.abs(found - of_live(base, None)).max() > 30 * case.close
    assert plan.checkpoint.form.widened == 0
