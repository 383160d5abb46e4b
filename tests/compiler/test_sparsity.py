"""Zeros are those that torch counts, in every dtype and across blocks; none that is filled goes unseen."""

import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from austeer.compiler import sparsity as module
from austeer.compiler.architectures import ARCHITECTURES
from austeer.compiler.checkpoint import Checkpoint
from austeer.compiler.errors import CheckFailed
from austeer.compiler.facts import facts_of
from austeer.compiler.form import ModelForm
from austeer.compiler.layout import Layout, OutputLayout
from austeer.compiler.patch import Patch, Touch
from austeer.compiler.sparsity import KeptZeros, TensorSparsity, kept_zeros, sparsity
from austeer.targets.checkpoint import Writing, plan, write
from tests.shared import shared
from tests.tiny import Tiny, fused, on_disk, rewritten, sharded, stored

Tensors = dict[str, Any]
DOWN = "model.layers.1.mlp.down_proj.weight"


def layout(folder: Path) -> Layout:
    checkpoint = Checkpoint.open(folder)
    return Layout.of(checkpoint, facts_of("m", checkpoint.config))


def changed(source: Path, folder: Path, change: Callable[[Tensors], Any]) -> Path:
    def both(tensors: Tensors) -> Tensors:
        change(tensors)
        return tensors

    return rewritten(source, folder, both)


def masked(share: float, seed: int = 0) -> Callable[[Tensors], None]:
    """Zeroes a random share of every matrix, half of them with the other sign."""

    def change(tensors: Tensors) -> None:
        rng = torch.Generator().manual_seed(seed)
        for tensor in tensors.values():
            if tensor.ndim > 1:
                gone = torch.rand(tensor.shape, generator=rng) < share
                tensor[gone] = torch.where(torch.rand(tensor.shape, generator=rng) < 0.5, 0.0, -0.0)[gone].to(
                    tensor.dtype
                )

    return change


def by_name(found: tuple[TensorSparsity, ...]) -> dict[str, TensorSparsity]:
    return {tensor.name: tensor for tensor in found}


@pytest.fixture(params=[8, module.BLOCK], ids=["small blocks", "usual blocks"], autouse=True)
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK", request.param)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3_moe"])
def test_zeros_are_those_of_torch(architecture: str, dtype: str, tmp_path: Path) -> None:
    folder = changed(on_disk(Tiny(architecture, dtype=dtype)), tmp_path / "m", masked(0.3))
    expected = {
        name: (tuple(tensor.shape), int((tensor == 0).sum()))
        for name, tensor in stored(folder).items()
        if tensor.ndim > 1
    }
    found = sparsity(layout(folder))
    assert {tensor.name: (tensor.shape, tensor.zeros) for tensor in found} == expected
    assert sum(tensor.zeros for tensor in found) > 0
    assert not any(tensor.pattern for tensor in found)


def test_a_double_too_small_for_float32_is_not_zero(tmp_path: Path) -> None:
    def change(tensors: Tensors) -> None:
        tensors[DOWN] = tensors[DOWN].double()
        tensors[DOWN][0, :3] = torch.tensor([1e-300, 5e-324, -0.0], dtype=torch.float64)

    folder = changed(on_disk(Tiny("llama")), tmp_path / "m", change)
    assert by_name(sparsity(layout(folder)))[DOWN].zeros == 1


def test_masks_integers_and_vectors_are_no_weights(tmp_path: Path) -> None:
    def change(tensors: Tensors) -> None:
        tensors["transformer.h.0.attn.bias"] = torch.ones(1, 1, 8, 8).tril()
        tensors["transformer.h.0.attn.mask"] = torch.zeros(8, 8, dtype=torch.uint8)
        tensors["none"] = torch.zeros(4, 0)

    usual = layout(on_disk(Tiny("gpt2")))
    found = sparsity(layout(changed(on_disk(Tiny("gpt2")), tmp_path / "m", change)))
    assert found == sparsity(usual)
    assert all(len(tensor.shape) == 2 for tensor in found)


def test_a_sharded_model_has_the_zeros_of_the_whole(tmp_path: Path) -> None:
    whole = sparsity(layout(on_disk(Tiny("llama"))))
    assert by_name(sparsity(layout(sharded(Tiny("llama"), tmp_path / "m")))) == by_name(whole)


# ---- patterns --------------------------------------------------------------------------


def two_of_four(tensor: Any, axis: int, seed: int = 0) -> None:
    """Zeroes two random values of every four along an axis."""
    groups = tensor.movedim(axis, -1).unflatten(-1, (-1, 4))
    order = torch.rand(groups.shape, generator=torch.Generator().manual_seed(seed)).argsort(-1)
    groups[order < 2] = 0


@pytest.mark.parametrize(("architecture", "axis"), [("llama", -1), ("gpt2", 0), ("gpt_neox", -1), ("phi3", -1)])
def test_two_of_four_is_along_the_inputs(architecture: str, axis: int, tmp_path: Path) -> None:
    tiny = Tiny(architecture)
    linears = {
        f"{layout(on_disk(tiny)).name(layer, linear)}.weight"
        for layer in range(tiny.layers)
        for linear in layout(on_disk(tiny)).facts.architecture.linears
    }

    def along(axis: int) -> Callable[[Tensors], None]:
        def change(tensors: Tensors) -> None:
            for name, tensor in tensors.items():
                if tensor.ndim > 1:
                    two_of_four(tensor, axis if name in linears else -1)

        return change

    right = sparsity(layout(changed(on_disk(tiny), tmp_path / "right", along(axis))))
    wrong = sparsity(layout(changed(on_disk(tiny), tmp_path / "wrong", along(-1 - axis))))
    assert linears <= {tensor.name for tensor in right}
    assert all(tensor.pattern == "2:4" and tensor.share == 0.5 for tensor in right)
    assert not any(tensor.pattern for tensor in wrong if tensor.name in linears)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_one_group_with_one_zero_breaks_the_pattern(architecture: str, tmp_path: Path) -> None:
    place = layout(on_disk(Tiny(architecture))).weights(1, "ffn_out")[0].name

    def change(tensors: Tensors) -> None:
        tensors[place].zero_()
        tensors[place][-3:, -3:] = 1  # the last group of either axis

    folder = changed(on_disk(Tiny(architecture)), tmp_path / "m", change)
    found = by_name(sparsity(layout(folder)))[place]
    assert (found.pattern, found.zeros) == ("structured", found.values - 9)


def test_inputs_that_four_does_not_divide_have_no_pattern(tmp_path: Path) -> None:
    folder = changed(on_disk(Tiny("llama", neurons=26)), tmp_path / "m", lambda t: two_of_four(t[DOWN][:, :24], -1))
    assert by_name(sparsity(layout(folder)))[DOWN].pattern == ""


def test_a_stack_of_experts_is_looked_at_as_matrices(tmp_path: Path) -> None:
    together = fused(Tiny("mixtral"), tmp_path / "fused")
    name = "model.layers.0.mlp.experts.down_proj"
    folder = changed(together, tmp_path / "m", lambda tensors: two_of_four(tensors[name], -1))
    found = by_name(sparsity(layout(folder)))[name]
    assert (found.pattern, found.share, len(found.shape)) == ("2:4", 0.5, 3)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_whole_rows_and_columns_are_structured(architecture: str, tmp_path: Path) -> None:
    place = layout(on_disk(Tiny(architecture))).weights(1, "ffn_out")[0].name

    def change(tensors: Tensors) -> None:
        tensors[place][1:3] = 0
        tensors[place][:, [2, 5]] = -0.0

    def one_more(tensors: Tensors) -> None:
        tensors[place][-1, -1] = 0

    folder = changed(on_disk(Tiny(architecture)), tmp_path / "m", change)
    assert by_name(sparsity(layout(folder)))[place].pattern == "structured"
    more = changed(folder, tmp_path / "more", one_more)
    assert by_name(sparsity(layout(more)))[place].pattern == ""


# ---- zeros that stay -------------------------------------------------------------------


def compare(before: Path, after: Path) -> KeptZeros:
    found = kept_zeros(Checkpoint.open(before), layout(after))
    assert found.after == sparsity(layout(after))
    return found


def test_every_filled_zero_is_counted(tmp_path: Path) -> None:
    pruned = changed(on_disk(Tiny("llama")), tmp_path / "a", masked(0.5))
    gate = "model.layers.0.mlp.gate_proj.weight"

    def change(tensors: Tensors) -> None:
        for name, tensor in tensors.items():
            tensor.copy_(torch.where(tensor == 0, -tensor, tensor + 1))  # another value, a zero of the other sign
            if tensor.ndim == 1:
                tensor.add_(1)  # biases and norms may change
            zeros = (tensor == 0).nonzero()
            if name in (DOWN, gate):
                tensor[tuple(zeros[-1])] = 1e-30
        first = (tensors[DOWN] == 0).nonzero()[0]
        tensors[DOWN][tuple(first)] = float("nan")

    after = changed(pruned, tmp_path / "b", change)
    assert dict(compare(pruned, after).filled) == {DOWN: 2, gate: 1}
    assert compare(after, pruned).filled == ()


def test_a_matrix_that_only_the_second_has_is_counted(tmp_path: Path) -> None:
    new = changed(on_disk(Tiny("llama")), tmp_path / "m", lambda tensors: tensors.update(new=torch.eye(3)))
    found = compare(on_disk(Tiny("llama")), new)
    assert found.filled == ()
    assert by_name(found.after)["new"] == TensorSparsity("new", (3, 3), 6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("lm_head.weight"), r"lm_head\.weight is not there, but it must have \[61, 20\]"),
        (
            lambda tensors: tensors.update({"lm_head.weight": torch.zeros(20, 61)}),
            r"lm_head\.weight has the shape \[20, 61\], but it must have \[61, 20\]",
        ),
    ],
)
def test_matrices_must_be_there_in_their_shape(change: Any, message: str, tmp_path: Path) -> None:
    after = changed(on_disk(Tiny("llama")), tmp_path / "m", change)
    with pytest.raises(CheckFailed, match=message):
        kept_zeros(Checkpoint.open(on_disk(Tiny("llama"))), layout(after))


@pytest.mark.parametrize(("home", "route"), [("phi3", "bias"), ("qwen2", "value-bias"), ("qwen3", "split-layer")])
def test_zeros_are_followed_into_another_form(home: str, route: Any, tmp_path: Path) -> None:
    """Split (phi3), renamed (an inserted layer) or as they were."""
    abroad = {"phi3": "llama"}.get(home, home)
    base = layout(changed(on_disk(Tiny(home, kv_heads=4)), tmp_path / "a", masked(0.5)))
    form = ModelForm(ARCHITECTURES[abroad], {(0, "attn_out"): route})
    folder = tmp_path / "out"
    folder.mkdir()
    write(plan(Patch((), (Touch(0, 0, "attn_out", "bias", None),)), base, form), folder, Writing())
    moved = OutputLayout(base, form).moved
    found = kept_zeros(base.checkpoint, layout(folder), moved)
    assert (found.filled, found.after) == ((), sparsity(layout(folder)))
    name, _ = moved[base.name(1, base.facts.architecture.inputs[0]) + ".weight"][-1]
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    tensors = stored(folder)
    tensors[name][tuple((tensors[name] == 0).nonzero()[-1])] = 1
    for file in folder.glob("*.safetensors"):
        file.unlink()
    save_file(tensors, folder / "model.safetensors")
    assert kept_zeros(base.checkpoint, layout(folder), moved).filled == ((name, 1),)


def test_a_part_that_cannot_hold_its_whole() -> None:
    base = layout(on_disk(Tiny("llama")))
    moved = {DOWN: ((DOWN.replace("1", "0"), (20, 28)), (DOWN, (20, 28)))}
    with pytest.raises(CheckFailed, match=r"cannot hold model\.layers\.1\.mlp\.down_proj\.weight \[20, 28\]; report"):
        kept_zeros(base.checkpoint, base, moved)


# ---- a real model, and the cost ---------------------------------------------------------


def test_the_magnitude_pruned_model_is_half_zero() -> None:
    dense, pruned = (layout(shared(f"models/stories260K{name}")) for name in ("", "-magnitude50"))
    found = [tensor for tensor in sparsity(pruned) if ".layers." in tensor.name]
    assert len(found) == 5 * 7
    assert all(tensor.share == 0.5 for tensor in found)
    assert not any(tensor.zeros for tensor in sparsity(dense))
    assert kept_zeros(dense.checkpoint, pruned).filled == ()
    filled = kept_zeros(pruned.checkpoint, dense).filled
    assert dict(filled) == {tensor.name: tensor.zeros for tensor in found}


def test_memory_does_not_grow_with_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK", 2**12)
    large = layout(on_disk(Tiny("llama", residual=256, neurons=1024, vocabulary=8192)))
    sparsity(large)
    tracemalloc.start()
    kept_zeros(large.checkpoint, large)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**19 < large.checkpoint.tensors["lm_head.weight"].nbytes / 8
