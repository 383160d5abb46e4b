"""What of a compiled folder is sent: all that makes the model, nothing else, and only if it is whole."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from austeer.compiler import AusteerError, CheckpointError, Program, ProgramError, Refused, Scale
from austeer.compiler.verbs.build import build
from austeer.compiler.verbs.push import push
from austeer.targets.contents import Contents, is_written
from tests.tiny import Tiny, on_disk

LLAMA = Tiny("llama")
RECORD = {"austeer.json", "austeer/program.safetensors", "README.md"}


def program(gamma: float = 0.5) -> Program:
    return Program.of([Scale(0, "ffn", (1,), gamma)], model=on_disk(LLAMA))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    program().save(tmp_path / "p.safetensors")
    build(str(on_disk(LLAMA)), [tmp_path / "p.safetensors"], tmp_path / "out")
    return tmp_path / "out"


def change_manifest(out: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((out / "austeer.json").read_text())
    change(manifest)
    (out / "austeer.json").write_text(json.dumps(manifest))


def test_everything_that_a_build_writes(out: Path):
    contents = Contents.of(out)
    assert set(contents.files) == {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert set(contents.files) > RECORD
    assert contents.left_out == ()
    assert (contents.base, contents.revision, contents.card_base) == (on_disk(LLAMA).name, None, on_disk(LLAMA).name)
    assert contents.program == program().sha256
    assert all(map(is_written, contents.files))


def test_what_no_compile_writes_is_left_out_and_listed(out: Path):
    before = Contents.of(out).files
    strays = [".DS_Store", ".env", "optimizer.pt", "pytorch_model.bin", "model-2.safetensors", "austeer/notes.txt"]
    for name in strays:
        (out / name).write_bytes(b"x")
    (out / ".git").mkdir()
    (out / ".git/config").touch()
    contents = Contents.of(out)
    assert contents.files == before
    assert set(contents.left_out) == {*strays, ".git/"}


@pytest.mark.parametrize(
    "name", ["austeer.json", "austeer/program.safetensors", "README.md", "model.safetensors", "config.json"]
)
def test_nothing_may_be_missing(out: Path, name: str):
    (out / name).unlink()
    with pytest.raises(AusteerError, match=name.replace(".", r"\.")):
        Contents.of(out)


def test_a_weight_file_that_was_cut_short(out: Path):
    path = out / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        Contents.of(out)


def test_another_program_than_the_manifest_s(out: Path):
    program(0.25).save(out / "austeer/program.safetensors")
    with pytest.raises(CheckpointError, match=r"is not the program that austeer\.json names; compile again"):
        Contents.of(out)


def test_a_damaged_program(out: Path):
    (out / "austeer/program.safetensors").write_bytes(b"\0" * 50)
    with pytest.raises(ProgramError):
        Contents.of(out)


@pytest.mark.parametrize(
    ("text", "by"),
    [("base_model", "bass_model"), (program().sha256, "0" * 64), ("---\n", "")],
)
def test_a_card_that_hides_the_edit_is_refused(out: Path, text: str, by: str):
    card = out / "README.md"
    card.write_text(card.read_text().replace(text, by))
    with pytest.raises(Refused, match="A baked edit is never hidden: restore the card, or compile again"):
        Contents.of(out)


def test_a_card_may_say_more(out: Path):
    card = out / "README.md"
    card.write_text(card.read_text().replace("base_model:", "language: en\nbase_model:") + "\nMore.\n")
    assert "README.md" in Contents.of(out).files


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda manifest: manifest.pop("base"), "'base' is missing"),
        (lambda manifest: manifest["base"].pop("revision"), "'revision' is missing"),
        (lambda manifest: manifest.update(program=None), "damaged"),
        (lambda manifest: manifest.update(form="onnx"), "unknown form 'onnx'; update austeer-compile"),
    ],
)
def test_a_damaged_manifest(out: Path, change: Callable[[dict[str, Any]], object], message: str):
    change_manifest(out, change)
    with pytest.raises(CheckpointError, match=message):
        Contents.of(out)


FORMS = {
    "lora": ["adapter_config.json", "adapter_model.safetensors"],
    "gguf": ["model.gguf"],
    "model-code": ["config.json", "model.safetensors", "modeling_steered.py"],
}


@pytest.mark.parametrize("form", FORMS)
def test_the_other_forms_by_their_file_names(out: Path, tmp_path: Path, form: str):
    folder = tmp_path / form
    shutil.copytree(out / "austeer", folder / "austeer")
    for name in ("austeer.json", "README.md"):
        shutil.copy(out / name, folder / name)
    change_manifest(folder, lambda manifest: manifest.update(form=form))
    for name in [*FORMS[form], "stray.bin"]:
        (folder / name).write_bytes(b"{}")
    contents = Contents.of(folder)
    assert set(contents.files) == {*FORMS[form], *RECORD}
    assert contents.left_out == ("stray.bin",)
    (folder / FORMS[form][-1]).unlink()
    with pytest.raises(CheckpointError, match=f"which the form {form} is made of"):
        Contents.of(folder)


def test_nothing_that_is_not_whole_reaches_the_hub(out: Path, monkeypatch: pytest.MonkeyPatch):
    def never(*_: object, **__: object) -> None:
        raise AssertionError("the Hub was asked")

    monkeypatch.setattr("huggingface_hub.HfApi.__init__", never)
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    with pytest.raises(AssertionError, match="the Hub was asked"):
        push(out, "me/steered")
    (out / "README.md").unlink()
    with pytest.raises(Refused):
        push(out, "me/steered")
