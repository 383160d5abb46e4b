"""steer: model + contrastive pairs → compiled checkpoint."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from austeer.compiler.certificate import Certificate
from austeer.compiler.edits import Shift
from austeer.compiler.errors import Refused, UsageError
from austeer.compiler.gate_card import gates_record
from austeer.compiler.gate_check import SideCheck, check_gates
from austeer.compiler.gates import Gate, Gated
from austeer.compiler.manifest import sha256_of
from austeer.compiler.pairs import read_pairs, read_texts
from austeer.compiler.program import Program
from austeer.compiler.sites import SiteName, site_named
from austeer.compiler.staging import require_place
from austeer.compiler.verbs.adaptive import NEURONS, Adaptive, Gating
from austeer.compiler.verbs.approximate import Approximations, are_inexact, choose_approximation, compile_for
from austeer.compiler.verbs.bases import Base, open_base
from austeer.compiler.verbs.common import (
    FORM,
    Compiled,
    Measured,
    Settings,
    certificate_dtype,
    target_for,
    write_compiled,
)
from austeer.compiler.verbs.finding import Choice, Finding, find
from austeer.compiler.verbs.goal import Goal
from austeer.compiler.verbs.methods import Method, method_named
from austeer.compiler.verbs.picture import require_picture
from austeer.compiler.verbs.search_picture import draw_search
from austeer.passes.legalize import refusal
from austeer.targets.llama_cpp import find_converter


@dataclass(frozen=True)
class Steering:
    """The program found, how it was chosen, and the certificate of the checkpoint (None with program_only).

    `approximations` where one had to be chosen; `sides`: what the compiled model does where gates are to open and
    where not; `gating`: how the gates and their neurons were fitted.
    """

    out: str | None
    program: Program
    method: str
    site: str
    choice: Choice
    certificate: Certificate | None
    notes: tuple[str, ...]
    approximations: Approximations | None = None
    sides: Mapping[str, SideCheck] = field(default_factory=dict[str, SideCheck])
    gating: dict[str, Any] | None = None

    def plain(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "out": self.out,
            "sha256": self.program.sha256,
            "edits": len(self.program.edits),
            "method": self.method,
            "site": self.site,
            **_plain(self.choice),
            "approximations": self.approximations.plain() if self.approximations else None,
            "gates": gates_record(self.program),
            "gating": self.gating,
            "sides": {name: found.plain() for name, found in self.sides.items()},
            "certificate": self.certificate.plain() if self.certificate else None,
            "notes": list(self.notes),
        }


def steer(
    model: str,
    pairs: str | Path,
    out: str | Path,
    *,
    method: str = "austeer",
    site: str | Sequence[str] | None = None,
    top_k: int | None = None,
    alpha: float | None = None,
    rho: float | None = None,
    l1_ratio: float | None = None,
    segments: int | None = None,
    max_drift: float = 0.1,
    trials: int | None = None,
    study: str | Path | None = None,
    picture: str | Path | None = None,
    neutral: str | Path | None = None,
    program_only: bool = False,
    approximate: bool = False,
    adaptive: bool = False,
    when: str | Path | None = None,
    unless: str | Path | None = None,
    gate_neurons: int = NEURONS,
    neurons: str = "append",
    target: str | None = None,
    form: str = FORM,
    revision: str | None = None,
    settings: Settings = Settings(),  # noqa: B008 (frozen)
) -> Steering:
    """Finds what tells the pairs' sides apart, edits it, and writes the checkpoint at `out`.

    The method "austeer" scales units of one site, default ffn, or the best of several; "steer2edit" adds rank-1 edits
    of heads, neurons or, by default, both; "fusion" shifts the residual stream of every layer, with one weight or one
    for each of `segments` of layers, towards the pairs' positive sides. What is not given of `top_k` and `alpha` is
    searched on held-out prompts for the best accuracy (fusion: overlap and perplexity) with a mean KL to the base on
    neutral text of at most `max_drift`, in so many `trials`; Steer2Edit's `rho` and `l1_ratio` together stand for
    both. The file `study` keeps the search, which goes on there if it was interrupted or is given more trials;
    `picture`, .png or .svg, shows it. `site` is one name or several, in a sequence or with commas. With
    `program_only`, `out` is a program file. With `approximate` the site may be residual, compiled by the
    approximation nearest on held-out text.
    With `adaptive` every edit acts only where a gate of its layer is open: in texts like those of the file `when`, and
    not in those like `unless` (texts or pairs), or else on the negative sides of the pairs. At most `gate_neurons` of
    a layer carry what passes; `neurons` is "append", or "reuse" for those that contribute least.
    Raises CheckFailed where steering does not help or the certificate does not hold; nothing is written then.
    """
    chosen, out = method_named(method), Path(out)
    kept = Path(study) if study is not None else None
    gates = _adaptive(adaptive, when, unless, gate_neurons, neurons, form)
    goal = Goal(chosen, _sites(chosen, site), top_k, alpha, max_drift, rho, l1_ratio, trials, kept, segments, gates)
    require_place(out)  # now, not after hours of work
    drawing = _drawing(picture, goal)
    samples, texts = read_pairs(pairs), read_texts(neutral) if neutral is not None else None
    base = open_base(model, revision)
    _require_units(goal, base)
    if not program_only:
        _require_foldable(goal, base, target, form, approximate=approximate)
    finding = find(base, goal, samples, texts, settings)
    if program_only:
        finding.program.save(out)
        drawing(finding)
        return _report(out, method, finding, None, ())
    compiled = compile_for(finding.program, base, target, form, approximate=approximate or adaptive)
    table, extra = None, {"steer": _record(method, goal, finding, Path(pairs), settings.seed)}
    if compiled.approximation is not None:
        compiled, table = choose_approximation(compiled, finding.texts, settings, out)
        extra["approximations"] = table.plain()
    dtype = certificate_dtype(base, settings)

    def check(folder: Path) -> Certificate:
        return compiled.certify(folder, finding.texts, dtype, settings.device)

    sides: dict[str, SideCheck] = {}

    def measure(folder: Path) -> Measured:
        sides.update(_check_sides(compiled, finding.gating, folder, dtype, settings))
        record = {"sides": {name: found.plain() for name, found in sides.items()}} if sides else {}
        return Measured(record, sides)

    certificate = write_compiled(compiled, out, certify=check, measure=measure, extra=extra)
    drawing(finding)
    report = _report(out, method, finding, certificate, compiled.plan.notes)
    return replace(report, approximations=table, sides=sides)


def _check_sides(
    compiled: Compiled, gating: Gating | None, folder: Path, dtype: str, settings: Settings
) -> dict[str, SideCheck]:
    """What lies in the folder, on the texts held out from its gates; nothing where there are no gates."""
    if gating is None:
        return {}
    return check_gates(
        compiled.base.path,
        compiled.program,
        gating.sides,
        lambda: compiled.load(folder, dtype, settings.device),
        dtype=dtype,
        device=settings.device,
        batch_tokens=settings.batch_tokens,
    )


def _adaptive(
    adaptive: bool,  # noqa: FBT001 - private
    when: str | Path | None,
    unless: str | Path | None,
    gate_neurons: int,
    neurons: str,
    form: str,
) -> Adaptive | None:
    if not adaptive:
        if when is not None or unless is not None:
            raise UsageError("--when and --unless say where gates open: add --adaptive")
        return None
    if neurons not in ("append", "reuse"):
        raise UsageError(f"--neurons must be append or reuse, got {neurons}")
    if form == "lora":
        raise UsageError("--adaptive needs new neurons, which no adapter holds: use another --form")
    opens, closes = (Path(file) if file is not None else None for file in (when, unless))
    return Adaptive(opens, closes, gate_neurons, reuse=neurons == "reuse", in_weights=form != "model-code")


def _sites(method: Method, site: str | Sequence[str] | None) -> tuple[SiteName, ...]:
    given = [site] if isinstance(site, str) else site or ()
    named: dict[SiteName, None] = dict.fromkeys(
        site_named(name.strip()) for names in given for name in names.split(",")
    )
    for name in named:
        if name not in method.sites:
            raise UsageError(f"--method {method.name} edits the sites {' and '.join(method.sites)}, not {name}")
    return tuple(named) if named else method.default


def _drawing(picture: str | Path | None, goal: Goal) -> Callable[[Finding], None]:
    """What draws the search, if it is to be drawn; refused now if it cannot be."""
    if picture is None:
        return lambda _: None
    if goal.complete:
        raise UsageError("--picture shows a search, and nothing is left to search for")
    file = Path(picture)
    require_picture(file)

    def draw(finding: Finding) -> None:
        assert finding.choice.search is not None
        draw_search(finding.choice.search, goal.max_drift, file)

    return draw


def _require_foldable(goal: Goal, base: Base, target: str | None, form: str, *, approximate: bool) -> None:
    """Refused, before any model is run, where no layer can carry an edit at one of the places, or nothing write it."""
    if form == "gguf":
        find_converter()
    if form == "model-code":  # carries every edit
        return
    if goal.adaptive:
        _require_gates(base, target, form)
        return
    for place, sites in goal.places.items():
        probes = [goal.method.probe(layer, site) for site in sites for layer in range(base.facts.geometry.layers)]
        if approximate and are_inexact(probes, base):
            compile_for(Program(base.facts.geometry, tuple(probes)), base, target, form, approximate=True)
            continue
        reasons = [refusal(probe, base.facts, target_for(target, form)) for probe in probes]
        if all(reasons) or (any(reasons) and not goal.method.rank):
            raise Refused(
                f"steering at site {place} cannot be compiled: {next(filter(None, reasons))}; "
                "or write the program alone with --program-only"
            )


def _require_gates(base: Base, target: str | None, form: str) -> None:
    """Refused where no layer can carry a gate, whatever it lets through."""
    geometry = base.facts.geometry
    zeros = np.zeros(geometry.residual, np.float32)
    probes = [Gated(Shift(layer, "ffn", zeros), Gate(zeros, 0, 1, zeros)) for layer in range(geometry.layers)]
    reasons = [refusal(probe, base.facts, target_for(target, form)) for probe in probes]
    if all(reasons):
        raise Refused(
            f"steering with gates cannot be compiled: {reasons[0]}; another --target or --form model-code may carry "
            "it; or write the program alone with --program-only"
        )


def _require_units(goal: Goal, base: Base) -> None:
    facts, method = base.facts, goal.method
    for place, sites in goal.places.items():
        most = facts.geometry.layers * sum(method.count(facts, site) for site in sites)
        if goal.top_k is not None and goal.top_k > most:
            raise UsageError(
                f"--top-k {goal.top_k} is more than the {most} {method.components} at site {place} of all layers"
            )


def _plain(choice: Choice) -> dict[str, Any]:
    """For report and manifest; the terms of the elastic net only where there is one."""
    penalty = {"rho": choice.rho, "l1_ratio": choice.l1_ratio} if choice.rho is not None else {}
    search = asdict(choice.search) if choice.search else None
    gate = {"gate": choice.gate} if choice.gate else {}
    return {"top_k": choice.k, "alpha": choice.alpha, **penalty, **gate, "drift": choice.drift, "search": search}


def _record(method: str, goal: Goal, finding: Finding, pairs: Path, seed: int) -> dict[str, Any]:
    """For the manifest: how the program was found, without any pair text."""
    return {
        "method": method,
        "site": finding.choice.site,
        **_plain(finding.choice),
        "max_drift": goal.max_drift,
        "seed": seed,
        "pairs": {
            "sha256": sha256_of(pairs),
            "fitted": finding.fitted,
            "held_out": finding.held_out,
        },
        **({"gating": finding.gating.record} if finding.gating else {}),
    }


def _report(
    out: Path, method: str, finding: Finding, certificate: Certificate | None, notes: tuple[str, ...]
) -> Steering:
    choice, gating = finding.choice, finding.gating.record if finding.gating else None
    notes = (*finding.notes, *notes)
    return Steering(str(out), finding.program, method, choice.site, choice, certificate, notes, gating=gating)
