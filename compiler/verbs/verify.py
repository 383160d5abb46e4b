"""verify: a compiled checkpoint checked from its files alone: bytes, then numbers."""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from austeer.compiler.certificate import Certificate, certify
from austeer.compiler.checkpoint import Checkpoint
from austeer.compiler.errors import UsageError
from austeer.compiler.live import load_model, load_tokenizer
from austeer.compiler.manifest import MANIFEST, PROGRAM, read_manifest
from austeer.compiler.neutral import sample_neutral
from austeer.compiler.pairs import read_texts
from austeer.compiler.program import Program
from austeer.compiler.progress import track
from austeer.compiler.rewrite import Segment
from austeer.compiler.tensors import read_header
from austeer.compiler.tokens import encode_texts, take_tokens
from austeer.compiler.verbs.common import Base, Settings, certificate_dtype, open_base, plan_for
from austeer.targets.shards import Chunk, Copy, Shard, Zeros

CHUNK = 2**24
SAMPLED_TEXTS, SAMPLED_TOKENS = 16, 64


@dataclass(frozen=True)
class Verification:
    """The outcome of each check; `certificate` is measured anew."""

    problems: tuple[str, ...]
    files: dict[str, str]
    certificate: Certificate | None
    notes: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether nothing at all was found wrong."""
        return not self.problems

    def plain(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "passed": self.passed,
            "problems": list(self.problems),
            "files": self.files,
            "certificate": self.certificate.plain() if self.certificate else None,
            "notes": list(self.notes),
        }


def verify(
    out: str | Path,
    *,
    base: str | None = None,
    texts: str | Path | None = None,
    settings: Settings = Settings(),  # noqa: B008 (frozen)
) -> Verification:
    """Checks that `out` is its base with exactly its program folded in, and measures the certificate anew.

    Without `texts` (a file of texts or pairs) it measures on text sampled from the base. Without `base` the
    manifest's is used: a Hub id, or a folder of that name here or beside `out`. Raises CheckpointError if
    `out` or its base cannot be read; what is merely wrong is a problem in the report.
    """
    out = Path(out)
    manifest = read_manifest(out)
    Checkpoint.open(out)  # whole and sound
    program = Program.load(out / PROGRAM)
    opened = open_base(base or _find_base(manifest, out), None if base else manifest["base"]["revision"])
    problems = list(_identity_problems(manifest, program, opened))
    if problems:  # with another base or program the rest would only repeat this
        return Verification(tuple(problems), {}, None, ())
    plan = plan_for(program, opened, manifest["target"])
    files = {shard.name: _compare(shard, out) for shard in track(plan.shards, "Comparing", len(plan.shards))}
    files |= {name: _compare_text(out / name, text) for name, text in plan.texts.items()}
    problems += [f"{name}: {verdict}" for name, verdict in files.items() if verdict != "ok"]
    certificate, notes = _measure(opened, out, program, texts, settings, plan.may_miss)
    problems += certificate.failures()
    return Verification(tuple(problems), files, certificate, notes)


def _find_base(manifest: dict[str, Any], out: Path) -> str:
    name, revision = manifest["base"]["id"], manifest["base"]["revision"]
    if revision:
        return name
    for folder in (Path(name), out.resolve().parent / name):
        if (folder / "config.json").is_file():
            return str(folder)
    raise UsageError(
        f"{out} was compiled from the local model {name!r}, which is not here; say where it is with --base"
    )


def _identity_problems(manifest: dict[str, Any], program: Program, base: Base) -> Iterator[str]:
    if program.sha256 != manifest["program"]["sha256"]:
        yield f"{PROGRAM} is not the program that {MANIFEST} names"
    recorded = manifest["base"]["files"]
    if set(recorded) != set(base.checkpoint.shards):
        yield f"the base has other weight files than {MANIFEST} names"
        return
    for name, facts in recorded.items():
        header = base.checkpoint.headers[name]
        if (header.size, header.sha256) != (facts["size"], facts["header_sha256"]):
            yield f"{name} of the base is not the file that was compiled (its size or header differs)"
        elif "sha256" in facts and _sha256(base.path / name) != facts["sha256"]:
            yield f"{name} of the base is not the file that was compiled (its content differs)"


def _compare(shard: Shard, out: Path) -> str:
    """Whether a file is, byte for byte, what compiling the base would give now."""
    path = out / shard.name
    if not path.is_file() or path.stat().st_size != shard.size:
        return f"missing, or not of the {shard.size:,} bytes that it should have"
    with (shard.source or Path(os.devnull)).open("rb") as old, path.open("rb") as new:
        for chunk in shard.chunks():
            for expected in _expected(chunk, old):
                start, found = new.tell(), new.read(len(expected))
                if found != expected:
                    name = _tensor_at(path, start + _first_difference(expected, found))
                    if isinstance(chunk, Segment):
                        return f"{name} does not hold what the program makes of the base"
                    return f"{name} differs from the base outside the edited slices"
    return "ok"


def _expected(chunk: Chunk, old: BinaryIO) -> Iterator[bytes | memoryview]:
    """The bytes of a chunk, in pieces that memory can take."""
    if isinstance(chunk, Copy):
        old.seek(chunk.start)
        yield from map(old.read, _pieces(chunk.end - chunk.start))
    elif isinstance(chunk, Zeros):
        yield from map(bytes, _pieces(chunk.count))
    else:
        yield chunk.data


def _first_difference(expected: bytes | memoryview, found: bytes) -> int:
    different = np.frombuffer(expected, np.uint8)[: len(found)] != np.frombuffer(found, np.uint8)
    return int(different.argmax()) if different.any() else len(found)


def _tensor_at(path: Path, position: int) -> str:
    """The tensor that has the byte at this position of a file."""
    tensors, _ = read_header(path)
    inside = (t.name for t in tensors.values() if t.offset <= position < t.offset + t.nbytes)
    return next(inside, "the header")


def _compare_text(path: Path, text: bytes) -> str:
    return "ok" if path.is_file() and path.read_bytes() == text else "missing or changed"


def _pieces(count: int) -> Iterator[int]:
    """So many bytes, in sizes that memory can take."""
    while count > 0:
        yield min(CHUNK, count)
        count -= CHUNK


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _measure(
    base: Base,
    out: Path,
    program: Program,
    texts: str | Path | None,
    settings: Settings,
    may_miss: frozenset[str],
) -> tuple[Certificate, tuple[str, ...]]:
    dtype, notes = certificate_dtype(base, settings)
    tokenizer = load_tokenizer(base.path)
    if texts is not None:
        tokens, cut = encode_texts(tokenizer, read_texts(texts), settings.length_for(base.checkpoint.config))
        notes += cut
    else:
        model = load_model(base.path, dtype=dtype, device=settings.device)
        tokens = sample_neutral(model, tokenizer, SAMPLED_TEXTS, SAMPLED_TOKENS, settings.seed)
        del model
    certificate = certify(
        base.path, out, program, take_tokens(tokens, 4096), dtype=dtype, device=settings.device, may_miss=may_miss
    )
    return certificate, tuple(notes)
