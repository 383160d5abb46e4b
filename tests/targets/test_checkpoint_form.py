"""The form `checkpoint`, built from every layout a base comes in; what is planned is what is written."""

import hashlib
import json
import os
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from austeer.compiler import CheckpointError, OutputError, Program, Rank1, Refused, Scale, Shift, interpret
from austeer.compiler.checkpoint import Checkpoint
from austeer.compiler.facts import facts_of
from austeer.compiler.form import ModelForm
from austeer.compiler.layout import Layout
from austeer.compiler.patch import Affine, Patch, Vector
from austeer.compiler.verbs.build import BuildReport, build
from austeer.targets import checkpoint
from austeer.targets.checkpoint import Plan, Writing, plan, write
from tests.tiny import CONFIGS, Tiny, bare, fused, load, logits, on_disk, program, rewritten, sharded, stored, tokens

LLAMA = Tiny("llama")
ADDED = {"austeer.json", "README.md", "austeer"}


def compiled(base: Path, made: Program, folder: Path, **options: Any) -> BuildReport:
    made.save(folder / "p.safetensors")
    return build(str(base), [folder / "p.safetensors"], folder / "out", **options)


def copy_of(source: Path, folder: Path) -> Path:
    shutil.copytree(source, folder)
    return folder


def check(base: Path, made: Program, folder: Path) -> None:
    """The compiled checkpoint, as transformers loads it, does what the interpreter says."""
    model, ids = load(base), tokens()
    with interpret(model, made):
        expected = logits(model, ids)
    found = logits(load(folder / "out"), ids)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (logits(model, ids) - expected).abs().max() > 0.01 * expected.abs().max()


# ---- layouts ---------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3_moe", "mixtral"])
def test_shards(architecture: str, tmp_path: Path) -> None:
    tiny = Tiny(architecture)
    base = sharded(tiny, tmp_path / "base")
    made = program(tiny, base)
    compiled(base, made, tmp_path)
    check(base, made, tmp_path)
    check_index(base, tmp_path / "out")
    compiled_whole = tmp_path / "whole"
    compiled_whole.mkdir()
    compiled(on_disk(tiny), program(tiny), compiled_whole)
    sharded_values, values = stored(tmp_path / "out"), stored(compiled_whole / "out")
    assert sharded_values.keys() == values.keys()
    assert all(torch.equal(sharded_values[name], values[name]) for name in values)


def check_index(base: Path, out: Path) -> None:
    """It names every tensor and the file it is in; without new tensors it is the base's to the byte."""
    name = "model.safetensors.index.json"
    index = json.loads((out / name).read_bytes())
    found = {tensor: path.name for path in out.glob("*.safetensors") for tensor in load_file(path)}
    assert index["weight_map"] == found
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in stored(out).values())
    assert ("model-austeer.safetensors" in found.values()) is ((out / name).read_bytes() != (base / name).read_bytes())


def test_a_shard_without_edits_is_the_base_s(tmp_path: Path) -> None:
    base = sharded(LLAMA, tmp_path / "base")
    name = "model.layers.0.mlp.down_proj.weight"
    compiled(base, Program.of([Rank1(0, "neurons", np.ones(28), np.ones(20), 1)], model=base), tmp_path)
    for path in base.glob("*.safetensors"):
        same = (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
        assert same is (name not in load_file(path))


@pytest.mark.parametrize("architecture", CONFIGS)
def test_names_without_the_prefix(architecture: str, tmp_path: Path) -> None:
    tiny = Tiny(architecture)
    base = bare(tiny, tmp_path / "base")
    made = program(tiny, base)
    report = compiled(base, made, tmp_path)
    whole = tmp_path / "whole"
    whole.mkdir()
    compiled(on_disk(tiny), program(tiny), whole)
    found, expected = stored(tmp_path / "out"), stored(whole / "out")
    assert all(torch.equal(found[short(name)], expected[name]) for name in expected)
    assert {entry["tensor"] for entry in report.plain()["lowering"]} <= found.keys()


def short(name: str) -> str:
    return next((name.removeprefix(p) for p in ("model.", "transformer.", "gpt_neox.") if name.startswith(p)), name)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox"])
def test_transformers_loads_what_is_compiled_without_the_prefix(architecture: str, tmp_path: Path) -> None:
    tiny = Tiny(architecture, tied=True)
    base = bare(tiny, tmp_path / "base")
    made = program(tiny, base)
    compiled(base, made, tmp_path)
    check(base, made, tmp_path)


@pytest.mark.parametrize("architecture", ["qwen3_moe", "mixtral"])
def test_experts_in_one_tensor(architecture: str, tmp_path: Path) -> None:
    tiny = Tiny(architecture)
    base = fused(tiny, tmp_path / "base")
    made = program(tiny, base)
    report = compiled(base, made, tmp_path)
    check(base, made, tmp_path)
    name = "model.layers.0.mlp.experts.down_proj"
    slices = [entry["slice"] for entry in report.plain()["lowering"] if entry["tensor"] == name]
    assert slices
    assert all(len(place) == 3 and place[0] is None and place[2] is None for place in slices)
    apart = tmp_path / "apart"
    apart.mkdir()
    compiled(on_disk(tiny), program(tiny), apart)
    together = stored(tmp_path / "out")[name]
    alone = [tensor for key, tensor in sorted(stored(apart / "out").items()) if is_expert_of_layer_0(key)]
    assert torch.equal(together, torch.stack(alone))


def is_expert_of_layer_0(name: str) -> bool:
    return ".layers.0." in name and name.endswith((".down_proj.weight", ".w2.weight")) and ".experts." in name


def test_transposed_weights(tmp_path: Path) -> None:
    tiny = Tiny("gpt2")
    made = Program.of([Scale(0, "heads", [5], 1.0), Scale(0, "ffn", [7], 1.0)], model=on_disk(tiny))
    report = compiled(on_disk(tiny), made, tmp_path)
    before, after = stored(on_disk(tiny)), stored(tmp_path / "out")
    heads, ffn = "transformer.h.0.attn.c_proj.weight", "transformer.h.0.mlp.c_proj.weight"
    assert torch.equal(after[heads][5], 2 * before[heads][5])
    assert torch.equal(after[ffn][:, 7], 2 * before[ffn][:, 7])
    # A unit of the input is a stored row, which is all that is rewritten; one of the output a stored column.
    sizes = {entry["tensor"]: entry["bytes"] for entry in report.plain()["tensors"]}
    assert sizes == {heads: 4 * 24, ffn: 4 * 28 * 24, ffn.replace("weight", "bias"): 4 * 24}


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_tied_embeddings_stay_tied(architecture: str, tmp_path: Path) -> None:
    tiny = Tiny(architecture, tied=True)
    base = on_disk(tiny)
    assert not any("lm_head" in name for name in stored(base))
    made = program(tiny)
    compiled(base, made, tmp_path)
    check(base, made, tmp_path)
    assert not any("lm_head" in name for name in stored(tmp_path / "out"))


# ---- the plan ---------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.1, 1.0])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3_moe"])
def test_the_figures_of_a_dry_run_are_those_of_the_build(architecture: str, share: float, tmp_path: Path) -> None:
    tiny = Tiny(architecture, dtype="bfloat16")
    made = program(tiny, share=share)
    dry = compiled(on_disk(tiny), made, tmp_path, dry_run=True).plain()
    assert [path.name for path in tmp_path.iterdir()] == ["p.safetensors"]
    report = compiled(on_disk(tiny), made, tmp_path).plain()
    assert dry["out"] is None
    assert {**dry, "out": report["out"]} == report
    files = [path for path in (tmp_path / "out").iterdir() if path.name not in ADDED]
    assert dry["bytes_to_copy"] == sum(path.stat().st_size for path in files)
    assert dry["bytes_to_rewrite"] == sum(
        entry["bytes"] for entry in dry["tensors"] if entry["file"] != "model-austeer.safetensors"
    )
    manifest = json.loads((tmp_path / "out/austeer.json").read_text())
    assert manifest["lowering"] == dry["lowering"]
    new = path_values(tmp_path / "out/model-austeer.safetensors")
    zero = {name for name, tensor in new.items() if not tensor.any()}
    written = {entry["tensor"] for entry in dry["tensors"]} - zero
    assert manifest["rounding"].keys() == written
    assert all(0 <= rounding < 2**-8 for rounding in manifest["rounding"].values())
    if not new:  # else layers may have other numbers
        before, after = stored(on_disk(tiny)), stored(tmp_path / "out")
        assert {name for name in after if not torch.equal(after[name], before[name])} == written


def path_values(path: Path) -> dict[str, Any]:
    return load_file(path) if path.exists() else {}


def test_the_bytes_planned_are_those_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = program(LLAMA, share=0.5)
    written: list[int] = []
    plain: Callable[[Any, Any], None] = checkpoint.write_all

    def counting(file: Any, data: Any) -> None:
        written.append(len(data))
        plain(file, data)

    monkeypatch.setattr(checkpoint, "write_all", counting)
    assert compiled(on_disk(LLAMA), made, tmp_path).plain()["bytes_to_rewrite"] == sum(written)


def test_progress_counts_every_byte_of_the_shards_once(tmp_path: Path) -> None:
    base = Checkpoint.open(sharded(LLAMA, tmp_path / "base"))
    layout = Layout.of(base, facts_of("m", base.config))
    form = Affine.identity(0, "attn_out", 20, 24).scale_output((3,), np.float32([2]))
    done: list[int] = []
    write(planned(Patch((form,), ()), layout), made_folder(tmp_path / "new"), Writing(advance=done.append))
    assert sum(done) == sum(header.size for header in base.headers.values())


def planned(patch: Patch, layout: Layout) -> Plan:
    """In the base's own form."""
    return plan(patch, layout, ModelForm(layout.facts.architecture))


def made_folder(path: Path) -> Path:
    path.mkdir()
    return path


@pytest.mark.parametrize("rows", [2**11, 2**12])
def test_memory_does_not_grow_with_the_weights_and_is_what_the_plan_says(rows: int, tmp_path: Path) -> None:
    columns = 2**9
    config = dict(
        Tiny("llama").config, model_type="llama", hidden_size=rows, num_hidden_layers=1, head_dim=columns // 4
    )
    config |= {"num_key_value_heads": 4, "mlp_bias": False}
    base = made_folder(tmp_path / "base")
    (base / "config.json").write_text(json.dumps(config))
    prefix = "model.layers.0."
    shapes = {f"self_attn.{name}_proj": (columns, rows) for name in "qkv"}
    shapes |= {"self_attn.o_proj": (rows, columns), "mlp.down_proj": (rows, 28)}
    shapes |= {f"mlp.{name}_proj": (28, rows) for name in ("gate", "up")}
    tensors = {f"{prefix}{name}.weight": torch.ones(shape) for name, shape in shapes.items()}
    tensors |= {f"{prefix}{name}.bias": torch.ones(shape[0]) for name, shape in shapes.items() if "attn" in name}
    save_file(tensors, base / "model.safetensors")
    edits = [
        Scale(0, "heads", [1], 1),
        Shift(0, "heads", np.ones(columns)),
        Rank1(0, "heads", np.ones(columns), np.ones(rows), 1),
        Scale(0, "attn", [1], 1),
    ]
    made = Program.of(edits, model=base)
    opened = Checkpoint.open(base)
    layout = Layout.of(opened, facts_of("m", config))
    from austeer.passes.fold import fold

    form = ModelForm(layout.facts.architecture)
    ready = plan(fold(made, layout.facts, form), layout, form)
    out = made_folder(tmp_path / "out")
    for job in ready.jobs:
        list(job.segments())  # small caches are made before the measurement
    tracemalloc.start()
    for job in ready.jobs:
        for _ in job.segments():
            pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak <= ready.peak_bytes
    write(ready, out, Writing())
    assert (stored(out)[f"{prefix}self_attn.o_proj.weight"][1, 1]) == 8  # (2·1 + 2·1)·2


# ---- files -------------------------------------------------------------------------------------


def test_config_and_tokenizer_files_go_along_byte_for_byte(tmp_path: Path) -> None:
    base = copy_of(on_disk(LLAMA), tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    odd = "\t" + json.dumps({"zzz": "é", **config}, indent=7, ensure_ascii=False).replace("\n", "\r\n") + "  \n\n"
    kept = {
        "config.json": odd.encode(),
        "generation_config.json": b"{ }",
        "tokenizer.json": b"\x00\xff",
        "tokenizer_config.json": b"{}",
        "chat_template.jinja": b"{{ x }}\r\n",
        "LICENSE.txt": b"as is",
        "Notice": b"n",
        "USE_POLICY.md": b"p",
    }
    for name, data in kept.items():
        (base / name).write_bytes(data)
    compiled(base, program(LLAMA, base), tmp_path)
    for name, data in kept.items():
        assert (tmp_path / "out" / name).read_bytes() == data, name


def test_unedited_twins_are_left_out_and_listed(tmp_path: Path) -> None:
    base = copy_of(on_disk(LLAMA), tmp_path / "base")
    names = ["consolidated.safetensors", "pytorch_model.bin", "model.gguf", "notes.txt", ".gitattributes", "README.md"]
    for name in names:
        (base / name).write_bytes(b"x")
    for folder in ("original", "onnx"):
        made_folder(base / folder).joinpath("x").write_bytes(b"x")
    report = compiled(base, program(LLAMA, base), tmp_path)
    expected = sorted([*names, "original/", "onnx/"])
    assert report.plain()["left_out"] == expected
    assert json.loads((tmp_path / "out/austeer.json").read_text())["left_out"] == expected
    present = {path.name for path in (tmp_path / "out").iterdir()}
    assert not present & (set(names) - {"README.md"} | {"original", "onnx"})
    assert (tmp_path / "out/README.md").read_bytes() != b"x"


def test_unknown_tensors_are_kept(tmp_path: Path) -> None:
    extra = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3),
        "v_head.table": torch.arange(6, dtype=torch.int64).reshape(2, 3),
        "scalar": torch.tensor(True),
        "empty": torch.zeros(0, 4),
        "narrow": torch.ones(5).to(torch.float8_e4m3fn),
    }
    base = rewritten(on_disk(LLAMA), tmp_path / "base", lambda tensors: {**tensors, **extra})
    compiled(base, program(LLAMA, base), tmp_path)
    found = stored(tmp_path / "out")
    assert found.keys() == stored(base).keys()
    for name, tensor in extra.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name


def test_tensors_outside_the_index_are_kept_with_a_note(tmp_path: Path) -> None:
    base = sharded(LLAMA, tmp_path / "base")
    shard = base / "model-00001-of-00003.safetensors"
    save_file({**load_file(shard), "extra": torch.ones(2)}, shard, metadata={"format": "pt"})
    report = compiled(base, program(LLAMA, base), tmp_path)
    assert "tensor extra is not in the index and is copied as it is" in report.notes
    assert torch.equal(stored(tmp_path / "out")["extra"], torch.ones(2))


def snapshot(folder: Path) -> dict[str, Any]:
    """Content, mode and time of every file."""
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mode, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_links_as_in_the_hub_s_cache_are_followed_and_never_handed_on(tmp_path: Path) -> None:
    blobs, base = made_folder(tmp_path / "blobs"), made_folder(tmp_path / "base")
    for path in on_disk(LLAMA).iterdir():
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        (blobs / digest).write_bytes(path.read_bytes())
        (blobs / digest).chmod(0o444)
        (base / path.name).symlink_to(os.path.relpath(blobs / digest, base))
    before = snapshot(blobs)
    made = program(LLAMA, base)
    compiled(base, made, tmp_path)
    check(base, made, tmp_path)
    assert snapshot(blobs) == before
    for path in (tmp_path / "out").rglob("*"):
        assert not path.is_symlink()
        assert path.stat().st_nlink == 1 or path.is_dir()
    files = json.loads((tmp_path / "out/austeer.json").read_text())["base"]["files"]
    weights = (on_disk(LLAMA) / "model.safetensors").read_bytes()
    assert files["model.safetensors"]["sha256"] == hashlib.sha256(weights).hexdigest()


def test_inputs_may_be_read_only_and_outputs_are_not(tmp_path: Path) -> None:
    base = copy_of(on_disk(LLAMA), tmp_path / "base")
    made = program(LLAMA, base)
    for path in base.iterdir():
        path.chmod(0o444)
    base.chmod(0o555)
    before = snapshot(base)
    try:
        compiled(base, made, tmp_path)
        assert snapshot(base) == before
        for path in (tmp_path / "out").rglob("*"):
            assert path.stat().st_mode & 0o200, path.name
        check(base, made, tmp_path)
    finally:
        base.chmod(0o755)


def test_an_existing_output_is_refused(tmp_path: Path) -> None:
    made_folder(tmp_path / "out")
    with pytest.raises(OutputError, match="exists already"):
        compiled(on_disk(LLAMA), program(LLAMA), tmp_path)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_compiled_checkpoint_can_be_compiled_again(tmp_path: Path) -> None:
    made = program(LLAMA, share=0.3)
    compiled(on_disk(LLAMA), made, tmp_path)
    base = (tmp_path / "out").rename(tmp_path / "base")
    again = program(LLAMA, base, seed=5, share=0.3)
    report = compiled(base, again, tmp_path)
    check(base, again, tmp_path)
    assert {"README.md", "austeer.json", "austeer/"} <= set(report.compiled.plan.left_out)


# ---- what cannot be placed ------------------------------------------------------------------------


def test_values_that_cannot_be_edited_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    base = rewritten(
        on_disk(LLAMA),
        tmp_path / "base",
        lambda tensors: {name: t.double() if "down_proj.weight" in name else t for name, t in tensors.items()},
    )
    made = Program.of([Scale(0, "ffn", [1], 1)], model=base)
    with pytest.raises(Refused, match=r"down_proj\.weight is stored as F64; only F32, F16, BF16 can be edited"):
        compiled(base, made, tmp_path)
    assert not (tmp_path / "out").exists()
    compiled(base, Program.of([Scale(0, "attn", [1], 1)], model=base), tmp_path)


def test_mixed_dtypes_are_each_kept(tmp_path: Path) -> None:
    def mixed(tensors: dict[str, Any]) -> dict[str, Any]:
        narrow = {"o_proj": torch.bfloat16, "down_proj.weight": torch.float16}
        return {
            name: t.to(next((d for key, d in narrow.items() if key in name), t.dtype)) for name, t in tensors.items()
        }

    base = rewritten(on_disk(LLAMA), tmp_path / "base", mixed)
    made = program(LLAMA, base)
    compiled(base, made, tmp_path)
    before, after = stored(base), stored(tmp_path / "out")
    assert {name: tensor.dtype for name, tensor in after.items()} == {name: t.dtype for name, t in before.items()}
    assert len({tensor.dtype for tensor in after.values()}) == 3


def layout_of(base: Path) -> Layout:
    opened = Checkpoint.open(base)
    return Layout.of(opened, facts_of("m", opened.config))


@pytest.mark.parametrize(
    "form",
    [
        Affine.identity(0, "attn_out", 20, 24).scale_output((3,), np.float32([2])),
        Affine.identity(0, "attn_out", 20, 24).shift_output(Vector("residual", np.ones(20, np.float32))),
    ],
    ids=["weight", "constant"],
)
def test_two_operations_on_one_tensor_are_a_defect(form: Affine) -> None:
    with pytest.raises(
        CheckpointError, match=r"o_proj\.weight: two operations of the patch change it; this is a defect"
    ):
        planned(Patch((form, form), ()), layout_of(on_disk(LLAMA)))


def test_an_operation_of_another_shape_is_an_error() -> None:
    form = Affine.identity(0, "attn_out", 20, 25).scale_output((3,), np.float32([2]))
    with pytest.raises(CheckpointError, match=r"o_proj\.weight has shape \[20, 24\], expected \[20, 25\]"):
        planned(Patch((form,), ()), layout_of(on_disk(LLAMA)))


def test_a_constant_without_a_bias_to_hold_it_is_refused_even_unlegalized() -> None:
    form = Affine.identity(0, "ffn_out", 20, 28).shift_output(Vector("residual", np.ones(20, np.float32)))
    with pytest.raises(Refused, match="layer 0: ffn_out has no bias to hold a constant"):
        planned(Patch((form,), ()), layout_of(on_disk(Tiny("llama", biases=False))))


def test_a_copy_by_hand_equals_a_clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = program(LLAMA, share=0.4)
    outs = []
    for number, cloning in enumerate((lambda src, dst: bool(shutil.copyfile(src, dst)), lambda _, __: False)):
        monkeypatch.setattr(checkpoint, "clone_file", cloning)
        folder = made_folder(tmp_path / str(number))
        compiled(on_disk(LLAMA), made, folder)
        outs.append((folder / "out/model.safetensors").read_bytes())
    assert outs[0] == outs[1]
