"""gate_neurons: what the neurons of gated edits do in the compiled model, and where they lie in its files."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from austeer.compiler import Edit, Fitted, Gate, Gated, Program, Rank1, Scale, Shift, certificate, interpret
from austeer.compiler.live import ffn_input, live_facts, load_model, port
from austeer.compiler.rewrite import Matrix
from austeer.compiler.verbs.bases import open_base
from austeer.compiler.verbs.build import build
from austeer.compiler.verbs.common import Compiled
from austeer.compiler.verbs.verify import verify
from austeer.targets.checkpoint import Writing
from tests.compiler.test_gates import ACTS, gates
from tests.tiny import VARIANTS, Tiny, certified, load, logits, on_disk, program, rewritten, stored, tokens

LEGAL = (
    "llama", "llama-unbiased", "llama-tied", "smollm3", "mistral", "qwen2", "phi3", "gpt2", "gpt2-tied", "gpt_neox",
    "gpt_neox-unbiased", "opt", "opt-unbiased",
)  # fmt: skip
OLD, NEW = 28, 256
DOWN = ("down_proj.weight", "fc2.weight", "mlp.c_proj.weight")
READ = ("gate_proj.", "up_proj.", "fc1.", "mlp.c_fc.")


def vector(gated: Gated) -> Any:
    """That of the shift within."""
    assert isinstance(gated.edit, Shift)
    return gated.edit.vector


def shifts(tiny: Tiny, seed: int = 0) -> list[Gated]:
    """A gated shift at every site of every layer."""
    return [gated for gated in gates(tiny, seed) if isinstance(gated.edit, Shift)]


def with_others(tiny: Tiny, *more: Edit) -> Program:
    """These edits among others without a gate, of every kind and at every site."""
    made = program(tiny)
    half = len(made.edits) // 2
    return Program(made.model, (*made.edits[:half], *more, *made.edits[half:]))


def written(base: Path, made: Program, out: Path, target: str = "transformers") -> Compiled:
    """What `build` writes, be it approximate."""
    compiled = Compiled.of(made, open_base(str(base)), target)
    out.mkdir()
    compiled.write(out, Writing())
    return compiled


def require_close(found: Tensor, expected: Tensor, plain: Tensor) -> None:
    scale = expected.abs().max()
    assert (found - expected).abs().max() <= 1e-5 * scale
    assert (plain - expected).abs().max() > 1e-2 * scale


# ---- what they do ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", LEGAL)
def test_gated_shifts_among_other_edits_are_what_the_interpreter_says(name: str, tmp_path: Path) -> None:
    tiny = VARIANTS[name]
    made = with_others(tiny, *shifts(tiny))
    made.save(tmp_path / "p")
    report = build(str(on_disk(tiny)), [tmp_path / "p"], tmp_path / "out")
    base, ids = load(on_disk(tiny)), tokens()
    with interpret(base, made):
        expected = logits(base, ids)
    with interpret(base, program(tiny)):
        ungated = logits(base, ids)
    require_close(logits(load(tmp_path / "out"), ids), expected, ungated)
    assert report.compiled.exact


@pytest.mark.parametrize("site", ["heads", "neurons"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_vector_goes_through_the_base_s_projection_and_no_scale_of_rows_reaches_it(
    name: str, site: Any, tmp_path: Path
) -> None:
    tiny = VARIANTS[name]
    base, width = on_disk(tiny), program(tiny).model.residual
    gated = next(edit for edit in shifts(tiny) if (edit.site, edit.layer) == (site, 1))
    rng = np.random.default_rng(0)
    k, v = rng.normal(size=len(vector(gated))), rng.normal(size=width)
    others = (Scale(1, "ffn", range(width), 3.0), Scale(1, "attn", range(width), 5.0), Rank1(1, site, k, v, 1.0))
    written(base, Program.of([*others, gated], model=base), tmp_path / "out")
    facts = live_facts(model := load(base))
    weight: Any = port(model, facts, 1, site).module.weight
    c = torch.tensor(vector(gated)) / (2 * gated.gate.delta)
    column = (weight.T if facts.architecture.transposed else weight) @ c
    (down,) = (tensor for key, tensor in stored(tmp_path / "out").items() if ".1." in key and key.endswith(DOWN))
    found = (down.T if facts.architecture.transposed else down)[:, OLD : OLD + 3]
    assert torch.allclose(found[:, 0], column, rtol=1e-5, atol=1e-7)
    assert torch.equal(found[:, 1], -found[:, 0])
    assert not found[:, 2].any()


def fitted(residual: int, count: int, seed: int = 0) -> Fitted:
    rng = np.random.default_rng(seed)
    rows, columns = (0.5 * rng.normal(size=shape) for shape in ((2, count, residual), (residual, count)))
    return Fitted(rows[0], rng.normal(size=count), rows[1], rng.normal(size=count), columns)


def adding(model: Any, layer: int, term: Any) -> None:
    """From now on the FFN writes what `term` makes of what it reads, too."""
    facts, seen = live_facts(model), list[Tensor]()
    ffn_input(model, facts, layer).module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    ffn = port(model, facts, layer, "ffn").module
    ffn.register_forward_hook(lambda _, __, output: output + term(seen.pop()).reshape(output.shape))


@pytest.mark.parametrize("name", ["llama", "llama-unbiased", "phi3", "gpt2", "gpt_neox", "opt"])
def test_fitted_neurons_add_what_they_say(name: str, tmp_path: Path) -> None:
    tiny = VARIANTS[name]
    base, act = on_disk(tiny), ACTS.get(tiny.architecture, torch.nn.functional.silu)
    width = program(tiny).model.residual
    kinds = (Scale(1, "ffn", [1, 3], 2.0), Rank1(0, "heads", np.ones(program(tiny).model.heads), np.ones(width), 1))
    model, ids = load(base), tokens()
    plain, edits = logits(model, ids), list[Edit]()
    for number, edit in enumerate(kinds):
        neurons = fitted(width, 5 + number, number)
        edits.append(Gated(edit, Gate(np.ones(width), 0, 1), neurons))
        gate, gate_bias, up, up_bias, down = (torch.tensor(part) for part in vars(neurons).values())

        def term(h: Tensor, parts: Any = (gate, gate_bias, up, up_bias, down)) -> Tensor:
            gate, gate_bias, up, up_bias, down = parts
            other = 1 if tiny.architecture in ACTS else h @ up.T + up_bias
            return (act(h @ gate.T + gate_bias) * other) @ down.T

        adding(model, edit.layer, term)
    compiled = written(base, Program.of(edits, model=base), tmp_path / "out")
    require_close(logits(load(tmp_path / "out"), ids), logits(model, ids), plain)
    inexact = {entry["edit"] for entry in compiled.plan.lowering if not entry["exact"]}
    assert (inexact, compiled.exact) == ({0, 1}, False)


# ---- without biases ---------------------------------------------------------------------------


def steady(tiny: Tiny, folder: Path) -> tuple[Path, list[float]]:
    """A model one unit of whose stream is large and the same for all tokens, and a direction that makes 1 of it."""

    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors["model.embed_tokens.weight"][:, 0] = 40.0
        return tensors

    base = rewritten(on_disk(tiny), folder, change)
    model, seen = load(base), list[Tensor]()
    ffn_input(model, live_facts(model), 1).module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    logits(model, tokens())
    constant = np.zeros(tiny.residual)
    constant[0] = 1 / seen[0][..., 0].mean()
    assert 1e-4 < (seen[0] @ torch.tensor(constant).float() - 1).abs().max() < 0.05
    return base, constant.tolist()


@pytest.mark.parametrize(
    ("target", "architecture"),
    [("transformers", "qwen3"), ("sglang", "llama"), ("portable", "llama"), ("sglang", "qwen2"), ("portable", "phi3")],
)
def test_a_direction_that_is_nearly_constant_stands_for_the_biases(
    target: str, architecture: str, tmp_path: Path
) -> None:
    tiny = Tiny(architecture, biases=False)
    base, constant = steady(tiny, tmp_path / "base")
    rng = np.random.default_rng(0)
    direction, gate = rng.normal(size=tiny.residual), Gate(8 * rng.normal(size=tiny.residual), 0.5, 2.0, constant)
    gated = Gated(Shift(1, "attn", direction), gate)
    compiled = written(base, made := Program.of([gated], model=base), tmp_path / "out", target)
    model, ids = load(base), tokens()
    plain = logits(model, ids)
    with interpret(model, made):
        meant = logits(model, ids)
    w, u, c = (torch.tensor(part) for part in (gated.gate.w, gated.gate.constant, vector(gated)))

    def term(h: Tensor) -> Tensor:
        one = h @ u
        high, low = (torch.nn.functional.silu(h @ w + (0.5 + delta) * one) for delta in (2.0, -2.0))
        return ((high - low) * one / 4)[..., None] * c

    adding(model, 1, term)
    made_of_it = load(tmp_path / "out")
    require_close(logits(made_of_it, ids), logits(model, ids), plain)
    assert (logits(made_of_it, ids) - meant).abs().max() < 0.1 * (plain - meant).abs().max()
    assert not any("mlp" in key and "bias" in key for key in made_of_it.state_dict())
    assert not compiled.exact


# ---- where they lie -----------------------------------------------------------------------------


def along_neurons(key: str, tensor: Tensor) -> Tensor:
    """The tensor with its neurons along the first axis."""
    transposed = "c_fc.weight" in key or (key.endswith(DOWN) and "c_proj" not in key)
    return tensor.T if transposed else tensor


def test_two_gated_edits_of_one_layer_lie_side_by_side_and_all_else_is_zero(tmp_path: Path) -> None:
    tiny = VARIANTS["llama-unbiased"]
    base = on_disk(tiny)
    edits = [gated for gated in shifts(tiny) if gated.layer == 1 and gated.site in ("ffn", "residual")]
    written(base, Program.of(edits, model=base), tmp_path / "out")
    found = {key: tensor for key, tensor in stored(tmp_path / "out").items() if key.endswith(DOWN) or any(
        part in key for part in READ)}  # fmt: skip
    assert {along_neurons(key, tensor).shape[0] for key, tensor in found.items()} == {NEW}
    for key, tensor in found.items():
        new = along_neurons(key, tensor)[OLD:]
        assert not new[4 if ".1." in key else 0 :].any(), key
    w, b, delta = zip(*((gated.gate.w, gated.gate.b, gated.gate.delta) for gated in edits), strict=True)
    layer = {key.removeprefix("model.layers.1.mlp."): tensor for key, tensor in found.items() if ".1." in key}
    place = slice(OLD, OLD + 4)
    assert torch.equal(layer["gate_proj.weight"][place], torch.tensor(np.repeat(w, 2, axis=0)))
    expected = [np.float32(b[n] + sign * delta[n]) for n in (0, 1) for sign in (1, -1)]
    assert layer["gate_proj.bias"][place].tolist() == expected
    assert layer["up_proj.bias"][place].tolist() == [1] * 4
    assert not layer["up_proj.weight"][place].any()
    for number, gated in enumerate(edits):
        column = torch.tensor(vector(gated) / (2 * gated.gate.delta))
        assert torch.allclose(layer["down_proj.weight"][:, OLD + 2 * number], column)


@pytest.mark.parametrize("neurons", [256, 300])
def test_the_width_is_a_multiple_of_256(neurons: int, tmp_path: Path) -> None:
    tiny = Tiny("opt", neurons=neurons)
    written(on_disk(tiny), Program.of(shifts(tiny)[:1], model=on_disk(tiny)), tmp_path / "out")
    assert load(tmp_path / "out").config.ffn_dim == 512


@pytest.mark.parametrize("name", ["llama", "llama-unbiased", "gpt2", "opt", "gpt_neox", "smollm3"])
def test_the_lowering_says_all_that_changes(name: str, tmp_path: Path) -> None:
    tiny = VARIANTS[name]
    base = on_disk(tiny)
    made = Program.of([*shifts(tiny)[:3], Scale(1, "ffn", [2, 4], 0.5), *shifts(tiny)[6:7]], model=base)
    compiled = written(base, made, tmp_path / "out")
    before, after = stored(base), stored(tmp_path / "out")
    listed = {entry["tensor"] for entry in compiled.plan.lowering}
    assert listed <= after.keys()
    for key, tensor in after.items():
        if key not in listed:
            assert digest(tensor) == digest(before[key]), key
            continue
        may = torch.zeros(tensor.shape, dtype=torch.bool)
        for entry in (entry for entry in compiled.plan.lowering if entry["tensor"] == key):
            axes = zip(entry["slice"], tensor.shape, strict=True)
            may[np.ix_(*[range(size) if axis is None else axis for axis, size in axes])] = True
        padded = torch.full_like(tensor, torch.nan)
        if key in before:
            padded[tuple(map(slice, before[key].shape))] = before[key]
        assert torch.equal(padded[~may], tensor[~may]), key
    assert {entry["edit"] for entry in compiled.plan.lowering} == set(range(len(made.edits)))
    assert compiled.exact


def digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()


def test_each_edit_owns_its_neurons(tmp_path: Path) -> None:
    tiny = VARIANTS["gpt2"]
    edits = [gated for gated in shifts(tiny) if gated.layer == 0][:2]
    compiled = written(on_disk(tiny), Program.of(edits, model=on_disk(tiny)), tmp_path / "out")
    key = "transformer.h.0.mlp.c_fc.weight"
    slices = [(entry["edit"], entry["slice"]) for entry in compiled.plan.lowering if entry["tensor"] == key]
    zero = list(range(OLD + 4, NEW))
    assert slices == [(0, [None, [OLD, OLD + 1]]), (1, [None, [OLD + 2, OLD + 3]]), (0, [None, zero])]


# ---- as a build -----------------------------------------------------------------------------------


def built(base: Path, edits: Sequence[Edit], folder: Path, **more: Any) -> Any:
    folder.mkdir()
    Program.of(edits, model=base).save(folder / "p")
    return build(str(base), [folder / "p"], folder / "out", **more)


def test_equal_inputs_give_equal_bytes_and_verify_finds_a_changed_one(tmp_path: Path) -> None:
    tiny = VARIANTS["llama-unbiased"]
    base = on_disk(tiny)
    one, other = (Path(built(base, shifts(tiny), tmp_path / name).out) for name in ("one", "other"))
    names = sorted(path.name for path in one.iterdir() if path.is_file())
    assert all((one / name).read_bytes() == (other / name).read_bytes() for name in names)
    compiled = Compiled.of(Program.of(shifts(tiny), model=base), open_base(str(base)))
    assert set(compiled.compare(one).values()) == {"ok"}
    tensors = stored(one)
    (file,) = (path for path in one.glob("*.safetensors") if "base" in path.name)
    kept = {key: tensor for key, tensor in tensors.items() if not key.endswith(".bias")}
    kept["model.layers.0.mlp.down_proj.weight"][3, OLD + 1] += 1
    save_file(kept, file, metadata={"format": "pt"})
    assert "does not hold" in compiled.compare(one)[file.name]


def test_a_dry_run_reads_no_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = VARIANTS["gpt2"]
    Program.of(shifts(tiny), model=on_disk(tiny)).save(tmp_path / "p")
    plain = build(str(on_disk(tiny)), [tmp_path / "p"], tmp_path / "out").plain()

    def read(*_: Any) -> Any:
        raise AssertionError("a weight is read")

    monkeypatch.setattr(Matrix, "_read", read)
    planned = build(str(on_disk(tiny)), [tmp_path / "p"], None, dry_run=True).plain()
    assert planned["lowering"] == plain["lowering"]
    assert planned["tensors"] == plain["tensors"]
    assert any(row["tensor"] == "transformer.h.0.mlp.c_fc.weight" for row in planned["tensors"])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt"])
def test_in_16_bits_the_certificate_holds(
    architecture: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(certificate, "GREEDY_TEXTS", 0)
    tiny = replace(VARIANTS[architecture], dtype=dtype)
    base = on_disk(tiny)
    edits = [gated for gated in shifts(tiny) if gated.site != "neurons"]
    written(base, made := Program.of(edits, model=base), tmp_path / "out")
    found = certified(base, tmp_path / "out", made, [tuple(row) for row in tokens(4, 16).tolist()])
    assert (found.stored, found.failures()) == (dtype, [])
    assert found.base_mean_kl > 0.03


def test_verify_holds(tmp_path: Path) -> None:
    from austeer.compiler.verbs.demo import MODEL

    width = Program.of([], model=MODEL).model.residual
    rng = np.random.default_rng(0)
    gate = Gate(rng.normal(size=width), 0.0, 4.0)
    gated = Gated(Shift(2, "attn", rng.normal(size=width)), gate)
    (tmp_path / "texts.txt").write_text("Once upon a time there was a dog.\n")
    report = built(MODEL, [gated], tmp_path / "new", texts=tmp_path / "texts.txt")
    assert report.certificate.passed
    assert not report.certificate.approximate
    checked = verify(report.out, base=str(MODEL), texts=tmp_path / "texts.txt")
    assert checked.passed, checked.problems
    live = load_model(Path(report.out), dtype="float32", device="cpu")
    assert live.config.intermediate_size % 256 == 0
