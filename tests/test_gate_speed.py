"""The benchmark of gates, small: it compares what it says, on models that are what it says."""

import json
from pathlib import Path
from typing import Any

import pytest

from austeer.compiler.live import load_model
from benchmarks import gates
from benchmarks.checkpoints import Shape

SMALL = Shape(64, 256, 4, 2)
FIGURES = ("compiled", "hooks")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gates, "FOLDER", tmp_path / "benchmarks")
    monkeypatch.setenv(gates.VARIABLE, str(gates.CONVERTER.resolve()))  # else it sets it, for all other tests


def test_base_compiled_and_hooks_in_turns_and_nothing_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gates, "_no_llama_cpp", lambda: "it is not here")
    loads: list[str] = []

    def loading(folder: Path, **more: Any) -> Any:
        loads.append(folder.name)
        return load_model(folder, **more)

    monkeypatch.setattr(gates, "load_model", loading)
    report = gates.run(SMALL, rounds=2, new_tokens=2, prompt=8)
    works = [f"transformers, {work}: {name} / base" for work in ("decoding", "reading") for name in FIGURES]
    assert [row.what for row in report.rows] == works
    assert loads == ["base", "compiled"] * 2  # anew for each round
    seconds = report.details["transformers, decoding"]["seconds"]
    assert {name: len(times) for name, times in seconds.items()} == dict.fromkeys(("base", *FIGURES), 2)
    assert not report.broken
    assert report.method.endswith("Without llama.cpp: it is not here")
    assert not list((tmp_path / "benchmarks").iterdir())


def test_the_compiled_model_is_wider_by_the_neurons_and_they_all_do_something(tmp_path: Path):
    engines = gates._engines(tmp_path, SMALL, 2, gates.Report("", ""))
    next(engines)
    config = json.loads((tmp_path / "compiled" / "config.json").read_text())
    assert (config["intermediate_size"], config["mlp_bias"]) == (256 + gates.NEURONS, True)
    for layer in load_model(tmp_path / "compiled", device="cpu").model.layers:
        assert (layer.mlp.down_proj.weight[:, 256:] != 0).any(0).all()


@pytest.mark.parametrize(("shape", "broken"), [(gates.EIGHT_B, True), (SMALL, False)])
def test_a_compiled_model_that_is_slow_breaks_the_limit_of_the_large_shape(
    shape: Shape, broken: bool, monkeypatch: pytest.MonkeyPatch
):
    slow = {"base": [1.0, 1.0], "compiled": [1.05, 1.04], "hooks": [2.0, 2.0]}
    monkeypatch.setattr(gates, "_engines", lambda *_: [("an engine", None)])
    monkeypatch.setattr(gates, "_taken", lambda _, works, *__: dict.fromkeys(works, slow))
    report = gates.run(shape, new_tokens=2)
    assert report.broken == broken
    assert [row.broken for row in report.rows] == [broken, False] * 2


@pytest.mark.engine
@pytest.mark.slow
def test_the_same_in_llama_cpp(tmp_path: Path):
    if missing := gates._no_llama_cpp():
        pytest.skip(missing)
    engines = dict(gates._engines(tmp_path, SMALL, 1, gates.Report("", "")))
    works = (gates.Work("decoding", 4, 2),)
    (taken,) = gates._taken(engines["llama.cpp"], works, 1, 0.0).values()
    assert {name: len(times) for name, times in taken.items()} == {"base": 1, "compiled": 1}
