"""The formats of other tools that are read, as a table, and which of them a file or folder is."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from austeer.compiler.checkpoint import read_json
from austeer.compiler.errors import InputError, Refused
from austeer.compiler.facts import ModelFacts
from austeer.compiler.program import METADATA_KEY
from austeer.compiler.tensors import read_header
from austeer.passes.adopt import adapter
from austeer.passes.adopt.artefact import Adopted, Asked
from austeer.passes.adopt.austeer_scores import SCORES, read_austeer_scores
from austeer.passes.adopt.control_vector import read_control_vector
from austeer.passes.adopt.head_array import read_array
from austeer.passes.adopt.ia3 import read_ia3
from austeer.passes.adopt.layer_vectors import read_layer_vectors
from austeer.passes.adopt.lofit import is_lofit, read_lofit
from austeer.passes.adopt.lora import read_lora
from austeer.passes.adopt.steer2edit import read_steer2edit
from austeer.passes.adopt.steering_lite import read_steering_lite
from austeer.passes.adopt.svec import read_svec

Reader: TypeAlias = Callable[[Path, ModelFacts, Asked], Adopted]


@dataclass(frozen=True)
class Format:
    """A format: its name for people, its reader, and the fields of `Asked` that mean something to it."""

    name: str
    read: Reader
    takes: tuple[str, ...] = ("layers",)


CONTROL_VECTOR = Format("control vector of repeng or llama.cpp", read_control_vector)
SVEC = Format("CAST steering vector", read_svec)
STEERING_LITE = Format("steering-lite vector", read_steering_lite)
LAYER_VECTORS = Format("steering vectors by layer", read_layer_vectors, ("site", "layers"))
LOFIT = Format("LoFiT parameters", read_lofit)
ARRAY = Format("array of shifts", read_array, ("site", "layers"))
IA3 = Format("IA3 adapter", read_ia3)
LORA = Format("LoRA adapter", read_lora)
SCORES_OF_AUSTEER = Format("AUSteer scores", read_austeer_scores, ("site", "top_k", "alpha"))
STEER2EDIT = Format("Steer2Edit rank-1 edits", read_steer2edit)

ADAPTERS: Mapping[str, Format] = {"IA3": IA3, "LORA": LORA}
BY_SUFFIX: Mapping[str, Format] = {".gguf": CONTROL_VECTOR, ".svec": SVEC, ".npy": ARRAY, ".pt": STEER2EDIT}


def recognise(artefact: Path) -> tuple[Format, Path]:
    """The format of an artefact, and the file that holds its numbers. Raises InputError or Refused for no format."""
    if not artefact.exists():
        raise InputError("there is no such file or directory")
    if artefact.is_dir():
        return _folder(artefact)
    if artefact.name == SCORES:
        return SCORES_OF_AUSTEER, artefact
    if artefact.name in (adapter.CONFIG, adapter.WEIGHTS):
        return _folder(artefact.parent)
    if artefact.suffix == ".safetensors":
        return _safetensors(artefact), artefact
    if artefact.suffix not in BY_SUFFIX:
        raise InputError(
            f"its name does not tell a format: known are .safetensors, {', '.join(BY_SUFFIX)}, and folders of adapters"
        )
    return BY_SUFFIX[artefact.suffix], artefact


def _folder(folder: Path) -> tuple[Format, Path]:
    if (folder / SCORES).is_file():
        return SCORES_OF_AUSTEER, folder / SCORES
    if not (folder / adapter.CONFIG).is_file():
        raise InputError(f"a folder with neither {adapter.CONFIG} nor {SCORES}; give the file itself")
    kind = str(read_json(folder / adapter.CONFIG).get("peft_type"))
    if kind not in ADAPTERS:
        raise Refused(f"a PEFT adapter of type {kind!r}; {' and '.join(ADAPTERS)} become programs. Merge it instead")
    if not (folder / adapter.WEIGHTS).is_file():
        raise InputError(f"there is no {adapter.WEIGHTS}; a .bin is a pickle and is not read: save the adapter anew")
    return ADAPTERS[kind], folder / adapter.WEIGHTS


def _safetensors(file: Path) -> Format:
    tensors, header = read_header(file)
    if METADATA_KEY in header.metadata:
        raise InputError("this is a program already: give it to build")
    if "cfg" in header.metadata:
        return STEERING_LITE
    return LOFIT if any(map(is_lofit, tensors)) else LAYER_VECTORS
