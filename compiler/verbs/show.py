"""Reports for people: the text and tables that the command line prints on stdout."""

import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import singledispatch
from typing import Any

from rich.console import Console
from rich.table import Table

from austeer.compiler.architectures import ARCHITECTURES
from austeer.compiler.card import describe
from austeer.compiler.certificate import Certificate
from austeer.compiler.engine_check import EngineCheck
from austeer.compiler.gate_check import SideCheck
from austeer.compiler.measure import Score
from austeer.compiler.program import Program
from austeer.compiler.sites import SITES, SiteName
from austeer.compiler.sparsity import TensorSparsity
from austeer.compiler.text import render
from austeer.compiler.verbs.approximate import Approximations
from austeer.compiler.verbs.baked import Zeros
from austeer.compiler.verbs.build import BuildReport
from austeer.compiler.verbs.demo import Demo
from austeer.compiler.verbs.importing import Imported
from austeer.compiler.verbs.inspect import Inspection
from austeer.compiler.verbs.methods import method_named
from austeer.compiler.verbs.push import PushReport
from austeer.compiler.verbs.restoration import Restoration, recovery_table
from austeer.compiler.verbs.steer import Steering
from austeer.compiler.verbs.targets import Support
from austeer.compiler.verbs.verify import Verification
from austeer.passes.search import Search

SHOWN = 20  # rows of long tables


@singledispatch
def show(report: Any) -> None:
    """Prints a report."""
    raise NotImplementedError(type(report))


@show.register
def _(report: BuildReport) -> None:
    plan, console = report.compiled.plan, _console()
    plain, edits = report.plain(), len(report.compiled.program.edits)
    rows = [(row["file"], row["tensor"], f"{row['bytes']:,}") for row in plain.get("tensors", ())]
    if rows:
        _table("Plan" if report.out is None else "Written anew", ("file", "tensor", "bytes"), rows)
    if report.out is None:
        slices = [(entry["edit"], entry["tensor"], _slice(entry["slice"])) for entry in plan.lowering]
        _table("Slices", ("edit", "tensor", "slice"), slices)
    console.print(f"{edits} edits, {len(rows)} tensors, {plan.output_bytes:,} bytes in all")
    if "peak_memory_bytes" in plain:
        rewritten, memory = plain["bytes_to_rewrite"], plain["peak_memory_bytes"] / 2**20
        console.print(f"{rewritten:,} bytes of the base rewritten, working memory up to {memory:.0f} MB")
    if plan.left_out:
        console.print(f"Left out (not part of the checkpoint): {', '.join(plan.left_out)}", markup=False)
    _approximations(report.approximations)
    _end(report.out, report.certificate, report.notes)


@show.register
def _(report: Steering) -> None:
    console = _console()
    if report.choice.search is not None:
        _search(report.choice.search)
    choice, components = report.choice, method_named(report.method).components
    penalty = f" (rho {choice.rho:.4g}, l1 ratio {choice.l1_ratio:.4g})" if choice.rho is not None else ""
    console.print(
        f"Edited {choice.k} {components} at site {report.site} with alpha {choice.alpha:.4g}{penalty}; "
        f"drift {choice.drift:.4f} nats per token"
    )
    _approximations(report.approximations)
    _gates(report)
    _sides(report.sides)
    _end(report.out, report.certificate, report.notes)


@show.register
def _(report: Restoration) -> None:
    found, console = report.restored, _console()
    _zeros(report.zeros)
    if found.importance is not None:
        heads = [(layer, head, float(found.importance[layer, head])) for layer, head in found.heads]
        rows = [(layer, head, f"{value:.3f}") for layer, head, value in sorted(heads, key=lambda head: -head[2])]
        title = f"The {len(rows)} heads that got a constant (importance: a probe is so often right; 0.5 is chance)"
        _table(title, ("layer", "head", "importance"), rows)
    columns = ("on held-out samples", "dense", "pruned", "restored", "back")
    _table("What is back", columns, recovery_table(found), all_rows=True)
    trained = found.trained
    how = (
        f"{found.learned:,} numbers trained in {trained.step} steps, best after {trained.best_step}"
        if trained.step
        else "lost components alone, nothing trained"
    )
    added = f"; {report.baked.added:,} parameters added" if report.baked else ""
    console.print(f"{len(found.heads)} heads: {how}{added}")
    _end(report.out, report.certificate, report.notes)


@show.register
def _(report: Inspection) -> None:
    if report.text:
        sys.stdout.write(render(report.program))
        return
    _program(report.program)
    if report.manifest is not None:
        base = report.manifest["base"]
        _console().print(
            f"Compiled into {base['id']} ({base['revision'] or 'local'}) for {report.manifest['target']}",
            markup=False,
        )
        rows = [(entry["edit"], entry["tensor"], _slice(entry["slice"])) for entry in report.manifest["lowering"]]
        _table("Lowering", ("edit", "tensor", "slice"), rows)
        if report.manifest["certificate"]:
            _certificate(Certificate.from_plain(report.manifest["certificate"]))


@show.register
def _(report: Imported) -> None:
    _program(report.program)
    _end(report.out, None, report.notes)


@show.register
def _(report: Verification) -> None:
    for name, verdict in report.files.items():
        _console().print(f"{name}: {verdict}", markup=False)
    _end(None, report.certificate, report.notes)
    if report.engines:
        _engines(report.engines)
    for problem in report.problems:
        _console().print(f"FAILED: {problem}", markup=False)
    if report.passed:
        approximately = report.certificate is not None and report.certificate.approximate
        how = "this program folded in approximately" if approximately else "exactly this program folded in"
        _console().print(f"Verified: the checkpoint is its base with {how}.")


@show.register
def _(report: Demo) -> None:
    show(report.steering)
    table = Table("base", "compiled", title="Greedy text", show_lines=True)
    for base, compiled in report.texts:
        table.add_row(base, compiled)
    _console().print(table)
    show(report.verification)
    if report.steering.out is None:
        _console().print("The checkpoint was temporary; demo -o OUT keeps it.")


@show.register
def _(report: PushReport) -> None:
    plan = report.plan
    rows = [(step.action, step.path, f"{step.size:,}") for step in plan.steps]
    _table(f"To {report.url} ({report.visibility})", ("", "file", "bytes"), rows, all_rows=True)
    for what, names in (("Left out", plan.contents.left_out), ("Kept in the repository", plan.kept)):
        if names:
            _console().print(f"{what} (no compile writes them): {', '.join(names)}", markup=False)
    _console().print(
        f"{plan.bytes_to('upload'):,} bytes to upload at most, {plan.bytes_to('copy'):,} copied on the Hub"
    )
    _end(f"{report.url}/commit/{report.commit}" if report.commit else None, None, plan.notes)


def _zeros(zeros: Iterable[Zeros]) -> None:
    """The zeros of all matrices of a kind together, whatever layer or expert they are of."""
    kinds: dict[str, list[Zeros]] = {}
    for matrix in zeros:
        kind = re.sub(r"\.\d+\.", ".*.", matrix.before.name).removesuffix(".weight")
        kinds.setdefault(kind, []).append(matrix)
    rows = [
        (kind, len(found), _share([m.before for m in found]), _share([m.after for m in found]), _patterns(found))
        for kind, found in kinds.items()
    ]
    _table("Zeros by kind of matrix", ("matrix", "how many", "pruned", "restored", "pattern"), rows)


def _share(matrices: Sequence[TensorSparsity | None]) -> str:
    known = [matrix for matrix in matrices if matrix]
    return f"{sum(m.zeros for m in known) / sum(m.values for m in known):.1%}" if known else "-"


def _patterns(zeros: Sequence[Zeros]) -> str:
    counts = Counter((matrix.after or matrix.before).pattern for matrix in zeros)
    some = "" if len(counts) == 1 else " in {}"
    return ", ".join(pattern + some.format(count) for pattern, count in counts.items() if pattern)


def _program(program: Program) -> None:
    model = program.model
    _console().print(f"Program {program.sha256}", highlight=False)
    _console().print(
        f"for {model.name} ({model.architecture}, {model.layers} layers, width {model.residual})",
        markup=False,
    )
    if program.provenance:
        _console().print(f"from {program.provenance}", markup=False)
    rows = [(number, edit.layer, edit.site, edit.kind, describe(edit)) for number, edit in enumerate(program.edits)]
    _table("Edits, in program order", ("edit", "layer", "site", "kind", "what"), rows)


@show.register
def _(report: Support) -> None:
    for target in report.targets:
        places = ((kind, "all sites" if sites == SITES else ", ".join(sites)) for kind, sites in COLUMNS)
        columns = ("architecture", *(f"{kind} @ {place}" for kind, place in places))
        rows = [
            (architecture, *(_ways(report, target.name, architecture, *column) for column in COLUMNS))
            for architecture in ARCHITECTURES
        ]
        _table(f"{target.name}: {target}", columns, rows, all_rows=True)
    if len(report.targets) == 1:
        for reason in dict.fromkeys(cell.refusal for cell in report.cells if cell.refusal):
            _console().print(f"refused: {reason}", markup=False)


COLUMNS: tuple[tuple[str, tuple[SiteName, ...]], ...] = (
    ("scale", ("heads", "attn", "neurons", "ffn")),
    ("rank1", ("heads", "neurons")),
    ("shift", ("heads",)),
    ("shift", ("attn",)),
    ("shift", ("neurons", "ffn")),
    ("shift", ("residual",)),
    ("scale", ("residual",)),
    ("gated", SITES),
)


def _ways(report: Support, target: str, architecture: str, kind: str, sites: tuple[SiteName, ...]) -> str:
    """All lowerings, best first; the cells of a column are alike."""
    cell = next(
        cell
        for cell in report.cells
        if (cell.target, cell.architecture, cell.kind, cell.site) == (target, architecture, kind, sites[0])
    )
    if kind == "gated":
        return ", ".join(how for how, _ in cell.ways) or "refused"
    exact = ", ".join(way.describe(architecture) for way in cell.preferred)
    return exact or ("approximate" if cell.approximations else "refused")


def _end(out: str | None, certificate: Certificate | None, notes: Iterable[str]) -> None:
    if certificate is not None:
        _certificate(certificate)
    for note in notes:
        _console().print(f"Note: {note}", markup=False)
    if out is not None:
        _console().print(f"Written: {out}", markup=False)


def _search(found: Search) -> None:
    """The points by what they differ in, and k; drift; the figures of the effect."""
    points = [trial.point for trial in found.table]
    names = [name for name in points[0] if name == "k" or len({point[name] for point in points}) > 1]
    figures = list(asdict(found.base))
    rows = [("base", *[""] * len(names), "", "0", *_figures(found.base, len(figures)))] + [
        (
            "->" if t == found.best else "",
            *(f"{t.point[name]:.4g}" if isinstance(t.point[name], float) else t.point[name] for name in names),
            f"{t.alpha:.4g}", f"{t.drift:.4f}", *_figures(t.effect, len(figures)),
        )
        for t in found.table
    ]  # fmt: skip
    columns = ("", *names, "alpha", "drift", *figures)
    _table("Search on held-out prompts (drift in nats per token)", columns, rows, all_rows=True)


def _figures(score: Score | None, count: int) -> list[str]:
    return ["-"] * count if score is None else [f"{value:.3f}" for value in asdict(score).values()]


def _approximations(found: Approximations | None) -> None:
    if found is None:
        return
    rows = [("unedited base", f"{found.base_mean_kl:.4g}", f"{found.base_top1_agreement:.4f}", "")] + [
        (c.name, f"{c.mean_kl:.4g}", f"{c.top1_agreement:.4f}", "<-" if c.name == found.chosen else "")
        if c.mean_kl is not None
        else (c.name, "-", "-", c.refusal)
        for c in found.candidates
    ]
    columns = ("approximation", "mean KL", "top-1", "")
    _table(f"Approximations, measured on {found.tokens} tokens", columns, rows, all_rows=True)
    _console().print("Approximate: no stock block carries a scale at site residual exactly.")


def _gates(report: Steering) -> None:
    """The gates that were chosen, of the layers that were edited."""
    if report.gating is None:
        return
    layers = {edit.layer for edit in report.program.edits}
    rows = [
        (
            gate["layer"],
            f"{report.gating['auc'][gate['layer']]:.3f}",
            f"{gate['threshold']:.2f}",
            f"{gate['open_when']['open']:.1%}",
            f"{gate['open_unless']['open']:.1%}",
            f"{gate['rounding']['bfloat16']['largest']:.1g}",
            f"{gate['constant_residual']:.2g}",
        )
        for gate in report.gating["gates"]
        if gate["gate"] == report.choice.gate and gate["layer"] in layers
    ]
    columns = ("layer", "AUC", "threshold", "open, when", "open, unless", "bfloat16 off by", "no constant by")
    _table("Gates, on texts held out from their fit (threshold in log-odds)", columns, rows)


def _sides(sides: Mapping[str, SideCheck]) -> None:
    columns = ("texts", "tokens", "KL from the base", "accuracy, margin", "of the base", "open gates")
    rows = [
        (
            name,
            found.tokens,
            f"{found.mean_kl:.4g}",
            " ".join(_figures(found.effect, 1)),
            " ".join(_figures(found.base_effect, 1)),
            " to ".join(f"{share:.1%}" for share in found.open_range),
        )
        for name, found in sides.items()
    ]
    if rows:
        _table("The compiled model, on those texts", columns, rows)


def _certificate(certificate: Certificate) -> None:
    title = f"Certificate: against {certificate.reference}, {certificate.dtype}, {certificate.tokens} tokens"
    _table(
        title,
        ("", "compiled", "unedited base"),
        certificate.table(),
    )
    same = "equal" if certificate.greedy_equal else "not equal"
    zeros = f"zero weights {certificate.zeros_before:.4%} -> {certificate.zeros_after:.4%}"
    rule = " as an approximation" if certificate.approximate else ""
    verdict = f"It holds{rule}." if certificate.passed else f"It does NOT hold: {'; '.join(certificate.failures())}."
    _console().print(f"Greedy text {same}; {zeros}. {verdict}", highlight=False)


def _engines(checks: Iterable[EngineCheck]) -> None:
    columns = ("engine", "from the interpreter", "from its unedited base", "")
    rows = [
        (
            f"{found.engine} {found.version or ''}",
            *(f"{distance.max_abs:.3g} (KL {distance.mean_kl:.3g})" for distance in (found.compiled, found.edited)),
            "FAILED" if found.failure else "ok",
        )
        for found in checks
    ]
    _table("Engines: max difference of log-probabilities, float32", columns, rows)


def _table(title: str, columns: Iterable[str], rows: Sequence[tuple[Any, ...]], *, all_rows: bool = False) -> None:
    table = Table(*columns, title=title, title_justify="left")
    shown = rows if all_rows else rows[:SHOWN]
    for row in shown:
        table.add_row(*map(str, row))
    _console().print(table, markup=False)
    if len(shown) < len(rows):
        _console().print(f"... and {len(rows) - len(shown)} more (see --json)")


def _slice(axes: list[list[int] | None]) -> str:
    return "[" + ", ".join(":" if axis is None else _some(axis) for axis in axes) + "]"


def _some(indices: list[int]) -> str:
    return ",".join(map(str, indices[:6])) + (f",… {len(indices) - 6} more" if len(indices) > 6 else "")


def _console() -> Console:
    return Console(highlight=False, soft_wrap=True)
