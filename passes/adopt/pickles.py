"""The one place where pickles are read, by torch's loader for plain data: code in them is refused, not run."""

from pathlib import Path
from typing import Any

from austeer.compiler.edits import Floats, as_vector
from austeer.compiler.errors import InputError


def load_plain(file: Path) -> Any:
    """What torch.save wrote, if it is tensors, numbers, texts, lists, tuples and dicts; InputError otherwise."""
    import torch

    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror or error})") from None
    except Exception as error:  # noqa: BLE001 - a damaged or hostile pickle can raise anything
        raise InputError(
            f"{file}: damaged, or more than plain data, which is never run ({type(error).__name__}: "
            f"{_first_sentence(error)}). If you trust it, save its tensors and lists anew with torch.save"
        ) from None


def plain_vector(value: Any, what: str) -> Floats:
    """A one-dimensional dense tensor of floating point numbers as float32; InputError for anything else."""
    import torch

    if not isinstance(value, torch.Tensor) or value.layout != torch.strided or not value.is_floating_point():
        raise InputError(f"{what} is not a dense tensor of floating point numbers")
    return as_vector(value, what)


def _first_sentence(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) < 160 else text[:160] + "…"
