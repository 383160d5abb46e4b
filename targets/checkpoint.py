"""The form `checkpoint`: a patch placed on the tensors of a checkpoint, and written as a new one."""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count
from operator import attrgetter
from pathlib import Path
from typing import IO, Any

from austeer.compiler.checkpoint import CONFIG, INDEX, WEIGHTS, Checkpoint, files_to_copy, read_json
from austeer.compiler.errors import CheckpointError, Refused
from austeer.compiler.form import ModelForm
from austeer.compiler.layout import Layout, OutputLayout
from austeer.compiler.patch import Affine, Patch
from austeer.compiler.rewrite import BLOCK, Matrix, recycle_blocks
from austeer.compiler.staging import clone_file, copy_file, copy_range, create_file, write_all, write_file
from austeer.compiler.tensors import TensorInfo, nbytes_of, render_header
from austeer.targets.chunks import Copy, Zeros
from austeer.targets.constants import Constants, Place, constants_of
from austeer.targets.growth import Growth
from austeer.targets.neurons import filled_biases, growths, neurons_lowering, new_neurons
from austeer.targets.replaced import replaced_biases, replaced_lowering, replaced_neurons, with_replaced
from austeer.targets.shards import Fill, Job, Shard
from austeer.targets.stream import stream_jobs, stream_lowering

EDITABLE = ("F32", "F16", "BF16")
REPORT = "this is a defect of austeer-compile, please report it"
BASE_SHARD, NEW_SHARD = "model-base.safetensors", "model-austeer.safetensors"


@dataclass(frozen=True)
class Plan:
    """What a build will do, known from headers alone. `texts` are the JSON files that differ from the base's."""

    checkpoint: Checkpoint
    form: ModelForm
    config: dict[str, Any]
    shards: tuple[Shard, ...]
    texts: dict[str, bytes]
    lowering: tuple[dict[str, Any], ...]
    copied: tuple[str, ...]
    left_out: tuple[str, ...]

    @property
    def jobs(self) -> list[Job]:
        """What happens to tensors of the base, in the order of the files and their bytes."""
        return [job for shard in self.shards for job in shard.jobs]

    @property
    def fills(self) -> list[Fill]:
        """The new tensors."""
        return [fill for shard in self.shards for fill in shard.fills]

    @property
    def growths(self) -> list[Growth]:
        """The tensors of the base that get more rows or columns."""
        return [growth for shard in self.shards for growth in shard.growths]

    @property
    def nbytes(self) -> int:
        """How many bytes of the base are rewritten."""
        return sum(job.nbytes for job in self.jobs)

    @cached_property
    def output_bytes(self) -> int:
        """The size of the output's files."""
        files = sum((self.checkpoint.path / name).stat().st_size for name in self.copied)
        return files + sum(map(len, self.texts.values())) + sum(shard.size for shard in self.shards)

    @property
    def peak_bytes(self) -> int:
        """An upper estimate of the working memory: the blocks in flight, and each job's vectors."""
        widest = max((sum(m.shape) for job in self.jobs for m in job.matrices), default=0)
        return 10 * 4 * max(BLOCK, widest) if self.jobs or self.fills else 0

    @property
    def notes(self) -> tuple[str, ...]:
        """How the model is written, where that is not as the base is."""
        return tuple(self.form.notes(str(self.checkpoint.config["model_type"])))

    @property
    def may_miss(self) -> frozenset[str]:
        """Biases that config.json announces and that are left out, since the target has no place for them."""
        if self.form.out_bias:
            return frozenset()
        return frozenset({self.form.architecture.attn_out.name + ".bias"})


@dataclass
class Writing:
    """What happened while writing: the largest relative rounding error of each tensor, and the bytes done."""

    rounding: dict[str, float] = field(default_factory=dict[str, float])
    advance: Callable[[int], None] = lambda _: None

    def measure(self, name: str, rounding: float) -> None:
        """Takes in the rounding error of a part of a tensor."""
        self.rounding[name] = max(self.rounding.get(name, 0.0), rounding)


def plan(patch: Patch, layout: Layout, form: ModelForm) -> Plan:
    """Places a patch on the tensors of a checkpoint.

    Every operation is placed, on tensors of the right shape that nothing else changes: CheckpointError
    otherwise, and Refused for stored dtypes that cannot be edited.
    """
    output = OutputLayout(layout, form)
    weights = [(affine, _weight_jobs(affine, output)) for affine in patch.operations]
    matrices: dict[Place, Matrix] = {(a.layer, a.role): found[0].matrices[0] for a, found in weights if found}
    constants = constants_of(patch, output, matrices)
    neurons = new_neurons(patch, output)
    replaced = replaced_neurons(patch, output)
    filled = {**constants.filled, **filled_biases(output, neurons), **replaced_biases(output, replaced)}
    assert filled.keys() <= output.added.keys(), REPORT
    jobs = [job for _, found in weights for job in found]
    jobs += [Job(_new_name(tensor, output), tensor, (), vector) for tensor, vector in constants.rewritten.items()]
    jobs += stream_jobs(patch, output)
    _require_once(jobs)
    jobs = with_replaced(jobs, output, replaced)
    for job in jobs:
        _require_editable(job.tensor)
    jobs = sorted(filter(attrgetter("nbytes"), jobs), key=lambda job: (job.tensor.file.name, job.tensor.offset))
    grown = sorted(growths(output, neurons), key=attrgetter("start"))
    for growth in grown:
        _require_editable(growth.tensor)
    shards = _shards(output, jobs, grown, [Fill(info, filled.get(name)) for name, info in output.added.items()])
    kept, left_out = files_to_copy(layout.checkpoint)
    texts = _texts(output, shards)
    return Plan(
        layout.checkpoint,
        form,
        output.config,
        shards,
        texts,
        (
            *_lowering(patch, output, constants),
            *stream_lowering(patch, output),
            *neurons_lowering(patch, output),
            *replaced_lowering(replaced),
        ),
        tuple(name for name in kept if name not in (*layout.checkpoint.shards, *texts)),
        tuple(left_out),
    )


def write(plan: Plan, folder: Path, writing: Writing) -> None:
    """Writes the planned checkpoint into `folder`: unchanged bytes are copied by the kernel, changed ones computed."""
    recycle_blocks()
    for name in plan.copied:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        copy_file(plan.checkpoint.path / name, target)
    for name, text in plan.texts.items():
        write_file(folder / name, text)
    for shard in plan.shards:
        _write_shard(shard, folder / shard.name, writing)


def _write_shard(shard: Shard, target: Path, writing: Writing) -> None:
    cloned = shard.source is not None and shard.header is None and clone_file(shard.source, target)
    descriptor = os.open(target, os.O_RDWR | getattr(os, "O_BINARY", 0)) if cloned else create_file(target)
    with os.fdopen(descriptor, "r+b", 0) as new, (shard.source or Path(os.devnull)).open("rb") as base:
        for chunk in shard.chunks(writing.measure):
            if isinstance(chunk, Copy):
                _copy(base, new, chunk, cloned=cloned)
                length = chunk.end - chunk.start
            elif isinstance(chunk, Zeros):
                length = chunk.count
                new.truncate(new.seek(length, os.SEEK_CUR))  # a hole, where the file system has them
            else:
                length = len(chunk.data)
                write_all(new, chunk.data)
            writing.advance(length)


def _copy(base: IO[bytes], new: IO[bytes], chunk: Copy, *, cloned: bool) -> None:
    """Moves on over unchanged bytes: those are there already in a clone, else they are copied."""
    if cloned:
        new.seek(chunk.end)
    else:
        copy_range(base.fileno(), new.fileno(), chunk.start, chunk.end - chunk.start)


def _weight_jobs(affine: Affine, output: OutputLayout) -> list[Job]:
    transposed = output.base.facts.architecture.transposed and affine.role != "block"
    return [
        Job(_new_name(tensor, output), tensor, _matrices(tensor, affine, transposed=transposed))
        for tensor in output.base.weights(affine.layer, affine.role)
    ]


def _new_name(tensor: TensorInfo, output: OutputLayout) -> str:
    """What a tensor that is edited, and so not split, is called in the output."""
    return output.moved[tensor.name][0][0]


def _matrices(tensor: TensorInfo, form: Affine, *, transposed: bool) -> tuple[Matrix, ...]:
    _require_editable(tensor)
    shape = (len(form.s), len(form.a)) if transposed else (len(form.a), len(form.s))
    stored = (*tensor.shape, 1) if len(tensor.shape) == 1 else tensor.shape
    if stored[-2:] != shape or len(stored) > 3:
        raise CheckpointError(f"{tensor.file}: {tensor.name} has shape {list(tensor.shape)}, expected {list(shape)}")
    count = stored[0] if len(stored) == 3 else 1
    step = tensor.nbytes // count
    return tuple(Matrix(tensor, tensor.offset + step * number, shape, transposed, form) for number in range(count))


def _require_editable(tensor: TensorInfo) -> None:
    if tensor.dtype not in EDITABLE:
        raise Refused(
            f"{tensor.file}: {tensor.name} is stored as {tensor.dtype}; only {', '.join(EDITABLE)} can be edited. "
            "Compile the unquantised model, then convert the result"
        )


def _require_once(jobs: list[Job]) -> None:
    twice = [name for name, times in Counter(job.tensor.name for job in jobs).items() if times > 1]
    if twice:
        raise CheckpointError(f"{twice[0]}: two operations of the patch change it; {REPORT}")


def _shards(output: OutputLayout, jobs: list[Job], grown: list[Growth], fills: list[Fill]) -> tuple[Shard, ...]:
    checkpoint = output.base.checkpoint
    alone = checkpoint.shards == (WEIGHTS,)
    made: list[Shard] = []
    for name in checkpoint.shards:
        here = sorted((t for t in checkpoint.tensors.values() if t.file.name == name), key=lambda t: t.offset)
        moved = [(new, tensor.dtype, shape) for tensor in here for new, shape in output.moved[tensor.name]]
        same = moved == [(tensor.name, tensor.dtype, tensor.shape) for tensor in here]
        header = None if same else render_header(moved, checkpoint.headers[name].metadata)
        data = sum(nbytes_of(dtype, shape) for _, dtype, shape in moved)
        made.append(
            Shard(
                BASE_SHARD if alone and fills else name,
                checkpoint.path / name,
                header,
                checkpoint.headers[name].size if header is None else len(header) + data,
                here[0].offset if here else 0,
                tuple(job for job in jobs if job.tensor.file.name == name),
                growths=tuple(growth for growth in grown if growth.tensor.file.name == name),
            )
        )
    return (*made, _new_shard(_free_name(checkpoint), fills)) if fills else tuple(made)


def _free_name(checkpoint: Checkpoint) -> str:
    """The new shard's name; a base that was compiled before has one of its own."""
    names = (NEW_SHARD if number == 1 else f"model-austeer-{number}.safetensors" for number in count(1))
    return next(name for name in names if name not in checkpoint.shards)


def _new_shard(name: str, fills: list[Fill]) -> Shard:
    entries = [(fill.tensor.name, fill.tensor.dtype, fill.tensor.shape) for fill in fills]
    header = render_header(entries, {"format": "pt"})
    size = len(header) + sum(nbytes_of(dtype, shape) for _, dtype, shape in entries)
    return Shard(name, None, header, size, fills=tuple(fills))


def _texts(output: OutputLayout, shards: tuple[Shard, ...]) -> dict[str, bytes]:
    """config.json and the index, where they change."""
    checkpoint, texts = output.base.checkpoint, dict[str, bytes]()
    if output.config != checkpoint.config:
        texts[CONFIG] = _json(output.config)
    if any(shard.header is not None for shard in shards) and (len(shards) > 1 or checkpoint.index):
        texts[INDEX] = _json(_index(output, shards))
    return texts


def _index(output: OutputLayout, shards: tuple[Shard, ...]) -> dict[str, Any]:
    checkpoint = output.base.checkpoint
    old: dict[str, Any] = read_json(checkpoint.path / checkpoint.index) if checkpoint.index else {}
    named = {shard.source.name: shard.name for shard in shards if shard.source}
    added = {fill.tensor.name: shard.name for shard in shards for fill in shard.fills}
    tensors = checkpoint.tensors.values()
    places = {
        new: named[tensor.file.name]
        for tensor in tensors
        if tensor.name not in checkpoint.unindexed
        for new, _ in output.moved[tensor.name]
    }
    size = sum(nbytes_of(tensor.dtype, shape) for tensor in tensors for _, shape in output.moved[tensor.name])
    size += sum(nbytes_of(info.dtype, info.shape) for info in output.added.values())
    metadata = {**old.get("metadata", {}), "total_size": size}
    return {**old, "metadata": metadata, "weight_map": dict(sorted({**places, **added}.items()))}


def _json(fields: dict[str, Any]) -> bytes:
    return (json.dumps(fields, indent=2, ensure_ascii=False) + "\n").encode()


def _lowering(patch: Patch, output: OutputLayout, constants: Constants) -> Iterator[dict[str, Any]]:
    """Manifest entries: for every axis of the written tensor the indices that may change; None is all."""
    layout, companions = output.base, set(output.added)
    for touch in patch.touches:
        rows, columns = (list(part) if part is not None else None for part in (touch.rows, touch.columns))
        if touch.part == "bias":
            for name, axes in constants.places(touch.layer, touch.role, rows):
                companions.discard(name)
                yield {"edit": touch.edit, "tensor": name, "slice": axes, "exact": touch.exact}
            continue
        axes = [columns, rows] if layout.facts.architecture.transposed else [rows, columns]
        for tensor in layout.weights(touch.layer, touch.role):
            whole_axes = [None] * (len(tensor.shape) - len(axes))  # the experts of a stack
            yield {
                "edit": touch.edit,
                "tensor": _new_name(tensor, output),
                "slice": [rows] if len(tensor.shape) == 1 else [*whole_axes, *axes],
                "exact": touch.exact,
            }
    for name in output.added:  # what only has to be there, as zeros: for the first edit that needs any of it
        if name in companions:
            yield {
                "edit": _first_constant(patch, output.form),
                "tensor": name,
                "slice": [None] * len(output.added[name].shape),
                "exact": True,
            }


def _first_constant(patch: Patch, form: ModelForm) -> int:
    """The first edit with neurons or whose constant, be it zero, has a route: what both need is there for its sake."""
    routed = [t.edit for t in patch.touches if t.part == "bias" and (t.layer, t.role) in form.routes]
    return min([*routed, *(edit for neurons in patch.neurons for edit in neurons.edits)])
