"""The files of a checkpoint that has tensors its base lacks: one new shard, new headers, an index, the same data."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from austeer.compiler import CheckpointError, Program, Scale, Shift, interpret
from austeer.compiler.live import load_model
from austeer.compiler.verbs.build import BuildReport, build
from tests.tiny import Tiny, load, logits, on_disk, rewritten, sharded, stored, tokens

LLAMA, QWEN3 = Tiny("llama", biases=False), Tiny("qwen3", biases=False)
NEW, BASE, INDEX = "model-austeer.safetensors", "model-base.safetensors", "model.safetensors.index.json"


def shift(site: Any = "attn", layer: int = 0, seed: int = 0) -> Shift:
    return Shift(layer, site, np.random.default_rng(seed).normal(size=20))


def compiled(base: Path, folder: Path, *edits: Any, out: str = "out", target: str = "transformers") -> BuildReport:
    Program.of(edits, model=base).save(folder / "p.safetensors")
    return build(str(base), [folder / "p.safetensors"], folder / out, target=target)


def check(base: Path, folder: Path, *edits: Any, may_miss: frozenset[str] = frozenset()) -> None:
    """The output loads complete and does what the interpreter says."""
    model, ids = load(base), tokens()
    with interpret(model, Program.of(edits, model=base)):
        wanted = logits(model, ids)
    made = load_model(folder / "out", dtype="float32", device="cpu", may_miss=may_miss)
    assert (logits(made, ids) - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def check_index(out: Path) -> dict[str, Any]:
    """It names every tensor in its file, and their size."""
    index = json.loads((out / INDEX).read_text())
    places = {name: path.name for path in out.glob("*.safetensors") for name in load_file(path)}
    assert index["weight_map"] == places
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in stored(out).values())
    return index


def data_of(path: Path) -> bytes:
    raw = path.read_bytes()
    return raw[8 + int.from_bytes(raw[:8], "little") :]


def test_a_base_in_one_file_gets_an_index_and_its_own_file_unchanged(tmp_path: Path) -> None:
    base = on_disk(LLAMA)
    compiled(base, tmp_path, shift())
    out = tmp_path / "out"
    assert sorted(path.name for path in out.glob("*.safetensors")) == [NEW, BASE]
    assert (out / BASE).read_bytes() == (base / "model.safetensors").read_bytes()
    assert check_index(out)["metadata"].keys() == {"total_size"}
    biases = {f"model.layers.{layer}.self_attn.{name}_proj.bias" for layer in (0, 1) for name in "qkvo"}
    assert load_file(out / NEW).keys() == biases
    assert not any(tensor.any() for name, tensor in load_file(out / NEW).items() if ".0.self_attn.o_proj" not in name)
    check(base, tmp_path, shift())


def test_shards_keep_their_names_and_the_index_its_other_keys(tmp_path: Path) -> None:
    base = sharded(QWEN3, tmp_path / "base")
    index = json.loads((base / INDEX).read_text())
    index["metadata"]["total_parameters"], index["odd"] = 7, ["é"]
    (base / INDEX).write_text(json.dumps(index))
    edits = [shift("residual", 0), shift("attn", 1)]
    compiled(base, tmp_path, *edits)
    out = tmp_path / "out"
    made = check_index(out)
    assert made["odd"] == ["é"]
    assert made["metadata"]["total_parameters"] == 7
    shards = {path.name for path in base.glob("*.safetensors")}
    assert {path.name for path in out.glob("*.safetensors")} == shards | {NEW}
    for name in shards:  # renamed behind the inserted layer, and otherwise the same bytes
        assert data_of(out / name) == data_of(base / name)
        assert (out / name).read_bytes() != (base / name).read_bytes()
    check(base, tmp_path, *edits)


def test_tensors_move_with_their_layer_and_others_stay(tmp_path: Path) -> None:
    extra = {
        "model.layers.1.odd.table": torch.arange(3),
        "elsewhere": torch.ones(2),
        "model.layers.10.x": torch.ones(1),
    }
    base = rewritten(on_disk(QWEN3), tmp_path / "base", lambda tensors: {**tensors, **extra})
    compiled(base, tmp_path, shift("residual", 0))
    before, after = stored(base), stored(tmp_path / "out")
    new = load_file(tmp_path / "out" / NEW).keys()
    renamed = {name.replace("layers.1.", "layers.2."): tensor for name, tensor in before.items()}
    assert after.keys() - new == renamed.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in renamed.items())
    assert {name.split(".self_attn")[0].split(".mlp")[0] for name in new} >= {"model.layers.1"}


def test_tensors_outside_the_index_stay_outside(tmp_path: Path) -> None:
    base = sharded(LLAMA, tmp_path / "base")
    shard = base / "model-00001-of-00003.safetensors"
    save_file({**load_file(shard), "extra": torch.ones(2)}, shard, metadata={"format": "pt"})
    compiled(base, tmp_path, shift())
    assert torch.equal(stored(tmp_path / "out")["extra"], torch.ones(2))
    assert "extra" not in json.loads((tmp_path / "out" / INDEX).read_text())["weight_map"]


def test_fused_maps_are_split_where_they_lie(tmp_path: Path) -> None:
    base = on_disk(Tiny("phi3"))
    compiled(base, tmp_path, shift())
    before, after = stored(base), stored(tmp_path / "out")
    assert data_of(tmp_path / "out" / BASE) == data_of(base / "model.safetensors")
    parts = [after[f"model.layers.1.self_attn.{name}_proj.weight"] for name in "qkv"]
    assert [len(part) for part in parts] == [24, 12, 12]
    assert torch.equal(torch.cat(parts), before["model.layers.1.self_attn.qkv_proj.weight"])
    parts = [after[f"model.layers.0.mlp.{name}_proj.weight"] for name in ("gate", "up")]
    assert torch.equal(torch.cat(parts), before["model.layers.0.mlp.gate_up_proj.weight"])
    assert not any("qkv_proj" in name or "gate_up_proj" in name for name in after)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_new_tensors_are_stored_as_the_base_s(dtype: str, tmp_path: Path) -> None:
    compiled(on_disk(Tiny("gemma2", biases=False, dtype=dtype)), tmp_path, shift("residual"))
    assert {str(tensor.dtype) for tensor in stored(tmp_path / "out").values()} == {f"torch.{dtype}"}


# ---- the manifest ------------------------------------------------------------------------------------


def lowering(report: BuildReport) -> list[tuple[int, str, Any]]:
    return [(entry["edit"], entry["tensor"], entry["slice"]) for entry in report.plain()["lowering"]]


def test_the_manifest_lists_what_holds_the_constant_and_what_is_zero_beside_it(tmp_path: Path) -> None:
    edits = [Scale(0, "heads", [2], 1), shift("attn", 1), Scale(1, "attn", [3], 1)]
    found = lowering(compiled(on_disk(LLAMA), tmp_path, *edits))
    name = "model.layers.{}.self_attn.{}_proj.{}".format
    changed = [
        (0, name(0, "o", "weight"), [None, [2]]),
        (1, name(1, "o", "bias"), [None]),
        (2, name(1, "o", "weight"), [[3], None]),
        (2, name(1, "o", "bias"), [[3]]),
    ]
    zero = {name(layer, part, "bias") for layer in (0, 1) for part in "qkvo"} - {name(1, "o", "bias")}
    assert found[:4] == changed
    assert sorted(found[4:]) == sorted((1, tensor, [None]) for tensor in zero)


def test_in_an_inserted_layer_the_slices_are_one_unit_and_one_column(tmp_path: Path) -> None:
    # Unit 19 of the residual is beyond the 12 of v_proj.bias.
    found = lowering(compiled(on_disk(QWEN3), tmp_path, shift("ffn"), Scale(0, "ffn", [19], 1)))
    held = [
        entry for entry in found if ".1.self_attn.o_proj.weight" in entry[1] or ".1.self_attn.v_proj.bias" in entry[1]
    ]
    assert sorted(held) == [
        (0, "model.layers.1.self_attn.o_proj.weight", [None, [0]]),
        (0, "model.layers.1.self_attn.v_proj.bias", [[0]]),
        (1, "model.layers.1.self_attn.o_proj.weight", [[19], [0]]),
        (1, "model.layers.1.self_attn.v_proj.bias", [[0]]),
    ]
    rounding = json.loads((tmp_path / "out/austeer.json").read_text())["rounding"]
    assert rounding.keys() <= stored(tmp_path / "out").keys()
    assert "model.layers.0.mlp.down_proj.weight" in rounding


def test_rounding_bears_the_names_of_the_output(tmp_path: Path) -> None:
    compiled(on_disk(QWEN3), tmp_path, shift("ffn", 0), Scale(1, "ffn", [1], 0.3))
    rounding = json.loads((tmp_path / "out/austeer.json").read_text())["rounding"]
    assert "model.layers.2.mlp.down_proj.weight" in rounding
    assert "model.layers.1.mlp.down_proj.weight" not in rounding


# ---- odd bases and odd edits ----------------------------------------------------------------------------


@pytest.mark.parametrize("tiny", [LLAMA, QWEN3], ids=["bias", "layer"])
def test_a_shift_of_zeros_is_placed_like_any_other(tiny: Tiny, tmp_path: Path) -> None:
    edits = [Shift(0, "ffn", np.zeros(20)), Scale(0, "ffn", [1], 0.5)]
    compiled(on_disk(tiny), tmp_path, *edits)
    check(on_disk(tiny), tmp_path, *edits)


@pytest.mark.parametrize("target", ["transformers", "sglang"])
def test_a_compiled_checkpoint_with_new_tensors_can_get_more(target: str, tmp_path: Path) -> None:
    compiled(on_disk(LLAMA), tmp_path, shift("attn"), target=target)
    base = (tmp_path / "out").rename(tmp_path / "base")
    edits = [shift("ffn", 1, seed=1), shift("attn", 0, seed=2)]
    compiled(base, tmp_path, *edits, target=target)
    out = tmp_path / "out"
    assert sorted(path.name for path in out.glob("*.safetensors")) == ["model-austeer-2.safetensors", NEW, BASE]
    check_index(out)
    check(base, tmp_path, *edits)


def test_a_stray_bias_that_the_form_would_use_stops_the_build(tmp_path: Path) -> None:
    stray = "model.layers.1.self_attn.k_proj.bias"
    base = rewritten(on_disk(LLAMA), tmp_path / "base", lambda tensors: {**tensors, stray: torch.ones(12)})
    with pytest.raises(CheckpointError, match=rf"{stray} is there that config\.json does not use.*remove it"):
        compiled(base, tmp_path, shift("attn"))
    assert not (tmp_path / "out").exists()
    compiled(base, tmp_path, shift("ffn"))  # whose biases are others: it stays, unused as before
    assert torch.equal(stored(tmp_path / "out")[stray], torch.ones(12))


def test_for_llama_cpp_a_qwen3_has_no_o_proj_bias_and_transformers_makes_it_zero(tmp_path: Path) -> None:
    base = on_disk(QWEN3)
    report = compiled(base, tmp_path, shift("residual"), target="llama.cpp")
    assert not any(name.endswith("o_proj.bias") for name in stored(tmp_path / "out"))
    assert json.loads((tmp_path / "out/config.json").read_text())["attention_bias"] is True
    assert report.compiled.plan.may_miss == {"self_attn.o_proj.bias"}
    check(base, tmp_path, shift("residual"), may_miss=report.compiled.plan.may_miss)
    model = load_model(tmp_path / "out", dtype="float32", device="cpu", may_miss=report.compiled.plan.may_miss)
    biases = [value for name, value in model.named_parameters() if name.endswith("o_proj.bias")]
    assert len(biases) == 3
    assert not any(bias.any() for bias in biases)
    with pytest.raises(CheckpointError, match=r"3 weights would be random.*o_proj\.bias"):
        load_model(tmp_path / "out", dtype="float32", device="cpu")


def test_equal_bytes_twice(tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(on_disk(QWEN3), base)
    edits = [shift("attn"), shift("residual", 1), Scale(1, "heads", [1], 1)]
    for out in ("a", "b"):
        compiled(base, tmp_path, *edits, out=out)
    names = sorted(path.name for path in (tmp_path / "a").iterdir() if path.is_file())
    assert {NEW, BASE, INDEX, "config.json"} <= set(names)
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
