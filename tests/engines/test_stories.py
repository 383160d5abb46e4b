"""A trained model, compiled, in every engine: the interpreter's log-probabilities and its very text."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from austeer.compiler import CheckFailed, Edit, Program, Rank1, Scale, interpret
from austeer.compiler.certificate import greedy
from austeer.compiler.facts import Geometry
from austeer.compiler.verbs.build import build
from austeer.targets.engines.engine import Engine, Request, Scores, log_softmax
from austeer.targets.engines.registry import ENGINES
from tests.shared import shared
from tests.tiny import load, logits

pytestmark = [pytest.mark.engine, pytest.mark.slow]

TEXT = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."
COUNT = 24
CLOSE = 1e-3
NAMES = [name for name in ENGINES if name not in ("peft", "vllm", "onnxruntime-genai")]  # the last two: heads of 8


class Story(NamedTuple):
    """The models, the text's tokens, and what transformers makes of them."""

    base: Path
    out: Path
    ids: tuple[int, ...]
    plain: Scores
    steered: Scores
    continuation: tuple[int, ...]


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


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    base, folder = shared("models/stories260K"), tmp_path_factory.mktemp("story")
    program = Program.of(edits(Program.of([], model=base).model), model=base)
    program.save(folder / "p.safetensors")
    build(str(base), [folder / "p.safetensors"], folder / "out")
    ids = tuple(AutoTokenizer.from_pretrained(base)(TEXT)["input_ids"])
    model, asked = load(base), torch.tensor([ids])
    plain = log_softmax(logits(model, asked)[0])
    with interpret(model, program):
        steered, continuation = log_softmax(logits(model, asked)[0]), greedy(model, ids, COUNT)
    assert np.abs(plain - steered).max() > 1
    return Story(base, folder / "out", ids, plain, steered, continuation)


def installed(name: str) -> Engine:
    """The engine, or a skip with the reason."""
    reason = ENGINES[name].missing()
    if reason:
        pytest.skip(f"{name}: {reason}")
    return ENGINES[name]


@pytest.mark.parametrize("name", NAMES)
def test_the_compiled_model_tells_the_interpreters_story_and_the_base_its_own(name: str, story: Story) -> None:
    engine = installed(name)
    found = engine.ask(Request(story.out, (story.ids,), COUNT))
    assert np.abs(found.scores[0] - story.steered).max() < CLOSE
    assert found.continuations == (story.continuation,)
    base = engine.ask(Request(story.base, (story.ids,))).scores[0]
    assert np.abs(base - story.plain).max() < CLOSE
    assert np.abs(base - story.steered).max() > 1000 * CLOSE


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("onnxruntime-genai", "head_size shall be a multiple of 16"),
        pytest.param("vllm", "Unsupported CPU attention configuration: head_dim=8", marks=pytest.mark.vllm),
    ],
)
def test_an_engine_that_cannot_run_heads_of_8_says_so(name: str, says: str, story: Story) -> None:
    with pytest.raises(CheckFailed, match=says):
        installed(name).ask(Request(story.out, (story.ids,)))
