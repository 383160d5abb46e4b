"""Neurons in the place of others in the files of a checkpoint: equal shapes, and every other byte as it was."""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from austeer.compiler import (
    CheckpointError,
    Edit,
    Fitted,
    Gate,
    Gated,
    Program,
    Rank1,
    Refused,
    Scale,
    Shift,
    interpret,
    rewrite,
)
from austeer.compiler.facts import Geometry, read_facts
from austeer.compiler.live import activation_of, block_of, ffn_input, live_facts
from austeer.compiler.verbs.bases import open_base
from austeer.compiler.verbs.common import Compiled
from austeer.targets.checkpoint import Writing
from tests.compiler.test_interpreter import close
from tests.tiny import VARIANTS, load, logits, on_disk, rewritten, sharded, stored, tokens

WIDTH = 28
PLACES: dict[int, tuple[tuple[int, ...], ...]] = {0: ((9, 3),), 1: ((27, 12), (5, 20, 8))}
TAKEN = {layer: [place for part in parts for place in part] for layer, parts in PLACES.items()}
READING = ("gate_proj", "up_proj", "gate_up_proj", "fc1", "mlp.c_fc")
DOWN = ("down_proj", "fc2", "mlp.c_proj")
UNGATED = ("gpt2", "opt")
NAMES = ["llama", "llama-unbiased", "gpt2", "opt", "phi3", "mistral"]


def plain(model: Geometry) -> list[Edit]:
    """Ungated edits of the same FFN that leave the neurons in question alone."""
    rng = np.random.default_rng(0)
    k = np.zeros(model.neurons)
    k[[1, 4]] = 1, -2
    return [
        Scale(1, "neurons", (0, 7), (0.5, -2)),
        Shift(1, "neurons", 0.3 * rng.normal(size=model.neurons)),
        Rank1(1, "neurons", k, rng.normal(size=model.residual), 0.3),
        Scale(1, "ffn", (2, 5), (1.0, -0.5)),
        Scale(0, "heads", (1, 3), (1.0, -0.5)),
    ]


def gates(model: Geometry, *, constant: bool = False) -> list[Gated]:
    rng = np.random.default_rng(1)

    def normal(*shape: int) -> Any:
        return rng.normal(size=shape)

    def gate() -> Gate:
        return Gate(normal(model.residual), 0.3, 2.0, 0.1 * normal(model.residual) if constant else ())

    wide, n = model.residual, 3
    fitted = Fitted(normal(n, wide), normal(n), normal(n, wide), normal(n), 0.3 * normal(wide, n))
    if model.architecture in UNGATED:
        fitted = replace(fitted, up=np.zeros((n, wide)), up_bias=np.zeros(n))
    return [
        Gated(Shift(0, "residual", 2 * normal(wide)), gate(), replaces=PLACES[0][0]),
        Gated(Shift(1, "heads", normal(model.heads)), gate(), replaces=PLACES[1][0]),
        Gated(Scale(1, "ffn", (2, 9), (1.0, 2.0)), gate(), fitted, PLACES[1][1]),
    ]


def whole(base: Path) -> Program:
    model = read_facts(base).geometry
    return Program(model, (*plain(model), *gates(model)))


def compiled(base: Path, out: Path, program: Program, target: str | None = None) -> Compiled:
    made = Compiled.of(program, open_base(str(base)), target)
    out.mkdir()
    made.write(out, Writing())
    return made


def along(name: str, tensor: torch.Tensor, *, transposed: bool) -> torch.Tensor:
    """A view of the tensor with its neurons along the first axis."""
    down = any(part in name for part in DOWN)
    return tensor.T if tensor.ndim == 2 and down != transposed else tensor


# ---- what it computes -------------------------------------------------------------------


def emptied(base: Path, taken: dict[int, list[int]]) -> Any:
    """The base without these neurons: what they read is nothing, so they are 0."""
    model = load(base)
    facts = live_facts(model)
    for layer, places in taken.items():
        for name, tensor in block_of(model, facts, layer).named_parameters():
            if any(f"{part}." in name for part in READING):
                rows = along(name, tensor, transposed=facts.architecture.transposed)
                rows[[*places, *(WIDTH + place for place in places)] if "gate_up" in name else places] = 0
    return model


@contextmanager
def added(model: Any, gated: Gated, *, biased: bool = True) -> Generator[None]:
    """Within the context the block of an edit adds what the neurons that were fitted to it do."""
    facts, n = live_facts(model), gated.neurons
    assert n is not None
    seen: list[torch.Tensor] = []
    gated_ffn = facts.architecture.model_type not in UNGATED
    act, constant = activation_of(facts), torch.tensor(gated.gate.constant)
    gate, gate_bias, up, up_bias, down = map(torch.tensor, (n.gate, n.gate_bias, n.up, n.up_bias, n.down))
    if not biased:
        gate, up = (rows + bias[:, None] * constant for rows, bias in ((gate, gate_bias), (up, up_bias)))
        gate_bias, up_bias = 0 * gate_bias, 0 * up_bias

    def add(_: Any, __: Any, output: Any) -> Any:
        y = output[0] if isinstance(output, tuple) else output
        h = seen.pop().reshape(*y.shape[:-1], -1)
        x = act(h @ gate.T + gate_bias) * (h @ up.T + up_bias if gated_ffn else 1)
        return (y + x @ down.T, *output[1:]) if isinstance(output, tuple) else y + x @ down.T

    place = ffn_input(model, facts, gated.layer).module
    handles = [
        place.register_forward_pre_hook(lambda _, args: seen.append(args[0])),
        block_of(model, facts, gated.layer).register_forward_hook(add),
    ]
    yield
    for handle in handles:
        handle.remove()


def by_hand(base: Path, program: Program, ids: torch.Tensor) -> torch.Tensor:
    """The logits of the base without the neurons that gave way, and with what the program says."""
    *others, last = program.edits
    model = emptied(base, TAKEN)
    assert isinstance(last, Gated)
    with interpret(model, Program(program.model, tuple(others))), added(model, last):
        return logits(model, ids)


@pytest.mark.parametrize("name", NAMES)
def test_the_compiled_model_is_the_base_without_them_and_with_the_gates(name: str, tmp_path: Path) -> None:
    base, ids = on_disk(VARIANTS[name]), tokens()
    program = whole(base)
    made = compiled(base, tmp_path / "out", program)
    found, expected = logits(load(tmp_path / "out"), ids), by_hand(base, program, ids)
    close(found, expected)
    assert (expected - logits(load(base), ids)).abs().max() > 0.1 * expected.abs().max()
    assert set(made.compare(tmp_path / "out").values()) == {"ok"}


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "phi3"])
def test_where_they_were_dead_it_is_the_interpreter(name: str, tmp_path: Path) -> None:
    transposed = VARIANTS[name].architecture == "gpt2"

    def kill(tensors: dict[str, Any]) -> dict[str, Any]:
        for key, tensor in tensors.items():
            layer = next((layer for layer in PLACES if f".{layer}." in key), None)
            if layer is not None and key.endswith(".weight") and any(part in key for part in DOWN):
                along(key, tensor, transposed=transposed)[TAKEN[layer]] = 0
        return tensors

    base, ids = rewritten(on_disk(VARIANTS[name]), tmp_path / "base", kill), tokens()
    *others, _ = whole(base).edits
    program = Program(read_facts(base).geometry, tuple(others))
    compiled(base, tmp_path / "out", program)
    model = load(base)
    with interpret(model, program):
        expected = logits(model, ids)
    close(logits(load(tmp_path / "out"), ids), expected)


# ---- what is in the files ---------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_all_else_keeps_every_bit(name: str, dtype: str, tmp_path: Path) -> None:
    """Against the same base with the ungated edits alone, and biases where the new neurons need them."""
    base = on_disk(replace(VARIANTS[name], dtype=dtype))
    program = whole(base)
    compiled(base, tmp_path / "plain", Program(program.model, tuple(plain(program.model))))
    compiled(base, tmp_path / "out", program)
    before, after = stored(tmp_path / "plain"), stored(tmp_path / "out")
    assert before.keys() == after.keys()
    assert (tmp_path / "plain" / "config.json").read_text() == (tmp_path / "out" / "config.json").read_text()
    for key, tensor in after.items():
        assert tensor.dtype == before[key].dtype
        assert tensor.shape == before[key].shape
        layer = next((layer for layer in PLACES if f".{layer}." in key), None)
        inside = any(f"{part}." in key for part in READING) or (
            key.endswith(".weight") and key.rsplit(".", 1)[0].endswith(DOWN)
        )
        if layer is None or not inside:
            assert torch.equal(tensor, before[key]), key
            continue
        old, new = (along(key, values, transposed=name == "gpt2") for values in (before[key], tensor))
        kept = [place for place in range(WIDTH) if place not in TAKEN[layer]]
        assert torch.equal(new[kept], old[kept]), key
        assert not torch.equal(new[TAKEN[layer]], old[TAKEN[layer]]), key
    check_step(after, gates(program.model)[0])


def check_step(after: dict[str, torch.Tensor], gated: Gated) -> None:
    """The two neurons of a step in layer 0, value by value."""
    shift, gate, places = gated.edit, gated.gate, list(gated.replaces)
    assert isinstance(shift, Shift)
    signs = np.array([[1.0], [-1.0]], np.float32)
    columns = signs * shift.vector / (2 * gate.delta)
    expected: dict[str, Any] = {
        **dict.fromkeys(("gate_proj.weight", "fc1.weight", "mlp.c_fc.weight"), np.stack([gate.w, gate.w])),
        **dict.fromkeys(("gate_proj.bias", "fc1.bias", "mlp.c_fc.bias"), gate.b + signs[:, 0] * gate.delta),
        "up_proj.weight": np.zeros((2, len(gate.w))),
        "up_proj.bias": np.ones(2),
        **{f"{part}.weight": columns for part in DOWN},
    }
    seen = [(key, end) for key in after for end in expected if ".0." in key and key.endswith(f".{end}")]
    assert len(seen) in (3, 5)
    for key, end in seen:
        rows = along(key, after[key], transposed="c_fc" in key or "c_proj" in key)
        assert torch.equal(rows[places], torch.tensor(expected[end]).to(rows.dtype)), key


def test_a_base_in_several_files_stays_in_them(tmp_path: Path) -> None:
    tiny = VARIANTS["gpt2"]
    base, out = sharded(tiny, tmp_path / "base"), tmp_path / "out"
    program = whole(base)
    made = compiled(base, out, program)
    names = {path.name: path.stat().st_size for path in base.iterdir()}
    assert {path.name: path.stat().st_size for path in out.iterdir()} == names
    assert (base / "config.json").read_bytes() == (out / "config.json").read_bytes()
    assert set(made.compare(out).values()) == {"ok"}
    compiled(on_disk(tiny), tmp_path / "expected", program)
    expected = stored(tmp_path / "expected")
    assert all(torch.equal(tensor, expected[key]) for key, tensor in stored(out).items())
    assert made.plan.nbytes < sum(tensor.nbytes for tensor in expected.values()) / 2


@pytest.mark.parametrize("name", ["llama-unbiased", "gpt2", "opt", "phi3"])
def test_the_lowering_says_all_that_changes_and_that_it_is_not_exact(name: str, tmp_path: Path) -> None:
    base = on_disk(VARIANTS[name])
    program = whole(base)
    made = compiled(base, tmp_path / "out", program)
    before, after = stored(base), stored(tmp_path / "out")
    for key in before.keys() & after.keys():
        may = torch.zeros(after[key].shape, dtype=torch.bool)
        for entry in (entry for entry in made.plan.lowering if entry["tensor"] == key):
            axes = zip(entry["slice"], may.shape, strict=True)
            may[np.ix_(*[range(size) if axis is None else axis for axis, size in axes])] = True
        assert torch.equal(before[key][~may], after[key][~may]), key
    inexact = {entry["edit"] for entry in made.plan.lowering if not entry["exact"]}
    assert inexact == {number for number, edit in enumerate(program.edits) if isinstance(edit, Gated)}


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_block_by_block_it_is_the_same(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    base = on_disk(VARIANTS[name])
    compiled(base, tmp_path / "one", whole(base))
    monkeypatch.setattr(rewrite, "BLOCK", 3 * WIDTH)
    made = compiled(base, tmp_path / "other", whole(base))
    assert max(len(segment.data) for job in made.plan.jobs for segment in job.segments()) <= 4 * 3 * WIDTH
    one, other = stored(tmp_path / "one"), stored(tmp_path / "other")
    assert all(torch.equal(one[key], other[key]) for key in one)


# ---- other forms ------------------------------------------------------------------------


@pytest.mark.parametrize("appended", [False, True])
@pytest.mark.parametrize("name", ["qwen3-unbiased", "phi3"])
def test_without_biases_a_constant_direction_stands_for_them(name: str, tmp_path: Path, *, appended: bool) -> None:
    """The window of the phi3 keeps it a phi3, whose two maps into neurons are one tensor."""
    base, ids = tmp_path / "base", tokens()
    config = '"sliding_window": 32' if name == "phi3" else ""
    rewritten(on_disk(VARIANTS[name]), base, dict)
    path = base / "config.json"
    path.write_text(path.read_text().replace('"sliding_window": null', config or '"sliding_window": null'))
    *_, gated = gates(read_facts(base).geometry, constant=True)
    gated = replace(gated, replaces=()) if appended else gated
    made = compiled(base, tmp_path / "out", Program(read_facts(base).geometry, (gated,)), "sglang")
    assert made.plan.form.architecture.model_type == VARIANTS[name].architecture
    assert stored(base).keys() == stored(tmp_path / "out").keys()
    model = emptied(base, {1: list(gated.replaces)})
    with added(model, gated, biased=False):
        expected = logits(model, ids)
    close(logits(load(tmp_path / "out"), ids), expected)
    shapes = {key: tensor.shape for key, tensor in stored(tmp_path / "out").items()}
    assert appended == (shapes != {key: tensor.shape for key, tensor in stored(base).items()})
    for entry in made.plan.lowering:
        axes = zip(entry["slice"], shapes[entry["tensor"]], strict=True)
        assert all(axis is None or max(axis) < size for axis, size in axes)


def test_an_engine_with_one_width_can_carry_them(tmp_path: Path) -> None:
    base = on_disk(replace(VARIANTS["gpt2"], neurons=96))
    model = read_facts(base).geometry
    gated = Gated(Shift(0, "residual", np.ones(model.residual)), Gate(np.ones(model.residual), 0, 2))
    with pytest.raises(Refused, match="one width for the FFN"):
        compiled(base, tmp_path / "no", Program(model, (gated,)), "llama.cpp")
    made = compiled(base, tmp_path / "out", Program(model, (replace(gated, replaces=(1, 90)),)), "llama.cpp")
    assert made.plan.form.widened == 0


# ---- what is refused --------------------------------------------------------------------


@pytest.mark.parametrize(
    "edit",
    [
        lambda _: Scale(1, "neurons", (4, 12), 0.5),
        lambda m: Rank1(1, "neurons", np.ones(WIDTH), np.ones(m.residual), 1),
    ],
)
def test_a_neuron_that_another_edit_is_about_has_to_stay(edit: Callable[[Geometry], Edit], tmp_path: Path) -> None:
    base = on_disk(VARIANTS["llama"])
    model = read_facts(base).geometry
    with pytest.raises(Refused, match=r"site neurons: neuron (5|12)\n"):
        compiled(base, tmp_path / "out", Program(model, (*gates(model), edit(model))))


def test_what_cannot_be_stored_is_an_error(tmp_path: Path) -> None:
    base = on_disk(replace(VARIANTS["llama"], dtype="float16"))
    model = read_facts(base).geometry
    gated = Gated(Shift(0, "residual", np.full(model.residual, 1e6)), Gate(np.ones(model.residual), 0, 2), None, (0, 1))
    with pytest.raises(CheckpointError, match=r"layers.0.mlp.down_proj.weight.*do not fit F16"):
        compiled(base, tmp_path / "out", Program(model, (gated,)))
