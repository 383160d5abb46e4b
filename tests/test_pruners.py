"""The plain pruners: their zeros, patterns and shapes are what they say, and transformers loads what they write."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from austeer.compiler.facts import read_facts
from austeer.compiler.live import load_tokenizer
from austeer.compiler.verbs.demo import MODEL
from benchmarks.pruners import magnitude, structured, two_of_four, wanda
from tests.shared import shared
from tests.tiny import load, logits, stored

TEXTS = ("Once upon a time there was a little girl.", "Tom had a red ball. He was happy.")


def pruned(out: Path, prune: Callable[[Path, Path], None]) -> dict[str, Any]:
    """The tensors of the pruned demo model, which must load and read text as the dense one does."""
    prune(MODEL, out)
    ids = torch.tensor([load_tokenizer(out)(TEXTS[0])["input_ids"]])
    assert logits(load(out), ids).isfinite().all()
    assert not torch.equal(logits(load(out), ids), logits(load(MODEL), ids))
    return stored(out)


def maps(tensors: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name.endswith("_proj.weight")}


def test_magnitude_takes_the_smallest_half_of_every_row(tmp_path: Path):
    dense, left = stored(MODEL), pruned(tmp_path / "out", magnitude)
    assert all(torch.equal(left[name], dense[name]) for name in dense.keys() - maps(dense).keys())
    for name, weight in maps(left).items():
        gone = weight == 0
        assert (gone.sum(1) == weight.shape[1] // 2).all()
        size = dense[name].abs()
        assert (size.where(gone, 0).amax(1) <= size.where(~gone, torch.inf).amin(1)).all()
        assert torch.equal(weight[~gone], dense[name][~gone])


def test_magnitude_is_what_the_shared_pruned_model_was_made_by(tmp_path: Path):
    given = stored(shared("models/stories260K-magnitude50"))
    magnitude(shared("models/stories260K"), tmp_path / "out")
    left = stored(tmp_path / "out")
    assert all(torch.equal(left[name], given[name]) for name in given)


def test_wanda_weighs_by_the_norms_of_the_inputs(tmp_path: Path):
    dense, left = stored(MODEL), pruned(tmp_path / "out", partial(wanda, texts=TEXTS))
    tokenizer, model, seen = load_tokenizer(MODEL), load(MODEL), []
    down = model.model.layers[1].mlp.down_proj
    down.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0]))
    for text in TEXTS:
        logits(model, torch.tensor([tokenizer(text)["input_ids"]]))
    name = "model.layers.1.mlp.down_proj.weight"
    score, gone = dense[name].float().abs() * torch.cat(seen).norm(dim=0), left[name] == 0
    assert (gone.sum(1) == gone.shape[1] // 2).all()
    assert (score.where(gone, 0).amax(1) <= score.where(~gone, torch.inf).amin(1)).all()
    assert not torch.equal(gone, pruned(tmp_path / "by-magnitude", magnitude)[name] == 0)


@pytest.mark.parametrize("texts", [(), TEXTS])
def test_two_of_every_four(texts: tuple[str, ...], tmp_path: Path):
    for weight in maps(pruned(tmp_path / "out", partial(two_of_four, texts=texts))).values():
        assert ((weight == 0).unflatten(1, (-1, 4)).sum(2) == 2).all()


def test_in_shape_a_quarter_of_heads_and_neurons_is_zero_on_both_sides(tmp_path: Path):
    left, facts = pruned(tmp_path / "out", partial(structured, in_shape=True)), read_facts(MODEL)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == json.loads((MODEL / "config.json").read_text())
    for layer in range(facts.geometry.layers):
        block = f"model.layers.{layer}."
        silent = (left[f"{block}self_attn.o_proj.weight"] == 0).all(0)
        assert torch.equal(silent, (left[f"{block}self_attn.q_proj.weight"] == 0).all(1))
        heads = silent.view(-1, facts.head_dim)
        assert torch.equal(heads.all(1), heads.any(1))
        assert heads.all(1).sum() == round(len(heads) / 4)
        idle = (left[f"{block}mlp.down_proj.weight"] == 0).all(0)
        assert idle.sum() == round(len(idle) / 4)
        for name in ("gate_proj", "up_proj"):
            assert torch.equal(idle, (left[f"{block}mlp.{name}.weight"] == 0).all(1))


def test_cut_to_smaller_shapes_it_is_the_model_without_the_units_that_went(tmp_path: Path):
    """The same units zeroed in the dense model give the same logits."""
    left, dense, facts = pruned(tmp_path / "out", structured), stored(MODEL), read_facts(tmp_path / "out")
    before = read_facts(MODEL)
    assert facts.geometry.neurons == before.geometry.neurons - round(before.geometry.neurons / 4)
    assert facts.geometry.heads < before.geometry.heads
    assert facts.head_dim == before.head_dim
    assert facts.config["head_dim"] == before.head_dim
    zeroed = load(MODEL)
    for layer, block in enumerate(zeroed.model.layers):
        for projection, axis in ((block.self_attn.o_proj, "self_attn.o_proj"), (block.mlp.down_proj, "mlp.down_proj")):
            name = f"model.layers.{layer}.{axis}.weight"
            kept = {column.numpy().tobytes() for column in left[name].T.contiguous()}
            gone = [i for i, column in enumerate(dense[name].T.contiguous()) if column.numpy().tobytes() not in kept]
            assert len(gone) == dense[name].shape[1] - left[name].shape[1]
            projection.weight[:, gone] = 0
    ids = torch.tensor([load_tokenizer(MODEL)(TEXTS[0])["input_ids"]])
    torch.testing.assert_close(logits(load(tmp_path / "out"), ids), logits(zeroed, ids), rtol=0, atol=1e-4)


def test_gpt2_which_stores_its_maps_transposed_and_fused(tmp_path: Path):
    model = shared("models/imdb-gpt2-2.6m")
    magnitude(model, tmp_path / "half")
    weight = stored(tmp_path / "half")["transformer.h.0.mlp.c_fc.weight"]
    assert ((weight == 0).sum(0) == weight.shape[0] // 2).all()
    structured(model, tmp_path / "silent", in_shape=True)
    left = stored(tmp_path / "silent")
    silent = (left["transformer.h.0.attn.c_proj.weight"] == 0).all(1)
    assert silent.sum() == 64
    for part in left["transformer.h.0.attn.c_attn.weight"].chunk(3, dim=1):  # queries, keys, values
        assert torch.equal((part == 0).all(0), silent)
    assert load(tmp_path / "silent")


def test_an_output_that_is_there_stays(tmp_path: Path):
    shutil.copytree(MODEL, tmp_path / "out")
    with pytest.raises(FileExistsError):
        magnitude(MODEL, tmp_path / "out")
