"""The examples run, offline, and print what they promise."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str, *arguments: object) -> str:
    command = [sys.executable, "-W", "error", EXAMPLES / name, *map(str, arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("name", "promise"),
    [("edit_by_hand.py", "largest difference between hooks and weights: "), ("steer_from_python.py", "verified: True")],
)
def test_example(name: str, promise: str):
    assert promise in run(name)


def test_the_demo_model_can_be_trained_again(tmp_path: Path):
    run("train_demo_model.py", "--out", tmp_path, "--steps", 2, "--stories", 200)
    shipped = Path(__file__).parents[1] / "compiler" / "demo_model"
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in shipped.iterdir()}
