"""A trained model, compiled, in every engine: the interpreter's log-probabilities and its very text."""

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from austeer.compiler import CheckFailed, Edit, Gate, Gated, Program, Rank1, Scale, Shift, interpret
from austeer.compiler.certificate import greedy
from austeer.compiler.facts import Geometry
from austeer.compiler.verbs.build import build
from austeer.targets.engines.engine import Engine, Request, Scores, log_softmax
from austeer.targets.engines.registry import ENGINES
from tests.engines.llama_cpp import served
from tests.shared import shared
from tests.tiny import load, logits, scratch

pytestmark = [pytest.mark.engine, pytest.mark.slow]

TEXT = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."
COUNT = 24
CLOSE = 1e-3
ROUNDED = 2e-2  # the weights of this model are float16, and those compiled from them too
ALL = [name for name in ENGINES if name != "peft"]
NAMES = [name for name in ALL if name not in ("vllm", "onnxruntime-genai")]  # these two: no heads of 8


class Story(NamedTuple):
    """The models, the text's tokens, and what transformers makes of them."""

    base: Path
    out: Path
    ids: tuple[int, ...]
    plain: Scores
    steered: Scores
    continuation: tuple[int, ...]


def folds(model: Geometry) -> list[Edit]:
    """What folds into a llama without biases: every kind and site but Shift."""
    rng = np.random.default_rng(0)
    widths = {"heads": model.heads, "attn": model.residual, "neurons": model.neurons, "ffn": model.residual}
    made: list[Edit] = []
    for layer in range(model.layers):
        for site, width in widths.items():
            made.append(Scale(layer, site, rng.permutation(width)[:8].tolist(), rng.normal(size=8)))
            if site in ("heads", "neurons"):
                made.append(Rank1(layer, site, rng.normal(size=width), rng.normal(size=model.residual), 0.02))
    return made


def constants(model: Geometry, strength: float) -> list[Edit]:
    """What no llama without biases has room for: the portable form adds a bias and a layer."""
    rng, layer = np.random.default_rng(0), model.layers // 2
    return [
        Shift(layer, "heads", strength * rng.normal(size=model.heads)),
        Shift(layer, "residual", strength * rng.normal(size=model.residual)),
        Scale(layer, "ffn", rng.permutation(model.residual)[:8].tolist(), rng.normal(size=8)),
    ]


def gated(model: Geometry) -> list[Edit]:
    """Constants at every site that come and go with the context, in one layer after the other."""
    rng = np.random.default_rng(0)
    widths = {"heads": model.heads, "attn": model.residual, "neurons": model.neurons, "ffn": model.residual}
    return [
        Gated(
            Shift(layer, site, rng.normal(size=width)),
            Gate(4 * rng.normal(size=model.residual) / model.residual**0.5, 0.0, 2.0),
        )
        for layer, (site, width) in enumerate({**widths, "residual": model.residual}.items())
    ]


MILD, STRONG = partial(constants, strength=0.3), partial(constants, strength=1.0)


@cache
def tell(name: str, edits: Callable[[Geometry], list[Edit]], target: str) -> Story:
    base, folder = shared(f"models/{name}"), scratch()
    program = Program.of(edits(Program.of([], model=base).model), model=base)
    program.save(folder / "p.safetensors")
    build(str(base), [folder / "p.safetensors"], folder / "out", target=target)
    ids = tuple(AutoTokenizer.from_pretrained(base)(TEXT)["input_ids"])
    model, asked = load(base), torch.tensor([ids])
    plain = log_softmax(logits(model, asked)[0])
    untold = greedy(model, ids, COUNT)
    with interpret(model, program):
        steered, continuation = log_softmax(logits(model, asked)[0]), greedy(model, ids, COUNT)
    assert np.abs(plain - steered).max() > 1
    assert continuation != untold
    return Story(base, folder / "out", ids, plain, steered, continuation)


def installed(name: str) -> Engine:
    """The engine, or a skip with the reason."""
    reason = ENGINES[name].missing()
    if reason:
        pytest.skip(f"{name}: {reason}")
    return ENGINES[name]


def require_told(engine: Engine, story: Story, limit: float) -> None:
    """The compiled model tells the interpreter's story, and the base its own."""
    found = engine.ask(Request(story.out, (story.ids,), COUNT))
    assert np.abs(found.scores[0] - story.steered).max() < limit
    assert found.continuations == (story.continuation,)
    base = engine.ask(Request(story.base, (story.ids,))).scores[0]
    assert np.abs(base - story.plain).max() < CLOSE
    assert np.abs(base - story.steered).max() > 50 * limit


@pytest.mark.parametrize("name", NAMES)
def test_the_compiled_model_tells_the_interpreters_story(name: str) -> None:
    require_told(installed(name), tell("stories260K", folds, "transformers"), CLOSE)


@pytest.mark.parametrize("name", NAMES)
def test_gates_tell_it_too(name: str) -> None:
    require_told(installed(name), tell("stories260K", gated, "transformers"), CLOSE)


def test_gates_are_exact_in_transformers_and_in_llama_cpp_from_a_gguf(tmp_path: Path, converter: None) -> None:  # noqa: ARG001
    base = shared("models/stories260K")
    made = Program.of(gated(Program.of([], model=base).model), model=base)
    made.save(tmp_path / "p")
    story = tell("stories260K", gated, "transformers")
    build(str(base), [tmp_path / "p"], tmp_path / "gguf", form="gguf")
    (file,) = (tmp_path / "gguf").glob("*.gguf")
    model = load(base)
    with interpret(model, made):
        expected = logits(model, torch.tensor([story.ids]))[0]
    compiled = logits(load(story.out), torch.tensor([story.ids]))[0]
    assert (compiled - expected).abs().max() <= 1e-5 * expected.abs().max()
    vocabulary = expected.shape[-1]
    found = served(file, story.ids, vocabulary, story.ids[-1])
    assert np.abs(found - story.steered).max() <= 1e-5 * float(expected.abs().max())
    assert np.abs(found - story.plain).max() > 1


@pytest.mark.parametrize("name", NAMES)
def test_one_portable_file_tells_it_everywhere(name: str) -> None:
    require_told(installed(name), tell("stories260K", MILD, "portable"), CLOSE)


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.vllm] * (name == "vllm")) for name in ALL])
def test_one_portable_file_with_heads_of_64_tells_it_in_every_engine(name: str) -> None:
    require_told(installed(name), tell("imdb-llama-7m", STRONG, "portable"), ROUNDED)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("onnxruntime-genai", "head_size shall be a multiple of 16"),
        pytest.param("vllm", "Unsupported CPU attention configuration: head_dim=8", marks=pytest.mark.vllm),
    ],
)
def test_an_engine_that_cannot_run_heads_of_8_says_so(name: str, says: str) -> None:
    story = tell("stories260K", folds, "transformers")
    with pytest.raises(CheckFailed, match=says):
        installed(name).ask(Request(story.out, (story.ids,)))
