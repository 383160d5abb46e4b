"""verify: a compiled checkpoint checked from its files alone: bytes, then numbers."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from austeer.compiler.certificate import Certificate
from austeer.compiler.engine_check import EngineCheck
from austeer.compiler.errors import UsageError
from austeer.compiler.manifest import MANIFEST, PROGRAM, read_manifest, sha256_of
from austeer.compiler.program import Program
from austeer.compiler.tokens import take_tokens
from austeer.compiler.verbs.approximate import recorded_approximation
from austeer.compiler.verbs.bases import Base, GgufBase, open_any_base
from austeer.compiler.verbs.common import Compiled, Settings, certificate_dtype, measuring_texts
from austeer.compiler.verbs.engines import check_engines
from austeer.targets.engines.registry import engine_named


@dataclass(frozen=True)
class Verification:
    """The outcome of each check; `certificate` is measured anew."""

    problems: tuple[str, ...]
    files: dict[str, str]
    certificate: Certificate | None
    notes: tuple[str, ...]
    engines: tuple[EngineCheck, ...] = ()

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
            "engines": [found.plain() for found in self.engines],
            "notes": list(self.notes),
        }


def verify(
    out: str | Path,
    *,
    base: str | None = None,
    texts: str | Path | None = None,
    engines: Sequence[str] = (),
    settings: Settings = Settings(),  # noqa: B008 (frozen)
) -> Verification:
    """Checks that `out` is its base with exactly its program folded in, and measures the certificate anew.

    Without `texts` (a file of texts or pairs) it measures on text sampled from the base. Without `base` the
    manifest's is used: a Hub id, or a folder of that name here or beside `out`. Every engine named loads `out`
    and the base, and must say what the interpreter says. Raises CheckpointError if `out` or its base cannot be
    read, UsageError for an engine that is not here; what is merely wrong is a problem in the report.
    """
    out, asked = Path(out), [engine_named(name) for name in engines]
    manifest = read_manifest(out)
    program = Program.load(out / PROGRAM)
    revision = None if base else manifest["base"]["revision"]
    opened = open_any_base(base or _find_base(manifest, out), revision, manifest["form"])
    problems = list(_identity_problems(manifest, program, opened))
    if problems:  # with another base or program the rest would only repeat this
        return Verification(tuple(problems), {}, None, ())
    approximation = recorded_approximation(manifest, program, opened)
    compiled = Compiled.of(program, opened, manifest["target"], manifest["form"], approximation)
    files = compiled.compare(out)
    problems += [f"{name}: {verdict}" for name, verdict in files.items() if verdict != "ok"]
    if isinstance(opened, GgufBase):
        return Verification(tuple(problems), files, None, opened.notes)
    tokens, cut = measuring_texts(opened, texts, settings)
    dtype = certificate_dtype(opened, settings)
    certificate = compiled.certify(out, take_tokens(tokens, 4096), dtype, settings.device)
    checks, wrong = check_engines(asked, opened.path, out, program, tokens, form=compiled.form)
    problems += [*certificate.failures(), *wrong]
    return Verification(tuple(problems), files, certificate, cut, checks)


def _find_base(manifest: dict[str, Any], out: Path) -> str:
    name, revision = manifest["base"]["id"], manifest["base"]["revision"]
    if revision:
        return name
    for folder in (Path(name), out.resolve().parent / name):
        if (folder / "config.json").is_file() or (folder.is_file() and folder.suffix == ".gguf"):
            return str(folder)
    raise UsageError(
        f"{out} was compiled from the local model {name!r}, which is not here; say where it is with --base"
    )


def _identity_problems(manifest: dict[str, Any], program: Program, base: Base | GgufBase) -> Iterator[str]:
    if program.sha256 != manifest["program"]["sha256"]:
        yield f"{PROGRAM} is not the program that {MANIFEST} names"
    recorded, found = manifest["base"]["files"], base.describe()["files"]
    if recorded.keys() != found.keys():
        yield f"the base has other weight files than {MANIFEST} names"
        return
    for name, facts in recorded.items():
        if any(found[name][key] != facts[key] for key in ("size", "header_sha256")):
            yield f"{name} of the base is not the file that was compiled (its size or header differs)"
        elif "sha256" in facts and sha256_of(base.path / name) != facts["sha256"]:
            yield f"{name} of the base is not the file that was compiled (its content differs)"
