"""inspect: a program, or a compiled checkpoint, explained."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from austeer.compiler.errors import InputError
from austeer.compiler.manifest import PROGRAM, read_manifest
from austeer.compiler.program import Program


@dataclass(frozen=True)
class Inspection:
    """A program, and the manifest where it is one of a compiled checkpoint."""

    program: Program
    manifest: dict[str, Any] | None
    text: bool = False  # whether the text form was asked for

    def plain(self) -> dict[str, Any]:
        """As JSON values."""
        program: dict[str, Any] = {
            "sha256": self.program.sha256,
            "model": self.program.model.plain(),
            "edits": [edit.plain() for edit in self.program.edits],
        }
        if self.program.provenance:
            program["provenance"] = self.program.provenance
        kept = ("target", "form", "lowering", "base", "certificate", "steer", "rounding", "versions")
        manifest = self.manifest or {}
        return {**program, **{key: manifest[key] for key in kept if key in manifest}}


def inspect(path: str | Path, *, text: bool = False) -> Inspection:
    """Reads a program file or a compiled checkpoint; InputError if it is neither."""
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: no such file or directory")
    if path.is_dir():
        manifest = read_manifest(path)
        return Inspection(Program.load(path / PROGRAM), manifest, text)
    return Inspection(Program.load(path), None, text)
