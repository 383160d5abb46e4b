"""All kinds of edits, and the one that JSON values describe."""

from typing import Any

from austeer.compiler.edits import Edit, Rank1, Scale, Shift
from austeer.compiler.errors import ProgramError
from austeer.compiler.gates import Gated

PLAIN: dict[str, type[Edit]] = {kind.kind: kind for kind in (Scale, Shift, Rank1)}
KINDS: dict[str, type[Edit]] = {**PLAIN, Gated.kind: Gated}


def edit_from(plain: dict[str, Any], what: str) -> Edit:
    """The edit whose `plain()` gave it (vectors may be arrays); ProgramError if there is none."""
    kind = KINDS.get(str(plain.get("kind")))
    if kind is None:
        raise ProgramError(f"{what}: unknown kind {plain.get('kind')!r}; this version knows {', '.join(KINDS)}")
    if kind is Gated:
        return _gated(plain, what)
    given = {name: value for name, value in plain.items() if name != "kind"}
    if given.keys() != set(kind.names()):
        expected = ", ".join(kind.names())
        raise ProgramError(f"{what}: a {kind.kind} has the fields {expected}; got {', '.join(given)}")
    return kind(**given)


def _gated(plain: dict[str, Any], what: str) -> Gated:
    inner = plain.get("edit")
    if not isinstance(inner, dict) or inner.get("kind") not in PLAIN:
        raise ProgramError(f"{what}: a gated edit has an edit of kind {', '.join(PLAIN)}; got {inner!r:.80}")
    edit = edit_from(inner, what)
    place = (plain.get("layer"), plain.get("site"))
    unknown = plain.keys() - {"kind", "layer", "site", "edit", "gate", "neurons", "replaces"}
    if place != (edit.layer, edit.site) or unknown:
        more = f"; unknown: {', '.join(sorted(unknown))}" if unknown else ""
        raise ProgramError(
            f"{what}: a gated edit has the layer and site of its edit, edit, gate, neurons and replaces{more}"
        )
    return Gated.of(plain, edit)
