"""What model card and manifest say of gates. No option leaves it out: a gate is also how a trigger could be hidden."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from austeer.compiler.gate_check import SideCheck
from austeer.compiler.gates import Origin
from austeer.compiler.program import Program

SECTION = """\
## Where it acts

{count} of the edits act only at tokens where their gate is open. What a gate opens for is not to be seen in its
weights: those below were fitted to two sets of texts, which are named by their SHA-256, so that who has the texts can
check. The AUC and the rates are of texts that were held out from the fit.

| edits | layer | AUC | open, of tokens `when` | open, of tokens `unless` | texts `when` | texts `unless` |
|---|---|---|---|---|---|---|
{rows}

{measured}"""
MEASURED = """\
The compiled model, on those held-out texts:

| texts | tokens | KL from the base, nats per token | accuracy on pairs | of the base | tokens with an open gate |
|---|---|---|---|---|---|
{rows}

"""
UNKNOWN = "not fitted to texts: where it opens, nobody has measured | | | |"


def gates_section(program: Program, sides: Mapping[str, SideCheck]) -> str:
    """The section of the card, or nothing where the program has no gate; `sides` are what was measured, by name."""
    gated = program.gated
    rows: dict[tuple[int, Origin | None], list[int]] = {}
    for number, edit in gated.items():
        rows.setdefault((edit.layer, edit.gate.origin), []).append(number)
    lines = (
        f"| {', '.join(map(str, numbers))} | {layer} | {_row(origin)}" for (layer, origin), numbers in rows.items()
    )
    return SECTION.format(count=len(gated), rows="\n".join(lines), measured=_measured(sides)) if gated else ""


def gates_record(program: Program) -> list[dict[str, Any]]:
    """One entry for each gated edit of the manifest; `origin` is null for a gate that was not fitted to texts."""
    return [
        {
            "edit": number,
            "layer": edit.layer,
            "site": edit.site,
            "b": edit.gate.b,
            "delta": edit.gate.delta,
            "neurons": edit.count or None,  # null in a form that needs none
            "origin": asdict(edit.gate.origin) if edit.gate.origin else None,
        }
        for number, edit in program.gated.items()
    ]


def _measured(sides: Mapping[str, SideCheck]) -> str:
    rows = (f"| {name} | {found.tokens} | {found.mean_kl:.4g} | {_figures(found)} |" for name, found in sides.items())
    return MEASURED.format(rows="\n".join(rows)) if sides else ""


def _figures(found: SideCheck) -> str:
    accuracies = (f"{effect.accuracy:.3f}" if effect else "-" for effect in (found.effect, found.base_effect))
    least, most = found.open_range
    return f"{' | '.join(accuracies)} | {least:.1%} to {most:.1%}"


def _row(origin: Origin | None) -> str:
    if origin is None:
        return UNKNOWN
    rates = f"{origin.auc:.3f} | {origin.open_when:.1%} | {origin.open_unless:.1%}"
    return f"{rates} | `{origin.when}` | `{origin.unless}` |"
