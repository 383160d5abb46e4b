"""How much of a contrast each head carries: the held-out accuracy of a linear probe (RestoreLCC, arXiv 2510.21834).

A sample is [what the pruned head puts out at the prompt; what the dense head puts out at the end of one side], and its
label is the side. The paper adds the head's lost component to the first part: one constant for all samples, which a
probe with an intercept takes out again, so that it is not asked for here. All heads of a layer are fitted at once, by
ridge regression on standardised features, in closed form.
"""

from collections.abc import Hashable, Sequence
from typing import Any, TypeAlias

import numpy as np

from austeer.compiler.edits import Floats
from austeer.compiler.errors import PairsError
from austeer.compiler.head_outputs import HeadOutputs
from austeer.compiler.progress import track

FOLDS = 5
PENALTY = 1.0  # of the squared weights, beside the sum of squared errors; more is worse at any dimension up to 128
ROUNDING = 1e-12  # the variance, beside the mean square, that a constant feature may seem to have

Matrix: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"


def importances(
    pruned: HeadOutputs, positive: HeadOutputs, negative: HeadOutputs, groups: Sequence[Hashable], seed: int
) -> Floats:
    """The importance of every head, float32 [layers, heads], from the same pairs in all three files.

    `pruned` holds the prompts, the others the sides as the dense model sees them, with the pruned model's heads.
    Raises PairsError as `folds` does.
    """
    parts = folds(groups, seed)
    layers = track(range(pruned.layers), "Probing heads", pruned.layers)
    probed = [
        head_importance(pruned.layer(layer), positive.layer(layer), negative.layer(layer), parts) for layer in layers
    ]
    return np.stack(probed)


def folds(groups: Sequence[Hashable], seed: int) -> Matrix:
    """The fold of each pair, of FOLDS: pairs of one group (a prompt) share it, and so do the two sides of a pair.

    Raises PairsError for fewer than two groups a fold.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    number = {group: index for index, group in enumerate(dict.fromkeys(groups))}
    if len(number) < 2 * FOLDS:
        raise PairsError(
            f"finding the heads that matter needs pairs with at least {2 * FOLDS} different prompts, two for each of "
            f"{FOLDS} folds, got {len(number)}: give more, or restore all heads with --top-heads all"
        )
    of_pairs = np.array([number[group] for group in groups])
    labels = np.repeat([1, -1], len(groups))
    splitter = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=seed)
    parts = np.empty(len(labels), np.int64)
    for part, (_, held_out) in enumerate(splitter.split(labels, labels, np.tile(of_pairs, 2))):
        parts[held_out] = part
    return parts[: len(groups)]


def head_importance(prompt: Floats, positive: Floats, negative: Floats, parts: Matrix) -> Floats:
    """The importance of each head of a layer, float32 [heads], from outputs [pairs, heads, dim] and each pair's fold.

    The share of samples that a probe, fitted without their fold, puts on the right side; a head that puts out nothing
    has 0.5.
    """

    def samples(part: int) -> Matrix:
        return _samples(*(outputs[parts == part] for outputs in (prompt, positive, negative)))

    moments = {part: _products(samples(part)) for part in np.unique(parts).tolist()}
    total: Any = sum(moments.values())
    right: Any = sum(_right(total - moment, samples(part)) for part, moment in moments.items())
    return (right / (2 * len(parts))).astype(np.float32)


def _samples(prompt: Floats, positive: Floats, negative: Floats) -> Matrix:
    """Of each head all samples: the features, a 1, and the label, float64 [heads, samples, 2·dim + 2]."""
    sides = [np.concatenate([prompt, side], axis=2) for side in (positive, negative)]
    constants = [np.full((*prompt.shape[:2], 2), (1, label)) for label in (1, -1)]
    return np.concatenate([np.concatenate(sides), np.concatenate(constants)], axis=2, dtype=np.float64).swapaxes(0, 1)


def _products(samples: Matrix) -> Matrix:
    return samples.swapaxes(1, 2) @ samples


def _right(products: Matrix, held_out: Matrix) -> Matrix:
    """How many held-out samples the probe of each head puts on the right side, [heads].

    `products` are those of the samples that it is fitted to, summed: [heads, 2·dim + 2, 2·dim + 2].
    """
    count = products[:, -2:-1, -2:-1]
    squares = products / count
    means = squares[:, -2]
    covariance = squares - means[:, :, None] * means[:, None]
    variance, square = (np.diagonal(x, axis1=1, axis2=2)[:, :-2] for x in (covariance, squares))
    scale = np.where(variance > ROUNDING * square, variance, np.inf) ** -0.5  # 0 for a constant feature
    correlation = covariance[:, :-2, :-2] * scale[:, :, None] * scale[:, None]
    target = (covariance[:, :-2, -1] * scale)[..., None]
    weights = np.linalg.solve(correlation + PENALTY * np.eye(scale.shape[1]) / count, target)
    features = (held_out[..., :-2] - means[:, None, :-2]) * scale[:, None]
    scores = (features @ weights)[..., 0] + means[:, -1:]
    return ((scores > 0) == (held_out[..., -1] > 0)).sum(1)
