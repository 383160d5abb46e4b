"""compose: several programs → one with all their edits."""

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from austeer.compiler.edits import Edit, Rank1, Scale, Shift
from austeer.compiler.errors import UsageError
from austeer.compiler.gates import Gated
from austeer.compiler.program import Program
from austeer.compiler.sites import SPACE, SiteName

KEPT = (Rank1, Gated)


@np.errstate(over="ignore", invalid="ignore")  # a merged edit that is not finite is refused as any other
def compose(programs: Sequence[Program]) -> tuple[Program, tuple[str, ...]]:
    """One program with the edits of all, in the order given, and notes on what was merged.

    Where several programs edit one site, its scales multiply and its shifts pass through the scales that
    follow them: one Scale, then one Shift. Rank1 and gated edits stay as they are. As in any program, different
    sites apply in data-flow order.
    Raises ProgramError if the programs are for different models.
    """
    if not programs:
        raise UsageError("no program given")
    first, *others = programs
    for other in others:
        other.require_fit(first.model)
    edits = [edit for program in programs for edit in program.edits]
    shared = _shared_places(programs)
    merged = [edit for layer, site in shared for edit in _merged(edits, layer, site, first.model.width(SPACE[site]))]
    kept = [edit for edit in edits if isinstance(edit, KEPT) or (edit.layer, edit.site) not in shared]
    notes = (f"layer {layer}, site {site}: edited by several programs; the factors multiply" for layer, site in shared)
    provenance = "; ".join(dict.fromkeys(program.provenance for program in programs if program.provenance))
    return Program(first.model, (*kept, *merged), provenance), tuple(notes)


def _shared_places(programs: Sequence[Program]) -> list[tuple[int, SiteName]]:
    times = Counter(place for program in programs for place in _scaled_or_shifted(program))
    return sorted(place for place, count in times.items() if count > 1)


def _scaled_or_shifted(program: Program) -> set[tuple[int, SiteName]]:
    return {(edit.layer, edit.site) for edit in program.edits if not isinstance(edit, KEPT)}


def _merged(edits: Sequence[Edit], layer: int, site: SiteName, width: int) -> Iterator[Edit]:
    factors, shift = np.ones(width, np.float32), np.zeros(width, np.float32)
    for edit in edits:
        if (edit.layer, edit.site) != (layer, site):
            continue
        if isinstance(edit, Scale):
            factors[list(edit.units)] *= 1 + edit.gamma
            shift[list(edit.units)] *= 1 + edit.gamma
        elif isinstance(edit, Shift):
            shift += edit.vector
    units = np.flatnonzero(factors != 1).tolist()
    if units:
        yield Scale(layer, site, tuple(units), factors[units] - 1)
    if shift.any():
        yield Shift(layer, site, shift)
