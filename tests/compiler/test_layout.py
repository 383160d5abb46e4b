"""Where projections lie in a checkpoint, and what is said when they do not."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from austeer.compiler import CheckpointError
from austeer.compiler.checkpoint import Checkpoint
from austeer.compiler.facts import facts_of
from austeer.compiler.layout import Layout
from tests.tiny import CONFIGS, PREFIXES, Tiny, bare, fused, on_disk, rewritten, sharded, stored


def layout(folder: Path) -> Layout:
    checkpoint = Checkpoint.open(folder)
    return Layout.of(checkpoint, facts_of("m", checkpoint.config))


def damaged(tiny: Tiny, folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    def changed(tensors: dict[str, Any]) -> dict[str, Any]:
        change(tensors)
        return tensors

    return rewritten(on_disk(tiny), folder / "m", changed)


@pytest.mark.parametrize("architecture", CONFIGS)
def test_every_projection_is_found_under_both_prefixes(architecture: str, tmp_path: Path) -> None:
    tiny = Tiny(architecture)
    usual, short = layout(on_disk(tiny)), layout(bare(tiny, tmp_path / "bare"))
    prefix = PREFIXES.get(architecture, "model.")
    assert (usual.prefix, short.prefix) == (prefix, "")
    for layer in range(tiny.layers):
        for role in ("attn_out", "ffn_out"):
            names = [tensor.name for tensor in usual.weights(layer, role)]
            assert names == [prefix + tensor.name for tensor in short.weights(layer, role)]
            assert len(names) == (tiny.experts if role == "ffn_out" and tiny.has_experts(layer) else 1)
            bias = usual.bias(layer, role)
            has_bias = ("attn" if role == "attn_out" else "ffn") in tiny._constants()
            assert (bias is not None) == has_bias
            if bias is not None:
                assert bias.name == names[0].removesuffix("weight") + "bias"


@pytest.mark.parametrize("architecture", ["qwen3_moe", "mixtral"])
def test_experts_are_found_in_both_layouts(architecture: str, tmp_path: Path) -> None:
    tiny = Tiny(architecture)
    apart, together = layout(on_disk(tiny)), layout(fused(tiny, tmp_path / "fused"))
    assert [tensor.shape[-2:] for tensor in apart.weights(0, "ffn_out")] == [(20, apart.facts.expert_neurons)] * 3
    (stack,) = together.weights(0, "ffn_out")
    assert stack.name == "model.layers.0.mlp.experts.down_proj"
    assert stack.shape == (3, 20, apart.facts.expert_neurons)
    values = stored(on_disk(tiny))
    alone = torch.stack([values[tensor.name] for tensor in apart.weights(0, "ffn_out")])
    assert torch.equal(alone, stored(tmp_path / "fused")[stack.name])


def test_tensors_are_found_in_their_shards(tmp_path: Path) -> None:
    tiny = Tiny("llama")
    found = layout(sharded(tiny, tmp_path / "sharded"))
    assert {tensor.file.name for layer in range(2) for tensor in found.weights(layer, "attn_out")} <= set(
        found.checkpoint.shards
    )


@pytest.mark.parametrize("architecture", CONFIGS)
def test_every_tensor_of_a_block_must_be_there_in_its_shape(architecture: str, tmp_path: Path) -> None:
    tiny = Tiny(architecture)
    facts = facts_of("m", Checkpoint.open(on_disk(tiny)).config)
    entry, prefix = facts.architecture, PREFIXES.get(architecture, "model.")
    block = prefix + entry.block.format(layer=1)
    linears = [entry.attn_out, *entry.inputs] if tiny.has_experts(1) else [entry.attn_out, entry.ffn_out, *entry.inputs]
    names = [linear.name + ".weight" for linear in linears if not (tiny.has_experts(1) and "neurons" in linear.outputs)]
    names += [linear.name + ".bias" for linear in linears if facts.has_bias(linear)]
    for number, name in enumerate(names):
        missing = damaged(tiny, tmp_path / f"a{number}", lambda tensors: tensors.pop(block + name))  # noqa: B023
        with pytest.raises(CheckpointError, match=f"no tensor {block}{name}, which config.json promises"):
            layout(missing)

        def cut(tensors: dict[str, Any]) -> None:
            tensors[block + name] = tensors[block + name][..., :-1]  # noqa: B023

        with pytest.raises(CheckpointError, match=rf"{block}{name} has shape \[.*, but config.json promises \["):
            layout(damaged(tiny, tmp_path / f"b{number}", cut))


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("architecture", ["qwen3_moe", "mixtral"])
def test_every_expert_must_be_there_in_its_shape(architecture: str, together: bool, tmp_path: Path) -> None:
    tiny = Tiny(architecture)
    source = fused(tiny, tmp_path / "fused") if together else on_disk(tiny)
    name = layout(source).weights(0, "ffn_out")[-1].name
    cut = rewritten(source, tmp_path / "cut", lambda tensors: {**tensors, name: tensors[name][..., :-1]})
    with pytest.raises(CheckpointError, match=rf"{name} has shape"):
        layout(cut)
    if together:
        few = rewritten(source, tmp_path / "few", lambda tensors: {**tensors, name: tensors[name][:-1]})
        with pytest.raises(CheckpointError, match=rf"{name} has shape \[2, .* promises \[3, "):
            layout(few)
    gone = rewritten(source, tmp_path / "gone", lambda tensors: {key: tensors[key] for key in tensors if key != name})
    with pytest.raises(CheckpointError, match=r"no tensor model\.layers\.0"):
        layout(gone)


def test_the_weights_of_another_architecture(tmp_path: Path) -> None:
    shutil.copytree(on_disk(Tiny("gpt2")), tmp_path / "m")
    shutil.copy(on_disk(Tiny("llama")) / "config.json", tmp_path / "m/config.json")
    with pytest.raises(
        CheckpointError,
        match=r"no tensor model\.layers\.0\.self_attn\.o_proj\.weight; these are not the weights of a llama",
    ):
        layout(tmp_path / "m")


def test_a_bias_counts_only_if_the_config_promises_it(tmp_path: Path) -> None:
    tiny = Tiny("llama", biases=False)
    name = "model.layers.0.self_attn.o_proj.bias"
    folder = damaged(tiny, tmp_path, lambda tensors: tensors.update({name: torch.ones(20)}))
    assert name in Checkpoint.open(folder).tensors
    assert layout(folder).bias(0, "attn_out") is None
