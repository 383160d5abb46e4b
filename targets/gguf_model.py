"""An existing GGUF file as a model to compile into: its facts from its metadata, and where its projections lie."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from austeer.compiler.architectures import ARCHITECTURES
from austeer.compiler.errors import CheckpointError, Refused
from austeer.compiler.facts import Geometry, ModelFacts
from austeer.compiler.gguf import KINDS, Gguf, GgufTensor, read_gguf
from austeer.compiler.patch import READS, Role
from austeer.compiler.tensors import TensorInfo
from austeer.targets.gguf_names import DIALECTS, ROLES, Dialect, tensor_name


@dataclass(frozen=True)
class GgufModel:
    """The header of a GGUF, and the facts of the model in it."""

    gguf: Gguf
    dialect: Dialect
    facts: ModelFacts

    @staticmethod
    def open(path: Path, model_type: str | None = None) -> "GgufModel":
        """Reads the header. `model_type`, which the metadata does not hold, is that of the program's model.

        Raises InputError for a damaged file, CheckpointError for one whose tensors contradict its metadata,
        Refused for a kind of file or architecture that is not supported.
        """
        gguf = read_gguf(path)
        _refuse_other_kinds(gguf)
        name = gguf.metadata.get("general.architecture")
        dialect = DIALECTS.get(str(name))
        if dialect is None:
            raise Refused(f"{path}: GGUF of architecture {name!r}; known are {', '.join(DIALECTS)}")
        model = GgufModel(gguf, dialect, _facts(gguf, dialect, model_type))
        model.require_shapes()
        return model

    def weight(self, layer: int, role: Role) -> TensorInfo:
        """An output projection: [out, in], or with experts [experts, out, in]."""
        experts = role == "ffn_out" and self.facts.has_experts(layer)
        return self._info(_required(self.gguf, tensor_name(layer, role, experts=experts)))

    def bias(self, layer: int, role: Role) -> TensorInfo | None:
        """The bias of an output projection, where the file has one."""
        tensor = self.gguf.tensors.get(tensor_name(layer, role, "bias"))
        return None if tensor is None else self._info(tensor)

    def require_shapes(self) -> None:
        """CheckpointError for the first output projection that is missing, or of another shape than promised."""
        facts, geometry = self.facts, self.facts.geometry
        for layer in range(geometry.layers):
            for role in ROLES:
                shape: tuple[int, ...] = (geometry.residual, geometry.width(READS[role]))
                if role == "ffn_out" and facts.has_experts(layer):
                    shape = (facts.expert_count, geometry.residual, facts.expert_neurons)
                for tensor, expected in ((self.weight(layer, role), shape), (self.bias(layer, role), shape[-2:-1])):
                    if tensor is not None and tensor.shape != expected:
                        raise CheckpointError(
                            f"{self.gguf.path}: {tensor.name} has shape {list(tensor.shape)}, but the metadata "
                            f"promises {list(expected)}; the file is damaged"
                        )

    def _info(self, tensor: GgufTensor) -> TensorInfo:
        # How many bytes a quantised tensor has is not known, and not needed: nothing rewrites it.
        nbytes = tensor.nbytes if tensor.kind in KINDS.values() else 0
        return TensorInfo(tensor.name, self.gguf.path, tensor.kind, tensor.shape, tensor.offset, nbytes)


def _refuse_other_kinds(gguf: Gguf) -> None:
    kind, parts = gguf.metadata.get("general.type", "model"), gguf.metadata.get("split.count", 1)
    if kind != "model":
        raise Refused(f"{gguf.path}: this GGUF holds no model, but is of type {kind!r}; give the model it belongs to")
    if parts != 1:
        raise Refused(f"{gguf.path}: this is one of {parts} parts; join them first: llama-gguf-split --merge")


def _facts(gguf: Gguf, dialect: Dialect, model_type: str | None) -> ModelFacts:
    """What config.json says elsewhere; a bias counts as there where llama.cpp would read an added one."""
    sizes = _Sizes(gguf, dialect.name)
    experts = sizes.get("expert_count", 0)
    model_type = _model_type(dialect, model_type, mixture=experts > 0)
    entry = ARCHITECTURES[model_type]
    layers, residual, neurons = (sizes.get(key) for key in ("block_count", "embedding_length", "feed_forward_length"))
    attn_bias, ffn_bias = (_can_shift(gguf, dialect, layers, role) for role in ROLES)
    entry = replace(
        entry,
        transposed=False,
        attn_out=replace(entry.attn_out, bias=attn_bias),
        ffn_out=replace(entry.ffn_out, bias=ffn_bias),
    )
    *_, heads = 0, *_required(gguf, tensor_name(0, "attn_out")).shape  # what is wrong with a 0 is said below
    geometry = Geometry(gguf.path.stem, model_type, layers, residual, heads, neurons)
    return ModelFacts(geometry, entry, {}, heads, 1, experts, sizes.get("expert_feed_forward_length", neurons))


def _model_type(dialect: Dialect, asked: str | None, *, mixture: bool) -> str:
    """GGUF does not tell llama from mistral, which only differ in name; a mixture it does."""
    fitting = [name for name in dialect.model_types if (ARCHITECTURES[name].experts is not None) == mixture]
    if not fitting:
        raise Refused(f"a mixture of experts in the architecture {dialect.name} is not supported")
    return asked if asked in fitting else fitting[0]


def _can_shift(gguf: Gguf, dialect: Dialect, layers: int, role: Role) -> bool:
    has = (tensor_name(layer, role, "bias") in gguf.tensors for layer in range(layers))
    return dialect.bias(role) == "optional" or all(has)


def _required(gguf: Gguf, name: str) -> GgufTensor:
    tensor = gguf.tensors.get(name)
    if tensor is None:
        raise CheckpointError(f"{gguf.path}: there is no tensor {name}; this file cannot be patched")
    return tensor


@dataclass(frozen=True)
class _Sizes:
    """The sizes in the metadata, under the architecture's name."""

    gguf: Gguf
    architecture: str

    def get(self, key: str, default: int | None = None) -> int:
        metadata: Mapping[str, Any] = self.gguf.metadata
        value = metadata.get(f"{self.architecture}.{key}", default)
        if type(value) is not int or value < 0 or (value == 0 and default != 0):
            raise CheckpointError(
                f"{self.gguf.path}: {self.architecture}.{key} must be a positive whole number, the same for all "
                f"layers; got {value!r}"
            )
        return value
