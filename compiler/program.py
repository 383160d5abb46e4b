"""Programs: ordered, immutable, verified sets of edits for one model, and their file format."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from austeer.compiler.edits import Edit, Scale, nested
from austeer.compiler.errors import ProgramError, SpaceError
from austeer.compiler.facts import Geometry, read_facts
from austeer.compiler.gates import Gated
from austeer.compiler.kinds import edit_from
from austeer.compiler.staging import write_atomically

METADATA_KEY = "austeer-program"
FORMAT = 1


@dataclass(frozen=True)
class Program:
    """An ordered, immutable set of edits for models of one geometry.

    `provenance` says where the edits come from, if not from here; it is no part of what the program is.
    Raises ProgramError on construction if an edit lies outside the model or contradicts another.
    """

    model: Geometry
    edits: tuple[Edit, ...]
    provenance: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        if not self.provenance.isprintable():
            raise ProgramError(f"provenance must be one line of printable text, got {self.provenance[:80]!r}")
        scaled: set[tuple[int, str, int]] = set()
        for number, edit in enumerate(self.edits):
            _verify(edit, self.model, f"edit {number} ({edit.where})")
            units = edit.units if isinstance(edit, Scale) else ()
            for address in ((edit.layer, edit.site, unit) for unit in units):
                if address in scaled:
                    raise ProgramError(
                        f"edit {number} ({edit.where}): unit {address[2]} is scaled twice; merge the two"
                    )
                scaled.add(address)
        _verify_replaced(self.edits, self.model)

    @staticmethod
    def of(edits: Iterable[Edit], *, model: str | Path | Geometry) -> "Program":
        """A program of these edits for a model: a local folder with config.json, or its geometry."""
        geometry = model if isinstance(model, Geometry) else read_facts(Path(model)).geometry
        return Program(geometry, tuple(edits))

    @property
    def gated(self) -> dict[int, Gated]:
        """The gated edits, by their numbers."""
        return {number: edit for number, edit in enumerate(self.edits) if isinstance(edit, Gated)}

    @cached_property
    def sha256(self) -> str:
        """Identity: the hash of geometry and edits, independent of file layout and of the model's name."""
        digest = hashlib.sha256(_canonical({**self.model.plain(), "name": "", "format": FORMAT}))
        for edit in self.edits:
            digest.update(_canonical(edit.scalars()))
            for name, array in edit.arrays().items():
                digest.update(_canonical({name: array.shape}) if isinstance(edit, Gated) else b"")
                digest.update(array.astype("<f4").tobytes())
        return digest.hexdigest()

    def require_fit(self, model: Geometry) -> None:
        """ProgramError unless the program fits `model`, naming every size that differs."""
        ours, theirs = self.model.plain(), model.plain()
        differing = [
            f"{key} {ours[key]}, not {theirs[key]}" for key in ours if key != "name" and ours[key] != theirs[key]
        ]
        if differing:
            raise ProgramError(
                f"this program was made for {self.model.name!r} and does not fit {model.name!r}: it has "
                f"{'; '.join(differing)}. Use the model it was made for, or find the edits anew"
            )

    def save(self, path: str | Path) -> None:
        """Writes the program as one .safetensors file, whole or not at all."""
        from safetensors.numpy import save

        tensors: dict[str, Any] = {}
        edits: list[dict[str, Any]] = []
        for number, edit in enumerate(self.edits):
            tensors |= {f"{number}.{name}": array for name, array in edit.arrays().items()}
            edits.append(edit.scalars())
        body: dict[str, Any] = {"format": FORMAT, "sha256": self.sha256, "model": self.model.plain(), "edits": edits}
        if self.provenance:
            body["provenance"] = self.provenance
        # One metadata key only: safetensors does not promise an order between several.
        write_atomically(Path(path), save(tensors, metadata={METADATA_KEY: json.dumps(body)}))

    @staticmethod
    def load(path: str | Path) -> "Program":
        """Reads a program from its .safetensors or its text form; ProgramError if it is neither, or damaged."""
        from austeer.compiler.text import is_text, parse

        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise ProgramError(f"{path}: cannot be read ({error.strerror})") from None
        try:
            return parse(data.decode()) if is_text(data) else _from_safetensors(data)
        except UnicodeDecodeError as error:
            raise ProgramError(f"{path}: a text that is not UTF-8 at byte {error.start}") from None
        except ProgramError as error:
            raise type(error)(f"{path}: {error}") from None


def _canonical(fields: dict[str, Any]) -> bytes:
    return json.dumps(fields, sort_keys=True).encode()


def _verify(edit: Edit, model: Geometry, what: str) -> None:
    if edit.layer >= model.layers:
        raise ProgramError(f"{what}: {model.name} has layers 0 to {model.layers - 1}")
    scale = edit.edit if isinstance(edit, Gated) else edit
    if isinstance(scale, Scale):
        width = model.width(edit.space)
        outside = [unit for unit in scale.units if unit >= width]
        if outside:
            raise ProgramError(f"{what}: unit {outside[0]} is outside the site's {width} units")
    for name, space, length in edit.widths():
        if length != model.width(space):
            raise SpaceError(
                f"{what}: {name} has {length} values; the {space} space of {model.name} has {model.width(space)}"
            )


def _verify_replaced(edits: Iterable[Edit], model: Geometry) -> None:
    """Every neuron that gated edits replace is there, and gives way once."""
    gated = [(f"edit {number} ({edit.where})", edit) for number, edit in enumerate(edits) if isinstance(edit, Gated)]
    replacing = [what for what, edit in gated if edit.replaces]
    adding = [what for what, edit in gated if not edit.replaces]
    if replacing and adding:
        raise ProgramError(
            f"{replacing[0]} replaces neurons and {adding[0]} does not; choose the neurons of all gated edits anew, "
            "or of none"
        )
    taken: dict[tuple[int, int], str] = {}
    for what, edit in gated:
        for neuron in edit.replaces:
            if neuron >= model.neurons:
                raise ProgramError(f"{what}: neuron {neuron} is outside the {model.neurons} of {model.name}'s FFNs")
            other = taken.setdefault((edit.layer, neuron), what)
            if other != what:
                raise ProgramError(f"{what}: {other} replaces neuron {neuron} too; choose the neurons of all anew")


def _from_safetensors(data: bytes) -> Program:
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        tensors = load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        body = json.loads(header["__metadata__"][METADATA_KEY])
        model, edits = body["model"], list(body["edits"])
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ProgramError(f"not a program: expected a .safetensors file written by Program.save ({error!r})") from None
    if body.get("format") != FORMAT:
        raise ProgramError(
            f"program format {body.get('format')!r}; this version reads {FORMAT}: update austeer-compile"
        )
    program = Program(Geometry.from_plain(model), _edits_from(edits, tensors), str(body.get("provenance", "")))
    if program.sha256 != body.get("sha256"):
        raise ProgramError("its content does not have the SHA-256 it states; the file was changed or damaged")
    return program


def _edits_from(edits: list[Any], tensors: dict[str, Any]) -> tuple[Edit, ...]:
    made: list[Edit] = []
    unused = dict(tensors)
    for number, fields in enumerate(edits):
        if not isinstance(fields, dict):
            raise ProgramError(f"edit {number} is not a JSON object")
        prefix = f"{number}."
        vectors = {name.removeprefix(prefix): unused.pop(name) for name in list(unused) if name.startswith(prefix)}
        made.append(edit_from(nested(fields, vectors), f"edit {number}"))
    if unused:
        raise ProgramError(f"tensors that belong to no edit: {', '.join(sorted(unused))}")
    return tuple(made)
