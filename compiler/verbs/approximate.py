"""Programs without an exact lowering: each approximation is written, measured, and the nearest chosen."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from austeer.compiler.certificate import Reference, compare, observe, stored_dtype
from austeer.compiler.live import load_model
from austeer.compiler.program import Program
from austeer.compiler.tokens import Tokens
from austeer.compiler.verbs.common import Base, Compiled, Settings, certificate_dtype
from austeer.passes.rescale import needs_rescaling, rescalings
from austeer.targets.checkpoint import Writing


@dataclass(frozen=True)
class Candidate:
    """One approximation: how far it is from the reference (KL in nats per token), or why it is not legal."""

    name: str
    mean_kl: float | None = None
    top1_agreement: float | None = None
    refusal: str = ""


@dataclass(frozen=True)
class Approximations:
    """All candidates on the same texts, the unedited base's figures there, and the candidate of least KL."""

    chosen: str
    texts: int
    tokens: int
    base_mean_kl: float
    base_top1_agreement: float
    candidates: tuple[Candidate, ...]

    def plain(self) -> dict[str, Any]:
        """As JSON values."""
        return {**asdict(self), "candidates": [asdict(candidate) for candidate in self.candidates]}


def is_inexact(program: Program, base: Base) -> bool:
    """Whether some edit has an approximation and nothing else."""
    return any(needs_rescaling(edit, base.facts) for edit in program.edits)


def compile_for(program: Program, base: Base, target: str, form: str, *, approximate: bool) -> Compiled:
    """The program compiled exactly or, if there is no such way and that is wanted, by the first legal approximation.

    Raises as Compiled.of does.
    """
    if not (approximate and is_inexact(program, base)):
        return Compiled.of(program, base, target, form)
    name = next(choice.name for choice in rescalings(program, base.facts) if not choice.refusal)
    return Compiled.of(program, base, target, form, name)


def choose_approximation(
    first: Compiled, texts: Sequence[Tokens], settings: Settings, place: Path
) -> tuple[Compiled, Approximations]:
    """Of an approximated program the approximation with the least mean KL from the interpreter on the texts.

    Every legal one is written to a temporary folder beside `place`, one after the other, and loaded.
    """
    program, base = first.program, first.base
    choices = rescalings(program, base.facts)
    legal = {
        choice.name: Compiled.of(program, base, first.target, first.form, choice.name)
        for choice in choices
        if not choice.refusal
    }
    dtype, _ = certificate_dtype(base, settings)
    model = load_model(base.path, dtype=dtype, device=settings.device)
    reference = observe(model, program, texts)
    del model
    found = [
        Candidate(choice.name, refusal=choice.refusal)
        if choice.refusal
        else _measured(legal[choice.name], choice.name, reference, dtype, settings.device, place)
        for choice in choices
    ]
    best = min((c for c in found if c.mean_kl is not None), key=lambda candidate: candidate.mean_kl or 0.0)
    before, tokens = reference.base, reference.base.tokens
    table = Approximations(
        best.name, len(reference.texts), tokens, before.kl / tokens, before.agreeing / tokens, tuple(found)
    )
    return legal[best.name], table


def _measured(compiled: Compiled, name: str, reference: Reference, dtype: str, device: str, place: Path) -> Candidate:
    with TemporaryDirectory(prefix=f".{place.name}.{name}.", dir=place.parent) as folder:
        compiled.write(Path(folder), Writing())
        model = compiled.load(Path(folder), dtype, device)
        figures = compare(model, reference, stored=stored_dtype(compiled.base.path))
    return Candidate(name, figures.mean_kl, figures.top1_agreement)
