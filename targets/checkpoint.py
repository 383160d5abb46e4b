"""The form `checkpoint`: a patch placed on the tensors of a checkpoint, and written as a new one."""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import IO, Any

from austeer.compiler.checkpoint import Checkpoint, files_to_copy
from austeer.compiler.errors import CheckpointError, Refused
from austeer.compiler.layout import Layout
from austeer.compiler.patch import Affine, Patch, Touch
from austeer.compiler.rewrite import BLOCK, Matrix, Segment, recycle_blocks, rewritten_bias
from austeer.compiler.staging import clone_file, copy_file, copy_range, create_file
from austeer.compiler.tensors import TensorInfo

EDITABLE = ("F32", "F16", "BF16")
REPORT = "this is a defect of austeer-compile, please report it"


@dataclass(frozen=True)
class Job:
    """Everything that happens to one tensor: its matrices are rewritten, or, for a bias, computed from one."""

    tensor: TensorInfo
    matrices: tuple[Matrix, ...]
    is_bias: bool = False

    @property
    def nbytes(self) -> int:
        """How many bytes are rewritten."""
        return self.tensor.nbytes if self.is_bias else sum(matrix.nbytes for matrix in self.matrices)

    def segments(self) -> Iterator[Segment]:
        """The new bytes, in file order."""
        if self.is_bias:
            yield rewritten_bias(self.tensor, self.matrices[0])
            return
        for matrix in self.matrices:
            yield from matrix.segments()


@dataclass(frozen=True)
class Plan:
    """What a build will do, known from headers alone."""

    checkpoint: Checkpoint
    jobs: tuple[Job, ...]  # in the order of the files and their bytes
    lowering: tuple[dict[str, Any], ...]
    kept: tuple[str, ...]
    left_out: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """How many bytes are rewritten."""
        return sum(job.nbytes for job in self.jobs)

    @cached_property
    def output_bytes(self) -> int:
        """The size of the files that are copied."""
        return sum((self.checkpoint.path / name).stat().st_size for name in self.kept)

    @property
    def peak_bytes(self) -> int:
        """An upper estimate of the working memory: the blocks in flight, and each job's vectors."""
        widest = max((sum(m.shape) for job in self.jobs for m in job.matrices), default=0)
        return 10 * 4 * max(BLOCK, widest) if self.jobs else 0

    def in_shard(self, name: str) -> list[Job]:
        """The jobs of one file."""
        return [job for job in self.jobs if job.tensor.file.name == name]


@dataclass
class Writing:
    """What happened while writing: the largest relative rounding error of each tensor, and the bytes done."""

    rounding: dict[str, float] = field(default_factory=dict[str, float])
    advance: Callable[[int], None] = lambda _: None


def plan(patch: Patch, layout: Layout) -> Plan:
    """Places a patch on the tensors of a checkpoint.

    Every operation is placed, on tensors of the right shape that nothing else changes: CheckpointError
    otherwise, and Refused for stored dtypes that cannot be edited.
    """
    jobs = [job for form in patch.operations for job in _jobs(form, layout)]
    twice = [name for name, times in Counter(job.tensor.name for job in jobs).items() if times > 1]
    if twice:
        raise CheckpointError(f"{twice[0]}: two operations of the patch change it; {REPORT}")
    lowering = [entry for touch in patch.touches for entry in _lowering(touch, layout)]
    jobs.sort(key=lambda job: (job.tensor.file.name, job.tensor.offset))
    kept, left_out = files_to_copy(layout.checkpoint)
    return Plan(layout.checkpoint, tuple(jobs), tuple(lowering), tuple(kept), tuple(left_out))


def write(plan: Plan, folder: Path, writing: Writing) -> None:
    """Writes the planned checkpoint into `folder`: unchanged bytes are copied by the kernel, changed ones computed."""
    recycle_blocks()
    todo = {job.tensor.name for job in plan.jobs}
    for name in plan.kept:
        source, target = plan.checkpoint.path / name, folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if name in plan.checkpoint.shards:
            todo -= _write_shard(source, target, plan.in_shard(name), writing)
        else:
            copy_file(source, target)
    if todo:
        raise CheckpointError(f"operations that no file took: {', '.join(sorted(todo))}; {REPORT}")


def _write_shard(source: Path, target: Path, jobs: list[Job], writing: Writing) -> set[str]:
    cloned = clone_file(source, target)
    descriptor = os.open(target, os.O_RDWR | getattr(os, "O_BINARY", 0)) if cloned else create_file(target)
    with source.open("rb") as base, os.fdopen(descriptor, "r+b", 0) as new:
        position = 0
        for job in jobs:
            for segment in job.segments():
                _advance(base, new, position, segment.offset, cloned=cloned)
                _write_all(new, segment.data)
                writing.rounding[job.tensor.name] = max(writing.rounding.get(job.tensor.name, 0.0), segment.rounding)
                end = segment.offset + len(segment.data)
                writing.advance(end - position)
                position = end
        size = os.fstat(base.fileno()).st_size
        _advance(base, new, position, size, cloned=cloned)
        writing.advance(size - position)
    return {job.tensor.name for job in jobs}


def _advance(base: IO[bytes], new: IO[bytes], position: int, end: int, *, cloned: bool) -> None:
    """Moves on to `end` over unchanged bytes: those are there already in a clone, else they are copied."""
    if cloned:
        new.seek(end)
    else:
        copy_range(base.fileno(), new.fileno(), position, end - position)


def _write_all(file: Any, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def _jobs(form: Affine, layout: Layout) -> Iterator[Job]:
    transposed = layout.facts.architecture.transposed
    weights = [
        Job(tensor, _matrices(tensor, form, transposed=transposed)) for tensor in layout.weights(form.layer, form.role)
    ]
    yield from (job for job in weights if job.nbytes)
    bias = layout.bias(form.layer, form.role)
    if bias is not None and form.changes_bias:
        _require_editable(bias)
        yield Job(bias, weights[0].matrices, is_bias=True)
    elif form.adds_bias:
        raise Refused(f"layer {form.layer}: {form.role} has no bias to hold a constant; legalize the program first")


def _matrices(tensor: TensorInfo, form: Affine, *, transposed: bool) -> tuple[Matrix, ...]:
    _require_editable(tensor)
    shape = (len(form.s), len(form.a)) if transposed else (len(form.a), len(form.s))
    if tensor.shape[-2:] != shape or len(tensor.shape) > 3:
        raise CheckpointError(f"{tensor.file}: {tensor.name} has shape {list(tensor.shape)}, expected {list(shape)}")
    count = tensor.shape[0] if len(tensor.shape) == 3 else 1
    step = tensor.nbytes // count
    return tuple(Matrix(tensor, tensor.offset + step * number, shape, transposed, form) for number in range(count))


def _require_editable(tensor: TensorInfo) -> None:
    if tensor.dtype not in EDITABLE:
        raise Refused(
            f"{tensor.file}: {tensor.name} is stored as {tensor.dtype}; only {', '.join(EDITABLE)} can be edited. "
            "Compile the unquantised model, then convert the result"
        )


def _lowering(touch: Touch, layout: Layout) -> Iterator[dict[str, Any]]:
    """Manifest entries: for every axis of the stored tensor the indices that may change; None is all."""
    rows, columns = (list(part) if part is not None else None for part in (touch.rows, touch.columns))
    if touch.part == "bias":
        bias = layout.bias(touch.layer, touch.role)
        tensors, axes = [bias] if bias else [], [rows]
    else:
        tensors = layout.weights(touch.layer, touch.role)
        axes = [columns, rows] if layout.facts.architecture.transposed else [rows, columns]
    for tensor in tensors:
        whole_axes = [None] * (len(tensor.shape) - len(axes))  # the experts of a stack
        yield {"edit": touch.edit, "tensor": tensor.name, "slice": [*whole_axes, *axes], "exact": True}
