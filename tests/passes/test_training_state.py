"""The state of a training on disk: what comes back, and which file is refused."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from austeer.compiler import CheckpointError, OutputError, staging
from austeer.passes.training_state import METADATA_KEY, StateFile, TrainingState

IDENTITY = {"model": "m", "data": "d", "seed": "0"}


def state(step: int = 12, **arrays: Any) -> TrainingState:
    some = {"trained": np.arange(6, dtype=np.float32).reshape(2, 3), "heads": np.array([[0, 3]], np.int64)}
    return TrainingState(step, {**some, **arrays}, {0: 2.5, 4: 1 / 3, 12: math.inf})


def test_a_state_comes_back_as_it_was(tmp_path: Path) -> None:
    file = StateFile(tmp_path / "state", IDENTITY)
    assert file.load() is None
    file.save(state())
    found = file.load()
    assert found is not None
    assert (found.step, found.losses) == (12, {0: 2.5, 4: 1 / 3, 12: math.inf})
    assert list(found.losses) == [0, 4, 12]
    assert set(found.arrays) == {"trained", "heads"}
    for name, array in state().arrays.items():
        np.testing.assert_array_equal(found.arrays[name], array)
        assert found.arrays[name].dtype == array.dtype
        torch.from_numpy(found.arrays[name])  # warns of what cannot be written to


def test_a_later_state_replaces_it_and_leaves_nothing_beside(tmp_path: Path) -> None:
    file = StateFile(tmp_path / "state", IDENTITY)
    file.save(state(12))
    file.save(state(16))
    found = file.load()
    assert found is not None
    assert found.step == 16
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


def test_a_state_that_cannot_be_written_leaves_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = StateFile(tmp_path / "state", IDENTITY)
    file.save(state(12))

    def full(path: Path, data: bytes) -> None:
        path.write_bytes(data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(staging, "write_file", full)
    with pytest.raises(OutputError, match="the disk is full"):
        file.save(state(16))
    found = file.load()
    assert found is not None
    assert found.step == 12
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


@pytest.mark.parametrize("name", IDENTITY)
def test_the_state_of_another_training_is_refused_with_what_differs(tmp_path: Path, name: str) -> None:
    StateFile(tmp_path / "state", IDENTITY).save(state())
    before = (tmp_path / "state").read_bytes()
    with pytest.raises(CheckpointError, match=f"state: .*another training, with other {name}; delete it") as caught:
        StateFile(tmp_path / "state", {**IDENTITY, name: "other"}).load()
    assert not any(f"other {other}" in str(caught.value) for other in IDENTITY if other != name)
    assert (tmp_path / "state").read_bytes() == before


def test_all_that_differs_is_named(tmp_path: Path) -> None:
    StateFile(tmp_path / "state", IDENTITY).save(state())
    with pytest.raises(CheckpointError, match="with other model, components; delete"):
        StateFile(tmp_path / "state", {**IDENTITY, "model": "n", "components": "10"}).load()


WHOLE = {"identity": IDENTITY, "step": 1, "losses": [[0, 1.0]]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no safetensors",
        None,  # without our metadata
        "no json",
        [],
        {},
        {**WHOLE, "identity": None},
        {**WHOLE, "identity": 3},
        {**WHOLE, "step": "x"},
        {**WHOLE, "losses": [[0]]},
        {**WHOLE, "losses": [[0, None]]},
        {**WHOLE, "losses": {"0": 1.0}},
    ],
    ids=str,
)
def test_a_file_that_is_no_state_is_refused(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "state"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        text = content if isinstance(content, str) else json.dumps(content)
        save_file({"a": np.zeros(2)}, path, {METADATA_KEY: text} if content is not None else {"format": "np"})
    with pytest.raises(CheckpointError, match=r"state: not the state of a training .* name another file"):
        StateFile(path, IDENTITY).load()


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not the state of a training"):
        StateFile(tmp_path, IDENTITY).load()


def test_a_folder_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="there is no directory"):
        StateFile(tmp_path / "none" / "state", IDENTITY).save(state())
