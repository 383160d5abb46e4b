"""LoRA adapters of PEFT: y += scaling·B(A x) on an output projection is one Rank1 per row of A.

scaling is alpha / r, or alpha / √r with rsLoRA. A is [r, in] and B [out, r] whatever way the base stores its weight.
"""

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from austeer.compiler.edits import Edit, Rank1
from austeer.compiler.errors import InputError, Refused
from austeer.compiler.facts import ModelFacts
from austeer.passes.adopt.adapter import Adapter, Place, places, read_adapter
from austeer.passes.adopt.artefact import Adopted, Asked, numbers

_KINDS = ("lora_A.weight", "lora_B.weight")
# Everything else that is on changes what the two matrices mean: DoRA, biases, modules saved whole, what is to come.
_HARMLESS = frozenset(
    "alpha_pattern auto_mapping base_model_name_or_path corda_config ensure_weight_tying eva_config exclude_modules "
    "fan_in_fan_out inference_mode init_lora_weights layers_pattern layers_to_transform loftq_config lora_alpha "
    "lora_dropout lora_ga_config megatron_core peft_type peft_version qalora_group_size r rank_pattern revision "
    "target_modules task_type use_rslora".split()
)
_BASE_UNCHANGED = (None, True, False, "gaussian", "eva", "orthogonal")  # the other initialisations change the base


def read_lora(file: Path, facts: ModelFacts, asked: Asked) -> Adopted:
    """Rank1 edits on the output projections. Raises Refused for other modules and for variants of LoRA."""
    adapter = read_adapter(file, facts, _KINDS, _HARMLESS)
    start = adapter.config.get("init_lora_weights")
    if start not in _BASE_UNCHANGED:
        raise Refused(
            f"init_lora_weights={start!r} changed the base when training began, so on the base the adapter means "
            "something else; save it with path_initial_model_for_weight_conversion, or merge it"
        )
    entry = facts.architecture
    found = places(adapter, facts, (entry.attn_out, entry.ffn_out))
    edits = [edit for place in found if asked.wanted(place.layer) for edit in _edits(adapter, place)]
    return Adopted(tuple(edits), adapter.notes)


def _edits(adapter: Adapter, place: Place) -> Iterator[Edit]:
    tensors = adapter.modules[place.module]
    if len(tensors) < len(_KINDS):
        raise InputError(f"{place.module} has only one of {' and '.join(_KINDS)}; the adapter is incomplete")
    down, up = (numbers(tensors[kind]) for kind in _KINDS)
    rank = _setting(adapter.config, "r", "rank_pattern", place.module)
    if down.ndim != 2 or up.ndim != 2 or not down.shape[0] == up.shape[1] == rank:
        shapes = f"{list(down.shape)} and {list(up.shape)}"
        raise InputError(f"{place.module}: lora_A and lora_B are {shapes}; expected [{rank}, in] and [out, {rank}]")
    alpha = _setting(adapter.config, "lora_alpha", "alpha_pattern", place.module)
    scaling = alpha / (math.sqrt(rank) if adapter.config.get("use_rslora") else rank)
    site = "heads" if place.linear.inputs == "heads" else "neurons"
    for row, column in zip(down, up.T, strict=True):
        yield Rank1(place.layer, site, row, column, scaling)


def _setting(config: Mapping[str, Any], key: str, pattern: str, module: str) -> Any:
    """A positive number: the one whose pattern matches the end of the module's name, else the general one."""
    patterns: Any = config.get(pattern) or {}
    try:
        matching = (found for part, found in patterns.items() if re.match(rf"(.*\.)?({part})$", module))
        value: Any = next(matching, config.get(key))
    except (re.error, AttributeError) as error:
        raise InputError(f"{pattern} of the adapter's configuration cannot be read ({error})") from None
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise InputError(f"{key} of {module} is {value!r}, not a positive number")
    return value
