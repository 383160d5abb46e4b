"""Where the projections of a model lie in its checkpoint: (layer, role) → tensors. The one place that makes names."""

from dataclasses import dataclass

from austeer.compiler.architectures import Linear
from austeer.compiler.checkpoint import Checkpoint
from austeer.compiler.errors import CheckpointError
from austeer.compiler.facts import ModelFacts
from austeer.compiler.patch import Role
from austeer.compiler.tensors import TensorInfo


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

    def name(self, layer: int, linear: Linear) -> str:
        """The tensor name of a linear map, without .weight or .bias."""
        return self.prefix + self.facts.architecture.block.format(layer=layer) + linear.name

    def weights(self, layer: int, role: Role) -> list[TensorInfo]:
        """The tensors of an output projection: one matrix, one matrix per expert, or one stack of experts."""
        tensors, experts = self.checkpoint.tensors, self.facts.architecture.experts
        if role == "attn_out" or experts is None or not self.facts.has_experts(layer):
            return [tensors[self.name(layer, self.facts.projection(role)) + ".weight"]]
        block = self.prefix + self.facts.architecture.block.format(layer=layer)
        if block + experts.fused in tensors:
            return [tensors[block + experts.fused]]
        names = (f"{block}{experts.down.format(expert=expert)}.weight" for expert in range(self.facts.expert_count))
        return [self._tensor(name) for name in names]

    def bias(self, layer: int, role: Role) -> TensorInfo | None:
        """The bias of an output projection, where the model as configured adds one."""
        linear = self.facts.projection(role)
        return self._tensor(self.name(layer, linear) + ".bias") if self.facts.has_bias(linear) else None

    def require_shapes(self) -> None:
        """CheckpointError for the first tensor that is missing or has another shape than config.json promises."""
        entry = self.facts.architecture
        for layer in range(self.facts.geometry.layers):
            for linear in (entry.attn_out, entry.ffn_out, *entry.inputs):
                if not (self.facts.has_experts(layer) and "neurons" in (linear.inputs, *linear.outputs)):
                    self._require_linear(self.name(layer, linear), linear)
            if self.facts.has_experts(layer):
                self._require_experts(layer)

    def _require_linear(self, name: str, linear: Linear) -> None:
        inputs, outputs = self.facts.axis(linear.inputs), sum(map(self.facts.axis, linear.outputs))
        weight = (inputs, outputs) if self.facts.architecture.transposed else (outputs, inputs)
        self._require(name + ".weight", weight)
        if self.facts.has_bias(linear):
            self._require(name + ".bias", (outputs,))

    def _require_experts(self, layer: int) -> None:
        matrix = (self.facts.geometry.residual, self.facts.expert_neurons)
        for tensor in self.weights(layer, "ffn_out"):
            self._require(tensor.name, matrix if len(tensor.shape) < 3 else (self.facts.expert_count, *matrix))

    def _require(self, name: str, shape: tuple[int, ...]) -> None:
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
