"""The picture of a restoration: the importance of all heads, and those that were chosen."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from austeer.compiler.edits import Floats
from austeer.compiler.verbs.picture import SIZE, write_picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes

POINTS = 72  # an inch


def draw_heads(importance: Floats, chosen: NDArray[np.bool_], file: Path) -> None:
    """Writes heads x layers as a heat map, the chosen ones marked; both arrays are [layers, heads].

    Whole or not at all, and equal arrays give equal bytes.
    """
    write_picture(lambda axes: _draw(axes, importance, chosen), file)


def _draw(axes: "Axes", importance: Floats, chosen: NDArray[np.bool_]) -> None:
    from matplotlib.ticker import MaxNLocator

    image = axes.imshow(importance.T, origin="lower", aspect="auto", interpolation="nearest", cmap="viridis")
    axes.figure.colorbar(image, ax=axes, label="importance (held-out accuracy of a probe)")
    layers, heads = chosen.nonzero()
    label = f"chosen: {len(layers)} of {chosen.size} heads"
    size = _mark(chosen.shape) ** 2
    axes.scatter(layers, heads, s=size, marker="s", facecolors="none", edgecolors="tab:red", label=label)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="layer", ylabel="head")
    axes.legend(fontsize="small", loc="lower center", bbox_to_anchor=(0.5, 1.0))


def _mark(shape: tuple[int, ...]) -> float:
    """The width of a mark in points: half a cell's at most."""
    cells = (POINTS * length / count for length, count in zip(SIZE, shape, strict=True))
    return min(8.0, 0.5 * min(cells))
