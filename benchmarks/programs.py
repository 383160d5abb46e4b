"""Programs to compile: seeded edits spread over all layers, at several sites, behind gates, or shifts of all heads."""

from collections.abc import Iterator

import numpy as np

from austeer.compiler.edits import Edit, Floats, Rank1, Scale, Shift
from austeer.compiler.facts import Geometry
from austeer.compiler.gates import Fitted, Gate, Gated
from austeer.compiler.program import Program
from austeer.compiler.sites import SPACE, SiteName

SCALED: tuple[SiteName, ...] = ("heads", "neurons", "ffn")
READ: tuple[SiteName, ...] = ("heads", "neurons")


def mixed(model: Geometry, edits: int, *, every_rank1: int = 0, units: int = 10) -> Program:
    """`edits` Scales of `units` units, over all layers and the three sites in turn; every n-th is a Rank1 instead.

    Consecutive edits go to consecutive layers, so that as many tensors as can be are changed.
    """
    return Program(model, tuple(_edits(model, edits, every_rank1, units)))


def gated(model: Geometry, neurons: int, *, units: int = 10, delta: float = 8.0) -> Program:
    """In every layer a Scale and a Shift at site ffn behind one gate, which take `neurons` neurons, two the Shift."""
    generator = np.random.default_rng(0)
    edits: list[Edit] = []
    for layer in range(model.layers):
        gate = Gate(delta * _direction(generator, model.residual), 0.0, delta)
        chosen = generator.permutation(model.residual)[:units]
        scale = Scale(layer, "ffn", tuple(chosen.tolist()), generator.uniform(-0.5, 1.0, len(chosen)))
        edits.append(Gated(scale, gate, _fitted(generator, neurons - 2, model.residual)))
        edits.append(Gated(Shift(layer, "ffn", _direction(generator, model.residual)), gate))
    return Program(model, tuple(edits))


def head_shifts(model: Geometry) -> Program:
    """What `restore` makes: in every layer one Shift of all heads."""
    generator = np.random.default_rng(0)
    shifts = (Shift(layer, "heads", _direction(generator, model.heads)) for layer in range(model.layers))
    return Program(model, tuple(shifts))


def _direction(generator: np.random.Generator, width: int) -> Floats:
    return generator.standard_normal(width, np.float32) / np.float32(np.sqrt(width))


def _fitted(generator: np.random.Generator, count: int, width: int) -> Fitted:
    """Neurons that are fitted to nothing: as quick, and as slow, as any."""
    gate, up, down = (np.stack([_direction(generator, width) for _ in range(count)]) for _ in range(3))
    biases = generator.uniform(-1, 1, (2, count))
    return Fitted(gate, biases[0], up, biases[1], down.T)


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
