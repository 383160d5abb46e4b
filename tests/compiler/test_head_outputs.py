"""Head outputs on disk against each text run alone."""

import random
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from austeer.compiler import CheckpointError, OutputError, UsageError
from austeer.compiler.head_outputs import HeadOutputs, record, record_sides
from austeer.compiler.live import live_facts, port
from austeer.compiler.tokens import PairTokens, Tokens
from tests.shared import TINY, tiny

TEXTS: tuple[Tokens, ...] = ((5, 6, 7), (9,), (3, 4, 5, 6, 7, 8, 9, 10, 11), (5, 6, 7), (5, 6), (12, 13, 14))
SHAPES = {"gemma2": (4, 8), "gpt2": (4, 6), "llama": (4, 8), "opt": (4, 6), "qwen2": (4, 6)}


def some_pairs() -> list[PairTokens]:
    generator = random.Random(5)

    def tokens(low: int, high: int) -> Tokens:
        return tuple(generator.randrange(64) for _ in range(generator.randint(low, high)))

    pairs = [PairTokens(tokens(0, 8), tokens(1, 4), tokens(1, 4)) for _ in range(7)]
    return [*pairs, pairs[2]]


def alone(model: Any, layer: int, text: Tokens) -> np.ndarray[Any, Any]:
    """What the attention output projection of a layer reads at the last token of one text."""
    seen: list[torch.Tensor] = []
    module = port(model, live_facts(model), layer, "heads").module
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(input_ids=torch.tensor([text]), use_cache=False)
    handle.remove()
    return seen[0].reshape(len(text), -1)[-1].numpy()


def assert_holds(outputs: HeadOutputs, model: Any, texts: list[Tokens]) -> None:
    assert (outputs.layers, outputs.count) == (2, len(texts))
    for layer in range(2):
        found = outputs.layer(layer)
        assert found.dtype == np.float32
        assert found.shape == (len(texts), outputs.heads, outputs.dim)
        expected = np.stack([alone(model, layer, text) for text in texts])
        np.testing.assert_allclose(found.reshape(len(texts), -1), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", TINY)
def test_each_row_is_its_text_run_alone(name: str, tmp_path: Path) -> None:
    """In the order of the texts, equal ones too."""
    assert_holds(record(tiny(name), TEXTS, tmp_path / "heads", batch_tokens=12), tiny(name), list(TEXTS))


@pytest.mark.parametrize("name", TINY)
def test_sides_are_the_whole_texts(name: str, tmp_path: Path) -> None:
    pairs = some_pairs()
    found = record_sides(tiny(name), pairs, tmp_path / "positive", tmp_path / "negative", batch_tokens=30)
    assert_holds(found[0], tiny(name), [pair.prefix + pair.positive for pair in pairs])
    assert_holds(found[1], tiny(name), [pair.prefix + pair.negative for pair in pairs])


@pytest.mark.parametrize("name", SHAPES)
def test_heads_are_query_heads_of_the_models_own_width(name: str, tmp_path: Path) -> None:
    outputs = record(tiny(name), TEXTS[:1], tmp_path / "heads", batch_tokens=12)
    assert (outputs.heads, outputs.dim) == SHAPES[name]


@pytest.mark.parametrize("batch_tokens", [1, 7, 10**6])
def test_batching_does_not_matter(batch_tokens: int, tmp_path: Path) -> None:
    found, expected = (
        record(tiny("qwen3"), TEXTS, tmp_path / str(size), batch_tokens=size) for size in (batch_tokens, 12)
    )
    for layer in range(2):
        np.testing.assert_allclose(found.layer(layer), expected.layer(layer), rtol=1e-5, atol=1e-6)


def test_a_model_in_16_bits_is_recorded_as_it_computes(tmp_path: Path) -> None:
    outputs = record(deepcopy(tiny("llama")).bfloat16(), TEXTS, tmp_path / "heads", batch_tokens=12)
    found = torch.from_numpy(outputs.layer(1))
    assert torch.equal(found.bfloat16().float(), found)
    assert found.abs().max() > 0


def test_the_file_is_plain_safetensors(tmp_path: Path) -> None:
    outputs = record(tiny("llama"), TEXTS, tmp_path / "heads.safetensors", batch_tokens=12)
    stored = load_file(outputs.file)
    assert {name: (values.shape, values.dtype) for name, values in stored.items()} == {
        f"layer.{layer}": ((6, 32), np.dtype(np.float32)) for layer in range(2)
    }
    np.testing.assert_array_equal(stored["layer.1"].reshape(6, 4, 8), outputs.layer(1))


def test_heads_in_the_order_of_another_model(tmp_path: Path) -> None:
    outputs = record(tiny("llama"), TEXTS, tmp_path / "heads", batch_tokens=12)
    chosen = outputs.in_order([(3, 0), (1, 2)])
    np.testing.assert_array_equal(chosen.layer(0), outputs.layer(0)[:, [3, 0]])
    np.testing.assert_array_equal(chosen.layer(1), outputs.layer(1)[:, [1, 2]])


def test_no_hook_stays(tmp_path: Path) -> None:
    model = tiny("llama")
    record(model, TEXTS, tmp_path / "heads", batch_tokens=12)
    with pytest.raises(UsageError, match="longer than the 128"):
        record(model, [(5,) * 129], tmp_path / "long", batch_tokens=12)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_infinite_outputs_are_no_outputs(tmp_path: Path) -> None:
    model = tiny("llama")
    handle = model.model.layers[1].self_attn.v_proj.register_forward_hook(lambda _, __, out: out * torch.inf)
    with pytest.raises(CheckpointError, match=r"heads of layer 1 put out is not finite.*--dtype float32"):
        record(model, TEXTS, tmp_path / "heads", batch_tokens=12)
    handle.remove()


def test_a_place_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot be written"):
        record(tiny("llama"), TEXTS, tmp_path / "missing" / "heads", batch_tokens=12)
