"""Where the projections of a model lie, in its checkpoint and in the one that is written. Nothing else makes names."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from austeer.compiler.architectures import Linear
from austeer.compiler.checkpoint import Checkpoint
from austeer.compiler.errors import CheckpointError
from austeer.compiler.facts import ModelFacts, facts_of
from austeer.compiler.form import ModelForm, Slot, output_config, slots
from austeer.compiler.patch import Role
from austeer.compiler.stream import STREAMS, StreamRole
from austeer.compiler.tensors import TensorInfo

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """A checkpoint together with the facts of its model, and the prefix its tensor names have."""

    checkpoint: Checkpoint
    facts: ModelFacts
    prefix: str

    @staticmethod
    def of(checkpoint: Checkpoint, facts: ModelFacts) -> "Layout":
        """Raises CheckpointError unless every linear map of every block is there in the shape config.json promises."""
        entry = facts.architecture
        for prefix in (entry.prefix, ""):
            layout = Layout(checkpoint, facts, prefix)
            if layout.name(0, entry.attn_out) + ".weight" in checkpoint.tensors:
                layout.require_shapes()
                return layout
        first = Layout(checkpoint, facts, entry.prefix).name(0, entry.attn_out) + ".weight"
        raise CheckpointError(
            f"{checkpoint.path}: no tensor {first}; these are not the weights of a {entry.model_type}"
        )

    def block(self, layer: int) -> str:
        """What the names of a layer's tensors begin with."""
        return self.prefix + self.facts.architecture.block.format(layer=layer)

    def name(self, layer: int, linear: Linear) -> str:
        """The tensor name of a linear map, without .weight or .bias."""
        return self.block(layer) + linear.name

    def weights(self, layer: int, role: Role) -> list[TensorInfo]:
        """The tensors of an output: one matrix, one matrix per expert, a stack of experts, a norm's weight, or none."""
        tensors, entry = self.checkpoint.tensors, self.facts.architecture
        if role == "block" and not entry.block_norm:
            return []
        if role == "block":
            return [self._tensor(f"{self.block(layer)}{entry.block_norm}.weight")]
        if role == "attn_out" or entry.experts is None or not self.facts.has_experts(layer):
            return [tensors[self.name(layer, self.facts.projection(role)) + ".weight"]]
        if self.block(layer) + entry.experts.fused in tensors:
            return [tensors[self.block(layer) + entry.experts.fused]]
        names = (entry.experts.down.format(expert=expert) for expert in range(self.facts.expert_count))
        return [self._tensor(f"{self.block(layer)}{name}.weight") for name in names]

    def bias(self, layer: int, role: Role) -> TensorInfo | None:
        """The bias of an output, where the model as configured adds one."""
        if role == "block":
            norm = self.facts.architecture.block_norm
            return self._tensor(f"{self.block(layer)}{norm}.bias") if norm else None
        linear = self.facts.projection(role)
        return self._tensor(self.name(layer, linear) + ".bias") if self.facts.has_bias(linear) else None

    def stream(self, layer: int | None, role: StreamRole) -> list[TensorInfo]:
        """The weights that begin, read or norm the residual stream; the residual axis is their last."""
        place = self.prefix if layer is None else self.block(layer)
        names = STREAMS[self.facts.architecture.model_type].names(role)
        tensors = [self._tensor(f"{place}{name}.weight") for name in names]
        for tensor in tensors:
            self._require(tensor.name, (*tensor.shape[:-1], self.facts.geometry.residual))
        return tensors

    def require_shapes(self) -> None:
        """CheckpointError for the first tensor that is missing or has another shape than config.json promises."""
        for layer in range(self.facts.geometry.layers):
            for linear in self.facts.architecture.linears:
                if not (self.facts.has_experts(layer) and not linear.of_attention):
                    for name, shape in self.tensors_of(layer, linear):
                        self._require(name, shape)
            if self.facts.has_experts(layer):
                self._require_experts(layer)

    def tensors_of(self, layer: int, linear: Linear) -> Iterator[tuple[str, Shape]]:
        """Names and shapes of the tensors that a linear map must have."""
        name = self.name(layer, linear)
        inputs, outputs = self.facts.axis(linear.inputs), sum(map(self.facts.axis, linear.outputs))
        yield name + ".weight", (inputs, outputs) if self.facts.architecture.transposed else (outputs, inputs)
        if self.facts.has_bias(linear):
            yield name + ".bias", (outputs,)

    def _require_experts(self, layer: int) -> None:
        matrix = (self.facts.geometry.residual, self.facts.expert_neurons)
        for tensor in self.weights(layer, "ffn_out"):
            self._require(tensor.name, matrix if len(tensor.shape) < 3 else (self.facts.expert_count, *matrix))

    def _require(self, name: str, shape: Shape) -> None:
        tensor = self._tensor(name)
        if tensor.shape != shape:
            raise CheckpointError(
                f"{tensor.file}: {name} has shape {list(tensor.shape)}, but config.json promises {list(shape)}; "
                "weights and configuration belong to different models"
            )

    def _tensor(self, name: str) -> TensorInfo:
        tensor = self.checkpoint.tensors.get(name)
        if tensor is None:
            raise CheckpointError(
                f"{self.checkpoint.path}: no tensor {name}, which config.json promises; download it again"
            )
        return tensor


@dataclass(frozen=True)
class OutputLayout:
    """The names that the tensors of a base have in another form of its model, and those that are new there."""

    base: Layout
    form: ModelForm

    @cached_property
    def config(self) -> dict[str, Any]:
        """The config.json of the output."""
        return output_config(self.base.facts, self.form)

    @cached_property
    def slots(self) -> tuple[Slot, ...]:
        """The layers of the output."""
        return slots(self.form, self.base.facts.geometry.layers)

    @cached_property
    def moved(self) -> dict[str, tuple[tuple[str, Shape], ...]]:
        """For each tensor of the base the tensors of the output that its bytes become, in order, with their shapes.

        Where FFNs are widened these are larger than what they come from, along one axis.
        """
        return {
            name: tuple((new, self._wider.get(new, shape)) for new, shape in self._moved(tensor))
            for name, tensor in self.base.checkpoint.tensors.items()
        }

    @cached_property
    def added(self) -> dict[str, TensorInfo]:
        """The tensors that only the output has; file and offset are the base layer's whose shape they have."""
        there = {name for parts in self.moved.values() for name, _ in parts}
        added: dict[str, TensorInfo] = {}
        for number, slot in enumerate(self.slots):
            model = self.base.weights(slot.like, "attn_out")[0]
            for name, shape in self._expected(number, slot):
                if name in self._strays:
                    raise CheckpointError(
                        f"{self.base.checkpoint.path}: a {name} is there that config.json does not use, and that the "
                        "compiled model would; remove it from the base"
                    )
                if name not in there:
                    added[name] = TensorInfo(name, model.file, model.dtype, shape, 0, 0)
        return added

    def linear_name(self, layer: int, linear: Linear) -> str:
        """The name of a linear map in a layer of the output."""
        return self._output.name(layer, linear)

    def norm_name(self, layer: int, norm: str) -> str:
        """The name of a norm's weight in a layer of the output."""
        return f"{self._output.block(layer)}{norm}.weight"

    def has_bias(self, linear: Linear) -> bool:
        """Whether a linear map of the output, in all its layers, has a bias."""
        return self._output.facts.has_bias(linear)

    def slot_of(self, layer: int, *, attention: bool) -> int:
        """The layer of the output that has the attention, or the FFN, of a layer of the base."""
        return next(
            number for number, slot in enumerate(self.slots) if layer == (slot.attention if attention else slot.ffn)
        )

    @cached_property
    def _output(self) -> Layout:
        """For names and shapes alone: the output's own tensors are not there yet."""
        facts = facts_of(self.base.facts.geometry.name, self.config)
        return Layout(self.base.checkpoint, facts, self.base.prefix)

    @cached_property
    def _wider(self) -> dict[str, Shape]:
        """The shapes of the linear maps of the output, if they are not those of the base."""
        if not self.form.widened:
            return {}
        linears = self.form.architecture.linears
        numbers = range(len(self.slots))
        return dict(entry for n in numbers for linear in linears for entry in self._output.tensors_of(n, linear))

    @cached_property
    def _block_of(self) -> dict[str, int]:
        return {self.base.block(layer): layer for layer in range(self.base.facts.geometry.layers)}

    @cached_property
    def _strays(self) -> set[str]:
        """Biases, by their names in the output, that the base holds and does not use."""
        facts, tensors = self.base.facts, self.base.checkpoint.tensors
        unused = [linear for linear in facts.architecture.linears if not facts.has_bias(linear)]
        names = {f"{self.base.name(layer, linear)}.bias" for layer in range(facts.geometry.layers) for linear in unused}
        return {new for name in names & tensors.keys() for new, _ in self.moved[name]}

    def _place(self, name: str) -> tuple[int, str] | None:
        """The layer of a tensor of the base, and its name within; None outside the blocks."""
        for block, layer in self._block_of.items():
            if name.startswith(block):
                return layer, name[len(block) :]
        return None

    def _moved(self, tensor: TensorInfo) -> Iterator[tuple[str, Shape]]:
        place = self._place(tensor.name)
        if place is None:
            yield tensor.name, tensor.shape
            return
        layer, inner = place
        to = self.slot_of(layer, attention=inner.startswith(self.base.facts.architecture.attention_part))
        linear, _, part = inner.rpartition(".")
        parts = self._parts(linear)
        if not parts:
            yield self._output.block(to) + inner, tensor.shape
        for piece in parts:
            rows = sum(map(self.base.facts.axis, piece.outputs))
            yield f"{self._output.name(to, piece)}.{part}", (rows, *tensor.shape[1:])

    def _parts(self, name: str) -> list[Linear]:
        """What a fused linear map of the base is split into; empty if it stays as it is."""
        entry, other = self.base.facts.architecture, self.form.architecture
        fused = next((linear for linear in entry.inputs if linear.name == name and len(linear.outputs) > 1), None)
        if fused is None or other.model_type == entry.model_type:
            return []
        return [linear for linear in other.inputs if linear.of_attention == fused.of_attention]

    def _expected(self, number: int, slot: Slot) -> Iterator[tuple[str, Shape]]:
        """Everything that a layer of the output must have, but for the experts, which only move."""
        experts = self._output.facts.has_experts(number)
        for linear in self.form.architecture.linears:
            if experts and not linear.of_attention:
                continue
            for name, shape in self._output.tensors_of(number, linear):
                if self.form.out_bias or name != self._output.name(number, self.form.architecture.attn_out) + ".bias":
                    yield name, shape
        if slot.attention is None or slot.ffn is None:
            yield from self._norms(number, slot.like)

    def _norms(self, number: int, like: int) -> Iterator[tuple[str, Shape]]:
        """What a block has besides its linear maps and experts."""
        entry, block = self.base.facts.architecture, self.base.block(like)
        others = tuple(f"{linear.name}." for linear in entry.linears)
        if entry.experts is not None and self.base.facts.has_experts(like):
            others += (entry.experts.module + ".", entry.experts.down.partition(".")[0] + ".")
        for name, tensor in self.base.checkpoint.tensors.items():
            if name.startswith(block) and not name[len(block) :].startswith(others):
                yield self._output.block(number) + name[len(block) :], tensor.shape
