"""A build that dies leaves no output or a whole one, and the same command works again (design, invariant 4)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from austeer.compiler import Program, Scale, Shift
from tests.tiny import Tiny


@pytest.mark.skipif(not hasattr(os, "fork"), reason="killing after each call needs fork")
def test_killed_after_each_file_system_call(tmp_path: Path):
    base, place = tmp_path / "base", tmp_path / "place"
    Tiny("llama", layers=1, biases=False).save(base)
    place.mkdir()
    edits = [Scale(0, "ffn", (1, 3), (0.5, -0.5)), Shift(0, "attn", [0.1] * 20)]  # the shift adds a file of its own
    Program.of(edits, model=base).save(tmp_path / "program.safetensors")
    command = [sys.executable, "tests/killing.py", base, tmp_path / "program.safetensors", place]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1], check=False)
    assert done.returncode == 0, done.stderr
    kills = json.loads(done.stdout)

    states = [kill["state"] for kill in kills]
    assert set(states) == {"none", "whole"}  # never partial; and the kills did reach past the rename
    assert states == sorted(states)  # first none, then whole
    assert len(kills) > 30, "too few calls were seen for the test to mean anything"
    assert any(kill["litter"] for kill in kills), "no kill left anything to clean up, so nothing was tested"
    assert all(kill["again"] == 0 and kill["same"] and kill["clean"] for kill in kills)
