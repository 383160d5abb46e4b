"""The facts of a model that decide what an edit means and where it can go, read from config.json alone."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from austeer.compiler.architectures import ARCHITECTURES, Architecture, Axis, Linear, holds
from austeer.compiler.checkpoint import CONFIG, read_json
from austeer.compiler.edits import Edit
from austeer.compiler.errors import CheckpointError, ProgramError, Refused
from austeer.compiler.patch import Role, role_of
from austeer.compiler.sites import SiteName, Space
from austeer.compiler.stream import STREAMS


@dataclass(frozen=True)
class Geometry:
    """What a program must know of its model: a name for messages, the architecture, and the sizes."""

    name: str
    architecture: str
    layers: int
    residual: int
    heads: int
    neurons: int

    def width(self, space: Space) -> int:
        """The number of units of a space."""
        return int(getattr(self, space))

    def plain(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)

    def same_shape(self, other: "Geometry") -> bool:
        """Whether a program for one model fits the other; the names may differ."""
        return {**self.plain(), "name": ""} == {**other.plain(), "name": ""}

    @staticmethod
    def from_plain(fields: Any) -> "Geometry":
        """The inverse of `plain`; ProgramError for anything else."""
        sizes = ("layers", "residual", "heads", "neurons")
        if not isinstance(fields, dict) or set(fields) != {"name", "architecture", *sizes}:
            raise ProgramError(f"a program's model needs name, architecture, {', '.join(sizes)}; got {fields!r}")
        if not all(type(fields[size]) is int and fields[size] > 0 for size in sizes):
            raise ProgramError(f"a program's model has sizes that are not positive whole numbers: {fields!r}")
        return Geometry(str(fields["name"]), str(fields["architecture"]), *(fields[size] for size in sizes))


@dataclass(frozen=True)
class ModelFacts:
    """Geometry, table entry and configuration of one model."""

    geometry: Geometry
    architecture: Architecture
    config: Mapping[str, Any]
    kv: int
    head_dim: int
    expert_count: int = 0
    expert_neurons: int = 0

    def axis(self, axis: Axis) -> int:
        """The length of a weight's axis."""
        return self.kv if axis == "kv" else self.geometry.width(axis)

    def projection(self, role: Role) -> Linear:
        """The table's entry for an output projection."""
        return self.architecture.attn_out if role == "attn_out" else self.architecture.ffn_out

    def role(self, edit: Edit) -> Role:
        """Where an edit ends up in this model."""
        return role_of(edit, post_norm=self.post_norm)

    def has_bias(self, linear: Linear) -> bool:
        """Whether this model, as configured, adds a bias here; a stray tensor in the file does not count."""
        return holds(linear.bias, self.config)

    def has_experts(self, layer: int) -> bool:
        """Whether the FFN of this layer is a mixture of experts."""
        experts = self.architecture.experts
        return experts is not None and experts.in_layer(layer, self.config)

    def ffn_in(self, layer: int) -> Linear:
        """The map that the FFN of a layer begins with: it reads what a gate reads. Refused for a mixture of experts."""
        if self.has_experts(layer):
            raise Refused(f"layer {layer} is a mixture of experts, which has no one FFN for a gate to read with")
        return next(linear for linear in self.architecture.inputs if not linear.of_attention)

    def output_norm(self, site: SiteName) -> str:
        """The norm of a block that what is written at a site passes on its way to the stream; empty if none."""
        if not self.post_norm or site == "residual":
            return ""
        stream, at_attention = STREAMS[self.architecture.model_type], site in ("heads", "attn")
        # Without norms of their own, what they write is normed together with the stream.
        names = (stream.attn_norm or stream.attn_in) if at_attention else (stream.ffn_norm or stream.ffn_in)
        return names[0]

    @property
    def post_norm(self) -> bool:
        """Whether a norm stands between the output projections and the residual stream."""
        return holds(self.architecture.post_norm, self.config)


def facts_of(name: str, config: Mapping[str, Any]) -> ModelFacts:
    """The facts of the model called `name`; Refused for an unknown architecture, CheckpointError for bad sizes."""
    entry = ARCHITECTURES.get(str(config.get("model_type")))
    if entry is None:
        raise Refused(
            f"{name}: architecture {config.get('model_type')!r} is not in the table; known are "
            f"{', '.join(ARCHITECTURES)}. To add it, write its entry in compiler/architectures.py"
        )
    size, keys = partial(_size, name, config), entry.sizes
    residual, heads, layers = size(keys.residual), size(keys.heads), size(keys.layers)
    head_dim = size(keys.head_dim, keys.head_dim_default or max(1, residual // heads))
    kv = size(keys.kv_heads, heads) * head_dim
    neurons = size(keys.neurons, (keys.neurons_per_residual or 0) * residual)
    geometry = Geometry(name, entry.model_type, layers, residual, heads * head_dim, neurons)
    if entry.experts is None:
        return ModelFacts(geometry, entry, config, kv, head_dim)
    count = next((key for key in entry.experts.counts if key in config), entry.experts.counts[0])
    return ModelFacts(geometry, entry, config, kv, head_dim, size(count), size(entry.experts.width))


def read_facts(folder: Path) -> ModelFacts:
    """The facts of the model in `folder`, named after it."""
    return facts_of(folder.resolve().name, read_json(folder / CONFIG))


def _size(name: str, config: Mapping[str, Any], key: str, default: int = 0) -> int:
    """The positive whole number under a key; `default`, unless it is 0, where the key is absent or null."""
    value = config.get(key)
    value = default if value is None else value
    if type(value) is not int or value <= 0:
        raise CheckpointError(f"{name}: config.json must hold a positive whole number under {key!r}; got {value!r}")
    return value
