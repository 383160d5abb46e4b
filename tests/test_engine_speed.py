"""The benchmarks of speed in engines, small: they compare what they say, on models that are what they say."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from austeer.compiler.live import load_model
from benchmarks import engines, gates, restored_speed
from benchmarks.checkpoints import EIGHT_B, Shape
from benchmarks.engines import Open, Report, Trial, Work, turns

SMALL = Shape(64, 256, 4, 2)
TRIALS = pytest.mark.parametrize("trial", [gates.TRIAL, restored_speed.TRIAL], ids=lambda trial: trial.name)
SIZES = {**SMALL.config(2), "vocab_size": engines.VOCABULARY}


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(engines, "FOLDER", tmp_path / "benchmarks")
    monkeypatch.setenv(engines.VARIABLE, str(engines.CONVERTER.resolve()))  # else it sets it, for all other tests


def in_transformers(trial: Trial, scratch: Path) -> Open:
    name, opened = next(trial.engines(scratch, SIZES, Report("", "")))
    assert name == "transformers"
    return opened


def models(trial: Trial) -> list[str]:
    return [trial.base, trial.compiled, *["hooks"] * trial.hooks]


@TRIALS
def test_models_in_turns_and_nothing_left_behind(trial: Trial, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(engines, "no_llama_cpp", lambda: "it is not here")
    loads: list[str] = []

    def loading(folder: Path, **more: Any) -> Any:
        loads.append(folder.name)
        return load_model(folder, **more)

    monkeypatch.setattr(engines, "load_model", loading)
    report = trial.run(SMALL, rounds=2, new_tokens=2, prompt=8)
    base, *others = models(trial)
    works = [f"transformers, {work}: {name} / {base}" for work in ("decoding", "reading") for name in others]
    assert [row.what for row in report.rows] == works
    assert loads == [base, trial.compiled] * 2  # anew for each round
    seconds = report.details["transformers, decoding"]["seconds"]
    assert {name: len(times) for name, times in seconds.items()} == dict.fromkeys(models(trial), 2)
    assert not report.broken
    assert report.method.endswith("Without llama.cpp: it is not here")
    assert not list((tmp_path / "benchmarks").iterdir())


def test_a_model_with_gates_is_wider_by_the_neurons_and_they_all_do_something(tmp_path: Path):
    in_transformers(gates.TRIAL, tmp_path)
    config = json.loads((tmp_path / "compiled" / "config.json").read_text())
    assert (config["intermediate_size"], config["mlp_bias"]) == (256 + gates.NEURONS, True)
    for layer in load_model(tmp_path / "compiled", device="cpu").model.layers:
        assert (layer.mlp.down_proj.weight[:, 256:] != 0).any(0).all()


def test_a_restored_model_has_the_zeros_of_the_pruned_one_and_other_biases(tmp_path: Path):
    in_transformers(restored_speed.TRIAL, tmp_path)
    pruned, restored = (load_model(tmp_path / name, device="cpu") for name in ("pruned", "restored"))
    for before, after in zip(pruned.model.layers, restored.model.layers, strict=True):
        for name, weight in before.named_parameters():
            assert torch.equal(weight, after.get_parameter(name)), name
            assert weight.ndim < 2 or ((weight == 0).sum(1) >= weight.shape[1] // 2).all(), name
        assert before.self_attn.o_proj.bias is None
        assert after.self_attn.o_proj.bias.abs().max() > 0


@TRIALS
@pytest.mark.parametrize(("shape", "broken"), [(EIGHT_B, True), (SMALL, False)])
def test_a_compiled_model_that_is_slow_breaks_the_limit_of_the_large_shape(
    trial: Trial, shape: Shape, broken: bool, monkeypatch: pytest.MonkeyPatch
):
    times = {"hooks": [2.0, 2.0], trial.compiled: [1.05, 1.04], trial.base: [1.0, 1.0]}
    slow = {name: times[name] for name in models(trial)}
    monkeypatch.setattr(Trial, "engines", lambda *_: [("an engine", None)])
    monkeypatch.setattr(engines, "turns", lambda _, works, *__: dict.fromkeys(works, slow))
    report = trial.run(shape, new_tokens=2)
    assert report.broken == broken
    assert [row.broken for row in report.rows] == [broken, *[False] * trial.hooks] * 2


@TRIALS
@pytest.mark.engine
@pytest.mark.slow
def test_the_same_in_llama_cpp(trial: Trial, tmp_path: Path):
    if missing := engines.no_llama_cpp():
        pytest.skip(missing)
    opened = dict(trial.engines(tmp_path, SIZES, Report("", "")))["llama.cpp"]
    (taken,) = turns(opened, (Work("decoding", 4, 2),), 1, 0.0).values()
    assert {name: len(times) for name, times in taken.items()} == {trial.base: 1, trial.compiled: 1}
