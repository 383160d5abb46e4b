"""One vector a layer in a `.safetensors` file: what is saved of steering-vectors' `layer_activations`.

steering-vectors itself writes no file. Its users save `{str(layer): vector}`; where they also save its
`layer_type` as metadata, that names the module whose output the vectors are added to.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from austeer.compiler.errors import InputError, Refused
from austeer.compiler.facts import ModelFacts
from austeer.compiler.sites import SiteName
from austeer.compiler.tensors import read_header
from austeer.passes.adopt.artefact import Adopted, Asked, numbers, shifts

SITE_OF: Mapping[str, SiteName] = {"decoder_block": "residual", "self_attn": "attn", "mlp": "ffn"}
_NAME = re.compile(r"(?:layers?[._]?)?(0|[1-9][0-9]{0,5})")


def read_layer_vectors(file: Path, facts: ModelFacts, asked: Asked) -> Adopted:
    """A Shift per layer at the site its metadata or the user names. Raises InputError for other tensors."""
    del facts  # the format names no model
    tensors, header = read_header(file)
    site = asked.site or _site(header.metadata.get("layer_type")) or asked.require_site()
    names = {name: _NAME.fullmatch(name) for name in tensors}
    strange = [name for name, found in names.items() if found is None]
    if strange:
        raise InputError(f"tensor {strange[0]!r} is not named after a layer, such as 12 or layer_12")
    directions = {int(found[1]): numbers(tensors[name]) for name, found in names.items() if found}
    if len(directions) < len(names):
        raise InputError("two tensors are named after one layer; leave one of them out")
    return Adopted(shifts(directions, site, asked))


def _site(layer_type: str | None) -> SiteName | None:
    if layer_type is None:
        return None
    if layer_type not in SITE_OF:
        raise Refused(f"it acts on the output of {layer_type!r}; only {', '.join(SITE_OF)} have a site in a program")
    return SITE_OF[layer_type]
