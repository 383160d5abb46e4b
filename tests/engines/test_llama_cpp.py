"""A compiled checkpoint in llama.cpp, by its own converter, against the interpreter; the base must not agree."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from austeer.compiler import Edit, Program, Rank1, Scale, interpret
from austeer.compiler.facts import Geometry
from austeer.compiler.verbs.build import build
from austeer.targets.llama_cpp import convert
from tests.engines.llama_cpp import served
from tests.shared import shared
from tests.tiny import load

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.usefixtures("converter")]

TEXT = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."
CLOSE = 1e-3


class Story(NamedTuple):
    """The models and what transformers says about them: log-probabilities [positions, vocabulary]."""

    base: Path
    out: Path
    ids: list[int]
    plain: "np.ndarray[Any, Any]"
    steered: "np.ndarray[Any, Any]"


def edits(model: Geometry) -> list[Edit]:
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


@torch.inference_mode()
def log_probabilities(model: Any, ids: Sequence[int]) -> "np.ndarray[Any, Any]":
    return model(input_ids=torch.tensor([list(ids)])).logits[0].double().log_softmax(-1).numpy()


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    base, folder = shared("models/stories260K"), tmp_path_factory.mktemp("story")
    program = Program.of(edits(Program.of([], model=base).model), model=base)
    program.save(folder / "p.safetensors")
    build(str(base), [folder / "p.safetensors"], folder / "out")
    ids = AutoTokenizer.from_pretrained(base)(TEXT)["input_ids"]
    model = load(base)
    plain = log_probabilities(model, ids)
    with interpret(model, program):
        steered = log_probabilities(model, ids)
    assert np.abs(plain - steered).max() > 1
    return Story(base, folder / "out", ids, plain, steered)


def converted(model: Path, folder: Path) -> Path:
    """The GGUF in float32 that llama.cpp's own converter makes of a checkpoint."""
    convert(model, folder / "model.gguf", "f32")
    return folder / "model.gguf"


def test_the_compiled_model_says_in_llama_cpp_what_the_interpreter_says(story: Story, tmp_path: Path) -> None:
    found = served(converted(story.out, tmp_path), story.ids, story.plain.shape[1], story.ids[-1])
    assert np.abs(found - story.steered).max() < CLOSE


def test_the_base_does_not(story: Story, tmp_path: Path) -> None:
    found = served(converted(story.base, tmp_path), story.ids, story.plain.shape[1], story.ids[-1])
    assert np.abs(found - story.plain).max() < CLOSE
    assert np.abs(found - story.steered).max() > 1000 * CLOSE
