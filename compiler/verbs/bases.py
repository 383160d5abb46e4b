"""The base of a compilation: a model on this disk, known from its headers."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from austeer.compiler.checkpoint import Checkpoint
from austeer.compiler.facts import ModelFacts, facts_of
from austeer.compiler.gguf import read_gguf
from austeer.compiler.layout import Layout
from austeer.compiler.manifest import describe_base
from austeer.targets.hub import Fetched, content_sha256, fetch


@dataclass(frozen=True)
class Base:
    """A base model on this disk, with everything that is known before its weights are read."""

    fetched: Fetched
    checkpoint: Checkpoint
    facts: ModelFacts
    layout: Layout

    @property
    def path(self) -> Path:
        """Its folder."""
        return self.checkpoint.path

    @property
    def source(self) -> Layout:
        """What a form is planned from."""
        return self.layout

    @property
    def notes(self) -> tuple[str, ...]:
        """What is odd about it."""
        return tuple(f"tensor {name} is not in the index and is copied as it is" for name in self.checkpoint.unindexed)

    def describe(self) -> dict[str, Any]:
        """For the manifest."""
        known = {name: content_sha256(self.path / name) for name in self.checkpoint.shards}
        hashes = {name: sha256 for name, sha256 in known.items() if sha256}
        return describe_base(self.checkpoint, self.fetched.id, self.fetched.revision, hashes)


@dataclass(frozen=True)
class GgufBase:
    """An existing GGUF file as the base, which the form `gguf` patches."""

    source: Path
    notes: tuple[str, ...] = ("transformers cannot run a patched GGUF: no certificate; `verify` compares its bytes",)

    @property
    def fetched(self) -> Fetched:
        """Its name, which is that of the file."""
        return Fetched(self.source, self.source.name, None)

    @property
    def path(self) -> Path:
        """The folder that it lies in."""
        return self.source.parent

    def describe(self) -> dict[str, Any]:
        """For the manifest: as of a checkpoint, with one file."""
        gguf = read_gguf(self.source)
        with self.source.open("rb") as file:
            header = hashlib.sha256(file.read(gguf.header_end)).hexdigest()
        facts = {"size": self.source.stat().st_size, "header_sha256": header}
        return {"id": self.source.name, "revision": None, "files": {self.source.name: facts}}


def open_any_base(model: str, revision: str | None, form: str) -> Base | GgufBase:
    """As `open_base`; a local .gguf file where the form is gguf."""
    if form == "gguf" and model.lower().endswith(".gguf") and Path(model).is_file():
        return GgufBase(Path(model))
    return open_base(model, revision)


def open_base(model: str, revision: str | None = None) -> Base:
    """The base at a local folder or Hub id, checked from its headers. Raises CheckpointError or Refused."""
    fetched = fetch(model, revision)
    checkpoint = Checkpoint.open(fetched.path)
    facts = facts_of(fetched.id.rpartition("/")[2], checkpoint.config)
    return Base(fetched, checkpoint, facts, Layout.of(checkpoint, facts))
