"""build: model + programs → compiled checkpoint."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from austeer.compiler.certificate import Certificate
from austeer.compiler.errors import UsageError
from austeer.compiler.live import load_tokenizer
from austeer.compiler.pairs import read_texts
from austeer.compiler.program import Program
from austeer.compiler.tokens import encode_texts
from austeer.compiler.verbs.common import (
    FORM,
    Compiled,
    GgufBase,
    Settings,
    certificate_dtype,
    open_any_base,
    write_compiled,
)
from austeer.passes.compose import compose
from austeer.targets.checkpoint import NEW_SHARD, Plan


@dataclass(frozen=True)
class BuildReport:
    """What was, or with `dry_run` would be, written."""

    out: str | None
    compiled: Compiled
    certificate: Certificate | None
    notes: tuple[str, ...]

    def plain(self) -> dict[str, Any]:
        """As JSON values."""
        program, plan = self.compiled.program, self.compiled.plan
        return {
            "out": self.out,
            "target": self.compiled.target,
            "form": self.compiled.form,
            "sha256": program.sha256,
            "edits": len(program.edits),
            **self._costs(),
            "lowering": list(plan.lowering),
            "left_out": list(plan.left_out),
            "certificate": self.certificate.plain() if self.certificate else None,
            "notes": list(self.notes),
        }

    def _costs(self) -> dict[str, Any]:
        """What is rewritten in a checkpoint, and the size of any output."""
        plan = self.compiled.plan
        if not isinstance(plan, Plan):
            return {"bytes_to_copy": plan.output_bytes}
        tensors = [{"tensor": job.name, "file": job.tensor.file.name, "bytes": job.nbytes} for job in plan.jobs]
        new = [{"tensor": fill.tensor.name, "file": NEW_SHARD, "bytes": fill.nbytes} for fill in plan.fills]
        return {
            "tensors": [*tensors, *new],
            "bytes_to_rewrite": plan.nbytes,
            "bytes_to_copy": plan.output_bytes,
            "peak_memory_bytes": plan.peak_bytes,
        }


def build(
    model: str,
    programs: Sequence[str | Path],
    out: str | Path | None,
    *,
    target: str | None = None,
    form: str = FORM,
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
    base = open_any_base(model, revision, form)
    compiled = Compiled.of(program, base, target, form)
    notes += (*compiled.plan.notes, *base.notes)
    if dry_run or out is None:
        return BuildReport(None, compiled, None, notes)
    check = None
    if texts is not None:
        check, notes = _certifier(compiled, texts, settings, notes)
    certificate = write_compiled(compiled, Path(out), certify=check)
    return BuildReport(str(out), compiled, certificate, notes)


def _certifier(compiled: Compiled, texts: str | Path, settings: Settings, notes: tuple[str, ...]) -> Any:
    base = compiled.base
    if isinstance(base, GgufBase):
        raise UsageError(f"--texts: {base.notes[0]}")
    length = settings.length_for(base.checkpoint.config)
    tokens, cut = encode_texts(load_tokenizer(base.path), read_texts(texts), length)
    dtype, kept = certificate_dtype(base, settings)

    def check(folder: Path) -> Certificate:
        return compiled.certify(folder, tokens, dtype, settings.device)

    return check, (*notes, *cut, *kept)
