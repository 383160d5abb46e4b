"""build: model + programs → compiled checkpoint."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from austeer.compiler.certificate import Certificate
from austeer.compiler.errors import UsageError
from austeer.compiler.program import Program
from austeer.compiler.staging import require_place
from austeer.compiler.tokens import Tokens
from austeer.compiler.verbs.approximate import Approximations, choose_approximation, compile_for
from austeer.compiler.verbs.bases import Base, GgufBase, open_any_base
from austeer.compiler.verbs.common import FORM, Compiled, Settings, certificate_dtype, measuring_texts, write_compiled
from austeer.passes.compose import compose
from austeer.targets.checkpoint import NEW_SHARD, Plan

UNCHOSEN = "approximate: this is one of the plans; which one is nearest is measured when the checkpoint is written"
UNMEASURED = "approximate: how near it comes is measured when it is written"


@dataclass(frozen=True)
class BuildReport:
    """What was, or with `dry_run` would be, written. `approximations` where one had to be chosen."""

    out: str | None
    compiled: Compiled
    certificate: Certificate | None
    notes: tuple[str, ...]
    approximations: Approximations | None = None

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
            "approximations": self.approximations.plain() if self.approximations else None,
            "certificate": self.certificate.plain() if self.certificate else None,
            "notes": list(self.notes),
        }

    def _costs(self) -> dict[str, Any]:
        """What is rewritten in a checkpoint, and the size of any output."""
        plan = self.compiled.plan
        if not isinstance(plan, Plan):
            return {"bytes_to_copy": plan.output_bytes}
        tensors = [{"tensor": job.name, "file": job.tensor.file.name, "bytes": job.nbytes} for job in plan.jobs]
        wider = [{"tensor": g.name, "file": g.tensor.file.name, "bytes": g.nbytes} for g in plan.growths]
        new = [{"tensor": fill.tensor.name, "file": NEW_SHARD, "bytes": fill.nbytes} for fill in plan.fills]
        return {
            "tensors": [*tensors, *wider, *new],
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
    approximate: bool = False,
    dry_run: bool = False,
    settings: Settings = Settings(),  # noqa: B008 (frozen)
) -> BuildReport:
    """Compiles programs into a model and writes the checkpoint at `out`; imports neither torch nor transformers.

    With `texts` (a file of texts or pairs) the result is certified on them first, which does load the model.
    With `approximate` a program without an exact lowering is compiled too, by the approximation that is nearest
    on the texts, or on text sampled from the base, or with what its gates were fitted with; it is certified in
    any case, and the certificate says so, and has a rule of its own.
    With `dry_run`, or no `out`, nothing is written. Raises InputError, Refused, OutputError or CheckFailed.
    """
    program, notes = compose([Program.load(path) for path in programs])
    base = open_any_base(model, revision, form)
    compiled = compile_for(program, base, target, form, approximate=approximate)
    notes += base.notes
    inexact = compiled.approximation is not None
    if dry_run or out is None:
        notes += (UNCHOSEN,) if inexact else () if compiled.exact else (UNMEASURED,)
        return BuildReport(None, compiled, None, (*compiled.plan.notes, *notes))
    require_place(Path(out))  # now, not after all is measured
    check, table = None, None
    if isinstance(base, GgufBase) and texts is not None:
        raise UsageError(f"--texts: {base.notes[0]}")
    if isinstance(base, Base) and (texts is not None or inexact or not compiled.exact):
        tokens, cut = measuring_texts(base, texts, settings)
        if inexact:
            compiled, table = choose_approximation(compiled, tokens, settings, Path(out))
        check = _certifier(compiled, tokens, certificate_dtype(base, settings), settings)
        notes += cut
    extra = {"approximations": table.plain()} if table else None
    certificate = write_compiled(compiled, Path(out), certify=check, extra=extra)
    return BuildReport(str(out), compiled, certificate, (*compiled.plan.notes, *notes), table)


def _certifier(
    compiled: Compiled, texts: Sequence[Tokens], dtype: str, settings: Settings
) -> Callable[[Path], Certificate]:
    return lambda folder: compiled.certify(folder, texts, dtype, settings.device)
