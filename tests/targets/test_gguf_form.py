"""Existing GGUFs patched: values, bytes outside, added tensors, refusals, damaged files; and plans by the converter."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from austeer.compiler import Edit, Gate, Gated, Program, Rank1, Scale, Shift
from austeer.compiler.checkpoint import Checkpoint
from austeer.compiler.errors import AusteerError, CheckpointError, InputError, ProgramError, Refused
from austeer.compiler.facts import Geometry, read_facts
from austeer.compiler.layout import Layout
from austeer.targets import gguf, gguf_patch
from austeer.targets.checkpoint import Writing
from austeer.targets.gguf_model import GgufModel
from austeer.targets.llama_cpp import SCRIPT, VARIABLE
from tests.tiny import Tiny, in_place, on_disk, planned_checkpoint, program

package = pytest.importorskip("gguf", reason="the gguf package, which reads and writes what is tested, is missing")

LAYERS, RESIDUAL, HEADS, NEURONS, EXPERTS = 2, 20, 32, 64, 3
Kind = package.GGMLQuantizationType


def values(*shape: int, seed: int) -> "np.ndarray[Any, Any]":
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def written(
    path: Path,
    architecture: str = "llama",
    kind: str = "F32",
    *,
    biases: bool = False,
    experts: int = 0,
    more: Mapping[str, Any] | None = None,
) -> Path:
    """A GGUF with the tensors that edits end in and one that they do not, by llama.cpp's own package."""
    writer = package.GGUFWriter(path, architecture)
    for key, value in {
        "block_count": LAYERS,
        "embedding_length": RESIDUAL,
        "feed_forward_length": NEURONS,
        **({"expert_count": experts} if experts else {}),
    }.items():
        writer.add_uint32(f"{architecture}.{key}", value)
    for key, value in (more or {}).items():
        (writer.add_string if isinstance(value, str) else writer.add_uint32)(key, value)
    add(writer, "token_embd.weight", values(7, RESIDUAL, seed=99), "F32")
    for layer in range(LAYERS):
        down = (*([experts] if experts else []), RESIDUAL, NEURONS)
        add(writer, f"blk.{layer}.attn_output.weight", values(RESIDUAL, HEADS, seed=layer), kind)
        add(writer, f"blk.{layer}.ffn_down{'_exps' if experts else ''}.weight", values(*down, seed=10 + layer), kind)
        if biases:
            add(writer, f"blk.{layer}.attn_output.bias", values(RESIDUAL, seed=20 + layer), "F32")
            add(writer, f"blk.{layer}.ffn_down.bias", values(RESIDUAL, seed=30 + layer), "F32")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add(writer: Any, name: str, data: "np.ndarray[Any, Any]", kind: str) -> None:
    writer.add_tensor(name, package.quants.quantize(data, Kind[kind]), raw_dtype=Kind[kind])


def read(path: Path) -> dict[str, "np.ndarray[Any, Any]"]:
    """All tensors in float32, by llama.cpp's own reader."""
    return {
        tensor.name: package.quants.dequantize(tensor.data, tensor.tensor_type)
        for tensor in package.GGUFReader(path).tensors
    }


def of(*edits: Edit, architecture: str = "llama") -> Program:
    model = Geometry("model", architecture, LAYERS, RESIDUAL, HEADS, NEURONS)
    return Program.of(edits, model=model)


def patched(path: Path, program: Program) -> Path:
    folder = path.parent / "out"
    folder.mkdir()
    return folder / gguf_patch.patch_gguf(path, program, folder, Writing()).file


SCALE = Scale(1, "ffn", (3, 8), (0.5, -2.0))
SHIFT = Shift(0, "attn", values(RESIDUAL, seed=5))
AT_HEADS = Shift(0, "heads", values(HEADS, seed=6))


def test_a_scaling_changes_its_rows_and_no_other_byte(tmp_path: Path) -> None:
    path = written(tmp_path / "model.gguf")
    out = patched(path, of(SCALE))
    before, after = read(path), read(out)
    expected = before["blk.1.ffn_down.weight"].copy()
    expected[3] *= 1.5
    expected[8] *= -1
    np.testing.assert_array_equal(after["blk.1.ffn_down.weight"], expected)
    old, new = (np.frombuffer(file.read_bytes(), np.uint8) for file in (path, out))
    place = GgufModel.open(path).weight(1, "ffn_out").offset
    rows = np.concatenate([np.arange(NEURONS * 4) + place + NEURONS * 4 * row for row in (3, 8)])
    assert set(np.flatnonzero(old != new)) <= set(rows)
    assert out.name == "model-steered.gguf"


def test_a_constant_becomes_a_bias_that_was_not_there(tmp_path: Path) -> None:
    path = written(tmp_path / "model.gguf", "llama", "F16")
    out = patched(path, of(SHIFT, AT_HEADS))
    before, after = read(path), read(out)
    assert after.keys() - before.keys() == {"blk.0.attn_output.bias"}
    for name, old in before.items():
        np.testing.assert_array_equal(after[name], old)
    weight = before["blk.0.attn_output.weight"].astype(np.float64)
    expected = weight @ AT_HEADS.vector + SHIFT.vector
    np.testing.assert_allclose(after["blk.0.attn_output.bias"], expected, rtol=1e-6, atol=1e-6)
    keys = {*package.GGUFReader(path).fields} - {"GGUF.tensor_count"}
    one, other = package.GGUFReader(path), package.GGUFReader(out)
    assert all(one.fields[key].contents() == other.fields[key].contents() for key in keys)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_any_number_of_added_biases_is_aligned_as_llama_cpp_wants_it(count: int, tmp_path: Path) -> None:
    path = written(tmp_path / "model.gguf")
    places = [(layer, site) for layer in range(LAYERS) for site in ("attn", "ffn")][:count]
    out = patched(path, of(*(Shift(layer, site, values(RESIDUAL, seed=5)) for layer, site in places)))
    reader = package.GGUFReader(out)
    position = reader.data_offset  # llama.cpp takes each tensor to begin where the one before ends, padded to 32
    for tensor in reader.tensors:
        assert tensor.data_offset == position
        position += -(-tensor.n_bytes // 32) * 32
    assert position == out.stat().st_size
    assert len(reader.tensors) == len(package.GGUFReader(path).tensors) + count


def test_a_bias_that_is_there_is_rewritten(tmp_path: Path) -> None:
    path = written(tmp_path / "model.gguf", biases=True)
    before, after = read(path), read(patched(path, of(SHIFT, Scale(0, "attn", (2,), (1.0,)))))
    expected = before["blk.0.attn_output.bias"] + SHIFT.vector
    expected[2] *= 2
    np.testing.assert_allclose(after["blk.0.attn_output.bias"], expected, rtol=1e-6)
    assert after.keys() == before.keys()


def test_all_experts_are_scaled(tmp_path: Path) -> None:
    path = written(tmp_path / "model.gguf", experts=EXPERTS)
    before, after = read(path), read(patched(path, of(SCALE, architecture="mixtral")))
    expected = before["blk.1.ffn_down_exps.weight"].copy()
    assert expected.shape == (EXPERTS, RESIDUAL, NEURONS)
    expected[:, 3] *= 1.5
    expected[:, 8] *= -1
    np.testing.assert_array_equal(after["blk.1.ffn_down_exps.weight"], expected)
    assert after.keys() == before.keys()


@pytest.mark.parametrize("architecture", ["llama", "mistral"])
def test_a_gguf_of_the_architecture_llama_takes_programs_for_both_its_kinds(architecture: str, tmp_path: Path) -> None:
    model = GgufModel.open(written(tmp_path / "model.gguf"), architecture)
    assert model.facts.geometry == Geometry("model", architecture, LAYERS, RESIDUAL, HEADS, NEURONS)


def test_the_lowering_names_tensors_and_slices_of_the_output(tmp_path: Path) -> None:
    path = written(tmp_path / "model.gguf")
    rank1 = Rank1(0, "neurons", np.eye(NEURONS)[4], np.eye(RESIDUAL)[7], 0.1)
    plan = gguf_patch.plan_gguf(path, of(SCALE, SHIFT, rank1))
    assert plan.lowering == (
        {"edit": 0, "tensor": "blk.1.ffn_down.weight", "slice": [[3, 8], None], "exact": True},
        {"edit": 1, "tensor": "blk.0.attn_output.bias", "slice": [None], "exact": True},
        {"edit": 2, "tensor": "blk.0.ffn_down.weight", "slice": [[7], [4]], "exact": True},
    )


def test_bytes_rounding_and_progress_are_told(tmp_path: Path) -> None:
    path, done = written(tmp_path / "model.gguf", "llama", "BF16"), list[int]()
    writing = Writing(advance=done.append)
    plan = gguf_patch.patch_gguf(path, of(SCALE, SHIFT), tmp_path, writing)
    assert sum(done) == plan.output_bytes == (tmp_path / plan.file).stat().st_size
    assert writing.rounding.keys() == {"blk.1.ffn_down.weight", "blk.0.attn_output.bias"}


def test_verify_finds_each_kind_of_damage(tmp_path: Path) -> None:
    path = written(tmp_path / "model.gguf")
    out = patched(path, of(SCALE, SHIFT))
    plan = gguf_patch.plan_gguf(path, of(SCALE, SHIFT))
    places = {tensor.name: tensor.data_offset for tensor in package.GGUFReader(out).tensors}
    good = out.read_bytes()
    row = 3 * NEURONS * 4
    for place, verdict in {
        places["blk.1.ffn_down.weight"] + row: "blk.1.ffn_down.weight does not hold",
        places["blk.0.attn_output.bias"]: "blk.0.attn_output.bias does not hold",
        places["token_embd.weight"]: "bytes outside",
        9: "bytes outside",
    }.items():
        damaged = bytearray(good)
        damaged[place] ^= 1
        out.write_bytes(damaged)
        assert verdict in gguf_patch.problems(out.parent, plan)[plan.file]
    out.write_bytes(good)
    assert gguf_patch.problems(out.parent, plan) == {plan.file: "ok"}
    out.write_bytes(good[:-1])
    assert "another size" in gguf_patch.problems(out.parent, plan)[plan.file]
    out.unlink()
    assert "missing" in gguf_patch.problems(out.parent, plan)[plan.file]


# ---- quantised ---------------------------------------------------------------------------


def test_a_quantised_tensor_is_refused_where_an_edit_ends_in_it(tmp_path: Path) -> None:
    path = written(tmp_path / "model.gguf", "llama", "Q8_0", biases=True)
    for edit in (SCALE, AT_HEADS):  # the second only needs the product of the weight and its vector
        with pytest.raises(Refused, match=r"weight is stored as Q8_0.*quantise the result with llama-quantize"):
            gguf_patch.plan_gguf(path, of(edit))


@pytest.mark.parametrize("biases", [True, False])
def test_a_constant_behind_a_quantised_projection_needs_only_the_bias(biases: bool, tmp_path: Path) -> None:
    path = written(tmp_path / "model.gguf", "llama", "Q8_0", biases=biases)
    before, after = read(path), read(patched(path, of(SHIFT)))
    base = before.get("blk.0.attn_output.bias", np.zeros(RESIDUAL))
    np.testing.assert_allclose(after["blk.0.attn_output.bias"], base + SHIFT.vector, rtol=1e-6)
    assert all(np.array_equal(after[name], before[name]) for name in before if name != "blk.0.attn_output.bias")


# ---- refusals and damage -----------------------------------------------------------------


def test_an_architecture_that_reads_no_bias_takes_no_constant(tmp_path: Path) -> None:
    path = written(tmp_path / "model.gguf", "qwen2")
    with pytest.raises(Refused, match="a constant needs the bias of"):
        gguf_patch.plan_gguf(path, of(SHIFT, architecture="qwen2"))
    assert gguf_patch.plan_gguf(path, of(SCALE, architecture="qwen2")).jobs


def test_a_gate_makes_the_ffn_wider_which_no_patch_does(tmp_path: Path) -> None:
    path = written(tmp_path / "model.gguf")
    gated = [Gated(edit, Gate(np.ones(RESIDUAL), 0.5, 2.0)) for edit in (SHIFT, SCALE)]
    with pytest.raises(Refused, match=r"a gate is new neurons, which make the FFN wider; .*--form gguf") as raised:
        gguf_patch.plan_gguf(path, of(*gated, SCALE))
    first, *lines = str(raised.value).splitlines()
    assert first.startswith("2 of 3 edits have no exact fold")
    assert [line.split(" at ")[0] for line in lines] == ["  gated shift", "  gated scale"]


def test_a_program_for_another_model_is_an_error(tmp_path: Path) -> None:
    path = written(tmp_path / "model.gguf", "qwen2")
    with pytest.raises(ProgramError):
        gguf_patch.plan_gguf(path, of(SCALE))


@pytest.mark.parametrize(
    ("more", "match"),
    [
        ({"general.type": "adapter"}, "holds no model"),
        ({"split.count": 3}, "llama-gguf-split --merge"),
    ],
)
def test_other_kinds_of_gguf_are_refused(more: dict[str, Any], match: str, tmp_path: Path) -> None:
    with pytest.raises(Refused, match=match):
        GgufModel.open(written(tmp_path / "model.gguf", more=more))


def test_an_unknown_architecture_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="'mamba'; known are llama"):
        GgufModel.open(written(tmp_path / "model.gguf", "mamba"))


def test_metadata_that_contradicts_the_tensors_is_an_error(tmp_path: Path) -> None:
    data = bytearray(written(tmp_path / "model.gguf").read_bytes())
    for key, message in ((b"llama.block_count", "no tensor blk.2"), (b"llama.embedding_length", "promises")):
        wrong = bytearray(data)
        wrong[wrong.index(key) + len(key) + 4] += 1
        (tmp_path / "wrong.gguf").write_bytes(wrong)
        with pytest.raises(CheckpointError, match=message):
            GgufModel.open(tmp_path / "wrong.gguf")


def test_no_damage_of_the_header_ends_in_anything_but_a_named_error(tmp_path: Path) -> None:
    good, wrong = written(tmp_path / "model.gguf").read_bytes(), tmp_path / "wrong.gguf"
    header, rng = GgufModel.open(tmp_path / "model.gguf").gguf.header_end, np.random.default_rng(0)
    outcomes = set[type]()
    for _ in range(400):
        damaged = bytearray(good)
        damaged[int(rng.integers(header))] = int(rng.integers(256))
        wrong.write_bytes(damaged)
        try:
            gguf_patch.plan_gguf(wrong, of(SCALE, SHIFT))
        except AusteerError as error:
            outcomes.add(type(error))
    assert {InputError, CheckpointError, Refused} <= outcomes


@pytest.mark.parametrize("size", [0, 3, 24, 100, -1])
def test_a_cut_file_is_an_error(size: int, tmp_path: Path) -> None:
    path = written(tmp_path / "model.gguf")
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(InputError, match=r"model.gguf: "):
        GgufModel.open(path)


# ---- the plan of the converter's route ---------------------------------------------------


def planned(base: Path, program: Program) -> gguf.GgufPlan:
    facts = read_facts(base)
    layout = Layout.of(Checkpoint.open(base), facts)
    return gguf.plan(planned_checkpoint(program, layout), layout)


@pytest.fixture
def converter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / SCRIPT).write_text("")
    monkeypatch.setenv(VARIABLE, str(tmp_path))


@pytest.mark.usefixtures("converter")
@pytest.mark.parametrize(
    ("tiny", "match"),
    [
        (Tiny("opt"), "llama.cpp 0c1e57098 does not have the architecture opt"),
        (Tiny("qwen3"), "the base has self_attn.o_proj.bias, and llama.cpp 0c1e57098 does not load a qwen3"),
        (Tiny("gemma2"), "the base has self_attn.o_proj.bias, and llama.cpp 0c1e57098 does not load a gemma2"),
        (Tiny("gpt2"), "4 × 24 neurons, and this one has 28"),
        (Tiny("gpt_neox", biases=False), "loads no gptneox without a bias of attention.dense"),
    ],
)
def test_what_llama_cpp_would_not_load_is_refused_before_anything_is_written(tiny: Tiny, match: str) -> None:
    with pytest.raises(Refused, match=match):
        planned(on_disk(tiny), in_place(tiny, on_disk(tiny)))


@pytest.mark.usefixtures("converter")
def test_a_tokenizer_with_code_of_its_own_is_refused(tmp_path: Path) -> None:
    base = shutil.copytree(on_disk(Tiny("llama")), tmp_path / "model")
    (base / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["a/b--c.D", None]}}))
    with pytest.raises(Refused, match=r"which llama\.cpp's converter would run"):
        planned(base, program(Tiny("llama")))


@pytest.mark.usefixtures("converter")
def test_the_lowering_has_the_names_and_axes_of_the_gguf() -> None:
    tiny = Tiny("gpt2", neurons=96)
    facts = read_facts(on_disk(tiny))
    one = Program.of([Scale(1, "ffn", (3,), (0.5,))], model=facts.geometry)
    weight = {"edit": 0, "tensor": "blk.1.ffn_down.weight", "slice": [[3], None], "exact": True}
    bias = {"edit": 0, "tensor": "blk.1.ffn_down.bias", "slice": [[3]], "exact": True}
    assert planned(on_disk(tiny), one).lowering == (weight, bias)
    tiny = Tiny("mixtral")
    one = Program.of([Scale(1, "ffn", (3,), (0.5,))], model=read_facts(on_disk(tiny)).geometry)
    stack = [entry["slice"] for entry in planned(on_disk(tiny), one).lowering]
    assert stack == [[[expert], [3], None] for expert in range(3)] or stack == [[None, [3], None]]
