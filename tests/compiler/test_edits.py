"""Edits are private, finite, immutable values; whatever cannot be one is a ProgramError that says where."""

from dataclasses import FrozenInstanceError
from typing import Any

import numpy as np
import pytest
import torch

from austeer.compiler import Edit, ProgramError, Rank1, Scale, Shift
from austeer.compiler.edits import as_index, as_vector
from austeer.compiler.kinds import edit_from

VALUES = [0.1, -2.0, 3.5]


@pytest.mark.parametrize(
    "given",
    [
        VALUES,
        tuple(VALUES),
        np.array(VALUES),
        np.array(VALUES, np.float32),
        torch.tensor(VALUES),
        torch.tensor(VALUES, dtype=torch.float64),
        torch.tensor(VALUES, requires_grad=True),
    ],
    ids=["list", "tuple", "float64", "float32", "torch", "torch64", "grad"],
)
def test_vectors_come_in_many_forms_and_are_kept_as_float32(given: Any) -> None:
    vector = Shift(0, "ffn", given).vector
    assert vector.dtype == np.float32
    assert vector.tolist() == np.float32(VALUES).tolist()


def test_bfloat16_tensors_are_taken() -> None:
    assert Shift(0, "ffn", torch.tensor([0.5, 2], dtype=torch.bfloat16)).vector.tolist() == [0.5, 2]


@pytest.mark.parametrize("make", [np.array, torch.tensor])
def test_vectors_are_private_copies(make: Any) -> None:
    mine = make(VALUES)
    edit = Shift(0, "ffn", mine)
    mine[0] = 9
    assert edit.vector[0] == np.float32(0.1)


def test_vectors_and_fields_cannot_be_changed() -> None:
    edit = Scale(0, "ffn", [1], [0.5])
    with pytest.raises(ValueError, match="read-only"):
        edit.gamma[0] = 1
    with pytest.raises(FrozenInstanceError):
        edit.layer = 2  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ([1, float("nan")], "nan or infinity"),
        ([float("inf")], "nan or infinity"),
        ([1e39], "nan or infinity"),
        (np.array([1e39]), "nan or infinity"),
        (torch.tensor([1e39], dtype=torch.float64), "nan or infinity"),
        ([[1.0, 2.0]], "one dimension"),
        (3.0, "one dimension"),
        ([[1.0], [2.0, 3.0]], "not a vector of numbers"),
        (["a"], "not a vector of numbers"),
        ([None], "nan or infinity"),
        ({"a": 1}, "not a vector of numbers"),
        ([1j], "not a vector of numbers"),
        (np.array([1j]), "not a vector of numbers"),
    ],
)
def test_what_is_no_finite_vector_is_refused(values: Any, reason: str) -> None:
    with pytest.raises(ProgramError, match=f"shift at layer 3, site ffn: vector: .*{reason}"):
        Shift(3, "ffn", values)
    with pytest.raises(ProgramError, match=reason):
        as_vector(values, "x")


@pytest.mark.parametrize("value", [-1, 1.0, 1.5, True, "1", None, [1], np.float32(1)])
def test_what_is_no_index_is_refused(value: Any) -> None:
    with pytest.raises(ProgramError, match="expected a whole number from 0"):
        as_index(value, "x")
    with pytest.raises(ProgramError, match="layer"):
        Shift(value, "ffn", [1.0])
    with pytest.raises(ProgramError, match="unit"):
        Scale(0, "ffn", [value], [1.0])


def test_numpy_integers_become_plain_ones() -> None:
    edit = Scale(np.int64(2), "ffn", np.array([3, 1]), [1, 2])
    assert (type(edit.layer), edit.units, type(edit.units[0])) == (int, (3, 1), int)


@pytest.mark.parametrize("gamma", [0.5, np.float32(0.5), np.float64(0.5)])
def test_one_gamma_means_the_same_for_all_units(gamma: Any) -> None:
    assert Scale(0, "ffn", [1, 4, 2], gamma) == Scale(0, "ffn", [1, 4, 2], [0.5, 0.5, 0.5])


@pytest.mark.parametrize(
    ("units", "gamma", "reason"),
    [
        ([1, 2], [0.5], "2 units but 1 values of gamma"),
        ([1], [0.5, 0.6], "1 units but 2 values"),
        ([1, 2, 1], [1, 2, 3], "a unit is listed twice"),
        (3, 0.5, "units must be a list"),
        (None, [], "units must be a list"),
    ],
)
def test_scale_refuses_lists_that_do_not_fit(units: Any, gamma: Any, reason: str) -> None:
    with pytest.raises(ProgramError, match=f"scale at layer 0, site attn.*{reason}"):
        Scale(0, "attn", units, gamma)


@pytest.mark.parametrize("site", ["attention", "layer", "", None, "FFN"])
def test_only_the_five_words_are_sites(site: Any) -> None:
    with pytest.raises(ProgramError, match="is not one of heads, attn, neurons, ffn, residual"):
        Shift(0, site, [1.0])


@pytest.mark.parametrize("site", ["attn", "ffn", "residual"])
def test_rank1_has_only_the_sites_that_a_projection_reads(site: Any) -> None:
    with pytest.raises(ProgramError, match="is not one of heads, neurons"):
        Rank1(0, site, [1.0], [1.0], 1.0)


@pytest.mark.parametrize("strength", [float("nan"), float("inf"), 1e39, None, "x", [1.0]])
def test_the_strength_is_one_finite_number(strength: Any) -> None:
    with pytest.raises(ProgramError, match="rank1 at layer 0, site heads: strength"):
        Rank1(0, "heads", [1.0], [1.0], strength)


def test_the_strength_is_rounded_to_float32() -> None:
    assert Rank1(0, "heads", [1], [1], 0.1).strength == float(np.float32(0.1))


EDITS = [
    Scale(1, "ffn", [3, 1], [0.5, -0.25]),
    Shift(0, "residual", VALUES),
    Rank1(2, "neurons", VALUES, [1.0, 2.0], 0.1),
]


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.kind)
def test_plain_values_and_back(edit: Edit) -> None:
    again = edit_from(edit.plain(), "x")
    assert again == edit
    assert hash(again) == hash(edit)
    assert type(again) is type(edit)


def test_plain_values_are_what_inspect_promises() -> None:
    assert EDITS[0].plain() == {"kind": "scale", "layer": 1, "site": "ffn", "units": (3, 1), "gamma": [0.5, -0.25]}
    assert list(EDITS[2].plain()) == ["kind", "layer", "site", "strength", "k", "v"]
    assert EDITS[1].plain()["vector"] == np.float32(VALUES).tolist()


@pytest.mark.parametrize(
    "change", [{"layer": 2}, {"site": "attn"}, {"units": (1, 3)}, {"gamma": [0.5, 0.25]}], ids=lambda c: next(iter(c))
)
def test_edits_differ_in_any_field(change: dict[str, Any]) -> None:
    assert edit_from({**EDITS[0].plain(), **change}, "x") != EDITS[0]
    assert EDITS[0] != EDITS[1]
    assert EDITS[0] != "scale"


@pytest.mark.parametrize(
    ("plain", "reason"),
    [
        ({"kind": "gate"}, "edit 4: unknown kind 'gate'; this version knows scale, shift, rank1, gated"),
        ({}, "edit 4: unknown kind None"),
        ({"kind": ["scale"]}, "unknown kind"),
        ({"kind": "shift", "layer": 0, "site": "ffn"}, "a shift has the fields layer, site, vector; got layer, site"),
        ({"kind": "shift", "layer": 0, "site": "ffn", "vector": [1], "gamma": [1]}, "got layer, site, vector, gamma"),
    ],
)
def test_what_is_no_edit_is_refused(plain: dict[str, Any], reason: str) -> None:
    with pytest.raises(ProgramError, match=reason):
        edit_from(plain, "edit 4")
