"""Vectors of steering-lite (`.safetensors`): `layerN.v` is added, times `coeff`, to the output of block N."""

import json
import re
from pathlib import Path
from typing import Any, cast

import numpy as np

from austeer.compiler.edits import Shift, as_number
from austeer.compiler.errors import InputError, Refused
from austeer.compiler.facts import ModelFacts
from austeer.compiler.tensors import TensorInfo, read_header
from austeer.passes.adopt.artefact import Adopted, Asked, numbers, shifts

ADDITIVE = ("mean_diff", "pca")  # the methods that do h + coeff·v and nothing else
_NAME = re.compile(r"layer(0|[1-9][0-9]{0,5})\.(?:shared\.)?(v|V)")


def read_steering_lite(file: Path, facts: ModelFacts, asked: Asked) -> Adopted:
    """A Shift of the residual stream per layer. Raises Refused for a method that is more than an addition."""
    del facts  # the format names no model
    tensors, header = read_header(file)
    config = _config(header.metadata.get("cfg", ""))
    method = config.get("method")
    if method not in ADDITIVE:
        raise Refused(f"steering-lite's method {method!r} does not add a constant; only {', '.join(ADDITIVE)} compile")
    if config.get("target", "residual") != "residual" or config.get("target_submodule"):
        raise Refused("it is not meant for the output of a block (target or target_submodule in its cfg)")
    coefficient = as_number(config.get("coeff", 1.0), "coeff in its cfg")
    directions = dict(_direction(name, tensor) for name, tensor in tensors.items())
    found = shifts(directions, "residual", asked)
    return Adopted(tuple(Shift(edit.layer, edit.site, np.float32(coefficient) * edit.vector) for edit in found))


def _config(text: str) -> dict[str, Any]:
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"its metadata `cfg` is not JSON ({error})") from None
    if not isinstance(config, dict):
        raise InputError("its metadata `cfg` is not a JSON object")
    return cast("dict[str, Any]", config)


def _direction(name: str, tensor: TensorInfo) -> tuple[int, Any]:
    found = _NAME.fullmatch(name)
    if found is None:
        raise InputError(f"tensor {name!r} is not called layerN.v, as steering-lite's {' and '.join(ADDITIVE)} do")
    vector = numbers(tensor)
    return int(found[1]), vector.sum(0) if found[2] == "V" and vector.ndim == 2 else vector  # V: several components
