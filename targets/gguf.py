"""The form `gguf`: a compiled checkpoint through llama.cpp's own converter, and the result checked."""

import contextlib
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from filecmp import cmp
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from austeer.compiler.checkpoint import CONFIG, COPIED, Checkpoint, read_json
from austeer.compiler.errors import CheckFailed, Refused
from austeer.compiler.facts import ModelFacts, facts_of
from austeer.compiler.gguf import read_gguf
from austeer.compiler.layout import Layout
from austeer.compiler.staging import copy_file
from austeer.targets import checkpoint
from austeer.targets.checkpoint import Writing
from austeer.targets.gguf_check import differences
from austeer.targets.gguf_names import ROLES, Place, dialect_of, place_of
from austeer.targets.llama_cpp import convert, find_converter

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OUTTYPES = {"F32": "f32", "F16": "f16", "BF16": "bf16"}


@dataclass(frozen=True)
class GgufPlan:
    """What a build of this form will do. `outtype` is the converter's name of the base's dtype."""

    checkpoint: checkpoint.Plan
    layout: Layout
    outtype: str

    @property
    def file(self) -> str:
        """The name of the output, by the naming convention of GGUF."""
        return f"{self.title}-{self.outtype.upper()}.gguf"

    @property
    def title(self) -> str:
        """What the converter takes for the model's name: a baked edit is never hidden."""
        return f"{self.layout.facts.geometry.name}-steered"

    @cached_property
    def lowering(self) -> tuple[dict[str, Any], ...]:
        """As the checkpoint's, by the names and axes of the GGUF."""
        transposed = self.layout.facts.architecture.transposed
        return tuple(
            _renamed(entry, place_of(entry["tensor"], transposed=transposed)) for entry in self.checkpoint.lowering
        )

    @property
    def licences(self) -> tuple[str, ...]:
        """The files of the base that lie beside the GGUF too."""
        base = self.checkpoint.checkpoint
        other = (name for name in self.checkpoint.copied if name not in base.shards and name != base.index)
        return tuple(name for name in other if not any(fnmatchcase(name, pattern) for pattern in COPIED))

    @property
    def left_out(self) -> tuple[str, ...]:
        """The files of the base that do not go along: tokenizer and configuration become metadata of the GGUF."""
        made = {*self.checkpoint.checkpoint.shards, *self.checkpoint.copied, CONFIG}
        return tuple(sorted({*made, *self.checkpoint.left_out} - {*self.licences}))

    @property
    def notes(self) -> tuple[str, ...]:
        """How the model is written, and what the certificate is about."""
        about = "the certificate is that of the checkpoint the GGUF was converted from; its values were compared"
        return (*self.checkpoint.notes, about)

    @property
    def output_bytes(self) -> int:
        """The size of the output, near enough; while it is written, it and the checkpoint take twice this."""
        return self.checkpoint.output_bytes


def plan(checkpoint_plan: checkpoint.Plan, layout: Layout) -> GgufPlan:
    """The plan for a checkpoint's plan and the layout of its base.

    Raises Refused for what llama.cpp cannot load, and as `find_converter` does where there is no converter.
    """
    _refuse_unloadable(facts_of(layout.facts.geometry.name, checkpoint_plan.config))
    _refuse_tokenizer_code(layout.checkpoint.path)
    find_converter()
    sizes = Counter[str]()
    for tensor in layout.checkpoint.tensors.values():
        sizes[tensor.dtype] += tensor.nbytes
    return GgufPlan(checkpoint_plan, layout, OUTTYPES.get(sizes.most_common(1)[0][0], "f32"))


def write(plan: GgufPlan, folder: Path, writing: Writing) -> None:
    """Writes the GGUF into `folder`, by way of a temporary checkpoint there. Equal inputs give equal bytes.

    Raises OutputError if the converter fails, CheckFailed if the GGUF does not hold what the program says.
    """
    with _compiled(plan, folder, writing) as compiled:
        for name in plan.licences:
            copy_file(compiled.path / name, folder / name)
        convert(compiled.path, folder / plan.file, plan.outtype)
        wrong = list(_differences(plan, folder / plan.file, compiled))
    if wrong:
        raise CheckFailed(f"llama.cpp's converter wrote another model than the compiled one: {'; '.join(wrong)}")


def problems(folder: Path, plan: GgufPlan) -> dict[str, str]:
    """For the file in `folder`: "ok" if it is what compiling and converting the base gives now, else what is wrong.

    Another version of the converter may write other bytes; then the edited tensors are compared, and it is told.
    """
    path = folder / plan.file
    if not path.is_file():
        return {plan.file: "missing"}
    with tempfile.TemporaryDirectory() as name, _compiled(plan, Path(name), Writing()) as compiled:
        convert(compiled.path, again := Path(name) / plan.file, plan.outtype)
        if cmp(path, again, shallow=False):
            return {plan.file: "ok"}
        wrong = list(_differences(plan, path, compiled))
    return {plan.file: "; ".join(wrong) or "outside the edited tensors it is not what this converter writes now"}


def load(plan: GgufPlan, *, dtype: str = "auto", device: str = "auto") -> "PreTrainedModel":
    """The compiled checkpoint as a live model: what the GGUF was made of, and was found to hold.

    transformers' own reader of GGUF drops biases in silence, so it can say nothing about the file itself.
    """
    from austeer.compiler.live import load_model

    with tempfile.TemporaryDirectory() as name, _compiled(plan, Path(name), Writing()) as compiled:
        return load_model(compiled.path, dtype=dtype, device=device, may_miss=plan.checkpoint.may_miss)


def _refuse_unloadable(facts: ModelFacts) -> None:
    geometry = facts.geometry
    dialect = dialect_of(geometry.architecture)
    if dialect is None:
        raise Refused(f"{geometry.name}: llama.cpp does not run {geometry.architecture}; use the form checkpoint")
    for role in ROLES:
        linear = facts.projection(role)
        if not facts.has_bias(linear) and dialect.bias(role) == "required":
            raise Refused(f"{geometry.name}: llama.cpp loads no {dialect.name} without a bias of {linear.name}")
    if dialect.name == "gpt2" and geometry.neurons != 4 * geometry.residual:
        raise Refused(
            f"{geometry.name}: llama.cpp's converter takes it for granted that a gpt2 has 4 × {geometry.residual} "
            f"neurons, and this one has {geometry.neurons}; use the form checkpoint with another engine"
        )


def _refuse_tokenizer_code(base: Path) -> None:
    # The converter would run it, or fetch it from the Hub and run it.
    path = base / "tokenizer_config.json"
    if path.is_file() and read_json(path).get("auto_map"):
        raise Refused(
            f"{path} names Python code of the tokenizer's own (auto_map), which llama.cpp's converter would run. "
            "If transformers has this tokenizer built in, delete auto_map in a local copy"
        )


@contextlib.contextmanager
def _compiled(plan: GgufPlan, folder: Path, writing: Writing) -> Generator[Checkpoint]:
    """The compiled checkpoint, in a folder whose name is the model's title, as long as the block lasts."""
    around = folder / ".checkpoint"
    inner = around / plan.title
    try:
        inner.mkdir(parents=True)
        checkpoint.write(plan.checkpoint, inner, writing)
        _complete_config(inner / CONFIG)
        yield Checkpoint.open(inner)
    finally:
        shutil.rmtree(around, ignore_errors=True)


def _complete_config(path: Path) -> None:
    """Adds what the converter reads and transformers 5 no longer writes."""
    config = read_json(path)
    if config["model_type"] == "gpt2" and "n_ctx" not in config:
        path.write_text(json.dumps({**config, "n_ctx": config.get("n_positions", 1024)}), "utf-8")


def _differences(plan: GgufPlan, path: Path, compiled: Checkpoint) -> Iterator[str]:
    # Not as a Layout: that asks for every tensor config.json promises, and a form may leave out what llama.cpp refuses.
    changed = dict.fromkeys(entry["tensor"] for entry in plan.checkpoint.lowering)
    yield from differences(read_gguf(path), compiled, facts_of(plan.title, compiled.config), changed)


def _renamed(entry: dict[str, Any], place: Place) -> dict[str, Any]:
    axes = entry["slice"][::-1] if place.transposed else entry["slice"]
    stacked = [] if place.expert is None else [[place.expert]]
    return {**entry, "tensor": place.name, "slice": [*stacked, *axes]}
