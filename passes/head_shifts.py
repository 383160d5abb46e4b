"""What RestoreLCC (arXiv 2510.21834) trains: a constant for each of some heads."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from austeer.compiler.edits import Floats, Shift
from austeer.compiler.facts import Geometry
from austeer.compiler.hooked import Placed
from austeer.compiler.program import Program

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class HeadShifts:
    """The compensations c = V·m + b of n heads, and where they start: m the lost components' own magnitudes, b = 0.

    `heads` int64 [n, 2]: layer and head of each; `directions` V [n, dim, k]: the first right singular vectors of what
    the head lost; `magnitudes` m [n, k]; `sizes` [n]: the RMS of what the dense model's head gives. Sizes are the unit
    that m and b are trained in, so that one learning rate serves every head of every model.
    """

    heads: NDArray[np.int64]
    directions: Floats
    magnitudes: Floats
    sizes: Floats

    @property
    def layers(self) -> tuple[int, ...]:
        """Those that have a head."""
        return tuple(sorted(set(self.heads[:, 0].tolist())))

    @property
    def start(self) -> Floats:
        """What is trained, [n, k + dim]: m and b side by side, in units of the sizes."""
        magnitudes = self.magnitudes / self.sizes[:, None]
        return np.concatenate([magnitudes, np.zeros(self.directions.shape[:2], np.float32)], axis=1)

    def arrays(self) -> dict[str, "Floats | NDArray[np.int64]"]:
        """The fields by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @cached_property
    def _constants(self) -> tuple[Placed, Placed]:
        """Directions and sizes, moved to a device once and not in every step."""
        import torch

        return Placed(torch.from_numpy(self.directions)), Placed(torch.from_numpy(self.sizes))

    def compensation(self, trained: "Tensor") -> "Tensor":
        """c of each head, [n, dim], on the device of what is trained; differentiable."""
        directions, sizes = (constant.on(trained) for constant in self._constants)
        m, b = trained.split([directions.shape[2], directions.shape[1]], dim=1)
        return sizes[:, None] * ((directions @ m[:, :, None])[:, :, 0] + b)

    def by_layer(self, compensation: "Tensor", width: int) -> Mapping[int, "Tensor"]:
        """What to add in each layer [width], zero at heads that are not among these; differentiable."""
        import torch

        made: dict[int, Tensor] = {}
        for layer in self.layers:
            rows, dim = np.flatnonzero(self.heads[:, 0] == layer), compensation.shape[1]
            chosen, places = (torch.from_numpy(index).to(compensation.device) for index in (rows, self.heads[rows, 1]))
            empty = compensation.new_zeros(width // dim, dim)
            made[layer] = empty.index_copy(0, places, compensation[chosen]).flatten()
        return made

    def program(self, trained: "Tensor", model: Geometry) -> Program:
        """A Shift at heads in each layer that has any of these."""
        vectors = self.by_layer(self.compensation(trained), model.heads)
        return Program.of((Shift(layer, "heads", vector) for layer, vector in vectors.items()), model=model)
