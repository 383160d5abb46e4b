"""Appended neurons in the files of a checkpoint: wider tensors whose old values keep every bit."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from austeer.compiler import CheckpointError, Program, Scale
from austeer.compiler.rewrite import BLOCK, Segment
from austeer.compiler.tensors import TensorInfo
from austeer.compiler.verbs.bases import open_base
from austeer.compiler.verbs.common import Compiled
from austeer.passes.linear_neurons import LinearNeurons
from austeer.targets import growth
from austeer.targets.checkpoint import Writing
from austeer.targets.chunks import Copy, Zeros
from austeer.targets.growth import Growth
from austeer.targets.shards import Job, Shard
from tests.tiny import VARIANTS, Tiny, bare, load, on_disk, rewritten, sharded, stored

OLD, NEW = 28, 256
UNITS = (1, 3, 8)
SLOPES = (0.5, -2.0, 3.0)
DOWN = ("down_proj.weight", "fc2.weight", "mlp.c_proj.weight")
INPUTS = ("gate_proj", "up_proj", "fc1", "mlp.c_fc")


def edits() -> tuple[Scale, ...]:
    """Layer 0 keeps its neurons, and gets a scale of another kind; layer 1 gets new ones."""
    return Scale(0, "ffn", (2,), 1.0), Scale(1, "residual", UNITS, 1.0), Scale(1, "neurons", (0, 7), 0.5)


def compiled(base: Path, out: Path, *more: Scale) -> Compiled:
    program = Program.of([*edits(), *more], model=base)
    made = Compiled.of(program, open_base(str(base)), approximation=LinearNeurons(fitted=SLOPES))
    out.mkdir()
    made.write(out, Writing())
    return made


def neuron_rows(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with its neurons along the first axis."""
    transposed = "c_fc.weight" in name or (name.endswith(DOWN) and "c_proj" not in name)
    return tensor.T if transposed else tensor


def of_ffn(name: str) -> bool:
    return name.endswith(DOWN) or any(f"{part}." in name for part in INPUTS)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["llama", "llama-unbiased", "gpt2", "opt", "mistral", "phi3"])
def test_old_neurons_keep_every_bit_and_new_ones_are_what_they_should(name: str, dtype: str, tmp_path: Path) -> None:
    base = on_disk(replace(VARIANTS[name], dtype=dtype))
    compiled(base, tmp_path / "out")
    before, after = stored(base), stored(tmp_path / "out")
    if name == "phi3":
        for key in [key for key in before if "gate_up" in key]:
            halves = before.pop(key).chunk(2)
            before |= {key.replace("gate_up", part): half for part, half in zip(("gate", "up"), halves, strict=True)}
        before = {key: tensor for key, tensor in before.items() if "qkv" not in key}
    grown = [key for key in before if of_ffn(key)]
    assert len(grown) == 2 * {"llama": 5, "gpt2": 3, "opt": 3}.get(name, 3)
    for key in grown:
        old, new = (neuron_rows(key, tensors[key]) for tensors in (before, after))
        assert new.dtype == old.dtype
        assert new.shape == (NEW, *old.shape[1:])
        edited = key.endswith(DOWN)
        if not edited:
            assert torch.equal(new[:OLD], old), key
        zero = OLD + (6 if ".1." in key else 0)
        assert not new[zero:].any(), key
    check_down(before, after)
    check_inputs(after)
    elsewhere = [key for key in before if not of_ffn(key) and "mlp.c_proj.bias" not in key and "_proj.bias" not in key]
    assert all(torch.equal(before[key], after[key]) for key in elsewhere if "fc2.bias" not in key)


def check_down(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> None:
    first, second = (next(key for key in before if key.endswith(DOWN) and f".{n}." in key) for n in (0, 1))
    old, new = neuron_rows(first, before[first]), neuron_rows(first, after[first])
    others = [unit for unit in range(old.shape[1]) if unit != 2]
    assert torch.equal(new[:OLD, others], old[:, others])
    assert torch.equal(new[:OLD, 2], 2 * old[:, 2])
    old, new = neuron_rows(second, before[second]).clone(), neuron_rows(second, after[second])
    others = [neuron for neuron in range(OLD) if neuron not in (0, 7)]
    old[:, list(UNITS)] *= 2
    assert torch.equal(new[others], old[others])
    columns = torch.zeros(6, old.shape[1], dtype=old.dtype)
    for place, (unit, slope) in enumerate(zip(UNITS, SLOPES, strict=True)):
        columns[2 * place, unit], columns[2 * place + 1, unit] = slope, -slope  # no scale of rows reaches them
    assert torch.equal(new[OLD : OLD + 6], columns)


def check_inputs(after: dict[str, torch.Tensor]) -> None:
    for key in (key for key in after if ".1." in key and of_ffn(key) and not key.endswith(DOWN)):
        new = neuron_rows(key, after[key])[OLD : OLD + 6]
        if key.endswith("up_proj.bias"):
            assert torch.equal(new, torch.ones_like(new))
        elif key.endswith((".bias", "up_proj.weight")):
            assert not new.any()
        else:
            rows = torch.zeros_like(new)
            for place, unit in enumerate(UNITS):
                rows[2 * place, unit], rows[2 * place + 1, unit] = 1, -1
            assert torch.equal(new, rows)


def test_a_base_in_several_files_and_one_without_the_prefix(tmp_path: Path) -> None:
    tiny = VARIANTS["gpt2"]
    compiled(on_disk(tiny), tmp_path / "expected")
    expected = load(tmp_path / "expected").state_dict()
    for number, base in enumerate((sharded(tiny, tmp_path / "sharded"), bare(tiny, tmp_path / "bare"))):
        out = tmp_path / str(number)
        made = compiled(base, out)
        assert set(made.compare(out).values()) == {"ok"}
        assert sum(path.stat().st_size for path in out.iterdir()) == made.plan.output_bytes
        found = load(out).state_dict()
        assert all(torch.equal(found[key], expected[key]) for key in expected)
    index = json.loads((tmp_path / "0" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in stored(tmp_path / "0").values())


def test_the_header_keeps_its_metadata_and_the_order_of_the_tensors(tmp_path: Path) -> None:
    base = on_disk(VARIANTS["gpt2"])
    compiled(base, tmp_path / "out")
    names: list[list[str]] = []
    for folder in (base, tmp_path / "out"):
        with safe_open(folder / "model.safetensors", "numpy") as file:
            names.append(list(file.offset_keys()))
            assert file.metadata() == {"format": "pt"}
    assert names[0] == names[1]


@pytest.mark.parametrize("name", ["llama", "llama-unbiased", "gpt2", "opt", "phi3"])
def test_the_lowering_says_all_that_is_new(name: str, tmp_path: Path) -> None:
    base = on_disk(VARIANTS[name])
    made = compiled(base, tmp_path / "out")
    before, after = stored(base), stored(tmp_path / "out")
    for key, tensor in after.items():
        may = torch.zeros(tensor.shape, dtype=torch.bool)
        for entry in (entry for entry in made.plan.lowering if entry["tensor"] == key):
            axes = zip(entry["slice"], tensor.shape, strict=True)
            may[np.ix_(*[range(size) if axis is None else axis for axis, size in axes])] = True
        padded = torch.full_like(tensor, torch.nan)
        old = before.get(key)
        if old is None and name == "phi3" and "_proj." in key:
            continue  # it is a part of a tensor of the base
        if old is not None:
            padded[tuple(map(slice, old.shape))] = old
        assert torch.equal(padded[~may], tensor[~may]), key
    exact = {entry["edit"]: True for entry in made.plan.lowering}
    for entry in made.plan.lowering:
        exact[entry["edit"]] &= entry["exact"]
    assert exact == {0: True, 1: False, 2: True}


def test_a_changed_new_value_is_found(tmp_path: Path) -> None:
    base, out = on_disk(VARIANTS["gpt2"]), tmp_path / "out"
    made = compiled(base, out)
    tensors = load_file(out / "model.safetensors")
    for key, place in (("transformer.h.1.mlp.c_proj.weight", (OLD, 1)), ("transformer.h.0.mlp.c_fc.bias", (NEW - 1,))):
        other = {**tensors, key: tensors[key].clone()}
        other[key][place] += 1
        save_file(other, out / "model.safetensors", metadata={"format": "pt"})
        assert made.compare(out)["model.safetensors"] != "ok"


def test_what_cannot_be_stored_is_an_error(tmp_path: Path) -> None:
    base = on_disk(replace(VARIANTS["llama"], dtype="float16"))
    program = Program.of([Scale(0, "residual", (1,), 1.0)], model=base)
    made = Compiled.of(program, open_base(str(base)), approximation=LinearNeurons(fitted=(1e6,)))
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match="do not fit F16"):
        made.write(tmp_path / "out", Writing())


def test_a_stray_bias_is_not_mistaken_for_the_new_one(tmp_path: Path) -> None:
    def change(tensors: dict[str, Any]) -> dict[str, Any]:
        return {**tensors, "model.layers.0.mlp.up_proj.bias": torch.ones(OLD)}

    base = rewritten(on_disk(Tiny("llama", biases=False)), tmp_path / "model", change)
    with pytest.raises(CheckpointError, match="does not use"):
        compiled(base, tmp_path / "out")


# ---- the stream of one file -------------------------------------------------------------


class Fixed(Job):
    """A job whose segments are given."""

    def segments(self) -> Iterator[Segment]:
        for offset in self.matrices:
            yield Segment(offset, b"x" * 5, 0.0)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("seed", range(20))
def test_segments_are_cut_where_something_is_inserted(seed: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(seed)
    base = tmp_path / "base"
    base.write_bytes(bytes(range(100)))
    info = TensorInfo("t", base, "F32", (0,), 0, 0)
    starts = 5 * np.sort(rng.permutation(18)[:8])
    points = np.sort(rng.integers(0, 97, 9)).tolist()
    growths = tuple(Growth("t", info, point, (0,), (2,), lambda: np.array([1.0, 2.0], np.float32)) for point in points)
    shard = Shard("s", base, None, 0, jobs=(Fixed("t", info, tuple(starts.tolist())),), growths=growths)
    expected = bytearray(range(100))
    for start in starts:
        expected[start : start + 5] = b"x" * 5
    for point in reversed(points):
        expected[point:point] = np.array([1.0, 2.0], "<f4").tobytes()
    found = bytearray()
    for chunk in shard.chunks():
        if isinstance(chunk, Copy):
            found += base.read_bytes()[chunk.start : chunk.end]
        else:
            found += bytes(chunk.count) if isinstance(chunk, Zeros) else chunk.data
    assert found == expected


def test_many_new_rows_come_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growth, "BLOCK", 64)
    values = np.arange(50 * 7, dtype=np.float32).reshape(50, 7)
    info = TensorInfo("t", Path("none"), "F32", (3, 7), 10, 84)
    pieces = list(Growth("t", info, 10, (3, 7), (60, 7), lambda: values).insertions())
    assert {piece.offset for piece in pieces} == {94}
    *blocks, rest = (piece.chunk for piece in pieces)
    assert rest == Zeros(7 * 7 * 4)
    data = [bytes(block.data) for block in blocks if isinstance(block, Segment)]
    assert b"".join(data) == values.tobytes()
    assert max(map(len, data)) <= 64 * 4 < BLOCK
