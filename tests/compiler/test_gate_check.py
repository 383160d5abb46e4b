"""What is measured and said of gates: both sides of their texts, the card's section, the manifest's record."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from austeer.compiler import Fitted, Gate, Gated, Origin, Program, Scale, Shift, interpret
from austeer.compiler.gate_card import UNKNOWN, gates_record, gates_section
from austeer.compiler.gate_check import Side, SideCheck, check_gates
from austeer.compiler.live import load_model
from austeer.compiler.measure import Effect, effects
from austeer.compiler.openness import Openness
from austeer.compiler.tokens import PairTokens
from austeer.compiler.verbs.bases import open_base
from austeer.compiler.verbs.common import Compiled, Measured, write_compiled
from tests.tiny import VARIANTS, load, on_disk, program

TINY = VARIANTS["llama"]
TEXTS = ((1, 5, 6, 7, 8), (1, 9, 10, 11), (1, 12, 13))
PAIRS = (PairTokens((1, 5), (6, 7), (8,)), PairTokens((1, 9), (10,), (11, 12)))
ORIGIN = Origin("ab" * 32, "cd" * 32, 0.9, 0.8, 0.125)


def gated(origin: Origin | None = ORIGIN) -> Program:
    model, rng = program(TINY).model, np.random.default_rng(0)
    gate = Gate(rng.normal(size=model.residual), 0.3, 2.0, origin=origin)
    shifts = [Gated(Shift(layer, "ffn", rng.normal(size=model.residual)), gate) for layer in (0, 1)]
    return Program(model, tuple(shifts))


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, SideCheck]]:
    base, out = on_disk(TINY), tmp_path_factory.mktemp("gates") / "out"
    found: dict[str, SideCheck] = {}

    def check(folder: Path) -> Measured:
        sides = {"when": Side(TEXTS, PAIRS), "unless": Side(TEXTS[:1])}
        found.update(
            check_gates(
                base, gated(), sides, lambda: load_model(folder, dtype="float32", device="cpu"),
                dtype="float32", device="cpu", batch_tokens=64,
            )
        )  # fmt: skip
        return Measured({"sides": {name: side.plain() for name, side in found.items()}}, found)

    write_compiled(Compiled.of(gated(), open_base(str(base))), out, measure=check)
    return out, found


def test_a_side_is_measured_as_it_is_defined(checked: tuple[Path, dict[str, SideCheck]]) -> None:
    _, found = checked
    model, total, equal = load(on_disk(TINY)), 0.0, 0
    for text in TEXTS:
        ids = torch.tensor([text])
        p = model(ids).logits[0].double().log_softmax(-1)
        with interpret(model, gated()):
            q = model(ids).logits[0].double().log_softmax(-1)
        total += float((p.exp() * (p - q)).sum())
        equal += int((p.argmax(-1) == q.argmax(-1)).sum())
    when = found["when"]
    assert (when.texts, when.tokens) == (3, 12)
    assert when.mean_kl == pytest.approx(total / 12, rel=1e-4)
    assert when.mean_kl > 0.01
    assert when.top1_agreement == equal / 12
    assert [when.base_effect, when.effect] == [
        Effect(pytest.approx(one.accuracy), pytest.approx(one.margin, rel=1e-4))  # pyright: ignore[reportArgumentType]
        for one in effects(model, PAIRS, [None, gated()], 64)
    ]
    assert found["unless"].effect is found["unless"].base_effect is None
    assert found["unless"].tokens == 5
    assert set(when.gates) == {0, 1}


def test_card_and_manifest_hold_it(checked: tuple[Path, dict[str, SideCheck]]) -> None:
    out, found = checked
    card, manifest = (out / "README.md").read_text(), json.loads((out / "austeer.json").read_text())
    assert "## Where it acts" in card
    assert f"| 0 | 0 | 0.900 | 80.0% | 12.5% | `{'ab' * 32}` | `{'cd' * 32}` |" in card
    assert f"| unless | 5 | {found['unless'].mean_kl:.4g} | - | - |" in card
    assert [gate["origin"]["open_unless"] for gate in manifest["gates"]] == [0.125, 0.125]
    assert manifest["sides"]["when"]["mean_kl"] == found["when"].mean_kl
    assert manifest["sides"]["when"]["gates"]["1"]["open"] == found["when"].gates[1].open


def test_no_build_leaves_the_gates_out(tmp_path: Path) -> None:
    made = gated(None)
    write_compiled(Compiled.of(made, open_base(str(on_disk(TINY)))), tmp_path / "out")
    card, manifest = ((tmp_path / "out" / name).read_text() for name in ("README.md", "austeer.json"))
    assert UNKNOWN in card
    assert json.loads(manifest)["gates"] == gates_record(made)
    assert gates_record(made)[0]["origin"] is None
    assert "sides" not in json.loads(manifest)


def test_what_is_not_measured_is_not_claimed() -> None:
    assert gates_section(Program(gated().model, (Scale(0, "ffn", [1], 0.5),)), {}) == ""
    assert "held-out texts:" not in gates_section(gated(), {})


def test_edits_of_one_gate_share_a_row() -> None:
    width = gated().model.residual
    neurons = Fitted(np.ones((3, width)), np.zeros(3), np.ones((3, width)), np.zeros(3), np.ones((width, 3)))
    gate = Gate(np.ones(width), 0, 8, origin=ORIGIN)
    made = Program(
        gated().model, (Gated(Scale(1, "ffn", [0], 1), gate, neurons), Gated(Scale(1, "attn", [0], 1), gate))
    )
    assert "| 0, 1 | 1 | 0.900 |" in gates_section(made, {})
    assert [record["neurons"] for record in gates_record(made)] == [3, None]


def test_the_range_of_open_gates() -> None:
    opened = {0: Openness(4, 0.25, 0.3), 1: Openness(4, 0.75, 0.6)}
    assert SideCheck(1, 4, 0.0, 1.0, None, None, opened).open_range == (0.25, 0.75)
