"""The examples run, offline, and print what they promise."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from austeer.compiler.live import load_tokenizer
from austeer.compiler.pruning import examine, require_same_tokenizer
from austeer.compiler.verbs.bases import open_base
from austeer.compiler.verbs.demo import MODEL
from tests.tiny import load

ROOT = Path(__file__).parents[1]
EXAMPLES, PRUNERS = ROOT / "examples", ROOT / ".venv-pruners/bin/python"


def run(name: str, *arguments: object, python: str | Path = sys.executable, warnings: str = "error") -> str:
    command = [python, "-W", warnings, EXAMPLES / name, *map(str, arguments)]
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


# llmcompressor itself warns, of a model that it thinks offloaded.
@pytest.mark.pruners
@pytest.mark.slow
@pytest.mark.parametrize(
    ("package", "options", "kind", "promise", "warnings"),
    [
        ("torch_pruning", [], "structured", "left in each layer: 6 heads, 216 neurons", "error"),
        ("llmcompressor", ["--method", "wanda"], "unstructured", "zeros in the linear maps: 50.0% to 50.0%", "default"),
        ("llmcompressor", ["--pattern", "2:4"], "2:4", "zeros in the linear maps: 50.0% to 50.0%", "default"),
        ("llmcompressor", ["--method", "sparsegpt"], "unstructured", "zeros in the linear maps: 50.0%", "default"),
    ],
)
def test_other_peoples_pruners_write_what_restore_takes(
    package: str, options: list[str], kind: str, promise: str, warnings: str, tmp_path: Path
):
    if not PRUNERS.exists():
        pytest.skip("`make test-pruners` installs the pruners")
    texts = (json.dumps({"text": text}) for text in (MODEL / "neutral.txt").read_text("utf-8").splitlines())
    (tmp_path / "texts.jsonl").write_text("\n".join(texts), "utf-8")
    data = ["--data", tmp_path / "texts.jsonl"] if package == "llmcompressor" else []
    out = tmp_path / "pruned"
    name = f"prune_with_{package}.py"
    assert promise in run(name, MODEL, out, *data, *options, python=PRUNERS, warnings=warnings)
    assert load(out)
    require_same_tokenizer(load_tokenizer(MODEL), load_tokenizer(out))
    assert examine(open_base(str(MODEL), None).layout, open_base(str(out), None).layout).kind == kind
