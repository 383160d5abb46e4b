"""fold: one normal form for each projection, and what each edit touches. (What it computes: test_invariants.)"""

from typing import Any

import numpy as np
import pytest

from austeer.compiler import Edit, Program, Rank1, Scale, Shift
from austeer.compiler.facts import read_facts
from austeer.compiler.patch import Patch, role_of
from austeer.passes.fold import fold
from austeer.passes.legalize import legalize
from austeer.targets.tables import TARGETS
from tests.tiny import Tiny, on_disk

LLAMA, NONE, MOE = Tiny("llama"), Tiny("llama", biases=False), Tiny("qwen3_moe")


def folded(*edits: Edit, tiny: Tiny = LLAMA) -> Patch:
    facts = read_facts(on_disk(tiny))
    program = Program(facts.geometry, edits)
    return fold(program, facts, legalize(program, facts, TARGETS["transformers"]))


def ones(width: int) -> Any:
    return np.ones(width, np.float32)


@pytest.mark.parametrize(
    ("site", "role"),
    [("heads", "attn_out"), ("attn", "attn_out"), ("neurons", "ffn_out"), ("ffn", "ffn_out"), ("residual", "ffn_out")],
)
def test_every_site_has_its_projection(site: Any, role: str) -> None:
    assert role_of(Shift(0, site, [1.0]), post_norm=False) == role


@pytest.mark.parametrize("kind", [Scale(0, "residual", [0], 1), Shift(0, "residual", [1.0])])
def test_behind_a_norm_the_block_s_own_output_is_what_comes_last(kind: Edit) -> None:
    assert role_of(kind, post_norm=True) == "block"
    assert role_of(Shift(0, "ffn", [1.0]), post_norm=True) == "ffn_out"


def test_nothing_gives_nothing() -> None:
    assert folded() == Patch((), ())


def test_one_operation_for_each_projection_in_order() -> None:
    edits = [Scale(layer, site, [0], 1) for layer in (1, 0) for site in ("ffn", "heads", "attn", "neurons")]
    assert [(form.layer, form.role) for form in folded(*edits).operations] == [
        (0, "attn_out"),
        (0, "ffn_out"),
        (1, "attn_out"),
        (1, "ffn_out"),
    ]


def test_scale_at_the_input_and_at_the_output() -> None:
    (form,) = folded(Scale(0, "heads", [2, 1], [0.5, -1]), Scale(0, "attn", [3], [1])).operations
    assert form.s.tolist() == [1, 0, 1.5, *[1] * 21]
    assert form.a.tolist() == [1, 1, 1, 2, *[1] * 16]


def test_order_at_the_input() -> None:
    scale, shift = Scale(0, "neurons", range(28), 1.0), Shift(0, "neurons", ones(28))
    (first,), (second,) = (folded(*edits).operations for edits in ((scale, shift), (shift, scale)))
    assert set(first.t.tolist()) == {1}
    assert set(second.t.tolist()) == {2}


def test_order_at_the_output() -> None:
    scale, shift = Scale(0, "ffn", range(20), 1.0), Shift(0, "ffn", ones(20))
    (first,), (second,) = (folded(*edits).operations for edits in ((scale, shift), (shift, scale)))
    assert set(first.u.tolist()) == {1}
    assert set(second.u.tolist()) == {2}


def test_sites_fold_in_data_flow_order_whatever_the_program_s() -> None:
    edits = (
        Shift(0, "residual", ones(20)),
        Scale(0, "ffn", range(20), 1.0),
        Rank1(0, "neurons", ones(28), ones(20), 3),
    )
    for order in ((0, 1, 2), (2, 1, 0), (1, 0, 2)):
        (form,) = folded(*(edits[place] for place in order)).operations
        assert set(form.u.tolist()) == {1}  # after the scale
        ((v, k),) = form.terms
        assert set(v.tolist()) == {6}  # strength 3, then scaled by 2
        assert set(k.tolist()) == {1}


def touched(*edits: Edit, tiny: Tiny = LLAMA) -> list[Any]:
    return [(t.edit, t.layer, t.role, t.part, t.rows, t.columns) for t in folded(*edits, tiny=tiny).touches]


ATTN, FFN = (0, "attn_out"), (0, "ffn_out")
KEY, VALUE = np.eye(24)[5] + np.eye(24)[2], np.eye(20)[7]


@pytest.mark.parametrize(
    ("edits", "expected"),
    [
        ([Scale(0, "heads", [4, 2], 1)], [(0, *ATTN, "weight", None, (4, 2))]),
        ([Scale(0, "attn", [4, 2], 1)], [(0, *ATTN, "weight", (4, 2), None), (0, *ATTN, "bias", (4, 2), None)]),
        ([Scale(0, "ffn", [1], 1)], [(0, *FFN, "weight", (1,), None), (0, *FFN, "bias", (1,), None)]),
        ([Shift(0, "heads", ones(24))], [(0, *ATTN, "bias", None, None)]),
        ([Shift(0, "residual", ones(20))], [(0, *FFN, "bias", None, None)]),
        ([Rank1(0, "heads", KEY, VALUE, 1)], [(0, *ATTN, "weight", (7,), (2, 5))]),
        ([Rank1(0, "heads", ones(24), ones(20), 1)], [(0, *ATTN, "weight", None, None)]),
        (  # the constant passes through what the other edit changed
            [Scale(0, "heads", [1], 1), Shift(0, "heads", ones(24))],
            [(0, *ATTN, "weight", None, (1,)), (0, *ATTN, "bias", None, None), (1, *ATTN, "bias", None, None)],
        ),
    ],
)
def test_what_edits_touch(edits: list[Edit], expected: list[Any]) -> None:
    assert touched(*edits) == expected


def test_a_row_scale_touches_no_bias_where_there_is_none() -> None:
    assert touched(Scale(0, "attn", [1], 1), tiny=NONE) == [(0, *ATTN, "weight", (1,), None)]


def test_touches_bear_the_edit_s_number_in_the_program() -> None:
    assert [entry[0] for entry in touched(Shift(1, "ffn", ones(20)), Scale(0, "heads", [1], 1))] == [0, 1]


def test_experts_are_edited_at_their_output_in_their_own_width() -> None:
    (form,) = folded(Scale(0, "ffn", [1], 1), tiny=MOE).operations
    assert (len(form.a), len(form.s)) == (20, 16)
    (form,) = folded(Scale(1, "ffn", [1], 1), tiny=MOE).operations
    assert (len(form.a), len(form.s)) == (20, 28)


def alike(heads: int) -> Any:
    """A shift of the heads of qwen2 that is the same for the heads of a group: [kv heads, group, head_dim]."""
    values = np.random.default_rng(0).normal(size=(2, 1, 6))
    return np.broadcast_to(values, (2, heads // 2, 6)).reshape(-1).astype(np.float32)


def test_what_v_proj_takes_is_in_no_form_and_adds_up() -> None:
    shifts = [Shift(0, "heads", alike(4)), Shift(0, "heads", 2 * alike(4)), Scale(0, "heads", [1], 1)]
    patch = folded(*shifts, tiny=Tiny("qwen2"))
    assert not any(form.t.any() for form in patch.operations)
    assert np.allclose(patch.values[0].within("heads"), 3 * alike(4))
    assert [(t.edit, t.part, t.rows) for t in patch.touches] == [
        (0, "bias", None),
        (1, "bias", None),
        (2, "weight", None),
    ]
