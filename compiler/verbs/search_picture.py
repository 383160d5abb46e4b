"""The picture of a search: effect against drift."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from austeer.compiler.measure import Score
from austeer.compiler.verbs.picture import write_picture
from austeer.passes.reach import Trial
from austeer.passes.search import Search

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw_search(found: Search, limit: float, file: Path) -> None:
    """Writes the picture, whole or not at all: equal searches give equal bytes."""
    write_picture(lambda axes: _draw(axes, found, limit), file)


def _draw(axes: "Axes", found: Search, limit: float) -> None:
    name, base = _first(found.base)
    judged = [trial for trial in found.table if trial.effect]
    for place in sorted({_place(trial) for trial in judged}):
        here = [trial for trial in judged if _place(trial) == place]
        axes.scatter([trial.drift for trial in here], _values(here), s=28, alpha=0.7, label=place or "trials")
    if found.best:
        axes.scatter([found.best.drift], _values([found.best]), s=220, marker="*", c="black", zorder=3, label="chosen")
    axes.axvline(limit, color="tab:red", linestyle="--", label=f"limit {limit:g}")
    axes.axhline(base, color="grey", linestyle=":", label=f"base {base:.3f}")
    axes.set(xlabel="drift (nats per token of neutral text)", ylabel=f"held-out {name}", xlim=(0, 1.2 * limit))
    axes.legend(fontsize="small")


def _place(trial: Trial) -> str:
    return ", ".join(value for value in trial.point.values() if isinstance(value, str) and value)


def _values(trials: Sequence[Trial]) -> list[float]:
    return [_first(trial.effect)[1] for trial in trials if trial.effect]


def _first(score: Score) -> tuple[str, float]:
    """The first figure of a score and its name."""
    return next(iter(asdict(score).items()))
