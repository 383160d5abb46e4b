"""The form `lora`: what PEFT makes of the adapter, what engines ask of it, and what it cannot hold."""

import json
import re
import shutil
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from austeer.compiler import CheckpointError, Edit, Program, Rank1, Refused, Scale, Shift, UsageError, interpret
from austeer.compiler.certificate import compare, observe
from austeer.compiler.checkpoint import Checkpoint
from austeer.compiler.facts import facts_of
from austeer.compiler.form import ModelForm
from austeer.compiler.layout import Layout
from austeer.compiler.live import load_model
from austeer.compiler.patch import role_of
from austeer.compiler.rewrite import Matrix
from austeer.compiler.tensors import read_header
from austeer.passes.fold import fold
from austeer.targets import checkpoint
from austeer.targets.checkpoint import Writing
from austeer.targets.lora import LoraPlan, load, plan, write
from austeer.targets.lora_engines import ENGINES
from austeer.targets.lora_files import CONFIG, WEIGHTS
from tests.tiny import VARIANTS, Tiny, bare, logits, on_disk, programs_edits, sharded, stored, tokens
from tests.tiny import load as load_plain

pytest.importorskip("peft", reason="PEFT, which runs adapters, is not installed")

BARE = Tiny("llama", biases=False)
WIDTHS = {"heads": 24, "attn": 20, "neurons": 28, "ffn": 20}
PEFT_NOISE = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


def planned(folder: Path, edits: Iterable[Edit], target: str = "transformers") -> LoraPlan:
    base = Checkpoint.open(folder)
    layout = Layout.of(base, facts_of("model", base.config))
    program, own = Program.of(edits, model=folder), ModelForm(layout.facts.architecture)
    return plan(fold(program, layout.facts, own), layout, target, name="tiny/model")


def written(made: LoraPlan, folder: Path) -> Writing:
    writing = Writing()
    folder.mkdir()
    write(made, folder, writing)
    return writing


def carried(tiny: Tiny, folder: Path, seed: int = 0) -> list[Edit]:
    """Random edits that an adapter can hold, stated here a second time: no constant, nothing that a bias follows."""

    def holds(edit: Edit) -> bool:
        role, experts = role_of(edit, post_norm=tiny.post_norm), tiny.architecture in ("qwen3_moe", "mixtral")
        biased = ("attn" if role == "attn_out" else "ffn") in tiny._constants()
        scales_bias = isinstance(edit, Scale) and edit.site in ("attn", "ffn") and biased
        return not (isinstance(edit, Shift) or role == "block" or scales_bias or (experts and role == "ffn_out"))

    return [edit for edit in programs_edits(tiny, folder, seed) if holds(edit)]


def difference(folder: Path, edits: Iterable[Edit], adapter: Path) -> tuple[float, float]:
    """How far the base with its adapter, and the base alone, are from the interpreter, as shares of its logits."""
    base, ids = load_plain(folder), tokens()
    with interpret(base, Program.of(edits, model=folder)):
        expected = logits(base, ids)
    attached = load(adapter, folder, dtype="float32", device="cpu")
    scale = expected.abs().max()
    return tuple(float((logits(model, ids) - expected).abs().max() / scale) for model in (attached, base))


def rank1(layer: int, site: Any, seed: int, strength: float = 0.5, *, v: Any = None) -> Rank1:
    rng = np.random.default_rng(seed)
    return Rank1(layer, site, rng.normal(size=WIDTHS[site]), rng.normal(size=20) if v is None else v, strength)


# ---- what it does ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
def test_the_base_with_the_adapter_does_what_the_interpreter_says(name: str, tmp_path: Path) -> None:
    tiny = VARIANTS[name]
    folder = on_disk(tiny)
    edits = carried(tiny, folder)
    assert {"scale", "rank1"} <= {edit.kind for edit in edits}
    made = planned(folder, edits)
    written(made, tmp_path / "out")
    ours, base = difference(folder, edits, tmp_path / "out")
    assert ours <= 1e-5
    assert base > 0.01
    assert sum(file.stat().st_size for file in (tmp_path / "out").iterdir()) == made.output_bytes


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bit_bases_lose_nothing_in_it(dtype: str, tmp_path: Path) -> None:
    tiny = replace(BARE, dtype=dtype)
    edits = carried(tiny, on_disk(tiny))
    writing = written(planned(on_disk(tiny), edits), tmp_path / "out")
    assert difference(on_disk(tiny), edits, tmp_path / "out")[0] <= 1e-5
    assert 0 < max(writing.rounding.values()) < 2**-8  # what an engine that casts would lose


@pytest.mark.parametrize("layout", [bare, sharded])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_modules_have_the_live_model_s_names_however_the_base_is_stored(
    architecture: str, layout: Any, tmp_path: Path
) -> None:
    tiny = Tiny(architecture)
    folder = layout(tiny, tmp_path / "base")
    edits = carried(tiny, folder)
    written(planned(folder, edits), tmp_path / "out")
    written(planned(on_disk(tiny), edits), tmp_path / "whole")
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()
    assert (tmp_path / "out" / CONFIG).read_bytes() == (tmp_path / "whole" / CONFIG).read_bytes()


@PEFT_NOISE
@pytest.mark.parametrize("name", ["llama-unbiased", "gpt2", "phi3", "qwen3_moe", "gpt_neox"])
def test_merged_it_is_the_form_checkpoint(name: str, tmp_path: Path) -> None:
    from peft import PeftModel

    tiny = VARIANTS[name]
    folder = on_disk(tiny)
    edits = carried(tiny, folder)
    written(planned(folder, edits), tmp_path / "lora")
    base = Checkpoint.open(folder)
    layout = Layout.of(base, facts_of("model", base.config))
    (tmp_path / "checkpoint").mkdir()
    own = ModelForm(layout.facts.architecture)
    patch = fold(Program.of(edits, model=folder), layout.facts, own)
    checkpoint.write(checkpoint.plan(patch, layout, own), tmp_path / "checkpoint", Writing())
    merged = PeftModel.from_pretrained(load_plain(folder), tmp_path / "lora").merge_and_unload().state_dict()
    expected, plain = load_plain(tmp_path / "checkpoint").state_dict(), load_plain(folder).state_dict()
    changed = [key for key in plain if not torch.equal(plain[key], expected[key])]
    assert changed
    for key, value in expected.items():
        if key in changed:
            assert (merged[key] - value).abs().max() <= 1e-6 * value.abs().max()
        else:
            assert torch.equal(merged[key], value)


def test_it_passes_the_certificate_s_rule_and_an_adapter_of_other_edits_does_not(tmp_path: Path) -> None:
    folder = on_disk(BARE)
    edits = carried(BARE, folder)
    texts = [tuple(row) for row in tokens(4, 20).tolist()]
    reference = observe(load_model(folder, dtype="float32", device="cpu"), Program.of(edits, model=folder), texts)
    for name, chosen in (("right", edits), ("wrong", edits[1:])):
        written(planned(folder, chosen), tmp_path / name)
        attached = load(tmp_path / name, folder, dtype="float32", device="cpu")
        assert compare(attached, reference, stored="float32").passed is (name == "right")


# ---- factors and ranks -----------------------------------------------------------------------


def weight_change(folder: Path, edits: Iterable[Edit], name: str) -> "np.ndarray[Any, Any]":
    """W' − W in float64 by the definitions of the edits: inputs first, then rank-1 terms, then outputs."""
    weight = stored(folder)[name + ".weight"].double().numpy()
    new = weight.copy()
    order = ("heads", "neurons", "attn", "ffn")
    scaled = [edit for edit in edits if isinstance(edit, Scale)]
    terms = np.zeros_like(weight)
    for edit in edits:
        if isinstance(edit, Rank1):
            terms += np.float64(edit.strength) * np.outer(edit.v.astype(float), edit.k.astype(float))
    new += terms
    for edit in sorted(scaled, key=lambda edit: order.index(edit.site)):
        units, factors = list(edit.units), 1 + edit.gamma.astype(float)
        if edit.site in ("heads", "neurons"):
            new[:, units] *= factors
        else:
            new[units] *= factors[:, None]
    return new - weight


V = np.random.default_rng(9).normal(size=20)
RANKS: list[tuple[list[Edit], int]] = [
    ([Scale(0, "heads", [3, 7, 11], 0.5)], 3),
    ([Scale(0, "attn", [3, 7], [0.5, -1])], 2),
    ([Scale(0, "heads", [3, 7, 11], 0.5), Scale(0, "attn", [3, 7], 2)], 5),
    ([rank1(0, "heads", 1)], 1),
    ([rank1(0, "heads", 1), rank1(0, "heads", 2)], 2),
    ([rank1(0, "heads", 1, 0.3, v=V), rank1(0, "heads", 2, -0.7, v=V), rank1(0, "heads", 3, 0.1, v=V)], 1),
    ([Rank1(0, "heads", np.eye(24)[5], V, 1), Scale(0, "heads", [5], 3)], 1),  # within the scaled column
    ([rank1(0, "heads", 1), Scale(0, "heads", [5], 3), Scale(0, "attn", [1], -0.5)], 3),
    ([Scale(0, "heads", range(24), np.linspace(-1, 1, 24))], 20),  # never more than the shorter side
    ([Scale(0, "attn", range(20), np.linspace(0.1, 1, 20)), rank1(0, "heads", 1)], 20),
    ([Scale(0, "heads", [4, 5], [0, 0.25])], 1),  # a factor of 1 changes nothing
]


@pytest.mark.parametrize(("edits", "rank"), RANKS)
def test_the_rank_is_the_least_and_the_factors_are_the_change(edits: list[Edit], rank: int) -> None:
    made = planned(on_disk(BARE), edits)
    assert (made.rank, len(made.modules)) == (rank, 1)
    a, b = (values.astype(float) for values in made.modules[0].change.factors(rank))
    expected = weight_change(on_disk(BARE), edits, "model.layers.0.self_attn.o_proj")
    assert np.abs(b @ a - expected).max() <= 1e-6 * np.abs(expected).max()
    assert np.linalg.matrix_rank(expected, tol=1e-5) == rank


def test_terms_of_almost_one_direction_stay_two() -> None:
    nearly = V.copy()
    nearly[3] *= 1 + 1e-5
    assert planned(on_disk(BARE), [rank1(0, "heads", 1, v=V), rank1(0, "heads", 2, v=nearly)]).rank == 2


def test_a_column_is_a_unit_vector_times_the_scaled_column_and_a_row_the_reverse() -> None:
    weight = stored(on_disk(BARE))["model.layers.1.mlp.down_proj.weight"].numpy()
    a, b = planned(on_disk(BARE), [Scale(1, "neurons", [6], 0.5)]).modules[0].change.factors(1)
    assert np.array_equal(a[0], np.eye(28)[6])
    assert np.array_equal(b[:, 0], weight[:, 6] * np.float32(0.5))
    a, b = planned(on_disk(BARE), [Scale(1, "ffn", [6], 0.5)]).modules[0].change.factors(1)
    assert np.array_equal(b[:, 0], np.eye(20)[6])
    assert np.array_equal(a[0], weight[6] * np.float32(0.5))


@pytest.mark.parametrize(("tiny", "site"), [(BARE, "ffn"), (Tiny("gpt2"), "neurons")])
def test_only_the_stored_rows_that_change_are_read(tiny: Tiny, site: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made, read = planned(on_disk(tiny), [Scale(0, site, [3, 9, 10], 1)]), list[tuple[int, int]]()
    original = Matrix._read

    def spy(self: Matrix, file: Any, first: int, last: int) -> Any:
        read.append((first, last))
        return original(self, file, first, last)

    monkeypatch.setattr(Matrix, "_read", spy)
    made.modules[0].change.factors(made.rank)
    assert read == [(3, 4), (9, 11)]


# ---- what is on disk -------------------------------------------------------------------------

SPREAD = [Scale(0, "heads", [1, 2, 3], 0.5), Scale(1, "ffn", [4], -0.5), rank1(1, "neurons", 0)]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    written(planned(on_disk(BARE), SPREAD), tmp_path / "out")
    return tmp_path / "out"


def test_one_rank_for_all_modules_zeros_beyond_their_own(out: Path) -> None:
    tensors = load_file(out / WEIGHTS)
    start = "base_model.model.model.layers."
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        f"{start}0.self_attn.o_proj.lora_A.weight": (3, 24),
        f"{start}0.self_attn.o_proj.lora_B.weight": (20, 3),
        f"{start}1.mlp.down_proj.lora_A.weight": (3, 28),
        f"{start}1.mlp.down_proj.lora_B.weight": (20, 3),
    }
    assert not tensors[f"{start}1.mlp.down_proj.lora_A.weight"][2].any()
    assert not tensors[f"{start}1.mlp.down_proj.lora_B.weight"][:, 2].any()
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())


def test_the_configuration(out: Path) -> None:
    config = json.loads((out / CONFIG).read_bytes())
    assert config["base_model_name_or_path"] == "tiny/model"
    assert (config["peft_type"], config["task_type"], config["inference_mode"]) == ("LORA", "CAUSAL_LM", True)
    assert config["target_modules"] == ["model.layers.0.self_attn.o_proj", "model.layers.1.mlp.down_proj"]


def test_gpt2_says_that_its_matrices_are_stored_the_other_way_round() -> None:
    for tiny, transposed in ((Tiny("gpt2"), True), (Tiny("gpt_neox"), False)):
        made = planned(on_disk(tiny), [Scale(0, "neurons", [1], 1)])
        assert json.loads(made.config)["fan_in_fan_out"] is transposed


# What the engines' own code asks of an adapter's configuration; what else they find there they do not look at.
VLLM = {"bias": "none", "use_dora": False, "modules_to_save": None, "use_rslora": False}
SGLANG = {"peft_type": "LORA", "use_dora": False, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
TENSOR = re.compile(r"base_model\.model\.(?P<module>.*layers\.(\d+)\..*)\.lora_[AB]\.weight")


@pytest.mark.parametrize("rules", [VLLM, SGLANG], ids=["vllm", "sglang"])
def test_engines_find_what_they_ask_for(rules: dict[str, Any], out: Path) -> None:
    config = json.loads((out / CONFIG).read_bytes())
    assert {key: config[key] for key in rules} == rules
    assert config["lora_alpha"] / config["r"] == 1
    assert isinstance(config["target_modules"], list)
    tensors = load_file(out / WEIGHTS)
    modules = {TENSOR.fullmatch(name)["module"] for name in tensors}  # pyright: ignore[reportOptionalSubscript]
    assert modules == set(config["target_modules"])
    assert {module.rpartition(".")[2] for module in modules} == {"o_proj", "down_proj"}
    assert all(config["r"] == tensor.shape[0 if "lora_A" in name else 1] for name, tensor in tensors.items())


def test_the_file_is_strictly_what_safetensors_allows_with_one_metadata_key(out: Path) -> None:
    tensors, header = read_header(out / WEIGHTS)
    assert len(tensors) == 4
    assert header.metadata == {"format": "pt"}
    assert next(iter(tensors.values())).offset % 8 == 0


def test_equal_inputs_give_equal_bytes(out: Path, tmp_path: Path) -> None:
    written(planned(on_disk(BARE), SPREAD), tmp_path / "again")
    names = {path.name for path in out.iterdir()}
    assert names == {CONFIG, WEIGHTS}
    assert all((out / name).read_bytes() == (tmp_path / "again" / name).read_bytes() for name in names)


def test_licences_go_along_and_all_else_is_left_out(tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(on_disk(BARE), base)
    (base / "LICENSE.txt").write_text("terms")
    (base / "tokenizer.json").write_text("{}")
    made = planned(base, SPREAD)
    assert made.left_out == ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json")
    written(made, tmp_path / "out")
    assert (tmp_path / "out" / "LICENSE.txt").read_text() == "terms"


def test_the_lowering_names_for_each_edit_the_terms_that_may_change() -> None:
    edits = [Scale(0, "attn", [7, 2], 0.5), Scale(0, "heads", [1, 5], 2), rank1(0, "heads", 0)]
    made = planned(on_disk(BARE), edits)
    found = {(entry["edit"], entry["tensor"][-13:-7]): entry["slice"] for entry in made.lowering}
    assert found == {
        (0, "lora_A"): [[0, 1], None],
        (0, "lora_B"): [None, [0, 1]],
        (1, "lora_A"): [[0, 1, 2, 3], None],  # rows are held whole, with what the columns do to them
        (1, "lora_B"): [None, [0, 1, 2, 3]],
        (2, "lora_A"): [[0, 1, 2, 3, 4], None],
        (2, "lora_B"): [None, [0, 1, 2, 3, 4]],
    }
    others = [Scale(0, "attn", [7, 2], 0.25), Scale(0, "heads", [1, 5], 1), rank1(0, "heads", 3)]
    for edit, other in enumerate(others):
        changed = planned(on_disk(BARE), [*edits[:edit], other, *edits[edit + 1 :]])
        before, after = (one.modules[0].change.factors(5) for one in (made, changed))
        terms = set(found[edit, "lora_A"][0])
        assert {n for n in range(5) if not np.array_equal(before[0][n], after[0][n])} <= terms
        assert {n for n in range(5) if not np.array_equal(before[1][:, n], after[1][:, n])} <= terms


# ---- engines ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("units", "flag"), [(1, 1), (2, 8), (8, 8), (9, 16), (20, 32)])
def test_vllm_is_asked_for_the_next_rank_that_it_knows(units: int, flag: int) -> None:
    made = planned(on_disk(BARE), [Scale(0, "ffn", range(units), 1)], "vllm")
    assert f"--max-lora-rank {flag} " in made.notes[0]
    assert f"an adapter of rank {units};" in made.notes[0]


def test_sglang_is_asked_for_the_rank_itself() -> None:
    assert "--max-lora-rank 9 " in planned(on_disk(BARE), [Scale(0, "ffn", range(9), 1)], "sglang").notes[0]


def test_tgi_gets_every_layer_of_an_edited_kind_else_it_drops_the_kind(tmp_path: Path) -> None:
    made = planned(on_disk(BARE), [Scale(1, "ffn", [4], -0.5)], "tgi")
    written(made, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / WEIGHTS)
    assert {int(name.split(".")[4]) for name in tensors} == {0, 1}
    assert all(tensor.any().item() is (".1." in name) for name, tensor in tensors.items())
    assert json.loads(made.config)["target_modules"] == [f"model.layers.{layer}.mlp.down_proj" for layer in (0, 1)]
    assert difference(on_disk(BARE), [Scale(1, "ffn", [4], -0.5)], tmp_path / "out")[0] <= 1e-5


# ---- refusals --------------------------------------------------------------------------------

BIASED, GPT2, OPT, MOE, NEOX = Tiny("llama"), Tiny("gpt2"), Tiny("opt"), Tiny("qwen3_moe"), Tiny("gpt_neox")


@pytest.mark.parametrize(
    ("tiny", "edit", "target", "reason"),
    [
        (BIASED, Shift(0, "ffn", [1.0] * 20), "vllm", "layer 0, ffn_out: a Shift is a constant, .*serve no bias"),
        (BIASED, Shift(1, "heads", [1.0] * 24), "vllm", "layer 1, attn_out: a Shift is a constant"),
        (BIASED, Scale(0, "ffn", [1], 1), "transformers", "layer 0, ffn_out: a Scale of its output scales its bias"),
        (NEOX, Scale(1, "attn", [1], 1), "transformers", "layer 1, attn_out: a Scale of its output scales its bias"),
        (MOE, Scale(0, "ffn", [1], 1), "transformers", "layer 0, ffn_out: the model has experts"),
        (MOE, Scale(1, "neurons", [1], 1), "transformers", "layer 1, ffn_out: the model has experts.*dense layers"),
        (BARE, Scale(0, "ffn", [1], 0), "transformers", "changes no weight"),
        (GPT2, Scale(0, "heads", [1], 1), "vllm", "vllm has no LoRA for gpt2"),
        (GPT2, Scale(0, "heads", [1], 1), "llama.cpp", "llama.cpp has no LoRA for gpt2"),
        (GPT2, Scale(0, "heads", [1], 1), "sglang", "sglang has LoRA for o_proj, down_proj only, .*attn.c_proj"),
        (OPT, Scale(0, "neurons", [1], 1), "sglang", "sglang has LoRA for o_proj, down_proj only, .*fc2"),
        (OPT, Scale(0, "neurons", [1], 1), "llama.cpp", "llama.cpp has no LoRA for opt"),
        (BARE, Scale(0, "ffn", [1], 1), "mlx-lm", "target mlx-lm does not serve a PEFT adapter"),
        (BARE, Scale(0, "ffn", [1], 1), "portable", "those that do are transformers, vllm, sglang"),
    ],
)  # fmt: skip
def test_refusals(tiny: Tiny, edit: Edit, target: str, reason: str) -> None:
    with pytest.raises(Refused, match=f"(?s){reason}") as raised:
        planned(on_disk(tiny), [edit], target)
    assert "--form checkpoint" in str(raised.value)


@pytest.mark.parametrize(
    ("tiny", "edit", "target"),
    [
        (BIASED, Scale(0, "neurons", [1], 1), "vllm"),
        (NEOX, Scale(1, "heads", [1], 1), "llama.cpp"),
        (MOE, Scale(0, "heads", [1], 1), "sglang"),
        (Tiny("qwen2"), Scale(0, "ffn", [1], 1), "tgi"),  # its biases are elsewhere
        (OPT, Scale(0, "neurons", [1], 1), "vllm"),
        (GPT2, Scale(0, "neurons", [1], 1), "transformers"),
    ],
)
def test_neighbours_of_the_refusals_are_planned(tiny: Tiny, edit: Edit, target: str) -> None:
    assert planned(on_disk(tiny), [edit], target).rank == 1


def test_every_refused_projection_is_named() -> None:
    edits = [
        Shift(0, "ffn", [1.0] * 20),
        Scale(1, "attn", [1], 1),
        Scale(1, "heads", [1], 1),
        Scale(1, "neurons", [1], 1),
    ]
    with pytest.raises(Refused) as raised:
        planned(on_disk(BIASED), edits)
    first, *lines = str(raised.value).splitlines()
    assert first.startswith("2 of 3 edited projections cannot be an adapter")
    assert [line.partition(":")[0] for line in lines] == ["  layer 0, ffn_out", "  layer 1, attn_out"]


def test_more_units_in_a_layer_than_vllm_has_ranks() -> None:
    wide = Tiny("llama", biases=False, layers=1, heads=4, head_dim=130, residual=516)
    edits = [Scale(0, "attn", range(513), 1)]
    assert planned(on_disk(wide), edits, "sglang").rank == 513
    with pytest.raises(Refused, match=r"has rank 513, and vllm serves at most 512; edit fewer units .*--form"):
        planned(on_disk(wide), edits, "vllm")
    assert "--max-lora-rank 512 " in planned(on_disk(wide), [Scale(0, "attn", range(512), 1)], "vllm").notes[0]


def test_values_that_the_base_s_dtype_cannot_hold(tmp_path: Path) -> None:
    tiny = replace(BARE, dtype="float16")
    with pytest.raises(CheckpointError, match=r"down_proj.weight: the edited values do not fit F16.*smaller strength"):
        written(planned(on_disk(tiny), [Scale(0, "ffn", [1], 1e6)]), tmp_path / "out")


def test_an_adapter_on_another_base(out: Path) -> None:
    with pytest.raises(CheckpointError, match="PEFT cannot attach this adapter"):
        load(out, on_disk(Tiny("llama", biases=False, residual=24)), dtype="float32", device="cpu")
    with pytest.raises(CheckpointError, match="PEFT cannot attach this adapter"):
        load(out, on_disk(GPT2), dtype="float32", device="cpu")


def test_an_adapter_that_lacks_a_module(out: Path, tmp_path: Path) -> None:
    shutil.copytree(out, tmp_path / "cut")
    config = json.loads((out / CONFIG).read_bytes())
    config["target_modules"].append("model.layers.1.self_attn.o_proj")
    (tmp_path / "cut" / CONFIG).write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="Found missing adapter keys"):
        load(tmp_path / "cut", on_disk(BARE), dtype="float32", device="cpu")


def test_without_peft(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UsageError, match="PEFT, which is not installed: pip install peft"):
        load(out, on_disk(BARE))


def test_every_engine_s_row_names_its_version_and_usage() -> None:
    for engine in ENGINES.values():
        assert engine.version
        assert "OUT" in engine.usage
