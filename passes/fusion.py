"""Fusion Steering (arXiv 2505.22572): what reference completions add to the residual stream, shifted in at every layer.

The paper injects γ·(h - μ) in each layer, for one prompt: h is the layer's mean activation over the tokens of a
reference completion, μ over those of the question alone. A checkpoint has no prompt of its own, so here the deltas are
means over all pairs, whose positive sides are the references; the injection is a constant, and compiles as a Shift.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from austeer.compiler.edits import Floats, Shift
from austeer.compiler.errors import PairsError, UsageError
from austeer.compiler.facts import Geometry
from austeer.compiler.forward import run_texts
from austeer.compiler.live import live_facts
from austeer.compiler.program import Program
from austeer.compiler.progress import track
from austeer.compiler.tokens import PairTokens, batches
from austeer.compiler.watch import See, ports, watching
from austeer.passes.study import Dimension, Point, Range

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

WEIGHTS = Range(0.05, 1.0)


@dataclass(frozen=True, eq=False)
class Fusion:
    """The space of programs that shift every layer by α · weight · delta: one weight, or one for each segment.

    `deltas` is float32 [layers, residual]. Segments are runs of layers, as equal in length as can be. Raises
    UsageError for fewer segments than 1 or more than layers.
    """

    deltas: Floats
    model: Geometry
    segments: int = 1
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 1 <= self.segments <= len(self.deltas):
            raise UsageError(f"--segments must be from 1 to the {len(self.deltas)} layers, got {self.segments}")

    @property
    def dimensions(self) -> Mapping[str, Dimension]:
        """A weight for each segment; none where there is but one, for α stands for it."""
        return dict.fromkeys(self._names, WEIGHTS)

    @property
    def starts(self) -> Sequence[Point]:
        """All segments alike, then each almost alone."""
        alike: Point = dict.fromkeys(self._names, WEIGHTS.high)
        return [alike, *({**dict.fromkeys(self._names, WEIGHTS.low), name: WEIGHTS.high} for name in self._names)]

    def program(self, point: Point, alpha: float) -> Program:
        """One Shift of the residual stream for each layer."""
        layers = len(self.deltas)
        weights = [point[name] for name in self._names] or [1.0]
        each = np.repeat(weights, [len(part) for part in np.array_split(np.arange(layers), self.segments)])
        shifts = (alpha * each[:, None] * self.deltas).astype(np.float32)
        return Program.of((Shift(layer, "residual", shift) for layer, shift in enumerate(shifts)), model=self.model)

    def size(self, point: Point) -> int:  # noqa: ARG002 - every point edits all
        """The number of layers."""
        return len(self.deltas)

    @property
    def _names(self) -> list[str]:
        return [f"weight {number + 1}" for number in range(self.segments)] if self.segments > 1 else []


def fusion(model: "PreTrainedModel", pairs: Sequence[PairTokens], segments: int, *, batch_tokens: int) -> Fusion:
    """The deltas of every layer: mean over the positive sides' tokens less mean over the prefixes', then over pairs.

    The first token of a longer prefix does not count: in many models it is a sink of attention whose activation is
    many times larger than all others. Raises PairsError where no pair has a prefix.
    """
    usable = [pair for pair in pairs if pair.prefix]
    if not usable:
        raise PairsError("no pair has a prompt, from which its reference completion could differ")
    places, _ = ports(model, "residual")
    sums = {layer: _Sum() for layer in places}
    packed = list(batches(usable, batch_tokens))
    for batch in track(packed, "Averaging activations", len(packed)):
        weights = _weights(batch)
        with watching((places[layer], total.adder(weights)) for layer, total in sums.items()):
            run_texts(model, [pair.prefix + pair.positive for pair in batch])
    deltas = np.stack([total.sum.cpu().numpy() for total in sums.values()]) / len(usable)
    return Fusion(deltas.astype(np.float32), live_facts(model).geometry, segments)


def _weights(pairs: Sequence[PairTokens]) -> Floats:
    """float32 [B, T]: of each token in its pair's delta; they sum to 0."""
    weights = np.zeros((len(pairs), max(len(pair.prefix + pair.positive) for pair in pairs)), np.float32)
    for row, pair in zip(weights, pairs, strict=True):
        first, end = int(len(pair.prefix) > 1), len(pair.prefix)
        row[first:end] = -1 / (end - first)
        row[end : end + len(pair.positive)] = 1 / len(pair.positive)
    return weights


class _Sum:
    """Σ weight · activation of one layer, float64 [residual]."""

    sum: Any = 0.0

    def adder(self, weights: Floats) -> See:
        """A function that adds one batch."""
        import torch

        def see(activation: "Tensor") -> None:
            factors = torch.from_numpy(weights).to(activation.device).double()
            self.sum += torch.einsum("bt,btr->r", factors, activation.double()).cpu()

        return see
