"""The forms of output, and what build and verify do with each: plan it, write it, load it, compare it."""

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from filecmp import cmp
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

import numpy as np

from austeer.compiler.errors import UsageError
from austeer.compiler.form import ModelForm
from austeer.compiler.layout import Layout
from austeer.compiler.live import load_model
from austeer.compiler.program import Program
from austeer.compiler.progress import track
from austeer.compiler.rewrite import Segment
from austeer.compiler.target import Target
from austeer.compiler.tensors import read_header
from austeer.passes.approximation import Approximation, approximated
from austeer.passes.fold import fold
from austeer.passes.legalize import legalize
from austeer.targets import checkpoint, gguf, gguf_patch, lora, model_code
from austeer.targets.checkpoint import Plan, Writing
from austeer.targets.chunks import Chunk, Copy, Zeros
from austeer.targets.gguf import GgufPlan
from austeer.targets.gguf_patch import GgufPatchPlan
from austeer.targets.lora import LoraPlan
from austeer.targets.model_code import CodePlan
from austeer.targets.shards import Shard

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHUNK = 2**24


class Planned(Protocol):
    """What will be written, known before anything is."""

    @property
    def lowering(self) -> tuple[dict[str, Any], ...]:
        """What each edit changes in which tensor of the output."""
        ...

    @property
    def left_out(self) -> tuple[str, ...]:
        """The files of the base that do not go along."""
        ...

    @property
    def output_bytes(self) -> int:
        """The size of the output."""
        ...

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know of it."""
        ...


@dataclass(frozen=True)
class Form:
    """One form of output. The plan that `plan` makes is what the other three take.

    load(plan, out, base, dtype, device) is the output as a live model, for the certificate. compare(plan, out)
    says of each file whether it is what would be written now: "ok", or what is wrong.
    """

    plan: Callable[[Program, Any, Target, str], Any]
    write: Callable[[Any, Path, Writing], None]
    load: Callable[[Any, Path, Path, str, str], "PreTrainedModel"]
    compare: Callable[[Any, Path], dict[str, str]]


def form_named(name: str) -> Form:
    """The form of this name; UsageError, naming all, if there is none."""
    if name not in FORMS:
        raise UsageError(f"there is no form {name!r}; there are {', '.join(FORMS)}")
    return FORMS[name]


def _plan_checkpoint(program: Program, layout: Layout, target: Target, _: str) -> Plan:
    form = legalize(program, layout.facts, target)
    return checkpoint.plan(fold(program, layout.facts, form), layout, form)


def plan_approximated(program: Program, layout: Layout, target: Target, choice: Approximation) -> Plan:
    """The plan of a checkpoint that is an approximation of the program."""
    form, patch = approximated(program, layout.facts, target, choice)
    return checkpoint.plan(patch, layout, form)


def _load_checkpoint(plan: Plan, out: Path, _: Path, dtype: str, device: str) -> "PreTrainedModel":
    return load_model(out, dtype=dtype, device=device, may_miss=plan.may_miss)


def _compare_checkpoint(plan: Plan, out: Path) -> dict[str, str]:
    shards = {shard.name: _compare_shard(shard, out) for shard in track(plan.shards, "Comparing", len(plan.shards))}
    return {**shards, **{name: _compare_text(out / name, text) for name, text in plan.texts.items()}}


def _compare_shard(shard: Shard, out: Path) -> str:
    """Whether a file is, byte for byte, what compiling the base would give now."""
    path = out / shard.name
    if not path.is_file() or path.stat().st_size != shard.size:
        return f"missing, or not of the {shard.size:,} bytes that it should have"
    with (shard.source or Path(os.devnull)).open("rb") as old, path.open("rb") as new:
        for chunk in shard.chunks():
            for expected in _expected(chunk, old):
                start, found = new.tell(), new.read(len(expected))
                if found != expected:
                    name = _tensor_at(path, start + _first_difference(expected, found))
                    if isinstance(chunk, Segment):
                        return f"{name} does not hold what the program makes of the base"
                    return f"{name} differs from the base outside the edited slices"
    return "ok"


def _expected(chunk: Chunk, old: BinaryIO) -> Iterator[bytes | memoryview]:
    """The bytes of a chunk, in pieces that memory can take."""
    if isinstance(chunk, Copy):
        old.seek(chunk.start)
        yield from map(old.read, _pieces(chunk.end - chunk.start))
    elif isinstance(chunk, Zeros):
        yield from map(bytes, _pieces(chunk.count))
    else:
        yield chunk.data


def _first_difference(expected: bytes | memoryview, found: bytes) -> int:
    different = np.frombuffer(expected, np.uint8)[: len(found)] != np.frombuffer(found, np.uint8)
    return int(different.argmax()) if different.any() else len(found)


def _tensor_at(path: Path, position: int) -> str:
    """The tensor that has the byte at this position of a file."""
    tensors, _ = read_header(path)
    inside = (t.name for t in tensors.values() if t.offset <= position < t.offset + t.nbytes)
    return next(inside, "the header")


def _compare_text(path: Path, text: bytes) -> str:
    return "ok" if path.is_file() and path.read_bytes() == text else "missing, or changed"


def _pieces(count: int) -> Iterator[int]:
    """So many bytes, in sizes that memory can take."""
    while count > 0:
        yield min(CHUNK, count)
        count -= CHUNK


def _plan_lora(program: Program, layout: Layout, target: Target, name: str) -> LoraPlan:
    program.require_fit(layout.facts.geometry)
    lora.refuse_gates(program)
    own = ModelForm(layout.facts.architecture)
    return lora.plan(fold(program, layout.facts, own), layout, target.name, name=name)


def _load_lora(_: LoraPlan, out: Path, base: Path, dtype: str, device: str) -> "PreTrainedModel":
    return lora.load(out, base, dtype=dtype, device=device)


def _compare_by_writing(write: Callable[[Any, Path, Writing], None]) -> Callable[[Any, Path], dict[str, str]]:
    """For small outputs: written once more, elsewhere, every file must have the same bytes."""

    def compare(plan: Any, out: Path) -> dict[str, str]:
        with TemporaryDirectory() as folder:
            write(plan, Path(folder), Writing())
            names = sorted(path.relative_to(folder) for path in Path(folder).rglob("*") if path.is_file())
            return {str(name): _compare_text(out / name, (Path(folder) / name).read_bytes()) for name in names}

    return compare


def _plan_gguf(program: Program, source: Layout | Path, target: Target, name: str) -> GgufPlan | GgufPatchPlan:
    if isinstance(source, Path):
        return gguf_patch.plan_gguf(source, program)
    return gguf.plan(_plan_checkpoint(program, source, target, name), source)


def _write_gguf(plan: GgufPlan | GgufPatchPlan, folder: Path, writing: Writing) -> None:
    if isinstance(plan, GgufPatchPlan):
        gguf_patch.write(plan, folder, writing)
    else:
        gguf.write(plan, folder, writing)


def _load_gguf(plan: GgufPlan | GgufPatchPlan, _: Path, __: Path, dtype: str, device: str) -> "PreTrainedModel":
    if isinstance(plan, GgufPatchPlan):
        raise UsageError("a patched GGUF is measured in llama.cpp alone; use verify --engine llama.cpp")
    return gguf.load(plan, dtype=dtype, device=device)


def _compare_gguf(plan: GgufPlan | GgufPatchPlan, out: Path) -> dict[str, str]:
    return gguf_patch.problems(out, plan) if isinstance(plan, GgufPatchPlan) else gguf.problems(out, plan)


def _plan_code(program: Program, layout: Layout, target: Target, _: str) -> CodePlan:
    if target.name not in CODE_TARGETS:
        raise UsageError(f"{target.title} runs no model code; {' and '.join(CODE_TARGETS)} do")
    return model_code.plan(program, layout)


def _load_code(_: CodePlan, out: Path, base: Path, dtype: str, device: str) -> "PreTrainedModel":
    return model_code.load(out, base, dtype=dtype, device=device)


def _compare_code(plan: CodePlan, out: Path) -> dict[str, str]:
    texts = {name: _compare_text(out / name, data) for name, data in model_code.made(plan).items()}
    copies = model_code.copied(plan).items()
    return texts | {name: _compare_copy(out / name, source) for name, source in track(copies, "Comparing", len(copies))}


def _compare_copy(path: Path, source: Path) -> str:
    return "ok" if path.is_file() and cmp(path, source, shallow=False) else "missing, or not the base's"


CODE_TARGETS = ("transformers", "vllm")
FORMS: Mapping[str, Form] = {
    "checkpoint": Form(_plan_checkpoint, checkpoint.write, _load_checkpoint, _compare_checkpoint),
    "gguf": Form(_plan_gguf, _write_gguf, _load_gguf, _compare_gguf),
    "lora": Form(_plan_lora, lora.write, _load_lora, _compare_by_writing(lora.write)),
    "model-code": Form(_plan_code, model_code.write, _load_code, _compare_code),
}
