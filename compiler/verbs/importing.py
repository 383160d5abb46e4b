"""import: a steering artefact of another tool → program."""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from austeer.compiler.errors import AusteerError, InputError, UsageError
from austeer.compiler.manifest import sha256_of
from austeer.compiler.program import Program
from austeer.compiler.sites import site_named
from austeer.compiler.staging import require_place
from austeer.compiler.verbs.bases import Base, open_base
from austeer.passes.adopt.artefact import Asked, strengthened
from austeer.passes.adopt.formats import Format, recognise

_RANGE = re.compile(r"([0-9]{1,6})(?:-([0-9]{1,6}))?")
_MAX_LAYERS = 100_000


@dataclass(frozen=True)
class Imported:
    """The program that was written at `out`, the format it was read from, and what to know about it."""

    out: str
    format: str
    program: Program
    notes: tuple[str, ...]

    def plain(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "out": self.out,
            "format": self.format,
            "sha256": self.program.sha256,
            "edits": len(self.program.edits),
            "provenance": self.program.provenance,
            "notes": list(self.notes),
        }


def import_artefact(
    artefact: str | Path,
    model: str,
    out: str | Path,
    *,
    site: str | None = None,
    layers: str | None = None,
    strength: float = 1.0,
    top_k: int | None = None,
    alpha: float | None = None,
    revision: str | None = None,
) -> Imported:
    """Writes at `out` the program that does to `model` what the artefact does, times `strength`.

    `layers` such as "10-15,20" keeps only these, as the artefact counts them. Raises InputError for an artefact that is
    damaged, of no known format or for another model, Refused for what no program can say, UsageError for an option that
    means nothing to this format, or that it needs.
    """
    artefact, out = Path(artefact), Path(out)
    if not math.isfinite(strength):
        raise UsageError(f"--strength must be a finite number, got {strength}")
    asked = Asked(site_named(site) if site else None, _layers(layers), top_k, alpha)
    require_place(out)
    base = open_base(model, revision)
    try:
        kind, file = recognise(artefact)
        _require_meaning(kind, asked)
        program, notes = _read(kind, file, base, asked, strength)
    except AusteerError as error:
        named = str(artefact) in str(error)
        raise error if named else type(error)(f"{artefact}: {error}") from None
    program.save(out)
    return Imported(str(out), kind.name, program, notes)


def _read(kind: Format, file: Path, base: Base, asked: Asked, strength: float) -> tuple[Program, tuple[str, ...]]:
    adopted = kind.read(file, base.facts, asked)
    if not adopted.edits:
        raise InputError("it changes nothing in the layers that are asked for")
    edits = adopted.edits if strength == 1 else (strengthened(edit, strength) for edit in adopted.edits)
    return Program(base.facts.geometry, tuple(edits), _provenance(kind, file, asked, strength)), adopted.notes


def _provenance(kind: Format, file: Path, asked: Asked, strength: float) -> str:
    """Format, file and options in one line; no path, and the same for equal files."""
    said = {**_said(asked), "strength": strength}
    options = ", ".join(f"{name} {_text(value)}" for name, value in said.items())
    return f"{kind.name} {file.name!r} (SHA-256 {sha256_of(file)}), {options}"


def _said(asked: Asked) -> dict[str, Any]:
    return {name: value for name, value in vars(asked).items() if value is not None}


def _text(value: Any) -> str:
    return " ".join(map(str, sorted(value))) if isinstance(value, frozenset) else f"{value}"


def _require_meaning(kind: Format, asked: Asked) -> None:
    strange = [f"--{name.replace('_', '-')}" for name in _said(asked) if name not in kind.takes]
    if strange:
        raise UsageError(f"{' and '.join(strange)} mean nothing to a file of the format {kind.name!r}")


def _layers(text: str | None) -> frozenset[int] | None:
    if text is None:
        return None
    found: set[int] = set()
    for part in text.replace(" ", "").split(","):
        match = _RANGE.fullmatch(part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last or last >= _MAX_LAYERS:
            raise UsageError(f"--layers {text!r}: {part!r} is no layer and no range; write, say, 10-15,20")
        found.update(range(first, last + 1))
    return frozenset(found)
