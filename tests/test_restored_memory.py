"""The benchmark of restoring's memory, small: what it writes, what it runs, and what it calls too much."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from austeer.compiler.live import load_tokenizer
from benchmarks import restored_memory
from benchmarks.checkpoints import Shape
from benchmarks.process import Usage
from benchmarks.report import Report

SMALL = Shape(64, 256, 4, 2)


def test_the_models_are_one_dense_and_one_without_half_of_it(tmp_path: Path):
    restored_memory.write_models(tmp_path, "bfloat16", SMALL, 2)
    dense, pruned = (load_file(tmp_path / name / "model.safetensors") for name in ("dense", "pruned"))
    assert dense.keys() == pruned.keys()
    for name, weight in dense.items():
        kept, in_block = pruned[name] != 0, ".layers." in name and weight.ndim > 1
        assert torch.equal(pruned[name][kept], weight[kept])
        assert (kept.float().mean() <= 0.5) == in_block, name
    assert load_tokenizer(tmp_path / "dense")("Once upon a time").input_ids


def test_one_command_and_nothing_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    commands: list[Sequence[str]] = []

    def measured(command: Sequence[str]) -> Usage:
        commands.append(command)
        assert all(Path(command[place]).exists() for place in (2, 4, 6))
        return Usage(2.0, 1.0, 10**9)

    monkeypatch.setattr(restored_memory, "measured", measured)
    monkeypatch.setattr(restored_memory, "FOLDER", tmp_path)
    report = restored_memory.run({"float32": (SMALL, 2)})
    assert [row.what for row in report.rows] == ["float32, 0.00 GB: restore, peak memory"]
    assert [part for part in commands[0] if part.startswith("-")][:3] == ["--dense", "--data", "-o"]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("peak", "broken"), [(10**9 + 1200, False), (10**9 + 1400, True)])
def test_the_limit_is_that_of_one_model_and_a_gigabyte(
    peak: int, broken: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "dense").mkdir()
    (tmp_path / "dense" / "model.safetensors").write_bytes(bytes(1000))
    monkeypatch.setattr(restored_memory, "measured", lambda _: Usage(2.0, 1.0, peak))
    assert restored_memory._measure(tmp_path, "float32", Report("", "")).broken == broken
