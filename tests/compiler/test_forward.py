"""Batches, padding and the shared prefix change nothing: each text is as if it were run alone."""

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM

from austeer.compiler import Program, Scale, Shift, UsageError, interpret
from austeer.compiler.forward import begin, logits, longest_text, run_texts
from austeer.compiler.live import live_facts
from austeer.compiler.tokens import PairTokens
from tests.shared import TINY, tiny

EXACT = {"rtol": 1e-4, "atol": 1e-5}


def some_pairs(count: int = 7) -> list[PairTokens]:
    """Pairs of many lengths, the third without a prefix."""
    generator = random.Random(3)

    def tokens(low: int, high: int) -> tuple[int, ...]:
        return tuple(generator.randrange(1, 64) for _ in range(generator.randint(low, high)))

    pairs = [PairTokens(tokens(1, 14), tokens(1, 6), tokens(1, 6)) for _ in range(count)]
    pairs[2] = replace(pairs[2], prefix=())
    return pairs


def alone(model: Any, text: tuple[int, ...]) -> torch.Tensor:
    """Logits of one text without padding, mask, positions or cache."""
    with torch.inference_mode():
        return model(input_ids=torch.tensor([text]), use_cache=False).logits[0]


def check_pairs(model: Any, pairs: list[PairTokens]) -> None:
    sides = begin(model, pairs)
    found = logits(model, sides.run(model))
    texts = [(pair.prefix, pair.positive) for pair in pairs] + [(pair.prefix, pair.negative) for pair in pairs]
    for row, (prefix, side) in enumerate(texts):
        expected = alone(model, prefix + side)
        assert_close(found[row, : len(side)], expected[len(prefix) :], **EXACT)
        assert_close(found.flatten(0, 1)[sides.last[row]], expected[-1], **EXACT)
        if prefix:
            assert sides.before is not None
            assert_close(logits(model, sides.before[row]), expected[len(prefix) - 1], **EXACT)


@pytest.mark.parametrize("name", TINY)
def test_pairs_that_share_a_prefix_are_as_if_run_alone(name: str) -> None:
    check_pairs(tiny(name), some_pairs())


@pytest.mark.parametrize("name", TINY)
def test_pairs_without_a_prefix_are_as_if_run_alone(name: str) -> None:
    pairs = [PairTokens((), pair.prefix + pair.positive, pair.prefix + pair.negative) for pair in some_pairs()]
    check_pairs(tiny(name), pairs)


@pytest.mark.parametrize("name", TINY)
def test_texts_are_as_if_run_alone(name: str) -> None:
    model, texts = tiny(name), [pair.prefix + pair.positive for pair in some_pairs()]
    states, real = run_texts(model, texts)
    for row, text in enumerate(texts):
        assert_close(logits(model, states[row, real[row]]), alone(model, text), **EXACT)


@pytest.mark.parametrize("name", ["llama", "gemma2", "opt", "gpt2", "mistral-window", "qwen3_moe"])
def test_a_program_acts_on_prefix_and_sides_alike(name: str) -> None:
    model = tiny(name)
    geometry = live_facts(model).geometry
    edits = [Scale(0, "ffn", (1, 5), [0.7, -0.4]), Shift(1, "heads", torch.linspace(-1, 1, geometry.heads))]
    before = alone(model, (1, 2, 3))
    with interpret(model, Program.of(edits, model=geometry)):
        assert not torch.allclose(alone(model, (1, 2, 3)), before, atol=1e-3)
        check_pairs(model, some_pairs())


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_either_attention_implementation(implementation: str) -> None:
    config = AutoConfig.for_model("llama", **TINY["llama"], attn_implementation=implementation)
    check_pairs(AutoModelForCausalLM.from_config(config).eval(), some_pairs())


def test_a_text_beyond_the_models_positions_is_refused() -> None:
    model = tiny("gpt2")
    with pytest.raises(UsageError, match="129 tokens is longer than the 128"):
        run_texts(model, [(1,) * 129])
    with pytest.raises(UsageError, match="130 tokens"):
        begin(model, [PairTokens((1,) * 127, (2,), (3, 4, 5))])


def test_a_rope_that_depends_on_the_length_bounds_the_text() -> None:
    rope = {"rope_type": "longrope", "long_factor": [2.0] * 3, "short_factor": [1.0] * 3, "rope_theta": 10000.0}
    sizes = dict(TINY["phi3"], original_max_position_embeddings=32, rope_parameters=rope)
    config = AutoConfig.for_model("phi3", **sizes)
    assert longest_text(AutoModelForCausalLM.from_config(config)) == 32
    assert longest_text(tiny("phi3")) == 128
