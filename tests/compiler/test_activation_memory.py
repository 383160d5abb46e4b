"""How many tokens pass a model at once: few enough to stay small beside it, and never none."""

import pytest

from austeer.compiler import activation_memory
from austeer.compiler.activation_memory import affordable_tokens, all_affordable
from austeer.compiler.live import load_model
from tests.tiny import Tiny, on_disk

TINY = Tiny("llama", layers=3, heads=4, head_dim=6, residual=20, neurons=28)
BLOCK = 8 * 20 + 4 * 24 + 4 * 28  # values a token
TOKEN = 4 * (2 * BLOCK + 3 * 20)  # bytes: a block's activations and their gradients, and each block's input


def test_a_small_model_takes_all_that_is_asked() -> None:
    assert affordable_tokens(load_model(on_disk(TINY), device="cpu"), 100) == 100


@pytest.mark.parametrize(("room", "tokens"), [(7 * TOKEN, 7), (8 * TOKEN - 1, 7), (1, 1)])
def test_as_many_as_have_room(room: int, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activation_memory, "LEAST_BYTES", room)
    monkeypatch.setattr(activation_memory, "SHARE", 0.0)
    assert affordable_tokens(load_model(on_disk(TINY), device="cpu"), 100) == tokens


def test_the_room_grows_with_the_weights_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activation_memory, "LEAST_BYTES", 0)
    model = load_model(on_disk(TINY), device="cpu")
    weights = sum(weight.numel() for weight in model.parameters())
    monkeypatch.setattr(activation_memory, "SHARE", 5 * TOKEN / (4 * weights) * 1.001)
    assert affordable_tokens(model, 100) == 5
    assert affordable_tokens(load_model(on_disk(TINY), dtype="bfloat16", device="cpu"), 100) == 5


def test_all_blocks_are_kept_where_they_have_room_together(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(on_disk(TINY), device="cpu")
    monkeypatch.setattr(activation_memory, "SHARE", 0.0)
    monkeypatch.setattr(activation_memory, "LEAST_BYTES", 10 * 3 * BLOCK * 4)
    assert all_affordable(model, 10)
    assert not all_affordable(model, 11)
