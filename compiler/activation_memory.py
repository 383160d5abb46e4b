"""How many tokens may pass a model at once, so that their activations stay small beside the model itself."""

from typing import TYPE_CHECKING

from austeer.compiler.live import live_facts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHARE = 0.1  # of the bytes of the model's weights
LEAST_BYTES = 2**27


def affordable_tokens(model: "PreTrainedModel", most: int) -> int:
    """As many, up to `most`, as one block's activations and their gradients, and every block's input, have room for."""
    sizes = live_facts(model).geometry
    values = 2 * _of_block(model) + sizes.layers * sizes.residual
    return max(1, min(most, int(_room(model) / (values * model.dtype.itemsize))))


def all_affordable(model: "PreTrainedModel", tokens: int) -> bool:
    """Whether the activations of all blocks have room together."""
    values = tokens * live_facts(model).geometry.layers * _of_block(model)
    return values * model.dtype.itemsize <= _room(model)


def _of_block(model: "PreTrainedModel") -> int:
    """About so many values a token."""
    sizes = live_facts(model).geometry
    return 8 * sizes.residual + 4 * sizes.heads + 4 * sizes.neurons


def _room(model: "PreTrainedModel") -> float:
    weights = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    return max(SHARE * weights, LEAST_BYTES)
