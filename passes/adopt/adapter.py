"""PEFT adapters on disk: their configuration, and which projection of the model each tensor belongs to."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from austeer.compiler.architectures import Linear
from austeer.compiler.checkpoint import read_json
from austeer.compiler.errors import Refused
from austeer.compiler.facts import ModelFacts
from austeer.compiler.tensors import TensorInfo, read_header

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Place:
    """A linear map of the model: `module` is its name there, as PEFT's patterns see it."""

    layer: int
    linear: Linear
    module: str


@dataclass(frozen=True)
class Adapter:
    """An adapter's configuration, and its tensors by module and kind (`lora_A.weight`, `ia3_l`, ...)."""

    config: Mapping[str, Any]
    modules: Mapping[str, Mapping[str, TensorInfo]]
    notes: tuple[str, ...]


def read_adapter(file: Path, facts: ModelFacts, kinds: tuple[str, ...], harmless: frozenset[str]) -> Adapter:
    """The adapter whose weights are `file`.

    Refused for a setting that is on and not `harmless`, and for tensors of other kinds: they change what the
    adapter does in ways that its `kinds` of tensors do not say.
    """
    config = read_json(file.parent / CONFIG)
    strange = {key: value for key, value in config.items() if key not in harmless and value and value != "none"}
    if strange:
        listed = ", ".join(f"{key}={value!r}" for key, value in sorted(strange.items()))
        raise Refused(
            f"its settings do more than a program can say: {listed}. Train without, or merge and compile that"
        )
    tensors, _ = read_header(file)
    modules: dict[str, dict[str, TensorInfo]] = {}
    for name, tensor in tensors.items():
        kind = next((kind for kind in kinds if name.endswith("." + kind)), None)
        if kind is None or not name.startswith(_PREFIX):
            raise Refused(f"tensor {name!r} is not one of {', '.join(kinds)} of a module; merge the adapter instead")
        modules.setdefault(name.removeprefix(_PREFIX).removesuffix("." + kind), {})[kind] = tensor
    return Adapter(config, modules, _other_base(config, facts))


def places(adapter: Adapter, facts: ModelFacts, linears: tuple[Linear, ...]) -> Iterator[Place]:
    """Where the adapter's modules are, in the order of the model; Refused, naming all, if some are elsewhere."""
    known = {place.module: place for place in _places(facts, linears)}
    others = sorted(adapter.modules.keys() - known.keys())
    if others:
        names = sorted({name.rpartition(".")[2] for name in others})
        allowed = ", ".join(sorted(linear.name for linear in linears))
        raise Refused(
            f"{len(others)} of its {len(adapter.modules)} modules have no edit in a program: {', '.join(names)} "
            f"(first {others[0]}); {allowed} have. Train the adapter on those alone, or merge it and compile the result"
        )
    return (place for module, place in known.items() if module in adapter.modules)


def _places(facts: ModelFacts, linears: tuple[Linear, ...]) -> Iterator[Place]:
    entry = facts.architecture
    for layer in range(facts.geometry.layers):
        for linear in linears:
            if not (facts.has_experts(layer) and linear is entry.ffn_out):
                for prefix in (entry.prefix, ""):  # trained on the model with or without its head
                    yield Place(layer, linear, prefix + entry.block.format(layer=layer) + linear.name)


def _other_base(config: Mapping[str, Any], facts: ModelFacts) -> tuple[str, ...]:
    said = str(config.get("base_model_name_or_path") or facts.geometry.name)
    name = said.rstrip("/").rpartition("/")[2]
    if name == facts.geometry.name:
        return ()
    return (f"it says it was trained on {name!r}; the model is {facts.geometry.name!r}",)
