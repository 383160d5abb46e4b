"""Programs to compile: seeded edits spread over all layers and over several sites."""

from collections.abc import Iterator

import numpy as np

from austeer.compiler.edits import Edit, Rank1, Scale
from austeer.compiler.facts import Geometry
from austeer.compiler.program import Program
from austeer.compiler.sites import SPACE, SiteName

SCALED: tuple[SiteName, ...] = ("heads", "neurons", "ffn")
READ: tuple[SiteName, ...] = ("heads", "neurons")


def mixed(model: Geometry, edits: int, *, every_rank1: int = 0, units: int = 10) -> Program:
    """`edits` Scales of `units` units, over all layers and the three sites in turn; every n-th is a Rank1 instead.

    Consecutive edits go to consecutive layers, so that as many tensors as can be are changed.
    """
    return Program(model, tuple(_edits(model, edits, every_rank1, units)))


def _edits(model: Geometry, edits: int, every_rank1: int, units: int) -> Iterator[Edit]:
    generator = np.random.default_rng(0)
    for number in range(edits):
        turn, layer = divmod(number, model.layers)
        if every_rank1 and number % every_rank1 == every_rank1 - 1:
            site = READ[turn % len(READ)]
            k, v = (generator.standard_normal(width) for width in (model.width(SPACE[site]), model.residual))
            yield Rank1(layer, site, k, v, 1e-3)
            continue
        visit, place = divmod(turn, len(SCALED))
        site = SCALED[place]
        # Later visits to a place take other units: no unit may be scaled twice.
        order = np.random.default_rng(layer).permutation(model.width(SPACE[site]))
        chosen = order[visit * units : (visit + 1) * units]
        yield Scale(layer, site, tuple(chosen.tolist()), generator.uniform(-0.5, 1.0, len(chosen)))
