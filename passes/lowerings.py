"""The lowerings that a target allows for an architecture, edit kind and site, best first, or why there are none."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from austeer.compiler.architectures import ARCHITECTURES, Architecture, Flag, Linear
from austeer.compiler.edits import Edit, Scale, Shift
from austeer.compiler.form import Route
from austeer.compiler.gates import Gated
from austeer.compiler.reexpress import carriers
from austeer.compiler.target import KEEPS, Row, Target, Treatment

WHY: Mapping[Treatment, str] = {
    "drops": "{target} drops {name} of {architecture} in silence",
    "warns": "{target} has no {name} in {architecture} and leaves the tensor out",
    "refuses": "{target} does not load a {architecture} that has {name}",
    "differs": "{target} honours {name} of {architecture} and transformers does not: it would be two models",
}
UNANNOUNCED = "transformers has no {name} in {architecture}, whatever {target} does with it: it would be two models"
NORMED = "the architecture norms what its projections write, so no bias is a constant shift there"
FIXED_WIDTH = (
    "the engine has one width for the FFN of a {architecture}, so a gate's neurons have to take the place of others: "
    "--neurons reuse"
)
SCALED_RESIDUAL = (
    "the residual stream is read through a norm, so no weight of a stock block scales it; --approximate compiles the "
    "nearest that one can do, measured and marked"
)


@dataclass(frozen=True)
class Lowering:
    """One way of carrying an edit: in the weights (no route), or by a route for its constant.

    `carrier` is the architecture the model is then written as. `out_bias` and `period` as in ModelForm.
    """

    carrier: str
    route: Route | None = None
    out_bias: bool = True
    period: int = 1

    def describe(self, architecture: str) -> str:
        """In two or three words, for tables."""
        how = (self.route or "weights").replace("-", " ")
        return how if self.carrier == architecture else f"{how} as {self.carrier}"


def lowerings(
    kind: type[Edit], site: str, architecture: str, target: Target, *, post_norm: bool
) -> list[Lowering] | str:
    """All lowerings of an edit, best first; if there are none, the reason.

    What only some models of the architecture have (a window, experts, the vector's own values) is legalize's to ask.
    """
    if target.members:
        return _shared(kind, site, architecture, target, post_norm=post_norm)
    found = [
        lowering
        for carrier in carriers(architecture)
        if isinstance(row := target.row(carrier), Row)
        for lowering in _in_architecture(kind, site, ARCHITECTURES[carrier], row, post_norm=post_norm)
    ]
    if not found:
        return why_not(kind, site, architecture, target, post_norm=post_norm)
    if kind is Gated:
        return sorted(found, key=lambda lowering: lowering.route is None)
    return sorted(found, key=lambda lowering: lowering.route in ("split-layer", "constant-layer"))


def unkept(linears: Iterable[Linear], architecture: str, target: Target) -> str | None:
    """Why a target does not even run the base in this architecture: one of these biases, which it has, is lost."""
    if target.members:
        return next(filter(None, (unkept(linears, architecture, member) for member in target.members)), None)
    row, entry = target.row(architecture), ARCHITECTURES[architecture]
    if isinstance(row, str):
        return row
    for linear in linears:
        treatment = row.attn if linear == entry.attn_out else row.qkv if linear.of_attention else row.ffn
        if linear.bias is not True and treatment not in KEEPS:
            why = WHY[treatment].format(target=target, name=f"{linear.name}.bias", architecture=architecture)
            return f"the base has {linear.name}.bias, and {why}"
    return None


def _shared(kind: type[Edit], site: str, architecture: str, target: Target, *, post_norm: bool) -> list[Lowering] | str:
    """What every member keeps in one and the same form."""
    found = [lowerings(kind, site, architecture, member, post_norm=post_norm) for member in target.members]
    reasons = [reason for reason in found if isinstance(reason, str)]
    if reasons:
        return "; ".join(dict.fromkeys(reasons))
    lists = [ways for ways in found if not isinstance(ways, str)]
    shared = [lowering for lowering in lists[0] if all(lowering in others for others in lists)]
    if shared:
        return shared
    ways = (
        f"{member.title} {' or '.join(way.describe(architecture) for way in ways)}"
        for member, ways in zip(target.members, lists, strict=True)
    )
    return f"no one form is kept by all: {'; '.join(ways)}"


def _in_architecture(
    kind: type[Edit], site: str, entry: Architecture, row: Row, *, post_norm: bool
) -> Iterator[Lowering]:
    name = entry.model_type
    if kind is Gated:
        yield from _by_neurons(entry, row, post_norm=post_norm)
    elif site == "residual" and post_norm and entry.block_norm:
        yield Lowering(name, "norm")
    elif kind is not Shift:
        if (kind, site) != (Scale, "residual"):
            yield Lowering(name)
    elif not (post_norm and site == "residual"):
        at_attention = site in ("heads", "attn")
        if _keeps(entry.attn_out if at_attention else entry.ffn_out, row.attn if at_attention else row.ffn):
            yield Lowering(name, "bias")
    if kind is Shift:
        yield from _by_values(site, entry, row, post_norm=post_norm)


def _by_neurons(entry: Architecture, row: Row, *, post_norm: bool) -> Iterator[Lowering]:
    """Neurons with biases, or else without: those take a direction in which their input is nearly constant."""
    if _gateless(entry, row, post_norm=post_norm):
        return
    if _keeps(entry.ffn_out, row.ffn):
        yield Lowering(entry.model_type, "bias")
    yield Lowering(entry.model_type)


def _gateless(entry: Architecture, row: Row, *, post_norm: bool) -> str:
    """Why neurons cannot carry a gate; empty if they can."""
    if post_norm:
        return "a norm stands after the FFN, so nothing that a neuron adds is a given vector in the stream"
    if entry.experts is not None:
        return f"{entry.model_type} has mixtures of experts, and a gate needs an FFN of its own"
    return "" if row.widens else FIXED_WIDTH


def _by_values(site: str, entry: Architecture, row: Row, *, post_norm: bool) -> Iterator[Lowering]:
    """Everything that needs a bias of v_proj, which stands in for a constant attention."""
    if entry.values is None or not _keeps(entry.values, row.qkv) or entry.block_norm:
        return
    out_bias = row.attn != "refuses" or not isinstance(entry.attn_out.bias, Flag)
    if site == "heads":
        yield Lowering(entry.model_type, "value-bias", out_bias)
    if not row.layers:
        return
    if site in ("heads", "attn") and not post_norm:
        yield Lowering(entry.model_type, "split-layer", out_bias, row.period)
    if site == "residual" or (site in ("neurons", "ffn") and not post_norm):
        yield Lowering(entry.model_type, "constant-layer", out_bias, row.period)


def _keeps(linear: Linear, treatment: Treatment) -> bool:
    """Whether a bias is there or can be switched on, and counts."""
    return linear.bias is True or (isinstance(linear.bias, Flag) and treatment in KEEPS)


def why_not(kind: type[Edit], site: str, architecture: str, target: Target, *, post_norm: bool) -> str:
    """Why the stock weights of an architecture do not carry an edit in a target."""
    row = target.row(architecture)
    if isinstance(row, str):
        return row
    if kind is Scale:
        return SCALED_RESIDUAL
    entry = ARCHITECTURES[architecture]
    if kind is Gated:
        return _gateless(entry, row, post_norm=post_norm).format(architecture=architecture)
    if post_norm and site in ("neurons", "ffn"):
        return NORMED
    at_attention = site in ("heads", "attn")
    linear, treatment = (entry.attn_out, row.attn) if at_attention else (entry.ffn_out, row.ffn)
    reason = _lost(linear, treatment, architecture, target)
    could_insert = not row.layers and entry.values is not None and entry.values.bias is not False and row.qkv in KEEPS
    return f"{reason}, and nobody has seen it run one with an inserted layer" if could_insert else reason


def biasless(architecture: str, target: Target) -> str:
    """Why a target keeps no bias of the FFN in an architecture; empty if it keeps it."""
    if target.members:
        return next(filter(None, (biasless(architecture, member) for member in target.members)), "")
    row, linear = target.row(architecture), ARCHITECTURES[architecture].ffn_out
    if isinstance(row, str):
        return row
    return "" if _keeps(linear, row.ffn) else _lost(linear, row.ffn, architecture, target)


def _lost(linear: Linear, treatment: Treatment, architecture: str, target: Target) -> str:
    why = WHY.get(treatment, UNANNOUNCED)
    return why.format(target=target, name=f"{linear.name}.bias", architecture=architecture)
