"""Where an edit sits in the code of the form `model-code`: its parts, each at one module of the model."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from austeer.compiler.edits import Edit, Floats, Rank1, Scale, Shift
from austeer.compiler.errors import Refused
from austeer.compiler.facts import ModelFacts
from austeer.compiler.gates import Gated


@dataclass(frozen=True)
class Part:
    """What one module does for an edit: a class of the code by its `kind`, its float32 vectors and its numbers.

    `module` is its name seen from the decoder, `place` where in its forward pass the part is used.
    """

    module: str
    place: str
    kind: str
    vectors: Mapping[str, Floats] = field(default_factory=dict[str, Floats])
    constants: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def plain(self) -> dict[str, Any]:
        """As JSON values, without the vectors."""
        return {"module": self.module, "place": self.place, "kind": self.kind, **self.constants}


def parts_of(edit: Edit, facts: ModelFacts) -> tuple[Part, ...]:
    """One part, or those of a gated edit: what it adds, its gate, the norm between, and the end of its block.

    Raises Refused if a layer has no such site, or no FFN for a gate to read with.
    """
    if isinstance(edit, Gated):
        return tuple(_gated(edit, facts))
    return (Part(*_place(edit, facts), edit.kind, _vectors(edit, facts, kept=1)),)


def _gated(gated: Gated, facts: ModelFacts) -> Iterator[Part]:
    block, edit, gate = _block(gated, facts), gated.edit, gated.gate
    module, place = _place(edit, facts)
    kind = "constant" if isinstance(edit, Shift) else edit.kind
    yield Part(module, f"gated_{place}", kind, _vectors(edit, facts, kept=0))
    first = facts.ffn_in(gated.layer).name
    # A module that owns the FFN reads what its first map reads, and leaves that one to the engine.
    reader, act = first.rpartition(".")[0] or first, facts.architecture.activation.of(facts.config)
    yield Part(block + reader, "gate", "gate", {"w": gate.w}, {"b": gate.b, "delta": gate.delta, "act": act})
    if norm := facts.output_norm(gated.site):
        yield Part(block + norm, "norm", "mark")
    yield Part(block.rstrip("."), "sum", "mark")


def _place(edit: Edit, facts: ModelFacts) -> tuple[str, str]:
    """The module, seen from the decoder, and the place there: "input", "output", or "rank1", from one to the other."""
    entry, role, block = facts.architecture, facts.role(edit), _block(edit, facts)
    if edit.site == "residual":
        return block.rstrip("."), "output"
    place = "rank1" if isinstance(edit, Rank1) else "input" if edit.site in ("heads", "neurons") else "output"
    if role == "attn_out" or entry.experts is None or not facts.has_experts(edit.layer):
        return block + facts.projection(role).name, place
    if edit.site == "neurons":
        raise Refused(f"{edit.where}: the layer is a mixture of experts, so a neuron has no one place; use site ffn")
    return block + entry.experts.module, place


def _block(edit: Edit, facts: ModelFacts) -> str:
    return facts.architecture.block.format(layer=edit.layer)


def _vectors(edit: Edit, facts: ModelFacts, *, kept: int) -> dict[str, Floats]:
    """As wide as their spaces; what the interpreter computes from constants is done. A scale keeps x, or adds to it."""
    if isinstance(edit, Scale):
        factor = np.full(facts.geometry.width(edit.space), kept, np.float32)
        factor[list(edit.units)] += edit.gamma
        return {"factor": factor}
    if isinstance(edit, Shift):
        return {"vector": edit.vector}
    assert isinstance(edit, Rank1), edit.where
    return {"k": edit.k, "v": np.float32(edit.strength) * edit.v}
