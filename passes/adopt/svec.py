"""CAST steering vectors of IBM's activation-steering (`.svec`): JSON with a list of numbers per layer.

Its layer wrapper adds direction N to what block N *receives*, which is the output of block N − 1.
"""

from pathlib import Path
from typing import Any, cast

from austeer.compiler.checkpoint import read_json
from austeer.compiler.errors import InputError, Refused, UsageError
from austeer.compiler.facts import ModelFacts
from austeer.passes.adopt.artefact import Adopted, Asked, other_model, shifts

_NOTE = (
    "direction N is what CAST adds before block N: here a shift of the residual stream after block N - 1. "
    "Its conditions and its norm-preserving option are not in the file and are not compiled"
)


def read_svec(file: Path, facts: ModelFacts, asked: Asked) -> Adopted:
    """A Shift of the residual stream per wanted layer. Raises InputError for another file, Refused for layer 0."""
    fields = read_json(file)
    directions = _directions(fields.get("directions"))
    if asked.layers is None:
        raise UsageError(
            "a .svec has a direction for every layer, and which ones steer is said when it is used: "
            f"say --layers, as behavior_layer_ids; it has {min(directions)} to {max(directions)}"
        )
    if 0 in asked.layers:
        raise Refused("direction 0 is added to the embeddings, where no block can carry it: leave 0 out of --layers")
    after = {layer - 1: vector for layer, vector in directions.items() if layer in asked.layers}
    # `asked` counts as CAST does, so what it names is checked here, and all that is left is wanted.
    missing = sorted(asked.layers - directions.keys())
    if missing:
        raise InputError(f"there is no direction for layer {missing[0]}, which --layers names")
    return Adopted(shifts(after, "residual", Asked()), (*other_model(fields.get("model_type"), facts), _NOTE))


def _directions(found: Any) -> dict[int, Any]:
    if not isinstance(found, dict) or not found:
        raise InputError("this is not a CAST steering vector: it has no `directions` from layers to vectors")
    named = cast("dict[str, Any]", found)
    wrong = [layer for layer in named if not (layer.isascii() and layer.isdigit() and len(layer) < 7)]
    if wrong:
        raise InputError(f"`directions` names the layer {wrong[0]!r}, which is not a whole number from 0")
    return {int(layer): vector for layer, vector in named.items()}
