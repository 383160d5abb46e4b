"""Programs without an exact lowering: each approximation is written, measured, and the nearest chosen."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from austeer.compiler.certificate import Reference, compare, observe, stored_dtype
from austeer.compiler.edits import Edit
from austeer.compiler.errors import Refused
from austeer.compiler.gates import Gated
from austeer.compiler.live import load_model
from austeer.compiler.program import Program
from austeer.compiler.tokens import Tokens
from austeer.compiler.verbs.bases import Base, GgufBase
from austeer.compiler.verbs.common import Compiled, Settings, certificate_dtype, sample_texts, target_for
from austeer.passes.approximation import Approximation, approximation_named, approximations, fit
from austeer.passes.rescale import needs_rescaling
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
    """All candidates on the same texts, the unedited base's figures there, and the candidate of least KL.

    `fitted`: the numbers that were fitted for the chosen one: factors of norms, or slopes of neurons.
    """

    chosen: str
    fitted: tuple[float, ...]
    texts: int
    tokens: int
    base_mean_kl: float
    base_top1_agreement: float
    candidates: tuple[Candidate, ...]

    def plain(self) -> dict[str, Any]:
        """As JSON values."""
        return {**asdict(self), "candidates": [asdict(candidate) for candidate in self.candidates]}


def are_inexact(edits: Iterable[Edit], base: Base | GgufBase) -> bool:
    """Whether some edit has an approximation and nothing else, in plain weights."""
    return isinstance(base, Base) and any(needs_rescaling(edit, base.facts) for edit in edits)


def compile_for(
    program: Program, base: Base | GgufBase, target: str | None, form: str, *, approximate: bool
) -> Compiled:
    """The program compiled exactly or, if there is no such way and that is wanted, by the first legal approximation.

    Raises as Compiled.of does, and Refused where neurons can only come near a gate and that is not wanted.
    """
    exactly = form == "model-code" or not (approximate and are_inexact(program.edits, base))
    if exactly or isinstance(base, GgufBase):
        compiled = Compiled.of(program, base, target, form)
        if not approximate:
            _require_exact(compiled)
        return compiled
    choices = approximations(program, base.facts, target_for(target, form))
    first = next(choice for choice in choices if not choice.refusal)
    return Compiled.of(program, base, target, form, first)


def _require_exact(compiled: Compiled) -> None:
    near = sorted({entry["edit"] for entry in compiled.plan.lowering if not entry["exact"]})
    if near:
        edits = compiled.program.edits
        reasons = (f"  {edits[number].where}: {_why_near(edits[number], compiled.target)}" for number in near)
        count = f"{len(near)} of {len(edits)} edits would only be approximated:"
        raise Refused("\n".join([count, *reasons, NEAR_ENOUGH]))


NEAR_ENOUGH = (
    "--approximate compiles them all the same, measured and marked; --form model-code carries every edit exactly"
)


def _why_near(edit: Edit, target: str) -> str:
    if isinstance(edit, Gated) and edit.replaces:
        return f"{edit.count} neurons of the FFN give way to those that carry it, and what they did is lost"
    if isinstance(edit, Gated) and edit.neurons is not None:
        return "what it adds is no fixed vector, and its neurons were fitted to that"
    return f"{target} keeps no bias of the FFN here, and the constant direction of the gate stands for it"


def recorded_approximation(manifest: dict[str, Any], program: Program, base: Base | GgufBase) -> Approximation | None:
    """The approximation that a manifest says was chosen; Refused if the program has none of that name."""
    record = manifest.get("approximations")
    if record is None or isinstance(base, GgufBase):
        return None
    target = target_for(manifest["target"], manifest["form"])
    choice = approximation_named(record["chosen"], program, base.facts, target)
    return replace(choice, fitted=tuple(record["fitted"]))


def choose_approximation(
    first: Compiled, texts: Sequence[Tokens], settings: Settings, place: Path
) -> tuple[Compiled, Approximations]:
    """Of an approximated program the approximation with the least mean KL from the interpreter on the texts.

    What is fitted is fitted on other text, sampled from the base. Every legal one is then written to a temporary
    folder beside `place`, one after the other, and loaded.
    """
    program, base = first.program, first.base
    assert isinstance(base, Base), "a GGUF has no approximation"
    dtype = certificate_dtype(base, settings)
    model = load_model(base.path, dtype=dtype, device=settings.device)
    choices = approximations(program, base.facts, target_for(first.target, first.form))
    fitted = fit(model, program, [c for c in choices if not c.refusal], sample_texts(base, model, settings.seed + 1))
    reference = observe(model, program, texts)
    del model
    legal = [Compiled.of(program, base, first.target, first.form, choice) for choice in fitted]
    measured = [_measured(compiled, reference, dtype, settings.device, place) for compiled in legal]
    best, _ = min(zip(legal, measured, strict=True), key=lambda pair: pair[1].mean_kl or 0.0)
    refused = [Candidate(choice.name, refusal=choice.refusal) for choice in choices if choice.refusal]
    return best, _table(best, (*measured, *refused), reference)


def _measured(compiled: Compiled, reference: Reference, dtype: str, device: str, place: Path) -> Candidate:
    assert compiled.approximation is not None
    name = compiled.approximation.name
    with TemporaryDirectory(prefix=f".{place.name}.{name}.", dir=place.parent) as folder:
        compiled.write(Path(folder), Writing())
        model = compiled.load(Path(folder), dtype, device)
        figures = compare(model, reference, stored=stored_dtype(compiled.base.path))
    return Candidate(name, figures.mean_kl, figures.top1_agreement)


def _table(best: Compiled, candidates: tuple[Candidate, ...], reference: Reference) -> Approximations:
    assert best.approximation is not None
    base, choice = reference.base, best.approximation
    return Approximations(
        choice.name,
        choice.fitted,
        len(reference.texts),
        base.tokens,
        base.kl / base.tokens,
        base.agreeing / base.tokens,
        candidates,
    )
