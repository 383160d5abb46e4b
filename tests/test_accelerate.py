"""restore in two processes, as `accelerate launch` starts them: the result of one, a report of one, an error of one."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from austeer.compiler import Program
from austeer.compiler.verbs.demo import MODEL
from benchmarks.pruners import magnitude

pytest.importorskip("accelerate")
pytestmark = pytest.mark.slow

RESTORE = ["-m", "austeer.compiler.cli", "restore"]
# `--cpu` would start a single process, however many are asked for: that launcher leaves several to MPI.
TWO = [
    "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
    "--mixed_precision", "no", "--dynamo_backend", "no",
]  # fmt: skip


@dataclass(frozen=True)
class Job:
    """A folder with a pruned model and samples to restore it with."""

    folder: Path

    def run(self, out: str, *options: str, processes: int = 1, data: str = "data.jsonl") -> Any:
        """The finished process; 19 samples to fit to, so that the last of a batch of 3 is alone."""
        launch = [*TWO, "--main_process_port", str(free_port())] if processes > 1 else []
        where = ["pruned", "--dense", str(MODEL), "--data", data, "-o", out, "--json", "--device", "cpu"]
        how = ["--top-heads", "all", "--epochs", "2", "--batch-size", "3", "--lr", "0.05", "--program-only"]
        command = [sys.executable, *launch, *RESTORE, *where, *how, *options]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            command, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=100, check=False
        )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@cache
def samples() -> list[str]:
    pairs = [json.loads(line) for line in (MODEL / "pairs.jsonl").read_text().splitlines()]
    return [json.dumps({"prompt": pair["prompt"], "response": pair["positive"]}) for pair in pairs]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tmp_path_factory.mktemp("job")
    magnitude(MODEL, folder / "pruned", 0.5)
    (folder / "data.jsonl").write_text("\n".join(samples()[:23]))
    (folder / "bad.jsonl").write_text('{"prompt": "no response"}\n')
    return Job(folder)


def vectors(file: Path) -> np.ndarray:
    return np.stack([edit.arrays()["vector"] for edit in Program.load(file).edits])


def test_two_processes_find_what_one_finds_and_one_reports(job: Job) -> None:
    one, two = job.run("one.safetensors"), job.run("two.safetensors", processes=2)
    assert (one.returncode, two.returncode) == (0, 0), two.stderr
    alone, together = json.loads(one.stdout), json.loads(two.stdout)  # one object each
    assert alone["samples"] == {"fitted": 19, "stopped_by": 2, "reported_on": 2}
    assert (together["steps"], together["best_step"]) == (alone["steps"], alone["best_step"])
    losses = [np.array(report["held_out_losses"]) for report in (alone, together)]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    assert losses[0][:, 1].min() < losses[0][0, 1] - 0.1
    np.testing.assert_allclose(together["loss"]["restored"], alone["loss"]["restored"], rtol=1e-4)
    wanted, found = (vectors(job.folder / f"{name}.safetensors") for name in ("one", "two"))
    np.testing.assert_allclose(found, wanted, atol=1e-3 * np.abs(wanted).max())
    assert (found != wanted).any()  # sums of two parts are rounded otherwise: there were two
    assert sorted(path.name for path in job.folder.glob("two*")) == ["two.safetensors"]


@pytest.mark.parametrize(
    ("options", "data", "message"),
    [
        ((), "bad.jsonl", "bad.jsonl:1: no 'response'"),
        (("--checkpoint", "bad.jsonl"), "data.jsonl", "bad.jsonl: not the state of a training"),  # found late
        (("--device", "spread"), "data.jsonl", "2 processes take a device each"),  # found by both
    ],
)
def test_what_cannot_be_is_said_once_and_nothing_waits(
    job: Job, options: tuple[str, ...], data: str, message: str
) -> None:
    done = job.run("none.safetensors", *options, processes=2, data=data)
    assert done.returncode == 1
    assert message in json.loads(done.stdout)["error"]
    errors = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert "austeer" not in done.stderr.replace("austeer.compiler.cli FAILED", "")  # no traceback of ours
    assert not (job.folder / "none.safetensors").exists()
