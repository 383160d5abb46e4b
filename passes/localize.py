"""AUSteer localization (arXiv 2602.04428): which units tell the two sides of contrastive pairs apart."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from austeer.compiler.edits import Floats, Scale
from austeer.compiler.errors import PairsError, Refused, UsageError
from austeer.compiler.facts import Geometry
from austeer.compiler.forward import begin
from austeer.compiler.program import Program
from austeer.compiler.progress import track
from austeer.compiler.sites import SiteName
from austeer.compiler.tokens import PairTokens, batches
from austeer.compiler.watch import ports, watching

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


@dataclass(frozen=True, eq=False)
class Scores:
    """Signed discriminative scores β of all units of a site: `beta[row, unit]` belongs to layer `layers[row]`.

    β = max(n⁺, n⁻) / N over N pairs, negative where n⁺ < n⁻; n⁺ (n⁻) counts the pairs whose activation at the
    last token is larger (smaller) on the positive side.
    """

    site: SiteName
    layers: tuple[int, ...]
    beta: Floats
    pairs: int
    notes: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """The number of units of all layers."""
        return self.beta.size

    def within(self, layers: Collection[int]) -> "Scores":
        """The scores of these layers alone."""
        rows = [row for row, layer in enumerate(self.layers) if layer in layers]
        return replace(self, layers=tuple(self.layers[row] for row in rows), beta=self.beta[rows])

    def select(self, k: int, alpha: float, model: Geometry) -> Program:
        """The k units with the largest |β| of all layers (ties: lower layer, then lower unit), scaled by γ = α·β.

        One Scale per layer that has any. Raises UsageError for a k outside 1..units or an α that is not finite.
        """
        if not 1 <= k <= self.size:
            raise UsageError(f"the number of units must be from 1 to {self.size} at site {self.site}, got {k}")
        if not np.isfinite(alpha):
            raise UsageError(f"alpha must be a finite number, got {alpha}")
        ranked = np.argsort(-np.abs(self.beta), axis=None, kind="stable")[:k]
        rows, units = np.divmod(np.sort(ranked), self.beta.shape[1])
        return Program.of(
            (
                Scale(layer, self.site, tuple(chosen.tolist()), alpha * self.beta[row, chosen].astype(np.float64))
                for row, layer in enumerate(self.layers)
                if (chosen := units[rows == row]).size
            ),
            model=model,
        )


def localize(
    model: "PreTrainedModel",
    pairs: Sequence[PairTokens],
    site: SiteName,
    *,
    batch_tokens: int,
    round_to_half: bool = False,
) -> Scores:
    """Scores every unit of `site` in every layer that has the site; only two counters a unit are held.

    Activations are subtracted in float32. `round_to_half` first rounds them to float16, as the authors'
    collector does: for comparison with it only. Raises PairsError for fewer than two pairs, Refused where no
    layer has the site.
    """
    if len(pairs) < 2:
        raise PairsError(f"localization needs at least two usable pairs, got {len(pairs)}: give more pairs")
    places, notes = ports(model, site)
    if not places:
        raise Refused("every layer is a mixture of experts, which has no single `neurons` site: use the site ffn")
    tallies = {layer: _Tally(round_to_half) for layer in places}
    packed = list(batches(pairs, batch_tokens))
    for batch in track(packed, "Localizing", len(packed)):
        sides = begin(model, batch)
        with watching((places[layer], tally.counter(sides.last)) for layer, tally in tallies.items()):
            sides.run(model)
    beta = np.stack([tally.beta(len(pairs)) for tally in tallies.values()])
    return Scores(site, tuple(places), beta, len(pairs), notes)


class _Tally:
    """n⁺ and n⁻ of one layer: int32 [2, width], on the device of its activations."""

    def __init__(self, round_to_half: bool) -> None:  # noqa: FBT001 - private
        self.round_to_half = round_to_half
        self.counts: Any = 0

    def counter(self, last: "Tensor") -> "Callable[[Tensor], None]":
        """A function that counts one batch, whose sides' last tokens stand at the flat places `last`."""
        import torch

        def see(activation: "Tensor") -> None:
            rows = activation.flatten(0, -2).index_select(0, last.to(activation.device))
            rows = (rows.half() if self.round_to_half else rows).float()
            positive, negative = rows.chunk(2)
            larger = torch.stack([positive > negative, positive < negative])
            self.counts += larger.sum(1, dtype=torch.int32)

        return see

    def beta(self, pairs: int) -> Floats:
        """β of each unit, float32 [width]."""
        more, less = self.counts.cpu().numpy()
        signed = np.where(more < less, -less, more)
        return signed.astype(np.float32) / np.float32(pairs)
