"""Asking an engine: what is missing, what is refused, and what it prints."""

import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

from austeer.compiler import CheckFailed, UsageError
from austeer.targets.engines.engine import Answer, Engine, Request, answer, log_softmax
from austeer.targets.engines.registry import engine_named
from austeer.targets.engines.vllm import VARIABLE

REQUEST = Request(Path("model"), ((1, 2),))


def test_an_engine_that_is_not_installed_says_how_to_get_it() -> None:
    absent = Engine("e", ("no-such-distribution", "numpy"), "pip install e", lambda _: Answer((), ()))
    assert absent.missing() == "no-such-distribution is not installed: pip install e"
    assert absent.version() is None
    with pytest.raises(UsageError, match=r"engine e cannot run here: no-such.*pip install e"):
        absent.ask(REQUEST)


def test_an_unknown_engine() -> None:
    with pytest.raises(UsageError, match=r"'vlm'; known are transformers, vllm, llama\.cpp"):
        engine_named("vlm")


def test_vllm_is_found_by_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    with pytest.raises(UsageError, match=f"{VARIABLE} is not set"):
        engine_named("vllm")
    monkeypatch.setenv(VARIABLE, "/no/such/python")
    with pytest.raises(UsageError, match="/no/such/python, which is no program"):
        engine_named("vllm")
    monkeypatch.setenv(VARIABLE, sys.executable)
    assert engine_named("vllm").missing() is None


def test_what_vllm_says_when_it_fails_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, sys.executable)  # a Python without vllm
    with pytest.raises(CheckFailed, match="No module named 'vllm'"):
        engine_named("vllm").ask(REQUEST)


def test_an_engine_that_fails_is_named_with_its_words() -> None:
    def run(_: Request) -> Answer:
        raise KeyError("rope")

    with pytest.raises(CheckFailed, match="engine e does not run model: 'rope'"):
        Engine("e", (), "", run).ask(REQUEST)


def test_an_engine_without_adapters_says_so() -> None:
    with pytest.raises(UsageError, match="serves no adapters"):
        Engine("e", (), "", lambda _: Answer((), ())).ask(Request(Path("model"), (), adapter=Path("adapter")))


def test_an_engine_without_model_code_says_so() -> None:
    with pytest.raises(UsageError, match="runs no model code; transformers and vllm do"):
        Engine("e", (), "", lambda _: Answer((), ())).ask(Request(Path("model"), (), code=True))


def test_engines_neither_print_nor_warn(capsys: pytest.CaptureFixture[str]) -> None:
    def run(_: Request) -> Answer:
        sys.stdout.write("loading\n")
        warnings.warn("old", DeprecationWarning, stacklevel=1)
        return Answer((), ())

    assert Engine("e", (), "", run).ask(REQUEST) == Answer((), ())
    assert capsys.readouterr().out == ""


def test_continuations_from_scores() -> None:
    def score(text: tuple[int, ...]) -> "np.ndarray[tuple[int, int], np.dtype[np.float32]]":
        return np.eye(10, dtype=np.float32)[[(token + 1) % 10 for token in text]]

    assert answer(Request(Path("model"), ((1, 2), (8,)), 3), score).continuations == ((3, 4, 5), (9, 0, 1))
    assert answer(Request(Path("model"), ((1, 2),)), score).continuations == ()


def test_log_softmax() -> None:
    found = log_softmax([[1000.0, 1000.0], [0.0, np.log(3)]])
    assert found.dtype == np.float32
    assert np.allclose(np.exp(found), [[0.5, 0.5], [0.25, 0.75]])
