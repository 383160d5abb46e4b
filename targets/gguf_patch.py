"""The form `gguf` out of an existing GGUF: edited tensors rewritten, new biases added, all else byte for byte."""

import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any, NamedTuple

from austeer.compiler.edits import Floats
from austeer.compiler.errors import Refused
from austeer.compiler.patch import Affine, Patch, Touch
from austeer.compiler.program import Program
from austeer.compiler.rewrite import Matrix, constant, recycle_blocks, stored_values
from austeer.compiler.staging import copy_range, create_file, write_all
from austeer.compiler.tensors import TensorInfo
from austeer.passes.fold import fold
from austeer.passes.in_place import require_in_place
from austeer.targets.checkpoint import EDITABLE, Writing
from austeer.targets.gguf_model import GgufModel
from austeer.targets.gguf_names import tensor_name
from austeer.targets.shards import Job

_F32 = 0  # ggml's number of the type
_TENSOR_COUNT = 8  # where in the file it stands
_CHUNK = 2**24


@dataclass(frozen=True)
class AddedBias:
    """A bias that the file lacks: one-dimensional and F32, as llama.cpp has all of them."""

    name: str
    matrix: Matrix

    @property
    def nbytes(self) -> int:
        """The length of its bytes."""
        return 4 * len(self.matrix.form.u)

    def data(self) -> tuple[bytes, float]:
        """Its bytes, and the rounding of the cast to F32, which is 0; CheckpointError if they are not finite."""
        form = self.matrix.form
        tensor = TensorInfo(self.name, self.matrix.tensor.file, "F32", form.u.shape, 0, self.nbytes)
        stored, rounding = stored_values(constant(self.matrix, None), tensor)
        return stored.tobytes(), rounding


@dataclass(frozen=True)
class GgufPatchPlan:
    """What patching a GGUF will do, known from its header alone."""

    model: GgufModel
    jobs: tuple[Job, ...]  # in the order of their bytes
    added: tuple[AddedBias, ...]
    lowering: tuple[dict[str, Any], ...]
    left_out: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def file(self) -> str:
        """The name of the output."""
        return f"{self.model.gguf.path.stem}-steered.gguf"

    @cached_property
    def output_bytes(self) -> int:
        """The size of the output."""
        return sum(piece.length for piece in _layout(self))


class _Piece(NamedTuple):
    """A part of the output: `data`, or, where that is None, a range of the base's bytes."""

    length: int
    offset: int = 0
    data: bytes | memoryview | None = None
    tensor: str = ""
    rounding: float = 0.0


def plan_gguf(model: Path, program: Program) -> GgufPatchPlan:
    """Places a program for the Hugging Face model on the tensors of its f32, f16 or bf16 GGUF.

    Raises InputError or CheckpointError for a file that cannot be used, ProgramError for a program for another
    model, Refused for what this file or llama.cpp cannot carry; quantised tensors only where an edit ends in one.
    """
    opened = GgufModel.open(model, program.model.architecture)
    return plan(fold(program, opened.facts, require_in_place(program, opened.facts)), opened)


def patch_gguf(model: Path, program: Program, folder: Path, writing: Writing) -> GgufPatchPlan:
    """Writes the GGUF `model` with `program` folded in into the existing folder. Raises as `plan_gguf` does."""
    planned = plan_gguf(model, program)
    write(planned, folder, writing)
    return planned


def plan(patch: Patch, model: GgufModel) -> GgufPatchPlan:
    """Places a patch on the tensors of a GGUF. Raises Refused for what it cannot carry."""
    jobs: list[Job] = []
    added: list[AddedBias] = []
    for form in patch.operations:
        weight, bias = model.weight(form.layer, form.role), model.bias(form.layer, form.role)
        changes = _changes_weight(form)
        if changes or form.t.any():
            _require_editable(weight)
        matrices = _matrices(weight, form)
        if changes:
            jobs.append(Job(weight.name, weight, matrices))
        if bias is not None and form.changes_bias:
            _require_editable(bias)
            jobs.append(Job(bias.name, bias, (), _bias(matrices[0], bias)))
        elif form.adds_bias:
            added.append(AddedBias(tensor_name(form.layer, form.role, "bias"), matrices[0]))
    jobs.sort(key=lambda job: job.tensor.offset)
    lowered = (_lowered(touch, model) for touch in patch.touches)
    written = {*model.gguf.tensors, *(bias.name for bias in added)}  # a scaling scales no bias where there is none
    lowering = tuple(entry for entry in lowered if entry["tensor"] in written)
    return GgufPatchPlan(model, tuple(jobs), tuple(added), lowering)


def write(plan: GgufPatchPlan, folder: Path, writing: Writing) -> None:
    """Writes the planned file into `folder`. Equal inputs give equal bytes."""
    recycle_blocks()
    with plan.model.gguf.path.open("rb") as base, os.fdopen(create_file(folder / plan.file), "wb", 0) as new:
        for piece in _pieces(plan):
            if piece.data is None:
                copy_range(base.fileno(), new.fileno(), piece.offset, piece.length)
            else:
                write_all(new, piece.data)
            if piece.tensor:
                writing.rounding[piece.tensor] = max(writing.rounding.get(piece.tensor, 0.0), piece.rounding)
            writing.advance(piece.length)


def problems(folder: Path, plan: GgufPatchPlan) -> dict[str, str]:
    """For the file in `folder`: "ok" if it is byte for byte what patching the base gives now, else what is wrong."""
    path = folder / plan.file
    if not path.is_file() or path.stat().st_size != plan.output_bytes:
        return {plan.file: "missing, or of another size than patching the base gives"}
    with plan.model.gguf.path.open("rb") as base, path.open("rb") as written:
        for piece in _pieces(plan):
            if not _same(piece, base, written):
                what = f"{piece.tensor} does not hold what the program makes of the base"
                return {plan.file: what if piece.tensor else "bytes outside the edited slices differ from the base"}
    return {plan.file: "ok"}


def _same(piece: _Piece, base: IO[bytes], written: IO[bytes]) -> bool:
    if piece.data is not None:
        return written.read(piece.length) == piece.data
    base.seek(piece.offset)
    sizes = (min(_CHUNK, piece.length - done) for done in range(0, piece.length, _CHUNK))
    return all(base.read(size) == written.read(size) for size in sizes)


def _bias(matrix: Matrix, bias: TensorInfo) -> Callable[[], Floats]:
    return lambda: constant(matrix, bias)


def _changes_weight(form: Affine) -> bool:
    return bool(form.terms) or bool((form.a != 1).any()) or bool((form.s != 1).any())


def _matrices(tensor: TensorInfo, form: Affine) -> tuple[Matrix, ...]:
    """One matrix, or one of each expert."""
    count = tensor.shape[0] if len(tensor.shape) == 3 else 1
    shape, step = (len(form.a), len(form.s)), tensor.nbytes // count
    return tuple(Matrix(tensor, tensor.offset + step * number, shape, False, form) for number in range(count))


def _require_editable(tensor: TensorInfo) -> None:
    if tensor.dtype not in EDITABLE:
        raise Refused(
            f"{tensor.file}: {tensor.name} is stored as {tensor.dtype}, and only f32, f16 and bf16 can be edited. "
            "Patch the f32, f16 or bf16 GGUF of this model, then quantise the result with llama-quantize"
        )


def _lowered(touch: Touch, model: GgufModel) -> dict[str, Any]:
    """The manifest's entry: for every axis of the stored tensor the indices that may change; None is all."""
    rows, columns = (list(part) if part is not None else None for part in (touch.rows, touch.columns))
    if touch.part == "bias":
        name, axes = tensor_name(touch.layer, touch.role, "bias"), [rows]
    else:
        weight = model.weight(touch.layer, touch.role)
        name, axes = weight.name, [*[None] * (len(weight.shape) - 2), rows, columns]
    return {"edit": touch.edit, "tensor": name, "slice": axes, "exact": True}


# ---- the bytes of the output -----------------------------------------------------------


def _layout(plan: GgufPatchPlan) -> Iterator[_Piece]:
    """The output as header, data of the base and added tensors, without the edits."""
    gguf = plan.model.gguf
    size = gguf.path.stat().st_size
    if not plan.added:
        yield _Piece(size)
        return
    header = _header(plan, size - gguf.data)
    yield _Piece(len(header), data=header)
    yield _Piece(size - gguf.data, gguf.data)
    yield _Piece(padding := -(size - gguf.data) % gguf.alignment, data=bytes(padding))
    for bias in plan.added:
        yield _Piece(length := bias.nbytes + -bias.nbytes % gguf.alignment, data=bytes(length), tensor=bias.name)


def _header(plan: GgufPatchPlan, data_bytes: int) -> bytes:
    """The base's header with the added tensors at the end of its table; metadata and other entries stay as they are."""
    gguf = plan.model.gguf
    with gguf.path.open("rb") as file:
        header = bytearray(file.read(gguf.header_end))
    struct.pack_into("<Q", header, _TENSOR_COUNT, len(gguf.tensors) + len(plan.added))
    offset = data_bytes + -data_bytes % gguf.alignment
    for bias in plan.added:
        name = bias.name.encode()
        header += struct.pack(f"<Q{len(name)}sIQIQ", len(name), name, 1, bias.nbytes // 4, _F32, offset)
        offset += bias.nbytes + -bias.nbytes % gguf.alignment
    return bytes(header) + bytes(-len(header) % gguf.alignment)


def _pieces(plan: GgufPatchPlan) -> Iterator[_Piece]:
    """The whole output, in order."""
    added = {bias.name: bias for bias in plan.added}
    for piece in _layout(plan):
        if piece.tensor:
            data, rounding = added[piece.tensor].data()
            yield piece._replace(data=data.ljust(piece.length, b"\0"), rounding=rounding)
        elif piece.data is None:
            yield from _edited(plan, piece)
        else:
            yield piece


def _edited(plan: GgufPatchPlan, piece: _Piece) -> Iterator[_Piece]:
    """A range of the base that holds all tensors, with their edits."""
    position, end = piece.offset, piece.offset + piece.length
    for job in plan.jobs:
        for segment in job.segments():
            yield _Piece(segment.offset - position, position)
            length = len(segment.data)
            yield _Piece(length, data=segment.data, tensor=job.tensor.name, rounding=segment.rounding)
            position = segment.offset + length
    yield _Piece(end - position, position)
