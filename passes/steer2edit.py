"""Steer2Edit (arXiv 2602.09870): rank-1 edits of the heads and neurons that already write along a steering vector."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from austeer.compiler.edits import Floats, Rank1
from austeer.compiler.errors import PairsError, Refused, UsageError
from austeer.compiler.facts import Geometry, ModelFacts
from austeer.compiler.forward import begin
from austeer.compiler.live import Port, live_facts, port, weight_of
from austeer.compiler.program import Program
from austeer.compiler.progress import track
from austeer.compiler.sites import SiteName
from austeer.compiler.tokens import PairTokens, batches
from austeer.compiler.watch import See, ports, watching

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

# What a block's output projection reads, and what it writes: before any post-norm, so the edit adds v where v was seen.
WRITES: Mapping[SiteName, SiteName] = {"heads": "attn", "neurons": "ffn"}


def elastic_net(scores: ArrayLike, rho: float, l1_ratio: float) -> Floats:
    """λ = sign(s)·max(|s| - ρα, 0) / (ρ(1 - α)) for each score s; α is `l1_ratio`.

    It maximizes s·λ - ρ(α|λ| + (1 - α)λ²/2): effect along the steering vector against size.
    Raises UsageError for a ρ that is not positive and finite or a ratio outside 0 ≤ α < 1.
    """
    if not (0 < rho < np.inf and 0 <= l1_ratio < 1):
        raise UsageError(f"rho must be above 0 and the l1 ratio from 0 to below 1, got {rho} and {l1_ratio}")
    s = np.asarray(scores, dtype=np.float64)
    return (np.sign(s) * np.maximum(np.abs(s) - rho * l1_ratio, 0) / (rho * (1 - l1_ratio))).astype(np.float32)


@dataclass(frozen=True, eq=False)
class Block:
    """The heads (or neurons) of one layer: `scores[j]` = cos(v, W_j x̄_j), and k_j as part j of `k`.

    W_j is the part of the output projection that reads head or neuron j, x̄_j its mean input. `v` [residual] is the
    steering vector of what the projection writes, of length 1 (0 where the sides do not differ); `k`, as wide as
    the site, holds W_jᵀv of length 1 in part j.
    """

    layer: int
    site: SiteName
    v: Floats
    k: Floats
    scores: Floats

    def edit(self, strengths: Floats) -> Rank1:
        """All edits λ_j v k_jᵀ of this block as one, since they share v."""
        width = len(self.k) // len(self.scores)
        return Rank1(self.layer, self.site, np.repeat(strengths, width) * self.k, self.v, 1.0)


@dataclass(frozen=True, eq=False)
class Alignment:
    """How well every head and neuron is aligned with the steering vector of its block."""

    blocks: tuple[Block, ...]
    pairs: int
    notes: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """The number of heads and neurons."""
        return sum(len(block.scores) for block in self.blocks)

    def within(self, layers: Collection[int]) -> "Alignment":
        """That of these layers alone."""
        return replace(self, blocks=tuple(block for block in self.blocks if block.layer in layers))

    def program(self, rho: float, l1_ratio: float, model: Geometry) -> Program:
        """The edits with elastic-net strengths: one Rank1 for each layer and site that has any."""
        strengths = [elastic_net(block.scores, rho, l1_ratio) for block in self.blocks]
        changed = ((block, values) for block, values in zip(self.blocks, strengths, strict=True) if values.any())
        return Program.of((block.edit(values) for block, values in changed), model=model)

    def select(self, k: int, alpha: float, model: Geometry) -> Program:
        """The edits of the k best aligned: λ = α·sign(s)·(|s| - |s| of the next one); see `penalty`."""
        return self.program(*self.penalty(k, alpha), model)

    def penalty(self, k: int, alpha: float) -> tuple[float, float]:
        """(ρ, l1 ratio) of the elastic net that leaves k components, with the slope α = 1 / (ρ(1 - l1 ratio)).

        Components that tie with the next one are left out. Raises UsageError for a k outside 1..size or an α that
        is not positive and finite.
        """
        if not 1 <= k <= self.size:
            raise UsageError(f"the number of heads and neurons must be from 1 to {self.size}, got {k}")
        if not 0 < alpha < np.inf:
            raise UsageError(f"alpha must be a finite number above 0, got {alpha}")
        falling = np.sort(np.concatenate([np.abs(block.scores) for block in self.blocks]))[::-1].astype(np.float64)
        threshold = float(falling[k]) if k < self.size else 0.0
        return threshold + 1 / alpha, threshold / (threshold + 1 / alpha)

    def choice(self, rho: float, l1_ratio: float) -> tuple[int, float]:
        """(k, α) of an elastic net: the number of components that it edits, and the slope."""
        edited = sum(np.count_nonzero(elastic_net(block.scores, rho, l1_ratio)) for block in self.blocks)
        return int(edited), 1 / (rho * (1 - l1_ratio))


def steer2edit(
    model: "PreTrainedModel", pairs: Sequence[PairTokens], sites: Sequence[SiteName], *, batch_tokens: int
) -> Alignment:
    """Aligns the heads, the neurons, or both (`sites`) of every layer with the pairs; two sums a block are held.

    Means are over each side's own tokens (those after the common prefix), then over texts. A mixture of experts
    has no neurons: its layers take part with their heads. Raises PairsError for fewer than two pairs, Refused
    where no layer has any of the sites, UsageError for other sites.
    """
    import torch

    if len(pairs) < 2:
        raise PairsError(f"a steering vector needs at least two usable pairs, got {len(pairs)}: give more pairs")
    if not sites or not set(sites) <= set(WRITES):
        raise UsageError(f"Steer2Edit edits the sites {' and '.join(WRITES)}, not {', '.join(sites)}")
    facts, found = live_facts(model), [ports(model, site) for site in sites]
    places: list[tuple[int, SiteName, Port]] = [
        (layer, site, reads)
        for site, (by_layer, _) in zip(sites, found, strict=True)
        for layer, reads in by_layer.items()
    ]
    if not places:
        raise Refused("every layer is a mixture of experts, which has no single `neurons` site: use the site heads")
    means = [_Means(reads, port(model, facts, layer, WRITES[site])) for layer, site, reads in places]
    packed = list(batches(pairs, batch_tokens))
    for batch in track(packed, "Averaging activations", len(packed)):
        sides = begin(model, batch)
        with watching(watched for mean in means for watched in mean.watched(sides.own)):
            sides.run(model)
    with torch.no_grad():
        blocks = tuple(_block(*place, mean, facts) for place, mean in zip(places, means, strict=True))
    return Alignment(blocks, len(pairs), tuple(note for _, notes in found for note in notes))


class _Means:
    """Σ x⁺ + x⁻ of what a projection reads, and Σ y⁺ - y⁻ of what it writes: float64 on the CPU."""

    def __init__(self, reads: Port, writes: Port) -> None:
        self.reads, self.writes = reads, writes
        self.sum: Any = 0
        self.difference: Any = 0

    def watched(self, own: "Tensor") -> tuple[tuple[Port, See], tuple[Port, See]]:
        """Where to look during one batch, whose sides' own tokens are marked in `own`, [2B, T]."""
        places = own.flatten().nonzero()[:, 0]
        weights = (own / own.sum(1, keepdim=True)).flatten()[places]
        signs = 1 - 2 * (places >= own.numel() // 2).float()

        def total(activation: "Tensor", weights: "Tensor") -> "Tensor":
            rows = activation.flatten(0, -2).index_select(0, places.to(activation.device)).float()
            return (weights.to(rows.device) @ rows).cpu().double()

        def read(activation: "Tensor") -> None:
            self.sum += total(activation, weights)

        def written(activation: "Tensor") -> None:
            self.difference += total(activation, weights * signs)

        return (self.reads, read), (self.writes, written)


def _block(layer: int, site: SiteName, reads: Port, means: _Means, facts: ModelFacts) -> Block:
    """Cosines and directions of one block, computed in float32. They do not depend on the sums' scale."""
    import torch

    weight = weight_of(reads.module, transposed=facts.architecture.transposed)
    direction, inputs = (_unit(values.float()).to(weight.device) for values in (means.difference, means.sum))
    parts = (-1, facts.head_dim if site == "heads" else 1)
    k = weight.T @ direction
    written = torch.einsum("rpw,pw->pr", weight.unflatten(1, parts), inputs.unflatten(0, parts))
    scores = _unit(written) @ direction
    return Block(layer, site, *(x.cpu().numpy() for x in (direction, _unit(k.unflatten(0, parts)).flatten(), scores)))


def _unit(vectors: "Tensor") -> "Tensor":
    """Each vector (the last axis) over its length; one of length 0 stays."""
    lengths = vectors.norm(dim=-1, keepdim=True)
    return vectors / lengths.where(lengths > 0, 1)
