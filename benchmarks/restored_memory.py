"""Restoring: the peak memory of `austeer-compile restore`, with the dense and the pruned model on disk."""

import json
import shutil
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.checkpoints import GB, ONE_B, Shape
from benchmarks.process import AUSTEER, measured
from benchmarks.report import FOLDER, Report, Row
from benchmarks.samples import estimate

MODELS: Mapping[str, tuple[Shape, int]] = {"float32": (ONE_B, 9), "bfloat16": (ONE_B, 22)}  # 1.6 and 1.9 GB
TIMES_MODEL, PLUS_BYTES = 1.3, GB
ROWS, SENTENCES = 12, 40  # of a row: more tokens than --max-length
OPTIONS = ("--epochs", "1", "--max-length", "256")
METHOD = (
    "One process for each model, a random llama with the tokenizer of the demo, and its twin without half of each "
    "row's weights: `restore PRUNED --dense DENSE --data FILE -o OUT`, from the search for the heads to the "
    "certificate. The figure is the peak resident set, in which pages of mapped files count."
)


def run(models: Mapping[str, tuple[Shape, int]] = MODELS) -> Report:
    """By dtype, the shape and number of layers of the models."""
    report = Report("restored-memory", METHOD, details={"rows": ROWS, "options": OPTIONS})
    FOLDER.mkdir(parents=True, exist_ok=True)
    for dtype, (shape, layers) in models.items():
        with TemporaryDirectory(dir=FOLDER, prefix="restored-memory-") as name:
            scratch = Path(name)
            # In a process of its own: what this one has in memory would count in the figure.
            with ProcessPoolExecutor(1, get_context("spawn")) as other:
                other.submit(write_models, scratch, dtype, shape, layers).result()
            report.rows.append(_measure(scratch, dtype, report))
    return report


def write_models(folder: Path, dtype: str, shape: Shape, layers: int) -> None:
    """The folders `dense` and `pruned`, and the file `data.jsonl`."""
    from transformers.utils import logging

    from austeer.compiler.checkpoint import read_json
    from austeer.compiler.verbs.demo import MODEL
    from benchmarks.live_models import prune_half, random_llama

    logging.disable_progress_bar()
    demo = read_json(MODEL / "config.json")
    model = random_llama({**shape.config(layers), "vocab_size": demo["vocab_size"]}, "cpu", dtype)
    for name in ("dense", "pruned"):
        model.save_pretrained(folder / name)
        for path in MODEL.glob("tokenizer*"):
            shutil.copy(path, folder / name)
        prune_half(model)
    rows = (
        {"prompt": f"Once upon a time {n} birds", "response": f" met {n} dogs and played." * SENTENCES}
        for n in range(ROWS)
    )
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def _measure(scratch: Path, dtype: str, report: Report) -> Row:
    dense, data, out = (str(scratch / name) for name in ("dense", "data.jsonl", "out"))
    size = sum(path.stat().st_size for path in Path(dense).glob("*.safetensors"))
    command = [AUSTEER, "restore", str(scratch / "pruned"), "--dense", dense, "--data", data, "-o", out, *OPTIONS]
    usage = measured(command)
    report.details[dtype] = {"model": size, **asdict(usage)}
    allowed = TIMES_MODEL * size + PLUS_BYTES
    against = f"{TIMES_MODEL} × model + {PLUS_BYTES / GB:.0f} GB; {usage.seconds:.0f} s"
    what = f"{dtype}, {size / GB:.2f} GB: restore, peak memory"
    return Row(what, estimate([usage.peak / 1e6]), "MB", at_most=allowed / 1e6, note=against)
