"""The form `lora`: a patch as a PEFT adapter, which engines serve beside the unedited base.

One rank for all modules, zero-padded, and lora_alpha equal to it: the scale alpha / r is 1 for those who know
rank_pattern and rsLoRA and those who do not. The modules are named by their full paths, so that an adapter has
tensors for the edited ones only. Values are float32: engines cast them to the model's dtype, and what needs no
cast (PEFT, llama.cpp) loses nothing.
"""

import json
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from austeer.compiler.checkpoint import Checkpoint, files_to_copy, is_licence
from austeer.compiler.errors import CheckpointError, Refused, UsageError
from austeer.compiler.layout import Layout
from austeer.compiler.live import load_model
from austeer.compiler.lowrank import LowRank
from austeer.compiler.patch import Affine, Patch, Touch
from austeer.compiler.rewrite import Matrix, stored_values
from austeer.compiler.staging import copy_file, write_file
from austeer.targets.checkpoint import Writing
from austeer.targets.lora_engines import Engine, engine_for

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
WAY_OUT = "use --form checkpoint"


@dataclass(frozen=True)
class Module:
    """The change of one module, called `name` in the live model."""

    name: str
    change: LowRank

    @property
    def keys(self) -> tuple[str, str]:
        """The tensors of its factors A and B in the file."""
        return f"base_model.model.{self.name}.lora_A.weight", f"base_model.model.{self.name}.lora_B.weight"

    def shapes(self, rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """The shapes of A and B."""
        form = self.change.matrix.form
        return (rank, len(form.s)), (len(form.a), rank)


@dataclass(frozen=True)
class LoraPlan:
    """What an adapter will hold, known from headers alone; `notes` say how it is served."""

    checkpoint: Checkpoint
    modules: tuple[Module, ...]
    rank: int
    config: bytes
    lowering: tuple[dict[str, Any], ...]
    kept: tuple[str, ...]
    left_out: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def header(self) -> bytes:
        """The start of the safetensors file: one metadata key, tensors in the order of their bytes, padded to 8."""
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for module in self.modules:
            for key, shape in zip(module.keys, module.shapes(self.rank), strict=True):
                end = offset + 4 * shape[0] * shape[1]
                entries[key] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, end]}
                offset = end
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    @property
    def output_bytes(self) -> int:
        """The size of all files."""
        values = sum(rows * columns for module in self.modules for rows, columns in module.shapes(self.rank))
        copied = sum((self.checkpoint.path / name).stat().st_size for name in self.kept)
        return len(self.config) + len(self.header) + 4 * values + copied


def plan(patch: Patch, layout: Layout, target: str) -> LoraPlan:
    """The adapter that does what a patch says, for an engine of the table in `lora_engines`.

    Refused, naming every projection that has no exact low-rank change, or the reason why the engine does not
    serve the adapter.
    """
    engine = engine_for(target)
    refused = [
        f"  layer {form.layer}, {form.role}: {why}" for form in patch.operations if (why := _refusal(form, layout))
    ]
    if refused:
        count = f"{len(refused)} of {len(patch.operations)} edited projections"
        raise Refused("\n".join([f"{count} cannot be an adapter; {WAY_OUT}:", *refused]))
    edited = {
        (form.layer, form.role): module for form in patch.operations if (module := _module(form, layout)).change.rank
    }
    if not edited:
        raise Refused(f"the program changes no weight, so there is nothing for an adapter to hold; {WAY_OUT}")
    rank = max(module.change.rank for module in edited.values())
    names = [layout.facts.projection(role).name for _, role in edited]
    engine.require(layout.facts.architecture.model_type, names, rank)
    lowering = [entry for touch in patch.touches for entry in _lowering(touch, edited.get((touch.layer, touch.role)))]
    modules = tuple(edited.values()) if engine.partial else tuple(_all_layers(edited, layout))
    kept, left_out = files_to_copy(layout.checkpoint)
    licences = tuple(name for name in kept if is_licence(name))
    rest = tuple(sorted({*kept, *left_out} - {*licences}))
    return LoraPlan(
        layout.checkpoint, modules, rank, _config(modules, rank, layout), tuple(lowering), licences, rest,
        (_note(rank, engine),),
    )  # fmt: skip


def write(plan: LoraPlan, folder: Path, writing: Writing) -> None:
    """Writes the adapter into `folder`; in memory are the factors of one module at a time.

    The rounding is that of the cast to the base's dtype, which most engines make. CheckpointError for values
    that are not finite in it.
    """
    write_file(folder / CONFIG, plan.config)
    with (folder / WEIGHTS).open("xb") as file:
        file.write(plan.header)
        for module in plan.modules:
            tensor = module.change.matrix.tensor
            for key, values in zip(module.keys, module.change.factors(plan.rank), strict=True):
                _, writing.rounding[key] = stored_values(values, tensor)
                file.write(np.ascontiguousarray(values, "<f4").data)
                writing.advance(values.nbytes)
    for name in plan.kept:
        copy_file(plan.checkpoint.path / name, folder / name)


def load(folder: Path, base: Path, *, dtype: str = "auto", device: str = "auto") -> "PreTrainedModel":
    """The base in `base` with the adapter in `folder` attached by PEFT, not merged.

    Raises UsageError where PEFT is not installed, CheckpointError where the two do not fit.
    """
    try:
        from peft import PeftModel
    except ImportError:
        raise UsageError("an adapter is run by PEFT, which is not installed: pip install peft") from None
    model = load_model(base, dtype=dtype, device=device)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # between PEFT and transformers, not the user's
            warnings.filterwarnings("error", "Found missing adapter keys", UserWarning)
            attached = PeftModel.from_pretrained(model, str(folder)).eval().requires_grad_(False)
    except (OSError, ValueError, RuntimeError, KeyError, UserWarning) as error:
        raise CheckpointError(f"{folder}: PEFT cannot attach this adapter to {base.name}: {error}") from error
    return attached.get_base_model()


def _refusal(form: Affine, layout: Layout) -> str | None:
    """Why the change of a projection is not one of low rank in one matrix; None if it is."""
    if form.role == "ffn_out" and layout.facts.architecture.experts:
        return "the model has experts, and PEFT takes any FFN's down projection for theirs, in dense layers too"
    if form.adds_bias:
        return "a Shift is a constant, which only a bias can hold, and engines serve no bias in an adapter"
    if form.changes_bias and layout.bias(form.layer, form.role):
        return "a Scale of its output scales its bias too, and engines serve no bias in an adapter"
    return None


def _module(form: Affine, layout: Layout) -> Module:
    """The module that a form changes. Its name is the live model's, which some files abbreviate."""
    entry, facts = layout.facts.architecture, layout.facts
    (tensor,) = layout.weights(form.layer, form.role)
    rows, columns = tensor.shape
    matrix = Matrix(tensor, tensor.offset, (rows, columns), entry.transposed, form)
    name = entry.prefix + entry.block.format(layer=form.layer) + facts.projection(form.role).name
    return Module(name, LowRank.of(matrix))


def _all_layers(edited: dict[Any, Module], layout: Layout) -> Iterator[Module]:
    """The edited modules and their unedited siblings in all other layers, which get factors of zeros."""
    for layer in range(layout.facts.geometry.layers):
        for role in sorted({role for _, role in edited}):
            sibling = next(module for (_, other), module in edited.items() if other == role).change.matrix.form
            unedited = Affine.identity(layer, role, len(sibling.a), len(sibling.s))
            yield edited.get((layer, role)) or _module(unedited, layout)


def _config(modules: Sequence[Module], rank: int, layout: Layout) -> bytes:
    """adapter_config.json: every key that decides what the adapter does, and none that PEFT 0.9 did not know."""
    fields = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": layout.facts.geometry.name,
        "revision": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "bias": "none",
        "modules_to_save": None,
        "target_modules": [module.name for module in modules],
        "layers_to_transform": None,
        "layers_pattern": None,
        "fan_in_fan_out": layout.facts.architecture.transposed,
        "init_lora_weights": True,
    }
    return (json.dumps(fields, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def _lowering(touch: Touch, module: Module | None) -> Iterator[dict[str, Any]]:
    """Manifest entries: the terms of both factors that an edit may change."""
    if module is None or touch.part == "bias":
        return
    change = module.change
    rows, columns = (set(part.tolist()) for part in (change.rows, change.columns))
    ranks = [n for n, row in enumerate(change.rows.tolist()) if touch.rows is None or row in touch.rows]
    if touch.rows is None or not rows.issuperset(touch.rows):
        first = len(rows)
        listed = enumerate(change.columns.tolist(), first)
        ranks += [n for n, column in listed if touch.columns is None or column in touch.columns]
        if touch.columns is None or not columns.issuperset(touch.columns):
            ranks += range(first + len(columns), change.rank)
    for key, axes in zip(module.keys, ([ranks, None], [None, ranks]), strict=True):
        yield {"edit": touch.edit, "tensor": key, "slice": axes, "exact": True}


def _note(rank: int, engine: Engine) -> str:
    return f"an adapter of rank {rank}; serve it with {engine.command(rank)}"
