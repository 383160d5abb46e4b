"""steer: model + contrastive pairs → compiled checkpoint."""

import hashlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from austeer.compiler.certificate import Certificate
from austeer.compiler.edits import Scale
from austeer.compiler.errors import Refused, UsageError
from austeer.compiler.pairs import read_pairs, read_texts
from austeer.compiler.program import Program
from austeer.compiler.sites import SPACE, SiteName, site_named
from austeer.compiler.staging import require_place
from austeer.compiler.target import target_named
from austeer.compiler.verbs.approximate import Approximations, choose_approximation, compile_for, is_inexact
from austeer.compiler.verbs.common import (
    FORM,
    TARGET,
    Base,
    Settings,
    certificate_dtype,
    open_base,
    write_compiled,
)
from austeer.compiler.verbs.finding import Choice, Finding, Goal, find
from austeer.passes.legalize import refusal
from austeer.targets.tables import TARGETS


@dataclass(frozen=True)
class Steering:
    """The program found, how it was chosen, and the certificate of the checkpoint (None with program_only).

    `approximations` where one had to be chosen.
    """

    out: str | None
    program: Program
    site: SiteName
    choice: Choice
    certificate: Certificate | None
    notes: tuple[str, ...]
    approximations: Approximations | None = None

    def plain(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "out": self.out,
            "sha256": self.program.sha256,
            "edits": len(self.program.edits),
            "site": self.site,
            "top_k": self.choice.k,
            "alpha": self.choice.alpha,
            "drift": self.choice.drift,
            "search": asdict(self.choice.search) if self.choice.search else None,
            "approximations": self.approximations.plain() if self.approximations else None,
            "certificate": self.certificate.plain() if self.certificate else None,
            "notes": list(self.notes),
        }


def steer(
    model: str,
    pairs: str | Path,
    out: str | Path,
    *,
    site: str = "ffn",
    top_k: int | None = None,
    alpha: float | None = None,
    max_drift: float = 0.1,
    neutral: str | Path | None = None,
    program_only: bool = False,
    approximate: bool = False,
    target: str = TARGET,
    form: str = FORM,
    revision: str | None = None,
    settings: Settings = Settings(),  # noqa: B008 (frozen)
) -> Steering:
    """Finds the units that tell the pairs' sides apart (AUSteer), scales them, and writes the checkpoint at `out`.

    What is not given of `top_k` and `alpha` is searched on held-out prompts for the best accuracy with a mean
    KL to the base on neutral text of at most `max_drift`. With `program_only`, `out` is a program file. With
    `approximate` the site may be residual, compiled by the approximation nearest on held-out text.
    Raises CheckFailed where steering does not help or the certificate does not hold; nothing is written then.
    """
    goal, out = Goal(site_named(site), top_k, alpha, max_drift), Path(out)
    require_place(out)  # now, not after hours of work
    samples, texts = read_pairs(pairs), read_texts(neutral) if neutral is not None else None
    base = open_base(model, revision)
    _require_units(goal, base)
    if not program_only:
        _require_foldable(goal.site, base, target, form, approximate=approximate)
    finding = find(base, goal, samples, texts, settings)
    if program_only:
        finding.program.save(out)
        return _report(out, goal, finding, None, ())
    compiled = compile_for(finding.program, base, target, form, approximate=approximate)
    table, extra = None, {"steer": _record(goal, finding, Path(pairs), settings.seed)}
    if compiled.approximation is not None:
        compiled, table = choose_approximation(compiled, finding.texts, settings, out)
        extra["approximations"] = table.plain()
    dtype, kept = certificate_dtype(base, settings)

    def check(folder: Path) -> Certificate:
        return compiled.certify(folder, finding.texts, dtype, settings.device)

    certificate = write_compiled(compiled, out, certify=check, extra=extra)
    report = _report(out, goal, finding, certificate, (*kept, *compiled.plan.notes))
    return replace(report, approximations=table)


def _require_foldable(site: SiteName, base: Base, target: str, form: str, *, approximate: bool) -> None:
    """Refused, before any model is run, where no layer can carry a scale at the site."""
    probes = [Scale(layer, site, (0,), (0.0,)) for layer in range(base.facts.geometry.layers)]
    probe = Program(base.facts.geometry, tuple(probes))
    if approximate and is_inexact(probe, base):
        compile_for(probe, base, target, form, approximate=True)
        return
    reasons = [refusal(probe, base.facts, target_named(target, TARGETS)) for probe in probes]
    if all(reasons):
        raise Refused(
            f"steering at site {site} cannot be compiled: {reasons[0]}; or write the program alone with --program-only"
        )


def _require_units(goal: Goal, base: Base) -> None:
    units = base.facts.geometry.layers * base.facts.geometry.width(SPACE[goal.site])
    if goal.top_k is not None and goal.top_k > units:
        raise UsageError(f"--top-k {goal.top_k} is more than the {units} units at site {goal.site} of all layers")


def _record(goal: Goal, finding: Finding, pairs: Path, seed: int) -> dict[str, Any]:
    """For the manifest: how the program was found, without any pair text."""
    return {
        "site": goal.site,
        "top_k": finding.choice.k,
        "alpha": finding.choice.alpha,
        "max_drift": goal.max_drift,
        "drift": finding.choice.drift,
        "seed": seed,
        "pairs": {
            "sha256": hashlib.sha256(pairs.read_bytes()).hexdigest(),
            "fitted": finding.fitted,
            "held_out": finding.held_out,
        },
        "search": asdict(finding.choice.search) if finding.choice.search else None,
    }


def _report(
    out: Path, goal: Goal, finding: Finding, certificate: Certificate | None, kept: tuple[str, ...]
) -> Steering:
    return Steering(str(out), finding.program, goal.site, finding.choice, certificate, (*finding.notes, *kept))
