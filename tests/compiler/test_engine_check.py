"""The rule of the check in an engine, and its figures."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from austeer.compiler import CheckFailed, interpret
from austeer.compiler.engine_check import FLOOR, Distance, EngineCheck, Expected, check, distance, expect
from tests.tiny import Tiny, load, logits, on_disk, program, tokens

CHECK = EngineCheck(
    engine="some engine",
    version="1.2",
    stored="float32",
    tokens=20,
    compiled=Distance(5e-6, 1e-12),
    edited=Distance(2.0, 0.3),
    own=Distance(4e-6, 1e-12),
    effect=Distance(2.0, 0.3),
)
SAME, FAR, NAN = Distance(0.0, 0.0), Distance(2.0, 0.3), Distance(np.nan, np.nan)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, None),
        ({"compiled": Distance(1e-4, 0.0)}, None),
        ({"compiled": Distance(1.1e-4, 0.0)}, "wrong: it is 0.00011"),
        ({"compiled": FAR, "edited": SAME}, "dropped in silence"),
        ({"compiled": FAR, "edited": Distance(1e-4, 0.0)}, "dropped in silence"),
        ({"compiled": FAR, "edited": Distance(0.5, 0.1)}, "edits are lost or changed"),
        ({"compiled": NAN, "edited": NAN}, "wrong: it is inf"),
        ({"effect": SAME, "edited": SAME}, "makes no difference"),
        # An engine that is itself a little off is judged by its own error, one that is far off not at all.
        ({"own": Distance(1e-3, 0.0), "compiled": Distance(1.9e-3, 0.0)}, None),
        ({"own": Distance(1e-3, 0.0), "compiled": Distance(2.1e-3, 0.0)}, "wrong"),
        ({"own": FAR, "compiled": FAR}, "cannot be judged"),
        ({"own": FAR, "compiled": FAR, "edited": SAME}, "dropped in silence"),
        ({"own": NAN, "compiled": SAME}, "cannot be judged"),
        # 16 bits: by mean KL, against that of the base.
        ({"stored": "bfloat16", "compiled": Distance(0.5, 3.9e-4)}, None),
        ({"stored": "bfloat16", "compiled": Distance(0.5, 4.1e-4)}, "wrong"),
        ({"stored": "float16", "compiled": FAR, "edited": Distance(0.1, 1e-4)}, "dropped in silence"),
    ],
)
def test_the_rule(changes: dict[str, Any], words: str | None) -> None:
    found = replace(CHECK, **changes)
    assert (found.failure is None) if words is None else (words in str(found.failure))
    assert found.plain()["passed"] is (words is None)


def test_figures_by_hand() -> None:
    p, q = np.log(np.array([[0.5, 0.5], [0.9, 0.1]])), np.log(np.array([[0.5, 0.5], [0.6, 0.4]]))
    found = distance([p[:1], p[1:]], [q[:1], q[1:]])
    assert found.max_abs == pytest.approx(np.log(4))
    assert found.mean_kl == pytest.approx((0.9 * np.log(1.5) - 0.1 * np.log(4)) / 2)


def test_what_is_all_but_impossible_counts_as_equal_and_nan_as_nothing() -> None:
    sure = np.array([[0.0, -300.0]])
    assert distance([sure], [np.array([[0.0, -1e38]])]).max_abs == 0
    assert distance([sure], [np.array([[0.0, -10.0]])]).max_abs == -FLOOR - 10
    assert np.isnan(distance([sure, sure], [np.array([[0.0, np.nan]]), sure]).max_abs)


def test_what_is_expected_is_the_base_with_and_without_hooks() -> None:
    tiny = Tiny("llama")
    text = tuple(tokens(1).tolist()[0])
    found, model = expect(load(on_disk(tiny)), program(tiny), [text]), load(on_disk(tiny))
    plain = logits(model, torch.tensor([text]))[0].log_softmax(-1)
    with interpret(model, program(tiny)):
        hooked = logits(model, torch.tensor([text]))[0].log_softmax(-1)
    assert np.abs(found.base[0] - plain.numpy()).max() < 1e-5
    assert np.abs(found.program[0] - hooked.numpy()).max() < 1e-5
    assert np.abs(found.program[0] - found.base[0]).max() > 0.1


def test_another_vocabulary_is_no_answer() -> None:
    scores = (np.zeros((2, 5), dtype=np.float32),)
    expected = Expected(((1, 2),), scores, scores)
    with pytest.raises(CheckFailed, match="e reports 6 tokens, the base has 5"):
        check("e", None, expected, (np.zeros((2, 6), dtype=np.float32),), scores, stored="float32")
