"""The benchmark of restoring's memory, small: what it writes, what it runs, and what it calls too much."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from austeer.compiler.tokens import load_tokenizer
from benchmarks import restored_memory
from benchmarks.checkpoints import Shape
from benchmarks.process import Usage

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


@pytest.mark.parametrize(("peak", "broken"), [(10**9, False), (11 * 10**8, True)])
def test_more_than_a_model_and_a_gigabyte_breaks_the_limit(
    peak: int, broken: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    commands: list[Sequence[str]] = []

    def measured(command: Sequence[str]) -> Usage:
        commands.append(command)
        assert all(Path(command[place]).exists() for place in (2, 4, 6))
        return Usage(2.0, 1.0, peak)

    monkeypatch.setattr(restored_memory, "measured", measured)
    monkeypatch.setattr(restored_memory, "FOLDER", tmp_path / "benchmarks")
    report = restored_memory.run({"float32": (SMALL, 2)})
    assert report.broken == broken
    assert [part for part in commands[0] if part.startswith("-")][:3] == ["--dense", "--data", "-o"]
    assert not list((tmp_path / "benchmarks").iterdir())
