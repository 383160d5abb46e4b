"""A model of 16 bits that computes in float32, with its weights as they are: each is widened where it is used.

A mapped model then takes the size of its files instead of twice that, and is no slower than one in float32.
"""

from collections.abc import Callable, Mapping
from functools import wraps
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.overrides import TorchFunctionMode

BLOCK_BYTES = 2**23  # of a matrix in float32: a larger one is used in blocks of rows, which a processor's cache holds


def compute_in_float32(model: "nn.Module") -> None:
    """From now on the model computes what it would if it were loaded in float32, but for the order of some sums.

    Its weights keep their dtype, their place and their identity. A mixture of experts must run one expert after the
    other, which is the "eager" of transformers' `experts_implementation`.
    """
    import torch

    promotion = _promotion()
    for module in model.modules():
        if any(weight.dtype in (torch.float16, torch.bfloat16) for weight in module.parameters(recurse=False)):
            scaled = hasattr(module, "scalar_embed_scale")
            module.forward = _scaled(module) if scaled else _within(promotion, module.forward)


def _within(promotion: "TorchFunctionMode", forward: Callable[..., Any]) -> Callable[..., Any]:
    """Around forward, as hooks would be missed by who calls it alone, and would have to stand in the right order."""

    @wraps(forward)
    def promoted(*args: Any, **kwargs: Any) -> Any:
        with promotion:
            return forward(*args, **kwargs)

    return promoted


def _promotion() -> "TorchFunctionMode":
    """Torch widens the narrower operand of arithmetic; in this mode also that of what else weights are used in."""
    from torch.overrides import TorchFunctionMode

    promoting = _promoting()

    class Promotion(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return promoting.get(func, func)(*args, **(kwargs or {}))

    return Promotion()


def _promoting() -> Mapping[Any, Callable[..., "Tensor"]]:
    """Of the functions that refuse operands of two dtypes, or take none but weights, those that weights are used in."""
    import torch
    from torch.nn import functional

    return {
        functional.embedding: lambda *args, **kwargs: functional.embedding(*args, **kwargs).float(),
        functional.layer_norm: _widening(functional.layer_norm),
        functional.linear: _linear,
        torch.addmm: _widening(torch.addmm),
    }


def _widening(function: Callable[..., "Tensor"]) -> Callable[..., "Tensor"]:
    import torch

    def wide(value: Any) -> Any:
        return value.float() if isinstance(value, torch.Tensor) else value

    def widening(*args: Any, **kwargs: Any) -> "Tensor":
        return function(*map(wide, args), **{name: wide(value) for name, value in kwargs.items()})

    return widening


def _linear(x: "Tensor", weight: "Tensor", bias: "Tensor | None" = None) -> "Tensor":
    from torch.nn import functional

    x, rows = x.float(), max(1, BLOCK_BYTES // (4 * weight.shape[1]))
    output = x.new_empty((*x.shape[:-1], len(weight)))
    for start in range(0, len(weight), rows):
        part = slice(start, start + rows)
        output[..., part] = functional.linear(x, weight[part].float(), None if bias is None else bias[part].float())
    return output


def _scaled(embedding: Any) -> Callable[..., "Tensor"]:
    """gemma's, which rounds its scale to the dtype of its weight."""
    from torch.nn import functional

    return lambda ids: functional.embedding(ids, embedding.weight).float() * embedding.scalar_embed_scale
