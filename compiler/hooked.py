"""What hooks that compute with constants share."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def widen(x: "Tensor") -> "Tensor":
    """`x` in float32, or wider if it is."""
    import torch

    return x.to(torch.promote_types(x.dtype, torch.float32))


def first_of(output: Any) -> "Tensor":
    """What a module gives, or its first part where that is a tuple."""
    return output[0] if isinstance(output, tuple) else output


def with_first(output: Any, first: "Tensor") -> Any:
    """What a module gives, with another first part."""
    return (first, *output[1:]) if isinstance(output, tuple) else first


class Placed:
    """A constant that follows the activations to their device, once."""

    def __init__(self, value: "Tensor") -> None:
        self.value = value

    def on(self, x: "Tensor") -> "Tensor":
        """The constant, on the device of `x`."""
        if self.value.device != x.device:
            self.value = self.value.to(x.device)
        return self.value
