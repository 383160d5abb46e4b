"""What the attention heads of a live model put out at the last token of texts, kept in a file.

A dense and a pruned model need never be loaded together: each is recorded on its own, and read back layer by layer.
"""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np

from austeer.compiler.edits import Floats
from austeer.compiler.errors import CheckpointError, OutputError
from austeer.compiler.forward import begin, run_texts
from austeer.compiler.live import live_facts
from austeer.compiler.progress import track
from austeer.compiler.tensors import nbytes_of, read_header, render_header
from austeer.compiler.tokens import Item, PairTokens, Tokens, batches
from austeer.compiler.watch import See, ports, watching

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class HeadOutputs:
    """A safetensors file with a tensor `layer.{l}`, float32 [count, heads · dim], for each layer: a row for each text.

    `order[l]` names the heads that layer l shows, in this order; None shows all.
    """

    file: Path
    layers: int
    count: int
    heads: int
    dim: int
    order: tuple[tuple[int, ...], ...] | None = None

    def layer(self, layer: int) -> Floats:
        """The outputs of one layer, [count, heads, dim]; nothing else is read."""
        tensors, _ = read_header(self.file)
        flat = np.fromfile(self.file, "<f4", self.count * self.heads * self.dim, offset=tensors[_name(layer)].offset)
        rows = flat.reshape(self.count, self.heads, self.dim)
        return rows if self.order is None else rows[:, self.order[layer]]

    def in_order(self, heads: Sequence[Sequence[int]]) -> "HeadOutputs":
        """Of each layer only these heads, in this order: a dense model's, as they stand in the pruned one."""
        return replace(self, order=tuple(map(tuple, heads)))


def record(model: "PreTrainedModel", texts: Sequence[Tokens], file: Path, *, batch_tokens: int) -> HeadOutputs:
    """Records the site `heads` of every layer at the last token of each text, which is not empty.

    One forward pass without the LM head, in which equal texts run once; one batch is held in memory. Raises
    CheckpointError for outputs that are not finite, OutputError where the file cannot be written, UsageError for a
    text that is too long.
    """
    made, rows = _outputs(model, len(texts), file), _rows(texts)
    packed = list(batches(list(rows), batch_tokens))
    with _sheet(made) as sheet:
        for batch in track(packed, "Recording heads", len(packed)):
            longest = max(map(len, batch))
            last = [row * longest + len(text) - 1 for row, text in enumerate(batch)]
            to = [(sheet, rows[text]) for text in batch]
            with _recording(model, np.array(last), to):
                run_texts(model, batch)
    return made


def record_sides(
    model: "PreTrainedModel", pairs: Sequence[PairTokens], positive: Path, negative: Path, *, batch_tokens: int
) -> tuple[HeadOutputs, HeadOutputs]:
    """Records both sides of pairs as `record` does whole texts; the prefix of a pair runs once."""
    made, rows = [_outputs(model, len(pairs), file) for file in (positive, negative)], _rows(pairs)
    packed = list(batches(list(rows), batch_tokens))
    with _sheet(made[0]) as first, _sheet(made[1]) as second:
        for batch in track(packed, "Recording heads", len(packed)):
            sides = begin(model, batch)
            to = [(sheet, rows[pair]) for sheet in (first, second) for pair in batch]
            with _recording(model, sides.last.cpu().numpy(), to):
                sides.run(model)
    return made[0], made[1]


@dataclass(frozen=True)
class _Sheet:
    """A file of head outputs that is being filled."""

    outputs: HeadOutputs
    out: IO[bytes]
    start: int

    def write(self, layer: int, rows: Sequence[int], values: Floats) -> None:
        """Puts one text's outputs, [heads · dim], into all its rows."""
        kept = values.astype("<f4")
        for row in rows:
            self.out.seek(self.start + (layer * self.outputs.count + row) * kept.nbytes)
            self.out.write(kept.tobytes())


@contextmanager
def _sheet(outputs: HeadOutputs) -> Generator[_Sheet]:
    shape = (outputs.count, outputs.heads * outputs.dim)
    header = render_header(((_name(layer), "F32", shape) for layer in range(outputs.layers)), {})
    try:
        with outputs.file.open("wb") as out:
            out.write(header)
            yield _Sheet(outputs, out, len(header))
    except OSError as error:
        needed = outputs.layers * nbytes_of("F32", shape) / 1e6
        what = f"head outputs, {needed:.0f} MB, cannot be written ({error.strerror}); give them another place"
        raise OutputError(f"{outputs.file}: {what}") from None


@contextmanager
def _recording(
    model: "PreTrainedModel", last: "np.ndarray[tuple[int], np.dtype[np.int64]]", to: Sequence[tuple[_Sheet, list[int]]]
) -> Generator[None]:
    """Within the context, the flat places `last` of what passes go into the rows of `to`, in every layer."""
    places, _ = ports(model, "heads")
    name = live_facts(model).geometry.name

    def keeper(layer: int) -> See:
        def see(activation: "Tensor") -> None:
            found = _at(activation, last)
            if not np.isfinite(found).all():
                raise CheckpointError(
                    f"{name}: what the heads of layer {layer} put out is not finite: its weights are broken, or its "
                    "dtype is too small for it (use --dtype float32)"
                )
            for (sheet, rows), values in zip(to, found, strict=True):
                sheet.write(layer, rows, values)

        return see

    with watching((place, keeper(layer)) for layer, place in places.items()):
        yield


def _at(activation: "Tensor", places: "np.ndarray[tuple[int], np.dtype[np.int64]]") -> Floats:
    """float32 [places, width], of an activation [batch, tokens, width] or flat."""
    import torch

    index = torch.from_numpy(places).to(activation.device)
    return activation.flatten(0, -2).index_select(0, index).float().cpu().numpy()


def _rows(items: Sequence[Item]) -> dict[Item, list[int]]:
    """Each different item, and where it stands."""
    rows: dict[Item, list[int]] = {}
    for row, item in enumerate(items):
        rows.setdefault(item, []).append(row)
    return rows


def _outputs(model: "PreTrainedModel", count: int, file: Path) -> HeadOutputs:
    facts = live_facts(model)
    return HeadOutputs(file, facts.geometry.layers, count, facts.geometry.heads // facts.head_dim, facts.head_dim)


def _name(layer: int) -> str:
    return f"layer.{layer}"
