"""Plain pruners, for tests and where no other is installed: each writes a pruned copy of a model's folder.

Models of one file without experts. What is pruned are the linear maps of the blocks.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from austeer.compiler.architectures import Axis, Linear
from austeer.compiler.checkpoint import CONFIG, read_json
from austeer.compiler.facts import ModelFacts, read_facts
from austeer.compiler.forward import run_texts
from austeer.compiler.live import load_model, load_tokenizer
from austeer.compiler.tokens import encode_texts

if TYPE_CHECKING:
    from torch import Tensor

Kept: TypeAlias = "Mapping[Axis, Tensor]"  # by axis, which of its units stay: bool [units]

WEIGHTS = "model.safetensors"
GROUP, ZEROS_OF_GROUP = 4, 2  # 2:4
CALIBRATION_TOKENS = 256


def magnitude(model: Path, out: Path, share: float = 0.5) -> None:
    """In every row (one output) of every map, the `share` of smallest weights becomes zero."""
    _mask(model, out, {}, lambda scores: _smallest(scores, int(share * scores.shape[-1])))


def wanda(model: Path, out: Path, texts: Sequence[str], share: float = 0.5) -> None:
    """As `magnitude`, by |weight| times the norm of its input over all tokens of the texts (arXiv 2306.11695)."""
    _mask(model, out, _input_norms(model, texts), lambda scores: _smallest(scores, int(share * scores.shape[-1])))


def two_of_four(model: Path, out: Path, texts: Sequence[str] = ()) -> None:
    """Two of every four neighbours in a row become zero: by Wanda's score if there are texts, else by magnitude."""

    def smallest(scores: "Tensor") -> "Tensor":
        return _smallest(scores.unflatten(-1, (-1, GROUP)), ZEROS_OF_GROUP).flatten(-2)

    _mask(model, out, _input_norms(model, texts) if texts else {}, smallest)


def structured(model: Path, out: Path, share: float = 0.25, *, in_shape: bool = False) -> None:
    """Of every layer, the `share` of heads and of neurons goes that the output projections weigh least.

    Shapes become smaller, and config.json says so: heads go in whole groups that share keys and values, and as many
    more as it takes for their number to divide the hidden size, or transformers refuses a llama. With `in_shape`
    heads go one by one, and what wrote and read the units becomes zero.
    """
    facts, tensors = read_facts(model), _tensors(model)
    kept = [_kept(facts, tensors, layer, share, in_shape=in_shape) for layer in range(facts.geometry.layers)]
    for layer, staying in enumerate(kept):
        for linear in _linears(facts):
            _keep(tensors, _name(facts, layer, linear), facts, linear, staying, in_shape=in_shape)
    _write(model, out, tensors, {} if in_shape else _sizes(facts, kept[0]))


def _mask(model: Path, out: Path, norms: "Mapping[str, Tensor]", smallest: "Callable[[Tensor], Tensor]") -> None:
    """Writes the model with zeros where `smallest` of the scores [outputs, inputs] says so."""
    facts, tensors = read_facts(model), _tensors(model)
    for name in [_name(facts, layer, linear) for layer in range(facts.geometry.layers) for linear in _linears(facts)]:
        weight = _rows(tensors[f"{name}.weight"], facts)
        scores = weight.float().abs() * norms.get(name, 1)
        weight[smallest(scores)] = 0
    _write(model, out, tensors, {})


def _smallest(scores: "Tensor", count: int) -> "Tensor":
    """bool, true at the `count` smallest of the last axis; of equals, at the first."""
    import torch

    places = scores.argsort(dim=-1, stable=True)[..., :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, places, value=True)


def _input_norms(model: Path, texts: Sequence[str]) -> "dict[str, Tensor]":
    """By linear map, the root of the summed squares of each of its inputs over all tokens: float32 [inputs]."""
    live, facts = load_model(model, dtype="float32", device="cpu"), read_facts(model)
    squares: dict[str, Any] = {}

    def watch(name: str) -> None:
        def see(_: Any, inputs: "tuple[Tensor, ...]") -> None:
            squares[name] = squares.get(name, 0) + inputs[0].flatten(0, -2).square().sum(0)

        live.get_submodule(name).register_forward_pre_hook(see)

    for layer in range(facts.geometry.layers):
        for linear in _linears(facts):
            watch(_name(facts, layer, linear))
    for text in encode_texts(load_tokenizer(model), texts, CALIBRATION_TOKENS)[0]:
        run_texts(live, [text])
    return {name: square.sqrt() for name, square in squares.items()}


def _kept(facts: ModelFacts, tensors: "Mapping[str, Tensor]", layer: int, share: float, *, in_shape: bool) -> Kept:
    """Which units of each axis stay in a layer."""
    import torch

    entry, groups = facts.architecture, facts.kv // facts.head_dim
    heads, neurons = (_column_norms(facts, tensors, layer, linear) for linear in (entry.attn_out, entry.ffn_out))
    width = facts.head_dim if in_shape else facts.geometry.heads // groups
    blocks = len(heads) // width
    left = blocks - max(1, round(share * blocks)) if in_shape else _divisor(facts, width, int((1 - share) * blocks))
    staying = (~_smallest(heads.view(blocks, width).norm(dim=1), blocks - left)).repeat_interleave(width)
    return {
        "residual": torch.ones(facts.geometry.residual, dtype=torch.bool),
        "heads": staying,
        "kv": staying.view(groups, -1, facts.head_dim).any(dim=1).flatten(),
        "neurons": ~_smallest(neurons, round(share * facts.geometry.neurons)),
    }


def _divisor(facts: ModelFacts, width: int, most: int) -> int:
    """The largest number of blocks of `width` units of heads, up to `most`, whose heads divide the hidden size."""
    heads = width // facts.head_dim
    return next(count for count in range(most, 0, -1) if facts.geometry.residual % (count * heads) == 0)


def _column_norms(facts: ModelFacts, tensors: "Mapping[str, Tensor]", layer: int, linear: Linear) -> "Tensor":
    return _rows(tensors[_name(facts, layer, linear) + ".weight"], facts).float().norm(dim=0)


def _keep(
    tensors: "dict[str, Tensor]", name: str, facts: ModelFacts, linear: Linear, kept: Kept, *, in_shape: bool
) -> None:
    """Cuts one map, and its bias, down to the units that stay."""
    import torch

    outputs, inputs = torch.cat([kept[axis] for axis in linear.outputs]), kept[linear.inputs]
    rows = _rows(tensors[f"{name}.weight"], facts)
    left = rows * outputs[:, None] * inputs if in_shape else rows[outputs][:, inputs]
    tensors[f"{name}.weight"] = _rows(left, facts)
    if (bias := tensors.get(f"{name}.bias")) is not None:
        tensors[f"{name}.bias"] = bias * outputs if in_shape else bias[outputs]


def _sizes(facts: ModelFacts, kept: Kept) -> dict[str, int]:
    """What config.json has to say of the smaller shapes."""
    keys, heads, kv = facts.architecture.sizes, int(kept["heads"].sum()), int(kept["kv"].sum())
    return {
        keys.heads: heads // facts.head_dim,
        keys.kv_heads: kv // facts.head_dim,
        keys.head_dim: facts.head_dim,
        keys.neurons: int(kept["neurons"].sum()),
    }


def _linears(facts: ModelFacts) -> Iterator[Linear]:
    yield from (*facts.architecture.inputs, facts.architecture.attn_out, facts.architecture.ffn_out)


def _name(facts: ModelFacts, layer: int, linear: Linear) -> str:
    """Of a map, both of its tensors, without .weight, and of its live module."""
    entry = facts.architecture
    return entry.prefix + entry.block.format(layer=layer) + linear.name


def _rows(weight: "Tensor", facts: ModelFacts) -> "Tensor":
    """[outputs, inputs]; a view, and its own inverse."""
    return weight.T if facts.architecture.transposed else weight


def _tensors(model: Path) -> "dict[str, Tensor]":
    from safetensors.torch import load_file

    return load_file(model / WEIGHTS)


def _write(model: Path, out: Path, tensors: "Mapping[str, Tensor]", config: Mapping[str, int]) -> None:
    """A copy of the folder with other tensors and other entries of config.json."""
    from safetensors.torch import save_file

    out.mkdir(parents=True)
    for path in model.iterdir():
        if path.is_file() and path.suffix != ".safetensors":
            shutil.copyfile(path, out / path.name)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, out / WEIGHTS, {"format": "pt"})
    (out / CONFIG).write_text(json.dumps({**read_json(model / CONFIG), **config}, indent=2))
