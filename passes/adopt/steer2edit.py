"""Steer2Edit's rank-1 edits (`.pt`; arXiv 2602.09870): ΔW = λ v̂ k̂ᵀ per attention head and per FFN neuron.

    {"attn": {(layer, head): {"lambda": λ, "k_hat": [head_dim]}},
     "mlp": {(layer, neuron): {"lambda": λ}},                      # k̂ is the neuron, its sign is in λ
     "meta": {"vhat_attn": {layer: [residual]}, "vhat_mlp": {layer: [residual]}, ...}}

All edits of a layer and block share v̂, so together they are one Rank1 whose k is the sum of λ k̂.
"""

from pathlib import Path
from typing import Any, Literal, cast

import numpy as np

from austeer.compiler.edits import Floats, Rank1, as_number
from austeer.compiler.errors import InputError
from austeer.compiler.facts import ModelFacts
from austeer.passes.adopt.artefact import Adopted, Asked, head_count
from austeer.passes.adopt.pickles import load_plain, plain_vector

Parts = dict[tuple[int, int], dict[str, Any]]


def read_steer2edit(file: Path, facts: ModelFacts, asked: Asked) -> Adopted:
    """One Rank1 per layer and block. Raises InputError for a file of another kind or for another model."""
    found: Any = load_plain(file)
    if isinstance(found, list):
        raise InputError("this is a list; AUSteer's scores are recognised by their name, all_scores.pt")
    edits = [
        *_edits(found, "attn", "heads", facts, asked),
        *_edits(found, "mlp", "neurons", facts, asked),
    ]
    return Adopted(tuple(sorted(edits, key=lambda edit: edit.layer)))


def _edits(found: Any, part: str, site: Literal["heads", "neurons"], facts: ModelFacts, asked: Asked) -> list[Rank1]:
    directions = _field(_field(found, "meta"), f"vhat_{part}")
    width = facts.geometry.width(site)
    step = width // head_count(facts) if part == "attn" else 1
    k_of: dict[int, Floats] = {}
    for (layer, unit), fields in _addressed(_field(found, part), part).items():
        if asked.wanted(layer):
            k_hat = _scaled_k(fields, f"{part} {(layer, unit)}", in_head=part == "attn")
            begin, end = unit * step, (unit + 1) * step
            if len(k_hat) != step or end > width:
                has = f"{part} {(layer, unit)} has {len(k_hat)} units"
                raise InputError(f"{has}; {facts.geometry.name} has {width // step} times {step}")
            k_of.setdefault(layer, np.zeros(width, np.float32))[begin:end] = k_hat
    return [
        Rank1(layer, site, k, plain_vector(_field(directions, layer), f"vhat_{part} of layer {layer}"), 1.0)
        for layer, k in k_of.items()
    ]


def _scaled_k(fields: Any, what: str, *, in_head: bool) -> Floats:
    strength = np.float32(as_number(_field(fields, "lambda"), f"{what}: lambda"))
    k_hat = plain_vector(_field(fields, "k_hat"), f"{what}: k_hat") if in_head else np.ones(1, np.float32)
    return strength * k_hat


def _field(fields: Any, key: Any) -> Any:
    if not isinstance(fields, dict) or key not in fields:
        raise InputError(f"there is no {key!r}: this is not Steer2Edit's file of rank-1 edits")
    return cast("dict[Any, Any]", fields)[key]


def _addressed(fields: Any, part: str) -> Parts:
    named = cast("dict[Any, Any]", fields) if isinstance(fields, dict) else {None: None}
    for address in named:
        pair = cast("tuple[Any, ...]", address) if isinstance(address, tuple) else ()
        if len(pair) != 2 or not all(type(number) is int and number >= 0 for number in pair):
            raise InputError(f"{part} names {address!r}, which is not a pair of a layer and a head or neuron")
    return cast("Parts", named)
