"""IA3 adapters of PEFT: a learned factor per input (feed-forward modules) or output of a projection.

The factors of v_proj pass through the attention's weighted mean, so they scale every head of their KV group; those of
k_proj change the attention weights themselves, which no edit does.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from austeer.compiler.architectures import Linear
from austeer.compiler.edits import Edit, Floats
from austeer.compiler.errors import InputError
from austeer.compiler.facts import ModelFacts
from austeer.compiler.sites import SPACE, SiteName
from austeer.passes.adopt.adapter import Adapter, Place, places, read_adapter
from austeer.passes.adopt.artefact import Adopted, Asked, head_count, numbers, scale_all

_KINDS = ("ia3_l",)
_HARMLESS = frozenset(
    "auto_mapping base_model_name_or_path exclude_modules fan_in_fan_out feedforward_modules inference_mode "
    "init_ia3_weights peft_type peft_version revision target_modules task_type".split()
)


def read_ia3(file: Path, facts: ModelFacts, asked: Asked) -> Adopted:
    """Scales of heads, neurons and block outputs. Raises Refused for k_proj and every other module."""
    adapter = read_adapter(file, facts, _KINDS, _HARMLESS)
    entry = facts.architecture
    # None where q, k and v are fused: factors of such a map are those of k too.
    values = tuple(linear for linear in entry.inputs if linear.outputs == ("kv",) and linear.name.endswith("v_proj"))
    found = places(adapter, facts, (*values, entry.attn_out, entry.ffn_out))
    edits = [edit for place in found if asked.wanted(place.layer) for edit in _edits(adapter, place, facts)]
    return Adopted(tuple(edits), adapter.notes)


def _edits(adapter: Adapter, place: Place, facts: ModelFacts) -> Iterator[Edit]:
    factors = numbers(adapter.modules[place.module]["ia3_l"])
    at_input = factors.ndim == 2 and factors.shape[0] == 1  # PEFT: [1, in] in feed-forward modules, else [out, 1]
    if not at_input and not (factors.ndim == 2 and factors.shape[1] == 1):
        raise InputError(f"{place.module}: ia3_l has shape {list(factors.shape)}, neither [1, in] nor [out, 1]")
    if place.linear.outputs == ("kv",):
        yield from scale_all(place.layer, "heads", _repeated(factors, place, facts))
        return
    site = _site(place.linear, at_input=at_input)
    width = facts.geometry.width(SPACE[site])
    if factors.size != width:
        raise InputError(f"{place.module}: {factors.size} factors; site {site} has {width} units")
    yield from scale_all(place.layer, site, factors.ravel())


def _site(linear: Linear, *, at_input: bool) -> SiteName:
    if linear.inputs == "heads":
        return "heads" if at_input else "attn"
    return "neurons" if at_input else "ffn"


def _repeated(factors: Floats, place: Place, facts: ModelFacts) -> Floats:
    """The factors of the values, given to each query head of their group."""
    heads = head_count(facts)
    head_dim = facts.geometry.heads // heads
    if factors.shape != (facts.kv, 1):
        raise InputError(f"{place.module}: ia3_l has shape {list(factors.shape)}; expected [{facts.kv}, 1]")
    groups = factors.reshape(-1, head_dim)
    return np.repeat(groups, heads // len(groups), axis=0).ravel()
