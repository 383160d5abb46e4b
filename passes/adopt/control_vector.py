"""Control vectors of repeng and llama.cpp (GGUF): `direction.N` is added to the output of block N, counted from 0.

llama.cpp adds it after the block's feed-forward residual. repeng wraps `layers[N]` and adds to what it returns;
negative layers become positive ones before they are written. Both are the residual site of layer N.
"""

import re
from pathlib import Path

from austeer.compiler.errors import InputError
from austeer.compiler.facts import ModelFacts
from austeer.compiler.gguf import read_gguf
from austeer.passes.adopt.artefact import Adopted, Asked, other_model, shifts

_DIRECTION = re.compile(r"direction\.(0|[1-9][0-9]{0,5})")


def read_control_vector(file: Path, facts: ModelFacts, asked: Asked) -> Adopted:
    """A Shift of the residual stream per direction. Raises InputError for any other GGUF."""
    gguf = read_gguf(file)
    architecture = gguf.metadata.get("general.architecture")
    if architecture != "controlvector":
        raise InputError(f"this GGUF holds a {architecture!r}, not a 'controlvector' as repeng and llama.cpp write it")
    directions = {_layer(name): gguf.values(tensor) for name, tensor in gguf.tensors.items()}
    notes = other_model(gguf.metadata.get("controlvector.model_hint"), facts)
    if 0 in directions and asked.wanted(0):
        notes += ("direction.0 acts as it does in repeng; llama.cpp refuses it",)
    return Adopted(shifts(directions, "residual", asked), notes)


def _layer(name: str) -> int:
    found = _DIRECTION.fullmatch(name)
    if found is None:
        raise InputError(f"tensor {name!r} is not called direction.N with a layer N from 0")
    return int(found[1])
