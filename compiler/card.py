"""The model card of a compiled checkpoint: what it was made from, under which licence, and what was edited."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from austeer.compiler.certificate import Certificate
from austeer.compiler.edits import Edit, Floats, Scale
from austeer.compiler.gate_card import gates_section
from austeer.compiler.gate_check import SideCheck
from austeer.compiler.gates import Gated
from austeer.compiler.manifest import MANIFEST, PROGRAM
from austeer.compiler.program import Program

RecoveryTable: TypeAlias = Sequence[tuple[str, str, str, str, str]]
"""What was measured, its value in the dense, the pruned and the restored model, and what is back."""

INHERITED = ("license", "license_name", "license_link", "language", "pipeline_tag")
LISTED_EDITS = 50


@dataclass(frozen=True)
class Words:
    """What a card says of one form of output."""

    library: str
    what: str
    kept: str


STEERED = (
    "Activation edits were compiled into it by `austeer-compile`: it behaves\n"
    "{how}as the base model would with the edits below applied at every token"
)
FORMS: Mapping[str, Words] = {
    "checkpoint": Words(
        "transformers",
        "This is `{base}` **with edited weights**. " + STEERED + ", with no hooks and no custom code.",
        "All other weights are byte for byte those of the base.",
    ),
    "gguf": Words(
        "gguf",
        "This is `{base}` **with edited weights**, as a GGUF. " + STEERED + ", with no hooks and no custom code.",
        "All other weights are those of the base.",
    ),
    "lora": Words(
        "peft",
        "This is an **adapter for `{base}`**, which edits its activations. " + STEERED + ".\n"
        "Without the adapter the base is what it was.",
        "The adapter holds nothing else.",
    ),
    "model-code": Words(
        "transformers",
        "This is `{base}` **with code that edits its activations**. " + STEERED + ".\n"
        "It needs `trust_remote_code=True`; the code is the one file `modeling_austeer.py`.",
        "The base's weights are all there, byte for byte.",
    ),
}

BODY = """\
# {base}, {done}

{what}
{notes}{licence}{recovery}
## What was edited

Program `{sha256}`, {count} edits. The program is in `{program}`, the full record of tensors and slices in `{manifest}`.

| layer | site | edit | what |
|---|---|---|---|
{rows}

{gates}{kept}
Anyone who has the base can check this, and recompute the measurement below, with `austeer-compile verify`.

## How exact it is

{certificate}

## Responsible use

Steering changes behaviour in ways that a benchmark may not show, and it can weaken safety training. The base model's
licence and use policy apply to this model too. Do not remove this card or `{manifest}` when you share it.
"""


APPROXIMATE = f"""\
**This compilation is approximate**: no stock block carries all of these edits exactly. Which of them are approximated
is in `{MANIFEST}` under `lowering`, and what else was tried, if anything was, under `approximations`. An approximation
is certified where its mean KL from the reference is at most half that of the unedited base.

"""


def render_card(
    program: Program,
    base: str,
    base_card: dict[str, Any],
    certificate: Certificate | None,
    *,
    form: str = "checkpoint",
    notes: Sequence[str] = (),
    sides: Mapping[str, SideCheck] | None = None,
    recovery: RecoveryTable = (),
) -> bytes:
    """The README.md of the output. `base_card` is the metadata of the base's own card, for the licence fields.

    `notes` are what else a user should know, a sentence each; `sides` what was measured where gates open or close;
    `recovery` what a pruned base has back.
    """
    import yaml

    words = FORMS[form]

    inherited = {key: base_card[key] for key in INHERITED if base_card.get(key)}
    front = {
        "base_model": base,
        **inherited,
        "library_name": words.library,
        "tags": ["austeer-compile", "activation-steering", "edited-weights"],
    }
    licence = inherited.get("license_name") or inherited.get("license")
    stated = (
        f"\nLicence, from the base's card: {licence}.\n"
        if licence
        else "\nThe base's card states no licence; ask its authors.\n"
    )
    rows = [_row(edit) for edit in program.edits[:LISTED_EDITS]]
    if len(program.edits) > LISTED_EDITS:
        rows.append(f"| … | | | {len(program.edits) - LISTED_EDITS} more in `{MANIFEST}` |")
    how = "approximately " if certificate and certificate.approximate else ""
    listed = "".join(f"\n- {note}" for note in notes) + ("\n" if notes else "")
    body = BODY.format(
        base=base, done="restored" if recovery else "steered", recovery=_recovered(recovery),
        what=words.what.format(base=base, how=how), kept=words.kept, licence=stated, notes=listed,
        sha256=program.sha256, count=len(program.edits), program=PROGRAM,
        manifest=MANIFEST, rows="\n".join(rows), gates=gates_section(program, sides or {}),
        certificate=_measured(certificate),
    )  # fmt: skip
    return f"---\n{yaml.safe_dump(front, sort_keys=True, allow_unicode=True)}---\n\n{body}".encode()


def read_card(folder: Path) -> dict[str, Any]:
    """The metadata of a base's own card; empty if it has none that can be read."""
    import yaml

    try:
        text = (folder / "README.md").read_text(encoding="utf-8")
        front = text.split("---\n", 2)[1] if text.startswith("---\n") else ""
        values = yaml.safe_load(front)
    except (OSError, ValueError, IndexError, yaml.YAMLError):
        return {}
    return values if isinstance(values, dict) else {}


def describe(edit: Edit) -> str:
    """One line on what an edit holds."""
    if isinstance(edit, Scale):
        units = ", ".join(
            f"{unit}: x{1 + gamma:.3g}" for unit, gamma in zip(edit.units[:8], edit.gamma[:8], strict=True)
        )
        more = f", … {len(edit.units) - 8} more" if len(edit.units) > 8 else ""
        return f"{len(edit.units)} units ({units}{more})"
    if isinstance(edit, Gated):
        return _describe_gated(edit)
    sizes = (_size(name, getattr(edit, name)) for name in edit.vectors)
    strength = [f"strength {edit.scalars()['strength']:.4g}"] if "strength" in edit.scalars() else []
    return ", ".join([*strength, *sizes])


def _describe_gated(gated: Gated) -> str:
    gate, inner = gated.gate, gated.edit
    neurons = [f"{gated.neurons.count} fitted neurons"] if gated.neurons else []
    places = [f"in the place of {len(gated.replaces)} neurons"] if gated.replaces else []
    parts = [f"gate {_size('w', gate.w)}, b {gate.b:.4g}, delta {gate.delta:.4g}", *neurons, *places]
    return "; ".join([f"{inner.kind} of {describe(inner)}", *parts])


def _size(name: str, vector: Floats) -> str:
    return f"|{name}| = {float((vector.astype('f8') ** 2).sum()) ** 0.5:.4g}"


def _row(edit: Edit) -> str:
    return f"| {edit.layer} | {edit.site} | {edit.kind} | {describe(edit).replace('|', chr(92) + '|')} |"


def _recovered(table: RecoveryTable) -> str:
    if not table:
        return ""
    rows = "\n".join(f"| {' | '.join(row)} |" for row in table)
    return (
        "\n## What was restored\n\n"
        "Pruning took something from what the attention heads put out. Some heads got a constant that brings a part\n"
        "of it back (RestoreLCC, arXiv 2510.21834). Every weight that pruning made zero still is. Measured on samples\n"
        "that nothing was fitted to:\n\n"
        f"| | dense | pruned | restored | back |\n|---|---|---|---|---|\n{rows}\n"
    )


def _measured(certificate: Certificate | None) -> str:
    if certificate is None:
        return "Not measured at build time. `austeer-compile verify` measures it."
    rows = "\n".join(f"| {name} | {ours} | {base} |" for name, ours, base in certificate.table())
    verdict = "holds" if certificate.passed else "does NOT hold"
    return (
        f"Measured in {certificate.dtype} on {certificate.tokens} tokens of {certificate.texts} texts, against "
        f"{certificate.reference}:\n\n"
        "| | compiled | unedited base |\n|---|---|---|\n"
        f"{rows}\n\n"
        f"{APPROXIMATE if certificate.approximate else ''}"
        f"The certificate {verdict}."
    )
