"""What of a compiled folder makes the model, in whatever form, checked to be whole before anything is sent."""

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from austeer.compiler.card import read_card
from austeer.compiler.checkpoint import INDEX, Checkpoint, is_copied
from austeer.compiler.errors import CheckpointError, Refused
from austeer.compiler.manifest import MANIFEST, PROGRAM, read_manifest
from austeer.compiler.program import Program

CARD = "README.md"
RECORD = (MANIFEST, PROGRAM, CARD)
"""What says that the weights are edited, and how: never left behind."""

WEIGHTS = {
    "checkpoint": ("*.safetensors", INDEX),
    "lora": ("adapter_model.safetensors", "adapter_config.json"),
    "gguf": ("*.gguf",),
    "model-code": ("*.safetensors", INDEX, "*.py"),
}
"""Patterns of the files that hold the weights, by form."""

_FOLDERS = ("additional_chat_templates", PROGRAM.partition("/")[0])


@dataclass(frozen=True)
class Contents:
    """A compiled folder that is whole.

    `files` are the paths in it, with `/`, that make the model, and `left_out` all others. `base` is a Hub id
    with its `revision`, or the name of a local folder and None; `card_base` is what the card calls it.
    """

    path: Path
    base: str
    revision: str | None
    card_base: str
    program: str
    files: tuple[str, ...]
    left_out: tuple[str, ...]

    @staticmethod
    def of(path: Path) -> "Contents":
        """Reads and checks a folder that a compile wrote; files beside the compile's own go to `left_out`.

        Raises CheckpointError or ProgramError if it is damaged or incomplete, Refused if its card no longer says
        what was edited.
        """
        form, base, revision, sha256 = _fields(path, read_manifest(path))
        if Program.load(path / PROGRAM).sha256 != sha256:
            raise CheckpointError(f"{path / PROGRAM} is not the program that {MANIFEST} names; compile again")
        names = sorted(_listed(path))
        weights = _weights(path, form, names)
        files = tuple(name for name in names if name in RECORD or name in weights or is_copied(name))
        left_out = tuple(name for name in names if name not in files)
        return Contents(path, base, revision, _card_base(path, sha256), sha256, files, left_out)


def is_written(name: str) -> bool:
    """Whether a compile, in some form, writes a file of this name."""
    patterns = [pattern for form in WEIGHTS.values() for pattern in form]
    return name in RECORD or is_copied(name) or ("/" not in name and _matches(name, patterns))


def _fields(path: Path, manifest: dict[str, Any]) -> tuple[str, str, str | None, str]:
    try:
        base, form = manifest["base"], manifest["form"]
        fields = form, base["id"], base["revision"], manifest["program"]["sha256"]
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{path / MANIFEST}: damaged, {error} is missing; compile again") from None
    if form not in WEIGHTS:
        raise CheckpointError(f"{path / MANIFEST}: unknown form {form!r}; update austeer-compile")
    return fields


def _card_base(path: Path, sha256: str) -> str:
    """The card's `base_model`; Refused unless card and program belong together."""
    named = read_card(path).get("base_model")
    if not named or sha256 not in (path / CARD).read_text("utf-8"):
        raise Refused(
            f"{path / CARD}: the card does not say which base was edited by which program (base_model, and the "
            f"program's SHA-256 as in {MANIFEST}). A baked edit is never hidden: restore the card, or compile again"
        )
    return str(named)


def _weights(path: Path, form: str, names: list[str]) -> set[str]:
    if form == "checkpoint":
        opened = Checkpoint.open(path)
        return {*opened.shards, *filter(None, [opened.index])}
    for pattern in WEIGHTS[form]:
        if pattern != INDEX and not any(_matches(name, [pattern]) for name in names):
            raise CheckpointError(f"{path}: there is no {pattern}, which the form {form} is made of; compile again")
    return {name for name in names if "/" not in name and _matches(name, WEIGHTS[form])}


def _matches(name: str, patterns: tuple[str, ...] | list[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _listed(path: Path) -> Iterator[str]:
    for entry in path.iterdir():
        if entry.is_dir() and entry.name in _FOLDERS:
            yield from (f"{entry.name}/{inner.name}" for inner in entry.iterdir())
        else:
            yield f"{entry.name}/" if entry.is_dir() else entry.name
