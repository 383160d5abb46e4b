"""Every form of output, from build to verify, as a user has it."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from austeer.compiler import CheckpointError, Edit, Program, Refused, Scale, Shift, UsageError
from austeer.compiler.verbs.build import BuildReport, build
from austeer.compiler.verbs.common import Settings, target_for
from austeer.compiler.verbs.demo import MODEL
from austeer.compiler.verbs.engines import of_form
from austeer.compiler.verbs.forms import FORMS, form_named
from austeer.compiler.verbs.verify import Verification, verify
from austeer.targets.engines.engine import Request
from tests.engines.llama_cpp import use_converter

CPU = Settings(device="cpu", dtype="float32")
FOLDED: tuple[Edit, ...] = (Scale(1, "heads", (3, 40), (1.0, -1.0)), Scale(2, "ffn", (5, 6, 7), (2.0, 0.5, -0.5)))
CONSTANT: tuple[Edit, ...] = (*FOLDED, Shift(2, "residual", 0.2 * np.ones(96)))
CODE_ONLY: tuple[Edit, ...] = (*CONSTANT, Scale(0, "residual", (5,), (1.0,)))
CASES = [("checkpoint", None, CONSTANT), ("checkpoint", "sglang", CONSTANT), ("lora", None, FOLDED),
         ("model-code", None, CODE_ONLY), ("gguf", None, CONSTANT)]  # fmt: skip
COPIES = {"checkpoint": "model-base.safetensors", "lora": "adapter_model.safetensors",
          "model-code": "modeling_austeer.py", "gguf": "demo_model-steered-F32.gguf"}  # fmt: skip


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.txt"
    path.write_text("Once upon a time there was a little girl.\nTom went to the park.\n")
    return path


@pytest.fixture(autouse=True)
def converter(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if "gguf" in str(getattr(request.node, "callspec", "")) + request.node.name:
        use_converter(monkeypatch, tmp_path / "converter")


def made(folder: Path, edits: tuple[Edit, ...], form: str, target: str | None, texts: Path | None) -> BuildReport:
    Program.of(edits, model=MODEL).save(folder / "p.safetensors")
    return build(str(MODEL), [folder / "p.safetensors"], folder / "out", form=form, target=target, texts=texts,
                 settings=CPU)  # fmt: skip


def check(folder: Path, texts: Path, engines: tuple[str, ...] = ()) -> Verification:
    return verify(folder / "out", base=str(MODEL), texts=texts, engines=engines, settings=CPU)


@pytest.mark.parametrize(("form", "target", "edits"), CASES, ids=lambda value: str(value) if value else "-")
def test_a_form_is_built_certified_and_verified(
    form: str, target: str | None, edits: tuple[Edit, ...], tmp_path: Path, texts: Path
) -> None:
    report = made(tmp_path, edits, form, target, texts)
    assert report.certificate is not None
    assert report.certificate.passed
    assert report.certificate.base_mean_kl > 1e-3
    manifest = json.loads((tmp_path / "out/austeer.json").read_text())
    assert (manifest["form"], manifest["target"]) == (form, target_for(target, form).name)
    assert {entry["edit"] for entry in manifest["lowering"]} == set(range(len(edits)))
    card = (tmp_path / "out/README.md").read_text()
    assert all(note in card for note in report.compiled.plan.notes)
    found = check(tmp_path, texts)
    assert found.passed, found.problems
    assert COPIES[form] in found.files

    victim = tmp_path / "out" / COPIES[form]
    data = bytearray(victim.read_bytes())
    data[-1] ^= 1
    victim.write_bytes(data)
    if form == "model-code":  # changed code is never run
        with pytest.raises(Exception, match=r"modeling_austeer\.py"):
            check(tmp_path, texts)
    else:
        assert any(COPIES[form] in problem for problem in check(tmp_path, texts).problems)


def test_model_code_is_asked_of_engines_that_run_code(tmp_path: Path, texts: Path) -> None:
    made(tmp_path, CODE_ONLY, "model-code", None, None)
    found = check(tmp_path, texts, ("transformers",))
    assert found.passed, found.problems
    assert found.engines[0].compiled.max_abs < 1e-4 < found.engines[0].edited.max_abs


def test_no_engine_is_asked_to_run_the_code_of_others(tmp_path: Path) -> None:
    made(tmp_path, CODE_ONLY, "model-code", None, None)
    assert of_form(Request(MODEL, ()), tmp_path / "out", "model-code").code
    with (tmp_path / "out/modeling_austeer.py").open("a") as code:
        code.write("\n")
    with pytest.raises(CheckpointError, match="so it is not run here"):
        of_form(Request(MODEL, ()), tmp_path / "out", "model-code")


def test_equal_inputs_give_equal_bytes_in_every_form(tmp_path: Path) -> None:
    for form, edits in (("checkpoint", CONSTANT), ("lora", FOLDED), ("model-code", CODE_ONLY)):
        first, second = (tmp_path / f"{form}{number}" for number in (1, 2))
        for folder in (first, second):
            folder.mkdir()
            made(folder, edits, form, None, None)
        names = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
        assert all((first / name).read_bytes() == (second / name).read_bytes() for name in names)


def test_an_existing_gguf_is_patched(tmp_path: Path, texts: Path) -> None:
    made(tmp_path, FOLDED, "gguf", None, None)
    base = shutil.move(tmp_path / "out" / COPIES["gguf"], tmp_path / "base.gguf")
    shutil.rmtree(tmp_path / "out")
    Program.of([Shift(1, "ffn", np.ones(96))], model=MODEL).save(tmp_path / "p.safetensors")
    report = build(str(base), [tmp_path / "p.safetensors"], tmp_path / "out", form="gguf")
    assert report.plain()["form"] == "gguf"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "base-steered.gguf", "austeer", "austeer.json", "README.md"
    }  # fmt: skip
    assert verify(tmp_path / "out").passed  # the base lies beside it
    with (tmp_path / "out/base-steered.gguf").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\1")
    assert not verify(tmp_path / "out").passed
    with pytest.raises(UsageError, match="no certificate"):
        build(str(base), [tmp_path / "p.safetensors"], tmp_path / "new", form="gguf", texts=texts)
    with pytest.raises(Refused, match="build --form gguf"):
        build(str(base), [tmp_path / "p.safetensors"], tmp_path / "new")


@pytest.mark.parametrize(
    ("form", "target", "match"),
    [
        ("pickle", None, "there is no form 'pickle'; there are checkpoint, gguf, lora, model-code"),
        ("checkpoint", "tpu", "there is no target 'tpu'; there are transformers, vllm, sglang"),
        ("gguf", "vllm", "vLLM reads no GGUF; leave --target out"),
        ("model-code", "mlx-lm", "MLX-LM runs no model code; transformers and vllm do"),
    ],
)
def test_what_does_not_go_together(form: str, target: str | None, match: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=match):
        made(tmp_path, FOLDED, form, target, None)
    assert not (tmp_path / "out").exists()


def test_the_forms_are_those_of_the_command_line() -> None:
    from austeer.compiler.cli import main

    option = next(parameter for parameter in main.commands["build"].params if parameter.name == "form")
    assert set(getattr(option.type, "choices", ())) == set(FORMS)
    assert all(form_named(name) is FORMS[name] for name in FORMS)
