"""Every entry of the table against a live transformers model: names, shapes, biases, spaces."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from austeer.compiler import CheckpointError
from austeer.compiler.architectures import ARCHITECTURES
from austeer.compiler.facts import facts_of, read_facts
from austeer.compiler.live import block_of, live_facts, port
from tests.tiny import CONFIGS, Tiny, load, logits, on_disk, tokens

# All sizes differ, so that no shape agrees by chance.
SHAPES = {"heads": 6, "kv_heads": 3, "head_dim": 10, "residual": 36, "neurons": 44, "layers": 2}
SITES = ("heads", "attn", "neurons", "ffn", "residual")
EVERY = [Tiny(name, **SHAPES, biases=biases) for name in CONFIGS for biases in (True, False)]


def name(tiny: Tiny) -> str:
    return f"{tiny.architecture}-{'biases' if tiny.biases else 'none'}"


def test_the_table_and_the_tests_know_the_same_architectures() -> None:
    assert list(ARCHITECTURES) == list(CONFIGS)
    assert all(entry.model_type == key for key, entry in ARCHITECTURES.items())


@pytest.fixture(scope="module", params=EVERY, ids=name)
def pair(request: pytest.FixtureRequest) -> tuple[Tiny, Any]:
    return request.param, load(on_disk(request.param))


def test_linear_maps_have_these_names_shapes_and_biases(pair: tuple[Tiny, Any]) -> None:
    tiny, model = pair
    facts = live_facts(model)
    entry = facts.architecture
    assert type(model).__name__ == entry.class_name
    for layer in range(tiny.layers):
        block = block_of(model, facts, layer)
        for linear in (entry.attn_out, entry.ffn_out, *entry.inputs):
            if tiny.has_experts(layer) and "neurons" in (linear.inputs, *linear.outputs):
                continue
            module = block.get_submodule(linear.name)
            assert isinstance(module, Conv1D if entry.transposed else nn.Linear)
            inputs, outputs = facts.axis(linear.inputs), sum(map(facts.axis, linear.outputs))
            expected = (inputs, outputs) if entry.transposed else (outputs, inputs)
            assert tuple(module.weight.shape) == expected, linear.name
            assert (module.bias is not None) == facts.has_bias(linear), linear.name


def test_no_linear_map_of_a_block_is_missing(pair: tuple[Tiny, Any]) -> None:
    tiny, model = pair
    facts = live_facts(model)
    known = {
        linear.name for linear in (facts.architecture.attn_out, facts.architecture.ffn_out, *facts.architecture.inputs)
    }
    for layer in range(tiny.layers):
        modules = block_of(model, facts, layer).named_modules()
        found = {path for path, module in modules if isinstance(module, (nn.Linear, Conv1D))}
        if tiny.has_experts(layer):
            assert found == {path for path in known if "attn" in path}
        else:
            assert found == known


def test_spaces_are_as_wide_as_what_passes_the_ports(pair: tuple[Tiny, Any]) -> None:
    tiny, model = pair
    facts = live_facts(model)
    seen: dict[tuple[int, str], tuple[int, ...]] = {}

    def note(key: tuple[int, str], side: str) -> Any:
        def hook(_: Any, inputs: Any, output: Any) -> None:
            value = inputs[0] if side == "input" else output
            seen[key] = tuple((value[0] if isinstance(value, tuple) else value).shape)

        return hook

    expected = {}
    for layer in range(tiny.layers):
        for site in SITES:
            if site == "neurons" and tiny.has_experts(layer):
                with pytest.raises(CheckpointError, match="mixture of experts"):
                    port(model, facts, layer, site)
                continue
            place = port(model, facts, layer, site)
            place.module.register_forward_hook(note((layer, site), place.side))
            space = site if site in ("heads", "neurons") else "residual"
            expected[layer, site] = facts.geometry.width(space)
    logits(model, tokens(2, 7))
    assert {key: shape[-1] for key, shape in seen.items()} == expected
    assert all(shape[:-1] in ((2, 7), (14,)) for shape in seen.values())


def test_live_and_stored_facts_agree(pair: tuple[Tiny, Any]) -> None:
    tiny, model = pair
    live, stored = live_facts(model), read_facts(on_disk(tiny))
    assert live.geometry.same_shape(stored.geometry)
    assert (live.kv, live.expert_count, live.expert_neurons) == (stored.kv, stored.expert_count, stored.expert_neurons)
    assert live.post_norm == stored.post_norm
    heads_and_kv = {"heads": 60, "kv": 60 if tiny.architecture in ("gpt2", "gpt_neox", "opt") else 30}
    assert {axis: live.axis(axis) for axis in ("heads", "kv")} == heads_and_kv


def test_experts_lie_where_the_table_says(pair: tuple[Tiny, Any]) -> None:
    tiny, model = pair
    facts = live_facts(model)
    experts = facts.architecture.experts
    for layer in range(tiny.layers):
        assert facts.has_experts(layer) == tiny.has_experts(layer)
        if experts is not None and tiny.has_experts(layer):
            path, _, attribute = experts.fused.rpartition(".")
            block = block_of(model, facts, layer)
            weight = getattr(block.get_submodule(path), attribute)
            assert tuple(weight.shape) == (facts.expert_count, facts.geometry.residual, facts.expert_neurons)
            assert experts.fused.startswith(experts.module)


def test_a_post_norm_stands_where_the_table_says(pair: tuple[Tiny, Any]) -> None:
    # A constant added to what the FFN writes shifts the block's output by it, unless a norm comes between.
    tiny, _ = pair
    for variant in [replace(tiny, post_norm=True), tiny] if tiny.architecture == "opt" else [tiny]:
        model = load(on_disk(variant))
        before = first_block(model)
        port(model, live_facts(model), 0, "ffn").module.register_forward_hook(plus_one)
        shifted = torch.allclose(first_block(model), before + 1, atol=1e-4)
        assert shifted is not live_facts(model).post_norm


def plus_one(_: Any, __: Any, output: Any) -> Any:
    return (output[0] + 1, *output[1:]) if isinstance(output, tuple) else output + 1


def first_block(model: Any) -> torch.Tensor:
    """What the first block gives."""
    outputs: list[torch.Tensor] = []
    handle = block_of(model, live_facts(model), 0).register_forward_hook(
        lambda _, __, output: outputs.append(output[0] if isinstance(output, tuple) else output)
    )
    logits(model, tokens())
    handle.remove()
    return outputs[0]


@pytest.mark.parametrize("step", [1, 2, 3])
@pytest.mark.parametrize("dense", [(), (0,), (1, 2)])
def test_layers_with_experts_are_those_of_transformers(step: int, dense: tuple[int, ...]) -> None:
    tiny = Tiny("qwen3_moe", layers=4, dense=dense)
    config = AutoConfig.for_model("qwen3_moe", **{**tiny.config, "decoder_sparse_step": step})
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    facts = live_facts(model)
    live = [hasattr(layer.mlp, "experts") for layer in model.model.layers]
    assert [facts.has_experts(layer) for layer in range(4)] == live


OPTIONAL = [(name, key) for name in CONFIGS for key in ("head_dim", "n_inner") if key in Tiny(name).config]


@pytest.mark.parametrize(("architecture", "key"), OPTIONAL)
def test_an_absent_size_means_what_transformers_takes(architecture: str, key: str) -> None:
    config = {"model_type": architecture, **Tiny(architecture, **SHAPES).config}
    del config[key]
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    facts = facts_of("m", config)
    assert facts.geometry.same_shape(live_facts(model).geometry)
    block, entry = block_of(model, facts, 1), facts.architecture
    for linear in (entry.attn_out, *entry.inputs[:1]):
        weight = block.get_submodule(linear.name).weight
        outputs, inputs = weight.shape[::-1] if entry.transposed else weight.shape
        assert inputs == facts.axis(linear.inputs)
        assert outputs == sum(map(facts.axis, linear.outputs))
