"""AUSteer's screening (`all_scores.pt`): the signed score β of every unit, without a strength.

Beside it lie `all_layer_ids.pt` and `all_indices.pt`, lists of the same length: each score's layer and window
[begin, end) of units. The order is layer-major, with windows of one unit in the published setting.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np

from austeer.compiler.errors import InputError, Refused, UsageError
from austeer.compiler.facts import ModelFacts
from austeer.compiler.sites import SPACE
from austeer.passes.adopt.artefact import Adopted, Asked
from austeer.passes.adopt.pickles import load_plain
from austeer.passes.localize import Scores

SCORES, LAYERS, WINDOWS = "all_scores.pt", "all_layer_ids.pt", "all_indices.pt"


def read_austeer_scores(file: Path, facts: ModelFacts, asked: Asked) -> Adopted:
    """The top k units of all layers by |β|, scaled by γ = α·β (arXiv 2602.04428).

    Raises UsageError where site, k or α is not given, InputError for scores that do not fit the model.
    """
    site = asked.require_site()
    if asked.top_k is None or asked.alpha is None:
        raise UsageError(
            "the scores rank units and say neither how many to scale nor how much: say --top-k and --alpha"
        )
    layers, width = facts.geometry.layers, facts.geometry.width(SPACE[site])
    beta = _scores(load_plain(file))
    if beta.size != layers * width:
        raise InputError(
            f"{beta.size} scores; site {site} of {facts.geometry.name} has {layers} layers of {width} units"
        )
    notes = _check_order(file.parent, layers, width)
    scores = Scores(site, tuple(range(layers)), beta.reshape(layers, width), pairs=0)
    return Adopted(scores.select(asked.top_k, asked.alpha, facts.geometry).edits, notes)


def _scores(found: Any) -> "np.ndarray[Any, np.dtype[np.float32]]":
    if not isinstance(found, list) or not all(type(score) in (int, float) for score in found):
        raise InputError("this is not AUSteer's list of scores")
    if not all(math.isfinite(score) and abs(score) <= 1 for score in found):
        raise InputError("a score is outside of -1 to 1, so these are not AUSteer's")
    return np.array(found, np.float32)


def _check_order(folder: Path, layers: int, width: int) -> tuple[str, ...]:
    """Raises InputError or Refused unless the scores are those of single units, layer after layer."""
    if not (folder / LAYERS).is_file() or not (folder / WINDOWS).is_file():
        return (f"{LAYERS} and {WINDOWS} do not lie beside the scores, which are taken as one a unit, layer by layer",)
    if load_plain(folder / LAYERS) != [layer for layer in range(layers) for _ in range(width)]:
        raise InputError(f"{LAYERS} does not name the layers in order, each once a unit")
    windows: Any = load_plain(folder / WINDOWS)
    if windows != [(unit, unit + 1) for _ in range(layers) for unit in range(width)]:
        raise Refused(f"{WINDOWS} has windows of several units; only scores of single units are read")
    return ()
