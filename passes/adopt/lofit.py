"""LoFiT (arXiv 2406.01563): head outputs x ← (1 + A)·x + v, trained parameters in a checkpoint of its own class.

They are called `...layers.N.self_attn.attn_A.H` and `attn_v.H`, one vector of head_dim numbers a head. Everything
else in such a checkpoint is the frozen base. (LoFiT's own `.npy` files list the heads that were chosen, no more.)
"""

import re
from pathlib import Path
from typing import Any

import numpy as np

from austeer.compiler.edits import Edit, Floats, Shift, as_vector
from austeer.compiler.errors import InputError
from austeer.compiler.facts import ModelFacts
from austeer.compiler.tensors import read_header
from austeer.passes.adopt.artefact import Adopted, Asked, head_count, numbers, scale_all

_NAME = re.compile(r"(?:.*\.)?layers\.([0-9]{1,6})\.self_attn\.attn_([Av])\.([0-9]{1,6})")


def is_lofit(name: str) -> bool:
    """Whether a tensor of this name is a LoFiT parameter."""
    return _NAME.fullmatch(name) is not None


def read_lofit(file: Path, facts: ModelFacts, asked: Asked) -> Adopted:
    """A Scale and a Shift of head outputs per layer, where not zero. Raises InputError for heads that do not fit."""
    tensors, _ = read_header(file)
    layers: dict[int, dict[str, dict[int, Any]]] = {}
    for name, tensor in tensors.items():
        found = _NAME.fullmatch(name)
        if found and asked.wanted(int(found[1])):
            by_kind = layers.setdefault(int(found[1]), {"A": {}, "v": {}})
            by_kind[found[2]][int(found[3])] = as_vector(numbers(tensor), name)
    others = sum(not is_lofit(name) for name in tensors)
    note = (f"{others} other tensors are taken for the frozen base and left out",) * bool(others)
    head_dim = facts.geometry.heads // head_count(facts)
    edits = [edit for layer in sorted(layers) for edit in _edits(layer, layers[layer], facts.geometry.heads, head_dim)]
    return Adopted(tuple(edits), note)


def _edits(layer: int, kinds: dict[str, dict[int, Floats]], width: int, head_dim: int) -> list[Edit]:
    scale, shift = (_joined(kinds[kind], width, head_dim, f"attn_{kind} of layer {layer}") for kind in "Av")
    edits: list[Edit] = list(scale_all(layer, "heads", 1 + scale))
    return [*edits, Shift(layer, "heads", shift)] if shift.any() else edits


def _joined(heads: dict[int, Floats], width: int, head_dim: int, what: str) -> Floats:
    """The vectors of all heads in one; a head that was not trained has zeros."""
    joined = np.zeros(width, np.float32)
    for head, vector in heads.items():
        begin, end = head * head_dim, (head + 1) * head_dim
        if len(vector) != head_dim or end > width:
            raise InputError(
                f"{what}: head {head} has {len(vector)} units; the model has {width // head_dim} heads of {head_dim}"
            )
        joined[begin:end] = vector
    return joined
