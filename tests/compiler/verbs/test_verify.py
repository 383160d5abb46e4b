"""verify: what is right passes, and every way to be wrong is found."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from austeer.compiler import CheckpointError, Program, Rank1, Scale, Shift, UsageError
from austeer.compiler.manifest import MANIFEST, PROGRAM
from austeer.compiler.tensors import read_header
from austeer.compiler.verbs.build import build
from austeer.compiler.verbs.common import Settings
from austeer.compiler.verbs.demo import MODEL
from austeer.compiler.verbs.verify import Verification, verify

EDITED, OTHER = "model.layers.1.mlp.down_proj.weight", "model.layers.1.mlp.up_proj.weight"
CPU = Settings(device="cpu")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "texts.txt"
    path.write_text("Once upon a time there was a little girl.\nTom went to the park.\n")
    return path


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify")
    rng = np.random.default_rng(0)
    edits = (Scale(1, "ffn", (3, 40), (1.0, -1.0)), Rank1(2, "heads", rng.normal(size=96), rng.normal(size=96), 0.05))
    Program.of(edits, model=MODEL).save(folder / "program")
    build(str(MODEL), [folder / "program"], folder / "out")
    return folder / "out"


@pytest.fixture
def copy(compiled: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(compiled, tmp_path / "out"))


def check(out: Path, texts: Path) -> Verification:
    return verify(out, base=str(MODEL), texts=texts, settings=CPU)


def flip(out: Path, tensor: str, place: int) -> None:
    """Changes one byte of a tensor a little."""
    info = read_header(out / "model.safetensors")[0][tensor]
    with (out / "model.safetensors").open("r+b") as file:
        file.seek(info.offset + place)
        byte = file.read(1)[0]
        file.seek(info.offset + place)
        file.write(bytes([byte ^ 1]))


def test_a_compiled_checkpoint_passes(copy: Path, texts: Path):
    found = check(copy, texts)
    assert found.passed, found.problems
    assert found.files == {"model.safetensors": "ok"}
    assert found.certificate is not None
    assert found.certificate.max_abs_logit_diff < 1e-4 < found.certificate.base_max_abs_logit_diff


def test_it_measures_on_sampled_text_where_none_is_given(copy: Path):
    assert verify(copy, base=str(MODEL), settings=CPU).passed


def test_a_changed_byte_outside_the_slices(copy: Path, texts: Path):
    flip(copy, OTHER, 0)
    assert any("outside the edited slices" in problem for problem in check(copy, texts).problems)


def test_a_changed_byte_inside_the_slices(copy: Path, texts: Path):
    flip(copy, EDITED, 3 * 288 * 4)
    assert any(EDITED in problem for problem in check(copy, texts).problems)


def test_an_edit_that_was_not_made_fails_bytes_and_numbers(copy: Path, texts: Path):
    shutil.copy(MODEL / "model.safetensors", copy / "model.safetensors")
    problems = " ".join(check(copy, texts).problems)
    assert "does not hold what the program makes of the base" in problems
    assert "max |Δlogit|" in problems


def test_another_program(copy: Path, texts: Path):
    Program.of([Scale(0, "ffn", (1,), (0.5,))], model=MODEL).save(copy / PROGRAM)
    assert any("not the program" in problem for problem in check(copy, texts).problems)


def test_another_base(copy: Path, texts: Path, tmp_path: Path):
    base = Path(shutil.copytree(MODEL, tmp_path / "base"))
    path = base / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    path.write_bytes(data[:8] + data[8 : 8 + length].replace(b'"pt"', b'"np"') + data[8 + length :])
    found = verify(copy, base=str(base), texts=texts, settings=CPU)
    assert any("not the file that was compiled" in problem for problem in found.problems)


@pytest.fixture(scope="module", params=["transformers", "sglang"])
def grown(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With new biases, or with an inserted layer."""
    folder = tmp_path_factory.mktemp("grown")
    rng = np.random.default_rng(0)
    edits = (Scale(1, "ffn", (3, 40), (1.0, -1.0)), Shift(1, "ffn", rng.normal(size=96)))
    Program.of(edits, model=MODEL).save(folder / "program")
    build(str(MODEL), [folder / "program"], folder / "out", target=request.param)
    return folder / "out"


FILES = ("config.json", "model.safetensors.index.json", "model-base.safetensors", "model-austeer.safetensors")


def test_a_checkpoint_with_new_tensors_passes(grown: Path, texts: Path):
    found = check(grown, texts)
    assert found.passed, found.problems
    assert found.files == dict.fromkeys(FILES, "ok")


@pytest.mark.parametrize("name", FILES)
def test_a_change_in_each_of_its_files(grown: Path, texts: Path, name: str, tmp_path: Path):
    out = Path(shutil.copytree(grown, tmp_path / "out"))
    data = bytearray((out / name).read_bytes())
    if name.endswith(".json"):
        data += b" "
    else:
        data[-1] ^= 1
    (out / name).write_bytes(data)
    problems = [problem for problem in check(out, texts).problems if problem.startswith(f"{name}: ")]
    assert problems
    if not name.endswith(".json"):
        assert "model." in problems[0]  # the tensor is named


def test_a_missing_or_foreign_manifest(copy: Path, texts: Path):
    (copy / MANIFEST).write_text(json.dumps({"format": 99}))
    with pytest.raises(CheckpointError, match="format"):
        check(copy, texts)
    (copy / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match="not compiled by"):
        check(copy, texts)


def test_a_local_base_that_is_not_here_must_be_named(copy: Path, texts: Path):
    with pytest.raises(UsageError, match="--base"):
        verify(copy, texts=texts, settings=CPU)


def test_a_local_base_beside_the_output_is_found(copy: Path, texts: Path):
    shutil.copytree(MODEL, copy.parent / MODEL.name)
    assert verify(copy, texts=texts, settings=CPU).passed
