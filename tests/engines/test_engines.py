"""Real engines: a compiled checkpoint says in each what the interpreter says, and the base does not."""

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from austeer.compiler import CheckFailed, Program, Scale, Shift, interpret
from austeer.compiler.cli import main
from austeer.compiler.verbs.bases import open_base
from austeer.compiler.verbs.build import build
from austeer.compiler.verbs.common import Compiled
from austeer.compiler.verbs.engines import check_engines, of_form
from austeer.passes.linear_neurons import LinearNeurons
from austeer.targets.checkpoint import Writing
from austeer.targets.engines.engine import Answer, Engine, Request
from austeer.targets.engines.registry import ENGINES
from tests.engines.cells import CELLS, EXACT, GAPS, LOWERINGS, VLLM, Cell, Gap
from tests.engines.models import on_disk, sized
from tests.tiny import CONFIGS, Tiny, load, logits, scratch, tokens

pytestmark = [pytest.mark.engine, pytest.mark.slow]

TEXTS = tuple(tuple(row) for row in tokens(2, 12).tolist())
COUNT = 8


def engine(name: str) -> Engine:
    """The engine, or a skip with the reason."""
    found = ENGINES[name]
    reason = found.missing()
    if reason:
        pytest.skip(f"{name}: {reason}")
    return found


@cache
def compiled(tiny: Tiny, lowering: str, target: str, form: str) -> Path:
    folder = scratch()
    LOWERINGS[lowering](tiny).save(folder / "p.safetensors")
    build(str(on_disk(tiny)), [folder / "p.safetensors"], folder / "out", target=target, form=form)
    return folder / "out"


@cache
def reference(tiny: Tiny, lowering: str) -> tuple[tuple["torch.Tensor", ...], tuple[tuple[int, ...], ...]]:
    """Log-probabilities and greedy continuations of the base with hooks."""
    model = load(on_disk(tiny))
    with interpret(model, LOWERINGS[lowering](tiny)):
        found = tuple(logits(model, torch.tensor([text]))[0].double().log_softmax(-1) for text in TEXTS)
        made: list[tuple[int, ...]] = []
        for text in TEXTS:
            ids = list(text)
            for _ in range(COUNT):
                ids.append(int(logits(model, torch.tensor([ids]))[0, -1].argmax()))
            made.append(tuple(ids[len(text) :]))
    return found, tuple(made)


@cache
def of_base(asked: Engine, tiny: Tiny) -> Answer:
    return asked.ask(Request(on_disk(tiny), TEXTS))


def off(answer: Answer, expected: Sequence[torch.Tensor]) -> float:
    """The largest difference of log-probabilities."""
    assert [found.shape for found in answer.scores] == [tuple(scores.shape) for scores in expected]
    return max(
        float(np.abs(found - scores.numpy()).max()) for found, scores in zip(answer.scores, expected, strict=True)
    )


@pytest.mark.parametrize("cell", [*CELLS, *(pytest.param(cell, marks=pytest.mark.vllm) for cell in VLLM)], ids=str)
def test_the_compiled_model_says_what_the_interpreter_says_and_the_base_does_not(cell: Cell) -> None:
    asked, (expected, continuations) = engine(cell.engine), reference(cell.tiny, cell.lowering)
    out = compiled(cell.tiny, cell.lowering, cell.target, cell.form)
    found = asked.ask(of_form(Request(on_disk(cell.tiny), TEXTS, COUNT), out, cell.form))
    assert off(found, expected) < cell.limit
    assert found.continuations == continuations
    if (cell.engine, cell.architecture) in {(gap.engine, gap.architecture) for gap in GAPS if gap.says == "type"}:
        with pytest.raises(CheckFailed):  # only as a llama the engine reads it at all
            asked.ask(Request(on_disk(cell.tiny), TEXTS))
    else:
        assert off(of_base(asked, cell.tiny), expected) > 100 * cell.limit


@pytest.mark.parametrize("gap", GAPS, ids=str)
def test_what_an_engine_does_not_run_it_refuses_or_it_shows(gap: Gap) -> None:
    tiny, asked = sized(gap.architecture), engine(gap.engine)
    if gap.says is None:
        base = load(on_disk(tiny))
        expected = [logits(base, torch.tensor([text]))[0].double().log_softmax(-1) for text in TEXTS]
        assert off(asked.ask(Request(on_disk(tiny), TEXTS)), expected) > 100 * EXACT
    else:
        with pytest.raises(CheckFailed, match=gap.says):
            asked.ask(Request(on_disk(tiny), TEXTS))


def test_every_engine_and_architecture_is_accounted_for() -> None:
    told = {(cell.engine, cell.architecture) for cell in [*CELLS, *VLLM, *GAPS] if cell.architecture != "smollm3"}
    names = CONFIGS.keys() - {"smollm3"}  # only what a mistral with a window becomes
    assert told == {(name, architecture) for name in ENGINES.keys() - {"peft"} for architecture in names}


@pytest.mark.parametrize(
    "name",
    [
        "llama.cpp",
        "ctranslate2",
        "mlx-lm",
        "onnxruntime-genai",
        "openvino",
        pytest.param("vllm", marks=pytest.mark.vllm),
    ],
)
def test_wider_ffns_run_in_every_engine_as_in_transformers(name: str, tmp_path: Path) -> None:
    """Neurons that stand in for a scaled stream are an approximation, but the same one everywhere."""
    asked, tiny = engine(name), sized("llama", biases=False)
    base = open_base(str(on_disk(tiny)))
    scaled = Program.of([Scale(0, "residual", [3, 40, 77], [1.0, -1.0, 2.0])], model=on_disk(tiny))
    compiled = Compiled.of(scaled, base, approximation=LinearNeurons(fitted=(0.5, -0.4, 0.9)))
    compiled.write(tmp_path, Writing())
    model = load(tmp_path)
    assert model.config.intermediate_size > base.facts.geometry.neurons
    expected = [logits(model, torch.tensor([text]))[0].double().log_softmax(-1) for text in TEXTS]
    assert off(asked.ask(Request(tmp_path, TEXTS)), expected) < EXACT
    assert off(asked.ask(Request(on_disk(tiny), TEXTS)), expected) > 100 * EXACT


# ---- forms that an engine drops ---------------------------------------------------------


def shifted(tiny: Tiny) -> Program:
    """A constant at the heads of every layer."""
    folder = on_disk(tiny)
    width = Program.of([], model=folder).model.heads
    rng = np.random.default_rng(0)
    return Program.of([Shift(layer, "heads", rng.normal(size=width)) for layer in range(tiny.layers)], model=folder)


def stray(tiny: Tiny, steering: Program, folder: Path) -> Path:
    """The illegal form: a bias of o_proj in the file, and a config.json that promises none."""
    folder.mkdir()
    for path in on_disk(tiny).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    for edit in steering.edits:
        assert isinstance(edit, Shift)
        block = f"model.layers.{edit.layer}.self_attn.o_proj"
        tensors[f"{block}.bias"] = tensors[f"{block}.weight"] @ torch.tensor(edit.vector).float()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("name", ["transformers", "ctranslate2", "onnxruntime-genai", "openvino"])
def test_a_bias_that_the_config_does_not_promise_is_seen_to_be_dropped_in_silence(name: str, tmp_path: Path) -> None:
    tiny, asked = sized("llama", biases=False), engine(name)
    steering = shifted(tiny)
    (found,), problems = check_engines([asked], on_disk(tiny), stray(tiny, steering, tmp_path / "m"), steering, TEXTS)
    assert len(problems) == 1
    assert "dropped in silence" in problems[0]
    assert found.edited.max_abs < EXACT < found.compiled.max_abs


def test_mlx_refuses_that_bias_and_llama_cpp_takes_it(tmp_path: Path) -> None:
    tiny = sized("llama", biases=False)
    steering = shifted(tiny)
    out = stray(tiny, steering, tmp_path / "m")
    _, problems = check_engines([engine("mlx-lm")], on_disk(tiny), out, steering, TEXTS)
    assert "parameters not in model" in problems[0]
    assert check_engines([engine("llama.cpp")], on_disk(tiny), out, steering, TEXTS)[1] == ()


@pytest.mark.parametrize(
    ("name", "architecture"),
    [("ctranslate2", "gemma2"), pytest.param("vllm", "qwen3", marks=pytest.mark.vllm)],
)
def test_verify_says_that_an_engine_drops_what_a_sound_build_holds(
    name: str, architecture: str, tmp_path: Path
) -> None:
    """transformers adds o_proj.bias under attention_bias; these two leave it out without a word."""
    engine(name)
    tiny = sized(architecture)
    shifted(tiny).save(tmp_path / "p.safetensors")
    build(str(on_disk(tiny)), [tmp_path / "p.safetensors"], tmp_path / "out")
    (tmp_path / "texts.txt").write_text("Hello there.\nSo it goes.\n")
    command = ["verify", tmp_path / "out", "--base", on_disk(tiny), "--texts", tmp_path / "texts.txt", "--json"]
    command += ["--device", "cpu", "--engine", "transformers", "--engine", name]
    done = CliRunner().invoke(main, [str(word) for word in command])
    report = json.loads(done.stdout)
    assert done.exit_code == 1
    assert [found["passed"] for found in report["engines"]] == [True, False]
    assert len(report["problems"]) == 1
    assert report["problems"][0].startswith(f"{name}: dropped in silence")


# ---- adapters ---------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft asks transformers
def test_peft_puts_an_adapter_on_the_base(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    tiny = sized("llama")
    model = peft.get_peft_model(load(on_disk(tiny)), peft.LoraConfig(r=2, target_modules=["o_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at first
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    model.save_pretrained(tmp_path / "adapter")
    adapter = load_file(tmp_path / "adapter/adapter_model.safetensors")
    merged = load(on_disk(tiny))
    for layer in range(tiny.layers):
        key = f"base_model.model.model.layers.{layer}.self_attn.o_proj.lora_"
        weight = merged.get_submodule(f"model.layers.{layer}.self_attn.o_proj").weight
        weight.data += 8 / 2 * adapter[f"{key}B.weight"] @ adapter[f"{key}A.weight"]
    expected = [logits(merged, torch.tensor([text]))[0].double().log_softmax(-1) for text in TEXTS]
    assert off(engine("peft").ask(Request(on_disk(tiny), TEXTS, adapter=tmp_path / "adapter")), expected) < EXACT
    assert off(engine("peft").ask(Request(on_disk(tiny), TEXTS)), expected) > 100 * EXACT
