"""The form `lora`: a patch as a PEFT adapter, which engines serve beside the unedited base.

Its values are float32: engines cast them to the model's dtype, and those that need not (PEFT, llama.cpp) lose
nothing.
"""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from austeer.compiler.checkpoint import Checkpoint, files_to_copy, is_licence
from austeer.compiler.errors import CheckpointError, Refused, UsageError
from austeer.compiler.layout import Layout
from austeer.compiler.live import load_model
from austeer.compiler.lowrank import LowRank
from austeer.compiler.patch import Affine, Patch, Touch
from austeer.compiler.program import Program
from austeer.compiler.rewrite import Matrix, stored_values
from austeer.compiler.staging import copy_file, write_file
from austeer.targets.checkpoint import Writing
from austeer.targets.lora_engines import engine_for
from austeer.targets.lora_files import CONFIG, WEIGHTS, config_file, factor_names, weights_header

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WAY_OUT = "use --form checkpoint"


@dataclass(frozen=True)
class Module:
    """The change of one module, called `name` in the live model."""

    name: str
    change: LowRank

    def shapes(self, rank: int) -> dict[str, tuple[int, int]]:
        """The shapes of its factors A and B, by their names in the file."""
        form = self.change.matrix.form
        return dict(zip(factor_names(self.name), ((rank, len(form.s)), (len(form.a), rank)), strict=True))


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
    def shapes(self) -> dict[str, tuple[int, int]]:
        """The shapes of all tensors, in the order of their bytes."""
        return {name: shape for module in self.modules for name, shape in module.shapes(self.rank).items()}

    @property
    def output_bytes(self) -> int:
        """The size of all files."""
        values = sum(rows * columns for rows, columns in self.shapes.values())
        copied = sum((self.checkpoint.path / name).stat().st_size for name in self.kept)
        return len(self.config) + len(weights_header(self.shapes)) + 4 * values + copied


def plan(patch: Patch, layout: Layout, target: str, *, name: str) -> LoraPlan:
    """The adapter that does what a patch says, for an engine of the table in `lora_engines`.

    `name` is the base's Hub id, or what else the adapter's configuration shall call it; never a path.
    Refused, naming every projection that has no exact low-rank change, or the reason why the engine does not
    serve the adapter.
    """
    engine, entry = engine_for(target), layout.facts.architecture
    _require_low_rank(patch, layout)
    changes = {(form.layer, form.role): _module(form, layout) for form in patch.operations}
    edited = {place: module for place, module in changes.items() if module.change.rank}
    if not edited:
        raise Refused(f"the program changes no weight, so there is nothing for an adapter to hold; {WAY_OUT}")
    rank = max(module.change.rank for module in edited.values())
    engine.require(entry.model_type, [module.name for module in edited.values()], rank)
    modules = tuple(edited.values()) if engine.partial else tuple(_all_layers(edited, layout))
    lowering = [line for touch in patch.touches for line in _lowering(touch, edited.get((touch.layer, touch.role)))]
    files = {file for files in files_to_copy(layout.checkpoint) for file in files}
    kept = tuple(sorted(filter(is_licence, files)))
    return LoraPlan(
        checkpoint=layout.checkpoint,
        modules=modules,
        rank=rank,
        config=config_file(name, [module.name for module in modules], rank, transposed=entry.transposed),
        lowering=tuple(lowering),
        kept=kept,
        left_out=tuple(sorted(files - {*kept})),
        notes=(f"an adapter of rank {rank}; serve it with {engine.command(rank)}",),
    )


def refuse_gates(program: Program) -> None:
    """Refused, naming all gated edits of a program, if there are any."""
    gated = [f"  {edit.where}" for edit in program.gated.values()]
    if gated:
        why = "a gate is new neurons, and an adapter changes linear maps that are there"
        raise Refused("\n".join([f"{why}; {WAY_OUT}:", *gated]))


def write(plan: LoraPlan, folder: Path, writing: Writing) -> None:
    """Writes the adapter into `folder`; in memory are the factors of one module at a time.

    The rounding is that of the cast to the base's dtype, which most engines make. CheckpointError for values
    that are not finite in it.
    """
    write_file(folder / CONFIG, plan.config)
    with (folder / WEIGHTS).open("xb") as file:
        file.write(weights_header(plan.shapes))
        for module in plan.modules:
            tensor = module.change.matrix.tensor
            for key, values in zip(factor_names(module.name), module.change.factors(plan.rank), strict=True):
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
        peft: Any = import_module("peft")
    except ImportError:
        raise UsageError("an adapter is run by PEFT, which is not installed: pip install peft") from None
    model = load_model(base, dtype=dtype, device=device)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # between PEFT and transformers, not the user's
            warnings.filterwarnings("error", "Found missing adapter keys", UserWarning)
            attached = peft.PeftModel.from_pretrained(model, str(folder)).eval().requires_grad_(False)
    except (OSError, ValueError, RuntimeError, KeyError, UserWarning) as error:
        raise CheckpointError(f"{folder}: PEFT cannot attach this adapter to {base.name}: {error}") from error
    served: Any = attached.get_base_model()
    return served


def _require_low_rank(patch: Patch, layout: Layout) -> None:
    reasons = [(form, _refusal(form, layout)) for form in patch.operations]
    refused = [f"  layer {form.layer}, {form.role}: {reason}" for form, reason in reasons if reason]
    if refused:
        count = f"{len(refused)} of {len(reasons)} edited projections"
        raise Refused("\n".join([f"{count} cannot be an adapter; {WAY_OUT}:", *refused]))


def _refusal(form: Affine, layout: Layout) -> str | None:
    """Why the change of a projection is not one of low rank in one matrix; None if it is."""
    if form.role == "ffn_out" and layout.facts.architecture.experts:
        return "the model has experts, and PEFT takes any FFN's down projection for theirs, in dense layers too"
    if form.role == "block":
        return "it changes a norm, and an adapter changes linear maps"
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
    for key, axes in zip(factor_names(module.name), ([ranks, None], [None, ranks]), strict=True):
        yield {"edit": touch.edit, "tensor": key, "slice": axes, "exact": True}
