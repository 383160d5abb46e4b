"""Arrays of shifts (`.npy`, no pickle): ITI's head displacements, and other vectors of all layers in one array."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from austeer.compiler.errors import InputError, SpaceError
from austeer.compiler.facts import ModelFacts
from austeer.compiler.sites import SPACE
from austeer.passes.adopt.artefact import Adopted, Asked, head_count, shifts


def read_array(file: Path, facts: ModelFacts, asked: Asked) -> Adopted:
    """A Shift per layer whose vector is not zero, at the site the user names.

    The array is floating point, [layers, width of the site]; for heads also [layers, heads, head_dim] or, as ITI
    orders its heads, [layers·heads, head_dim]. Raises InputError for another file, SpaceError for other shapes.
    """
    array, site = _load(file), asked.require_site()
    layers, width = facts.geometry.layers, facts.geometry.width(SPACE[site])
    shapes = [(layers, width)]
    if site == "heads":
        heads = head_count(facts)
        shapes += [(layers, heads, width // heads), (layers * heads, width // heads)]
    if array.shape not in shapes:
        raise SpaceError(
            f"an array of shape {list(array.shape)}; shifts at site {site} of {facts.geometry.name} have "
            f"{' or '.join(str(list(shape)) for shape in shapes)}"
        )
    rows = array.reshape(layers, width)
    directions = {layer: row for layer, row in enumerate(rows) if row.any() or layer in (asked.layers or ())}
    return Adopted(shifts(directions, site, asked))


def _load(file: Path) -> NDArray[np.floating]:
    try:
        # Mapped, not read: a header that claims more than the file holds is refused and costs no memory.
        with np.errstate(over="ignore"):
            array = np.array(np.lib.format.open_memmap(file, mode="r"))
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror or error})") from None
    except Exception as error:  # noqa: BLE001 - the header is parsed as Python, and its parsers raise many things
        raise InputError(f"this is not an .npy file of plain numbers ({type(error).__name__})") from None
    if array.dtype.kind in "iu" and array.ndim == 2 and array.shape[1] == 2:
        raise InputError("this is a list of (layer, head) pairs, as LoFiT's and ITI's head selection writes: no shift")
    if array.dtype.kind != "f":
        raise InputError(f"an array of {array.dtype}; shifts are floating point")
    return array
