"""targets: which engine keeps which edit of which architecture, and in what form."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from austeer.compiler.architectures import ARCHITECTURES
from austeer.compiler.edits import Edit, Scale, Shift
from austeer.compiler.gates import Gated
from austeer.compiler.kinds import KINDS
from austeer.compiler.sites import SiteName
from austeer.compiler.stream import STREAMS
from austeer.compiler.target import Target, target_named
from austeer.passes.linear_neurons import NAME as NEURONS
from austeer.passes.lowerings import SCALED_RESIDUAL, Lowering, lowerings
from austeer.passes.rescale import RESCALINGS
from austeer.targets.tables import TARGETS


@dataclass(frozen=True)
class Cell:
    """The lowerings of one edit in one architecture, best first; empty with a reason where it is refused.

    `approximations` are what --approximate chooses from, by measured KL, where nothing is exact.
    """

    target: str
    architecture: str
    kind: str
    site: SiteName
    lowerings: tuple[Lowering, ...]
    refusal: str = ""
    approximations: tuple[str, ...] = ()

    @property
    def preferred(self) -> list[Lowering]:
        """The lowerings that models come to: after one that never fails, no other of the same carrier."""
        found: list[Lowering] = []
        for way in self.lowerings:
            if not any(other.carrier == way.carrier and other.route != "value-bias" for other in found):
                found.append(way)
            if way.carrier == self.architecture and way.route in (None, "bias"):
                break
        return found

    @property
    def ways(self) -> list[tuple[str, bool]]:
        """The lowerings in words, and whether each is exact."""
        words = [lowering.describe(self.architecture) for lowering in self.lowerings]
        if self.kind != Gated.kind:
            return [(how, True) for how in words]
        exact = [how.replace("bias", "neurons") for how in words if how.startswith("bias")]
        inexact = [how.replace("weights", "neurons without bias") for how in words if how.startswith("weights")]
        fitted = [f"fitted {how}" for how in exact]
        return [*((f"{how} (shift)", True) for how in exact), *((how, False) for how in [*fitted, *inexact])]

    def plain(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "target": self.target,
            "architecture": self.architecture,
            "kind": self.kind,
            "site": self.site,
            "lowerings": [
                *({"how": how, "exact": exact} for how, exact in self.ways),
                *({"how": how, "exact": False} for how in self.approximations),
            ],
            "refusal": self.refusal or None,
        }


@dataclass(frozen=True)
class Support:
    """Some targets, and all their cells."""

    targets: tuple[Target, ...]
    cells: tuple[Cell, ...]

    def plain(self) -> dict[str, Any]:
        """As JSON values."""
        engines = [{"name": target.name, "title": target.title, "version": target.version} for target in self.targets]
        return {"targets": engines, "cells": [cell.plain() for cell in self.cells]}


def targets(name: str | None = None) -> Support:
    """The table of one target, or of all. Raises UsageError for a name that is none."""
    chosen = (target_named(name, TARGETS),) if name else tuple(TARGETS.values())
    return Support(chosen, tuple(cell for target in chosen for cell in _cells(target)))


def markdown() -> str:
    """The support matrix of the README: how a constant gets in at heads, attn, ffn and residual, and a gate."""
    support = targets()
    names = [target.name for target in support.targets]
    lines = [f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for architecture in ARCHITECTURES:
        places: list[tuple[str, SiteName]] = [*(("shift", site) for site in SHIFTED), ("gated", "heads")]
        cells = [" ".join(_letter(support, name, architecture, *place) for place in places) for name in names]
        lines.append(f"| {architecture} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _approximations(target: Target, architecture: str) -> tuple[str, ...]:
    """Of a scaled stream: other units in every architecture, and neurons where the FFN can have biases."""
    shift = lowerings(Shift, "ffn", architecture, target, post_norm=ARCHITECTURES[architecture].post_norm is True)
    biased = not isinstance(shift, str) and any(way.route == "bias" for way in shift)
    return (*RESCALINGS, NEURONS) if biased and STREAMS[architecture].ffn_in else RESCALINGS


SHIFTED: tuple[SiteName, ...] = ("heads", "attn", "ffn", "residual")
LETTERS = {"bias": "b", "value-bias": "v", "split-layer": "s", "constant-layer": "c"}


def _letter(support: Support, target: str, architecture: str, kind: str, site: SiteName) -> str:
    address = (target, architecture, kind, site)
    cell = next(cell for cell in support.cells if (cell.target, cell.architecture, cell.kind, cell.site) == address)
    if kind == Gated.kind:  # the best alone: the others are approximate
        letters = [("g" if way.route else "a", way.carrier) for way in cell.lowerings[:1]]
    else:
        letters = [(LETTERS[way.route or "bias"], way.carrier) for way in cell.preferred]
    cased = (letter.upper() if carrier != architecture else letter for letter, carrier in letters)
    return "/".join(dict.fromkeys(cased)) or "-"


def _cells(target: Target) -> Iterator[Cell]:
    for architecture in ARCHITECTURES:
        for kind in KINDS.values():
            for site in kind.sites:
                yield _cell(target, architecture, kind, site)


def _cell(target: Target, architecture: str, kind: type[Edit], site: SiteName) -> Cell:
    post_norm = ARCHITECTURES[architecture].post_norm is True
    found = lowerings(kind, site, architecture, target, post_norm=post_norm)
    if isinstance(found, str):
        scaled_stream = kind is Scale and site == "residual" and found == SCALED_RESIDUAL
        ways = _approximations(target, architecture) if scaled_stream else ()
        return Cell(target.name, architecture, kind.kind, site, (), found, ways)
    return Cell(target.name, architecture, kind.kind, site, tuple(found))
