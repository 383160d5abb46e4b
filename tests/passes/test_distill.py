"""distill: gated edits as neurons fitted to what they add."""

from typing import Any

import numpy as np
import pytest

from austeer.compiler import Edit, Gate, Gated, Program, Scale
from austeer.compiler.live import live_facts
from austeer.passes import fit_neurons
from austeer.passes.distill import Distilled, distill
from tests.tiny import VARIANTS, load, on_disk, tokens

UNITS = (1, 4, 7)
TEXTS = [tuple(row) for row in tokens(60, 24, seed=1).tolist()]
HELD_OUT = [tuple(row) for row in tokens(20, 24, seed=2).tolist()]
LAYER = 1


@pytest.fixture(autouse=True)
def _quick(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "slow" not in request.keywords:
        monkeypatch.setattr(fit_neurons, "STEPS", 300)


def gate(residual: int, seed: int = 0, scale: float = 1.0) -> Gate:
    return Gate(scale * np.random.default_rng(seed).normal(size=residual), 0.0, 2.0)


def gated(name: str, edit: Edit | None = None) -> tuple[Any, Program]:
    """A tiny model, and a program of one gated edit: a scale at site ffn."""
    model = load(on_disk(VARIANTS[name]))
    geometry = live_facts(model).geometry
    made = Gated(edit or Scale(LAYER, "ffn", UNITS, (2.0, -1.0, 3.0)), gate(geometry.residual))
    return model, Program(geometry, (made,))


def one(model: Any, program: Program, neurons: int = 32, target: float = 2.0, seed: int = 0) -> tuple[Any, Distilled]:
    """The neurons of the last edit, and how they came out."""
    made, records = distill(model, program, TEXTS, neurons=neurons, target_r2=target, seed=seed)
    return made.edits[-1], records[-1]


# ---- how well it fits -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "bar"),
    [("llama", 0.9), ("llama-unbiased", 0.9), ("phi3", 0.9), ("gpt2", 0.8), ("gpt_neox", 0.8), ("opt", 0.8)],
)
def test_few_neurons_do_most_of_a_scale_at_ffn(name: str, bar: float) -> None:
    _, record = one(*gated(name), neurons=64)
    print(name, record)
    assert record.held_out_r2 > bar


@pytest.mark.parametrize("site", ["heads", "attn", "neurons", "residual"])
def test_and_much_of_one_elsewhere(site: Any) -> None:
    _, record = one(*gated("llama", Scale(LAYER, site, UNITS, 2.0)))
    print(site, record)
    assert record.held_out_r2 > 0.5
