"""Checkpoints: directories in Hugging Face layout, checked whole before anything is read from them."""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, cast

from austeer.compiler.errors import CheckpointError, InputError, Refused
from austeer.compiler.tensors import STORAGE, Header, TensorInfo, read_header

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

# fmt: off
COPIED = (
    CONFIG, "generation_config.json",
    "tokenizer*.json", "tokenizer.model*", "*.tiktoken", "tiktoken.model", "tekken.json", "spiece.model",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt",
    "chat_template*.jinja", "chat_template*.json", "additional_chat_templates/*.jinja",
)
# fmt: on
"""Patterns of the files that go along with the weights."""

_TEMPLATES = "additional_chat_templates"
_LICENCES = ("license*", "licence*", "notice*", "use_policy*")  # however it is spelt, it has to go along
_SHARD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*\.safetensors")

_UNQUANTISED = "Compile the unquantised model it was made from, and quantise the result"
_AS_SAFETENSORS = "Load it with transformers and save_pretrained it, or use huggingface.co/spaces/safetensors/convert"
_BEFORE_GGUF = "Compile the Hugging Face checkpoint it was made from, and convert the result"
_PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}
_FILES = {
    ".safetensors": "this is one file of weights; give the directory that holds it and config.json",
    ".gguf": f"this is a GGUF file. {_BEFORE_GGUF}; or patch it: build --form gguf",
    **dict.fromkeys(_PICKLES, f"this is a pickle, which can run code when read. {_AS_SAFETENSORS}"),
}


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint, of which only the headers and the JSON files have been read.

    `shards` are file names in `path`, sorted; `headers` has one entry for each. `index` is the index's file
    name, if there is one, and `unindexed` the tensors that the shards hold and the index does not name.
    """

    path: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    shards: tuple[str, ...]
    index: str | None
    headers: dict[str, Header]
    unindexed: tuple[str, ...] = ()

    @staticmethod
    def open(path: str | Path) -> "Checkpoint":
        """Opens a directory with config.json and safetensors weights, in one file or in shards with an index.

        Raises CheckpointError if it is damaged or incomplete, Refused if it is of an unsupported kind.
        """
        path = Path(path)
        names = _names(path)
        refuse_files(str(path), names)
        config = read_json(path / CONFIG)
        refuse_config(str(path), config)
        places = read_index(path / INDEX) if INDEX in names else {}
        refuse_ambiguous(str(path), names, places)
        shards = tuple(sorted(set(places.values()))) or (WEIGHTS,)
        tensors, headers = _read_shards(path, shards)
        _check_index(path, places, tensors)
        _refuse_quantised(path, tensors.values())
        unindexed = tuple(sorted(tensors.keys() - places.keys())) if places else ()
        return Checkpoint(path, config, tensors, shards, INDEX if places else None, headers, unindexed)


def refuse_files(where: str, names: Iterable[str]) -> None:
    """Refused, with the way out, if the files of the model called `where` in messages are of another kind.

    Raises CheckpointError if configuration or weights are not there at all.
    """
    names = sorted(names)
    endings = {Path(name).suffix.lower() for name in names}
    if "adapter_config.json" in names:
        raise Refused(f"{where} is an adapter (LoRA or the like). Merge it into its model and compile that")
    if not {WEIGHTS, INDEX} & set(names):
        _refuse_other_weights(where, names, endings)
    if CONFIG not in names:
        raise CheckpointError(f"{where}: there is no {CONFIG}, so this is no model; give a model's directory")


def refuse_config(where: str, config: dict[str, Any]) -> None:
    """Refused if config.json, of the model called `where` in messages, rules it out."""
    if config.get("quantization_config") or config.get("compression_config"):
        raise Refused(f"{where} is quantised, as its {CONFIG} says. {_UNQUANTISED}")
    if config.get("auto_map"):
        raise Refused(
            f"{where} brings Python code of its own (auto_map in {CONFIG}); its meaning is unknown. "
            "If transformers has this architecture built in, delete auto_map in a local copy"
        )
    if config.get("transformers_weights"):
        raise Refused(
            f"{where} names its weights by transformers_weights in {CONFIG}, which engines other than "
            "transformers ignore. Load it with transformers and save_pretrained it"
        )
    parts = [key for key in ("text_config", "vision_config", "audio_config") if key in config]
    architectures = cast("list[str]", config.get("architectures") or [])
    parts += [name for name in architectures if str(name).endswith("ForConditionalGeneration")]
    if parts:
        raise Refused(
            f"{where} is more than a decoder language model ({', '.join(parts)} in {CONFIG}). "
            "Export its language model with save_pretrained and compile that"
        )


def refuse_ambiguous(where: str, names: Iterable[str], places: dict[str, str]) -> None:
    """Refused if there are both an index, which holds `places`, and a model.safetensors outside of it."""
    # transformers 5 reads model.safetensors and ignores the index, vLLM reads the index's shards: with both,
    # no output would be right for all.
    if places and set(places.values()) != {WEIGHTS} and WEIGHTS in names:
        raise Refused(
            f"{where} has both {WEIGHTS} and {INDEX}, and engines differ in which one they load. "
            "Remove the one that is not meant"
        )


def parse_json(path: Path, refusal: type[InputError], advice: str) -> Any:
    """The JSON value in a file; `refusal`, which names the file and ends with `advice`, if it holds none."""
    try:
        return json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise refusal(f"{path}: cannot be read ({error.strerror}); {advice}") from None
    except (ValueError, RecursionError) as error:
        raise refusal(f"{path}: this is not JSON in UTF-8 ({error}); {advice}") from None


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; CheckpointError, which names the file, if that is not what it holds."""
    fields = parse_json(path, CheckpointError, "download it again")
    if not isinstance(fields, dict):
        raise CheckpointError(f"{path}: this is JSON, but not an object; download it again")
    return cast("dict[str, Any]", fields)


def read_index(path: Path) -> dict[str, str]:
    """The shard that an index gives for each tensor; CheckpointError unless all are plain file names."""
    places: Any = read_json(path).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f"{path}: there is no weight_map from tensors to shards; download it again")
    for name, shard in cast("dict[str, Any]", places).items():
        # A path would let a model read, and later copy, any file of this machine.
        if not isinstance(shard, str) or not _SHARD.fullmatch(shard):
            raise CheckpointError(
                f"{path}: tensor {name!r} is said to be in {shard!r}, which is not the plain name of a "
                ".safetensors file in the same directory; do not use this model unless you know why"
            )
    return cast("dict[str, str]", places)


def is_copied(name: str) -> bool:
    """Whether a file, by its path in the model directory with `/`, goes along besides the weights."""
    if is_licence(name):
        return True
    return any(fnmatchcase(name, pattern) and name.count("/") == pattern.count("/") for pattern in COPIED)


def is_licence(name: str) -> bool:
    """Whether a file, by its path in the model directory, says under which terms the model may be used."""
    return "/" not in name and any(fnmatchcase(name.lower(), pattern) for pattern in _LICENCES)


def files_to_copy(checkpoint: Checkpoint) -> tuple[list[str], list[str]]:
    """The files that make the model and those left out, sorted, with `/`; a directory left out ends in `/`.

    Symbolic links count as what they lead to; CheckpointError if a file that makes the model is a broken one.
    """
    kept, left_out = {*checkpoint.shards, *filter(None, [checkpoint.index])}, set[str]()
    for name in _listed(checkpoint.path):
        if name in kept:
            continue
        (kept if is_copied(name) else left_out).add(name)
    broken = [name for name in sorted(kept) if not (checkpoint.path / name).is_file()]
    if broken:
        raise CheckpointError(f"{checkpoint.path / broken[0]}: this leads to no file; download the model again")
    return sorted(kept), sorted(left_out)


def _listed(path: Path) -> Iterator[str]:
    for entry in path.iterdir():
        if entry.name == _TEMPLATES and entry.is_dir():
            yield from (f"{_TEMPLATES}/{inner.name}" for inner in entry.iterdir())
        else:
            yield f"{entry.name}/" if entry.is_dir() else entry.name


def _names(path: Path) -> list[str]:
    if path.is_dir():
        return [entry.name for entry in path.iterdir()]
    if path.exists():
        raise Refused(f"{path}: {_FILES.get(path.suffix.lower(), 'this is a file; give a model directory')}")
    raise CheckpointError(f"{path}: there is no such directory")


def _refuse_other_weights(where: str, names: list[str], endings: set[str]) -> None:
    if endings & _PICKLES:
        raise Refused(f"{where} has its weights as pickle, which can run code when read. {_AS_SAFETENSORS}")
    if ".gguf" in endings:
        raise Refused(f"{where} has its weights as GGUF. {_BEFORE_GGUF}")
    if endings & {".h5", ".msgpack", ".onnx"}:
        raise Refused(f"{where} has its weights for TensorFlow, JAX or ONNX. {_AS_SAFETENSORS}")
    others = [name for name in names if name.endswith(".safetensors")]
    if others:
        raise Refused(
            f"{where} has no {WEIGHTS} and no {INDEX}, only {', '.join(others[:3])}, which engines do not "
            "look for. Load it with transformers and save_pretrained it"
        )
    if CONFIG in names:
        raise CheckpointError(f"{where} has no weights: there is no {WEIGHTS} and no {INDEX}; download it again")


def _read_shards(path: Path, shards: Iterable[str]) -> tuple[dict[str, TensorInfo], dict[str, Header]]:
    tensors: dict[str, TensorInfo] = {}
    headers: dict[str, Header] = {}
    for shard in shards:
        if not (path / shard).is_file():
            raise CheckpointError(f"{path / shard}: this file of the weights is missing; download it again")
        found, headers[shard] = read_header(path / shard)
        for name in found.keys() & tensors.keys():
            raise CheckpointError(
                f"{path}: tensor {name!r} is both in {tensors[name].file.name} and in {shard}; "
                "engines would differ in which one counts"
            )
        tensors |= found
    return tensors, headers


def _check_index(path: Path, places: dict[str, str], tensors: dict[str, TensorInfo]) -> None:
    for name, shard in places.items():
        if name not in tensors:
            raise CheckpointError(f"{path / INDEX}: tensor {name!r} should be in {shard}, and is in no shard")
        actual = tensors[name].file.name
        if actual != shard:
            raise CheckpointError(f"{path / INDEX}: tensor {name!r} should be in {shard}, and is in {actual}")


def _refuse_quantised(path: Path, tensors: Iterable[TensorInfo]) -> None:
    # Only weights count: GPT-2 and its kin store causal masks as U8 or BOOL.
    for tensor in tensors:
        if "weight" in tensor.name.rpartition(".")[2] and tensor.dtype not in STORAGE:
            raise Refused(f"{path} is quantised: {tensor.name} is stored as {tensor.dtype}. {_UNQUANTISED}")
