"""The form of a model: what the output is like, apart from the values of its weights."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from austeer.compiler.architectures import Architecture, Flag, Linear, holds
from austeer.compiler.facts import ModelFacts
from austeer.compiler.patch import Role
from austeer.compiler.reexpress import reexpression

Route = Literal["bias", "value-bias", "split-layer", "constant-layer", "norm"]
"""Where the constant of a projection goes.

bias: the projection's own bias
value-bias: the bias of v_proj, for head outputs that are shifted alike within each group
split-layer: the attention of a layer inserted between the block's attention and its FFN
constant-layer: the attention of a layer inserted after the block
norm: weight and bias of the norm that ends the block
"""


@dataclass(frozen=True)
class ModelForm:
    """The architecture the model is written as, and the route of each projection's constant.

    `period` layers are inserted at a time, the others empty. `out_bias`: whether the complete set of attention
    biases includes that of the output; an engine that has none may refuse the file for it. `widened`: by how many
    neurons the FFN of every layer is wider, for config.json has one width for all.
    """

    architecture: Architecture
    routes: Mapping[tuple[int, Role], Route] = field(default_factory=dict[tuple[int, Role], Route])
    period: int = 1
    out_bias: bool = True
    widened: int = 0

    def inserts(self, layer: int, role: Role) -> bool:
        """Whether this projection's constant needs a layer of its own."""
        return self.routes.get((layer, role)) in ("split-layer", "constant-layer")

    @property
    def inserted(self) -> int:
        """How many layers are added."""
        return self.period * sum(self.inserts(*place) for place in self.routes)

    def notes(self, home: str) -> Iterator[str]:
        """What is not as in the base, whose architecture is `home`."""
        if self.architecture.model_type != home:
            yield f"written as a {self.architecture.model_type}, which is a {home} whose biases engines honour"
        if self.inserted:
            yield f"layers inserted: {self.inserted}, each as costly in time and cache as any other"
        if self.widened:
            yield f"neurons appended to the FFN of every layer: {self.widened}, most of them zero"

    def needs(self, role: Role) -> bool:
        """Whether the biases of the attention, or those of the FFN, have to be there."""
        if any(route == "bias" and place[1] == role for place, route in self.routes.items()):
            return True
        return role == "attn_out" and not set(self.routes.values()) <= {"bias", "norm"}


WIDTH_MULTIPLE = 256  # what quantised kernels of engines ask of an FFN's width


def widening(neurons: int, more: int) -> int:
    """By how much an FFN of so many neurons gets wider to hold more of them, in a width that engines like."""
    return -(-(neurons + more) // WIDTH_MULTIPLE) * WIDTH_MULTIPLE - neurons if more else 0


@dataclass(frozen=True)
class Slot:
    """One layer of the output: whose attention and whose FFN it has (None: all zero), or whose constant.

    `like` is the layer of the base whose shapes and configuration it shares.
    """

    like: int
    attention: int | None = None
    ffn: int | None = None
    constant: tuple[int, Role] | None = None


def slots(form: ModelForm, layers: int) -> tuple[Slot, ...]:
    """The layers of the output, for a base of so many."""
    found: list[Slot] = []
    for layer in range(layers):
        empty = [Slot(layer)] * (form.period - 1)
        if form.inserts(layer, "attn_out"):
            found += [Slot(layer, attention=layer), Slot(layer, ffn=layer, constant=(layer, "attn_out")), *empty]
        else:
            found.append(Slot(layer, layer, layer))
        for role in ("ffn_out", "block"):
            if form.inserts(layer, role):
                found += [Slot(layer, constant=(layer, role)), *empty]
    return tuple(found)


def output_config(facts: ModelFacts, form: ModelForm) -> dict[str, Any]:
    """The config.json of the output: the original JSON with keys changed."""
    config, entry, home = dict(facts.config), form.architecture, facts.architecture
    translated = entry.model_type != home.model_type
    if translated:
        config = reexpression(home.model_type, entry.model_type).translate(config, entry.class_name)
    sets: tuple[tuple[Role, Linear], ...] = (("attn_out", entry.attn_out), ("ffn_out", entry.ffn_out))
    for role, linear in sets:
        of_attention = role == "attn_out"
        had = translated and any(facts.has_bias(old) for old in home.linears if old.of_attention == of_attention)
        if (had or form.needs(role)) and isinstance(linear.bias, Flag) and not holds(linear.bias, config):
            config[linear.bias.key] = linear.bias.value
    if form.widened:
        config[entry.sizes.neurons] = facts.geometry.neurons + form.widened
    return _with_layers(config, facts, form) if form.inserted else config


def _with_layers(config: dict[str, Any], facts: ModelFacts, form: ModelForm) -> dict[str, Any]:
    """Every entry that counts or lists layers, for the inserted ones too."""
    base, entry = facts.geometry.layers, form.architecture
    layout = slots(form, base)
    if entry.sliding_period and not config.get("layer_types"):
        period = int(config.get("sliding_window_pattern") or entry.sliding_period)
        kinds = ("sliding_attention", "full_attention")
        config["layer_types"] = [kinds[(layer + 1) % period == 0] for layer in range(base)]
    for key, value in config.items():
        if "layer" in key and isinstance(value, list) and len(value) == base and key != "mlp_only_layers":
            config[key] = [value[slot.like] for slot in layout]
    config[entry.sizes.layers] = len(layout)
    window = config.get("max_window_layers")
    if window is not None:  # the first layer that slides
        config["max_window_layers"] = max(window, base) - base + sum(slot.like < window for slot in layout)
    if entry.experts is not None:
        dense = [i for i, slot in enumerate(layout) if slot.ffn is None or not facts.has_experts(slot.ffn)]
        config |= {entry.experts.dense_layers: dense, entry.experts.step: 1}
    return config
