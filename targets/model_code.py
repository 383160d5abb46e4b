"""The form `model-code`: the base's own weights, and code that applies the edits in transformers and in vLLM.

Exact for every edit at every site, because nothing is folded. It needs trust_remote_code, so it is never the default.
The shards of the base are copied as they are; the vectors of the edits lie in a shard of their own.
"""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from austeer.compiler.checkpoint import CONFIG, INDEX, WEIGHTS, files_to_copy, read_json
from austeer.compiler.edits import Floats
from austeer.compiler.errors import CheckpointError, Refused
from austeer.compiler.layout import Layout
from austeer.compiler.program import Program
from austeer.compiler.staging import copy_file, write_file
from austeer.targets.checkpoint import Writing
from austeer.targets.code_parts import parts_of
from austeer.targets.modeling import CODE, code, config_keys, require_own_code
from austeer.targets.tokenizer_class import TOKENIZER_CONFIG, with_class

if TYPE_CHECKING:
    from transformers import PreTrainedModel

VECTORS = "model-austeer.safetensors"
# With a model.safetensors beside it transformers would not read the index, and so not the vectors.
RENAMED = {WEIGHTS: "model-base.safetensors"}


@dataclass(frozen=True)
class CodePlan:
    """What will be written, known from headers alone: the edits as config.json lists them, and the new tensors."""

    layout: Layout
    edits: tuple[dict[str, Any], ...]
    vectors: dict[str, Floats]
    lowering: tuple[dict[str, Any], ...]
    kept: tuple[str, ...]
    left_out: tuple[str, ...]

    @property
    def base(self) -> Path:
        """The folder of the base."""
        return self.layout.checkpoint.path

    @cached_property
    def output_bytes(self) -> int:
        """The size of the files that are copied, and of the vectors."""
        return sum((self.base / name).stat().st_size for name in self.kept) + self.vector_bytes

    @property
    def notes(self) -> tuple[str, ...]:
        """How it is loaded."""
        return (f"load it with trust_remote_code=True, which runs {CODE}; without that it does not load at all",)

    @property
    def vector_bytes(self) -> int:
        """The size of the vectors."""
        return sum(vector.nbytes for vector in self.vectors.values())


def plan(program: Program, layout: Layout) -> CodePlan:
    """Places the parts of every edit at modules of the model, and their vectors under the names of those modules.

    Raises ProgramError if the program is for another model, Refused if it has no edits or a layer has no such site,
    or, being a mixture of experts, nothing that a gate could read with.
    """
    program.require_fit(layout.facts.geometry)
    if not program.edits:
        raise Refused(f"{layout.checkpoint.path}: a program without edits needs no code; use the model as it is")
    edits, vectors, lowering = list[dict[str, Any]](), dict[str, Floats](), list[dict[str, Any]]()
    for number, edit in enumerate(program.edits):
        parts = parts_of(edit, layout.facts)
        listed = [part.plain() for part in parts]
        edits.append({"kind": edit.kind, "layer": edit.layer, "site": edit.site, "parts": listed})
        for part in parts:
            for field, vector in part.vectors.items():
                name = f"{layout.prefix}{part.module}.austeer.{part.place}.{number}.{field}"
                vectors[name] = vector
                lowering.append({"edit": number, "tensor": name, "slice": [None], "exact": True})
    for name in vectors.keys() & layout.checkpoint.tensors.keys():
        raise CheckpointError(f"{layout.checkpoint.path}: there is a tensor {name} already; start from the base model")
    kept, left_out = files_to_copy(layout.checkpoint)
    return CodePlan(layout, tuple(edits), vectors, tuple(lowering), tuple(kept), tuple(left_out))


def write(plan: CodePlan, folder: Path, writing: Writing) -> None:
    """Writes the files of the base, its shards unchanged, and those that carry the edits, into `folder`."""
    for name, source in copied(plan).items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        copy_file(source, target)
        writing.advance(target.stat().st_size)
    for name, data in made(plan).items():
        write_file(folder / name, data)
    writing.advance(plan.vector_bytes)


def copied(plan: CodePlan) -> dict[str, Path]:
    """The files that are the base's own, by their names in the output."""
    changed = _changed(plan)
    return {RENAMED.get(name, name): plan.base / name for name in plan.kept if name not in changed}


def made(plan: CodePlan) -> dict[str, bytes]:
    """The files that carry the edits."""
    from safetensors.numpy import save

    texts = {
        name: (json.dumps(fields, indent=2, ensure_ascii=False) + "\n").encode()
        for name, fields in _changed(plan).items()
    }
    vectors = save(plan.vectors, metadata={"format": "pt"})
    return {**texts, CODE: code(plan.layout.facts.architecture), VECTORS: vectors}


def load(folder: Path, base: Path, *, dtype: str, device: str) -> "PreTrainedModel":  # noqa: ARG001 (as every form's)
    """The written model, for inference. Its code runs only if it is exactly what `write` writes.

    Raises CheckpointError for any other code, and as `load_model` does.
    """
    from austeer.compiler.live import load_model

    require_own_code(folder)
    return load_model(folder, dtype=dtype, device=device, trust_remote_code=True)


def _changed(plan: CodePlan) -> dict[str, dict[str, Any]]:
    """The JSON files that differ from the base's. No key is lost."""
    config, entry = plan.layout.checkpoint.config, plan.layout.facts.architecture
    changed = {CONFIG: {**config, **config_keys(entry), "austeer": list(plan.edits)}, INDEX: _index(plan)}
    if TOKENIZER_CONFIG in plan.kept:
        changed[TOKENIZER_CONFIG] = with_class(read_json(plan.base / TOKENIZER_CONFIG), entry.model_type)
    return changed


def _index(plan: CodePlan) -> dict[str, Any]:
    """The base's index, or one of its single file, with the vectors added."""
    checkpoint = plan.layout.checkpoint
    size = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
    single = {"metadata": {}, "weight_map": dict.fromkeys(checkpoint.tensors, WEIGHTS)}
    index = read_json(checkpoint.path / checkpoint.index) if checkpoint.index else single
    places = {name: RENAMED.get(shard, shard) for name, shard in index["weight_map"].items()}
    metadata = {**(index.get("metadata") or {}), "total_size": size + plan.vector_bytes}
    return {**index, "metadata": metadata, "weight_map": {**places, **dict.fromkeys(plan.vectors, VECTORS)}}
