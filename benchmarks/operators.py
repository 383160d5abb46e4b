"""What one forward pass asks of the hardware: its ATen operators, with the shapes and dtypes they work on."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Operator: TypeAlias = tuple[str, tuple[tuple[tuple[int, ...], str], ...]]  # name, and (shape, dtype) of each input


def operators(model: "PreTrainedModel", ids: Any) -> list[Operator]:
    """Those of reading `ids` [batch, tokens] and of one more token that goes on from the cache, in order."""
    import torch

    with torch.no_grad(), _recorded() as calls:
        cache = model(ids, use_cache=True).past_key_values
        model(ids[:, -1:], past_key_values=cache, use_cache=True)
    return calls


@contextmanager
def _recorded() -> Iterator[list[Operator]]:
    from torch import Tensor
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    calls: list[Operator] = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            calls.append((str(func), tuple((tuple(leaf.shape), str(leaf.dtype)) for leaf in inputs)))
            return func(*args, **(kwargs or {}))

    with Recorder():
        yield calls
