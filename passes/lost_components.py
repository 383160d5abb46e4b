"""What pruning took from the attention heads, as directions and magnitudes (RestoreLCC, arXiv 2510.21834).

X_h = U S Vᵀ is what head h lost at the last token of N texts: dense output - pruned output. Its lost component is
Σ_{i≤k} mean(U_i)·S_i·V_i. As U S = X V, mean(U_i)·S_i is the mean loss along V_i: the component is the mean loss, seen
in the k directions that lose most.
"""

from dataclasses import dataclass

import numpy as np

from austeer.compiler.edits import Floats


@dataclass(frozen=True, eq=False)
class LostComponents:
    """Of each head of a layer: the directions V_i as columns, float32 [heads, dim, rank], and mean(U_i)·S_i.

    The largest singular value comes first. Directions point to where the mean lies: no magnitude, [heads, rank], is
    negative.
    """

    directions: Floats
    magnitudes: Floats

    def component(self, k: int) -> Floats:
        """The lost component of each head from its first k directions (all, where there are fewer), [heads, dim]."""
        return np.einsum("hdk,hk->hd", self.directions[..., :k], self.magnitudes[:, :k])


def lost_components(lost: Floats) -> LostComponents:
    """Decomposes what all heads of a layer lost, [texts, heads, dim], in float64; the rank is min(texts, dim)."""
    import torch

    by_head = torch.from_numpy(lost).transpose(0, 1).double()
    directions = torch.linalg.svd(by_head, full_matrices=False)[2].mT
    magnitudes = (by_head.mean(1, keepdim=True) @ directions)[:, 0]
    # Either sign of a singular vector is right, and which one comes is up to the machine.
    directions = directions.where(magnitudes[:, None] >= 0, -directions)
    return LostComponents(directions.float().numpy(), magnitudes.abs().float().numpy())
