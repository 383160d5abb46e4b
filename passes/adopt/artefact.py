"""What all formats share: what the user has to say about an artefact, what is found in it, and reading its numbers."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from austeer.compiler.edits import Edit, Floats, Rank1, Scale, Shift
from austeer.compiler.errors import InputError, UsageError
from austeer.compiler.facts import ModelFacts
from austeer.compiler.sites import SiteName
from austeer.compiler.tensors import TensorInfo, to_float32


@dataclass(frozen=True)
class Asked:
    """What only the user knows where the artefact does not say. `layers` counts as the artefact does; None is all."""

    site: SiteName | None = None
    layers: frozenset[int] | None = None
    top_k: int | None = None
    alpha: float | None = None

    def require_site(self) -> SiteName:
        """The site; UsageError where the user has not named it."""
        if self.site is None:
            raise UsageError(
                "this artefact does not say what its vectors were added to, and shapes can agree by chance: say --site "
                "heads (input of the attention output projection), attn, neurons, ffn or residual (output of the block)"
            )
        return self.site

    def wanted(self, layer: int) -> bool:
        """Whether the user wants this layer."""
        return self.layers is None or layer in self.layers


@dataclass(frozen=True)
class Adopted:
    """The edits of an artefact, and what the user should know about how they were read."""

    edits: tuple[Edit, ...]
    notes: tuple[str, ...] = ()


def shifts(directions: Mapping[int, Any], site: SiteName, asked: Asked) -> tuple[Shift, ...]:
    """One Shift for each layer that is wanted, in the order of layers; InputError for a wanted layer without one."""
    missing = sorted((asked.layers or frozenset()) - directions.keys())
    if missing:
        found = ", ".join(map(str, sorted(directions)))
        raise InputError(f"there is no vector for layer {missing[0]}, which --layers names; there are {found}")
    return tuple(Shift(layer, site, directions[layer]) for layer in sorted(directions) if asked.wanted(layer))


def scale_all(layer: int, site: SiteName, factors: Floats) -> tuple[Scale, ...]:
    """x ← factors·x over a whole site, as a Scale of the units that change; none if no unit does."""
    units = np.flatnonzero(factors != 1)
    return (Scale(layer, site, units.tolist(), factors[units] - np.float32(1)),) if units.size else ()


@np.errstate(over="ignore", invalid="ignore")  # what overflows is refused by the edit itself
def strengthened(edit: Edit, strength: float) -> Edit:
    """The edit with its effect times `strength`; ProgramError where that is not finite."""
    if isinstance(edit, Scale):
        return replace(edit, gamma=edit.gamma * np.float32(strength))
    if isinstance(edit, Shift):
        return replace(edit, vector=edit.vector * np.float32(strength))
    assert isinstance(edit, Rank1), edit
    return replace(edit, strength=edit.strength * strength)


def other_model(said: Any, facts: ModelFacts) -> tuple[str, ...]:
    """A note, if the artefact names a model type and it is not the model's."""
    if not isinstance(said, str) or said == facts.geometry.architecture:
        return ()
    return (
        f"it says it was made for a {said!r} model, and {facts.geometry.name} is a {facts.geometry.architecture!r}",
    )


def head_count(facts: ModelFacts) -> int:
    """The number of query heads; the heads space has as many parts of equal width."""
    return int(facts.config[facts.architecture.sizes.heads])


def numbers(tensor: TensorInfo) -> NDArray[np.float32]:
    """The values of a tensor in its shape; CheckpointError unless they are floating point."""
    with tensor.file.open("rb") as file:
        file.seek(tensor.offset)
        return to_float32(file.read(tensor.nbytes), tensor.dtype).reshape(tensor.shape)
