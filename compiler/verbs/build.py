"""build: model + programs → compiled checkpoint."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from austeer.compiler.certificate import Certificate, certify
from austeer.compiler.live import load_tokenizer
from austeer.compiler.pairs import read_texts
from austeer.compiler.program import Program
from austeer.compiler.tokens import encode_texts
from austeer.compiler.verbs.common import (
    TARGET,
    Base,
    Settings,
    certificate_dtype,
    open_base,
    plan_for,
    write_compiled,
)
from austeer.passes.compose import compose
from austeer.targets.checkpoint import Plan


@dataclass(frozen=True)
class BuildReport:
    """What was, or with `dry_run` would be, written."""

    out: str | None
    program: Program
    plan: Plan
    certificate: Certificate | None
    notes: tuple[str, ...]

    def plain(self) -> dict[str, Any]:
        """As JSON values."""
        tensors = [{"tensor": job.name, "file": job.tensor.file.name, "bytes": job.nbytes} for job in self.plan.jobs]
        return {
            "out": self.out,
            "sha256": self.program.sha256,
            "edits": len(self.program.edits),
            "tensors": tensors,
            "bytes_to_rewrite": self.plan.nbytes,
            "bytes_to_copy": self.plan.output_bytes,
            "peak_memory_bytes": self.plan.peak_bytes,
            "lowering": list(self.plan.lowering),
            "left_out": list(self.plan.left_out),
            "certificate": self.certificate.plain() if self.certificate else None,
            "notes": list(self.notes),
        }


def build(
    model: str,
    programs: Sequence[str | Path],
    out: str | Path | None,
    *,
    target: str = TARGET,
    revision: str | None = None,
    texts: str | Path | None = None,
    dry_run: bool = False,
    settings: Settings = Settings(),  # noqa: B008 (frozen)
) -> BuildReport:
    """Compiles programs into a model and writes the checkpoint at `out`; imports neither torch nor transformers.

    With `texts` (a file of texts or pairs) the result is certified on them first, which does load the model.
    With `dry_run`, or no `out`, nothing is written. Raises InputError, Refused, OutputError or CheckFailed.
    """
    program, notes = compose([Program.load(path) for path in programs])
    base = open_base(model, revision)
    plan = plan_for(program, base, target)
    notes += tuple(f"tensor {name} is not in the index and is copied as it is" for name in base.checkpoint.unindexed)
    if dry_run or out is None:
        return BuildReport(None, program, plan, None, notes)
    check = None
    if texts is not None:
        check, notes = _certifier(base, program, texts, settings, notes, plan.may_miss)
    certificate = write_compiled(plan, base, program, Path(out), target=target, certify=check)
    return BuildReport(str(out), program, plan, certificate, notes)


def _certifier(
    base: Base,
    program: Program,
    texts: str | Path,
    settings: Settings,
    notes: tuple[str, ...],
    may_miss: frozenset[str],
) -> Any:
    length = settings.length_for(base.checkpoint.config)
    tokens, cut = encode_texts(load_tokenizer(base.path), read_texts(texts), length)
    dtype, kept = certificate_dtype(base, settings)

    def check(folder: Path) -> Certificate:
        return certify(base.path, folder, program, tokens, dtype=dtype, device=settings.device, may_miss=may_miss)

    return check, (*notes, *cut, *kept)
