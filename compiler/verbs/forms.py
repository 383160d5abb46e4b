"""The forms of output, and what build and verify do with each: plan it, write it, load it, compare it."""

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from austeer.compiler.errors import UsageError
from austeer.compiler.layout import Layout
from austeer.compiler.live import load_model
from austeer.compiler.program import Program
from austeer.compiler.progress import track
from austeer.compiler.target import Target
from austeer.passes.fold import fold
from austeer.passes.legalize import legalize
from austeer.passes.rescale import Rescaling, rescale
from austeer.targets import checkpoint
from austeer.targets.checkpoint import Plan, Writing
from austeer.targets.shards import Copy, Shard, Zeros

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

    plan: Callable[[Program, Layout, Target, str], Any]
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


def plan_rescaled(program: Program, layout: Layout, target: Target, choice: Rescaling) -> Plan:
    """The plan of a checkpoint whose residual stream is kept in other units; see passes.rescale."""
    form, patch = rescale(program, layout.facts, target, choice)
    return checkpoint.plan(patch, layout, form)


def _load_checkpoint(plan: Plan, out: Path, _: Path, dtype: str, device: str) -> "PreTrainedModel":
    return load_model(out, dtype=dtype, device=device, may_miss=plan.may_miss)


def _compare_checkpoint(plan: Plan, out: Path) -> dict[str, str]:
    shards = {shard.name: _compare_shard(shard, out) for shard in track(plan.shards, "Comparing", len(plan.shards))}
    return {**shards, **{name: _compare_text(out / name, text) for name, text in plan.texts.items()}}


def _compare_shard(shard: Shard, out: Path) -> str:
    path = out / shard.name
    if not path.is_file() or path.stat().st_size != shard.size:
        return f"missing, or not of the {shard.size:,} bytes that it should have"
    with (shard.source or Path(os.devnull)).open("rb") as old, path.open("rb") as new:
        for chunk in shard.chunks():
            if isinstance(chunk, Copy):
                old.seek(chunk.start)
                if not all(old.read(size) == new.read(size) for size in _pieces(chunk.end - chunk.start)):
                    return f"bytes outside the edited slices differ from the base, before byte {new.tell():,}"
            elif isinstance(chunk, Zeros):
                if any(any(new.read(size)) for size in _pieces(chunk.count)):
                    return f"a new tensor is not zero where it should be, before byte {new.tell():,}"
            elif new.read(len(chunk.data)) != chunk.data:
                return f"it does not hold what the program makes of the base, before byte {new.tell():,}"
    return "ok"


def _compare_text(path: Path, text: bytes) -> str:
    return "ok" if path.is_file() and path.read_bytes() == text else "missing, or changed"


def _pieces(count: int) -> Iterator[int]:
    """So many bytes, in sizes that memory can take."""
    while count > 0:
        yield min(CHUNK, count)
        count -= CHUNK


FORMS: Mapping[str, Form] = {
    "checkpoint": Form(_plan_checkpoint, checkpoint.write, _load_checkpoint, _compare_checkpoint),
}
