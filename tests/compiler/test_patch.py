"""The normal form of a projection: vectors meet only tensors of their space, and its algebra is that of the edits."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from austeer.compiler import SpaceError
from austeer.compiler.patch import READS, Affine, Role, Vector

ROLES: tuple[Role, ...] = ("attn_out", "ffn_out")


def ones(space: Any, width: int = 4) -> Vector:
    return Vector(space, np.ones(width, np.float32))


def square(role: Role = "attn_out") -> Affine:
    """A projection whose spaces all have four units: no shape would give a mistake away."""
    return Affine.identity(0, role, 4, 4)


def test_a_shift_of_the_heads_does_not_build_as_a_bias() -> None:
    # A published tool stores a shift of the heads as o_proj.bias, without multiplying by W_o.
    with pytest.raises(SpaceError, match="a vector of the heads space cannot be used in the residual space"):
        square().shift_output(ones("heads"))


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("space", ["heads", "neurons", "residual"])
def test_vectors_meet_only_their_own_space(role: Role, space: Any) -> None:
    form, reads = square(role), READS[role]
    if space == reads:
        assert form.shift_input(ones(space)).t.tolist() == [1] * 4
        assert len(form.add_rank1(ones("residual"), ones(space)).terms) == 1
    else:
        with pytest.raises(SpaceError):
            form.shift_input(ones(space))
        with pytest.raises(SpaceError):
            form.add_rank1(ones("residual"), ones(space))
    if space == "residual":
        assert form.shift_output(ones(space)).u.tolist() == [1] * 4
    else:
        with pytest.raises(SpaceError):
            form.shift_output(ones(space))
        with pytest.raises(SpaceError):
            form.add_rank1(ones(space), ones(reads))


def test_what_each_projection_reads() -> None:
    assert dict(READS) == {"attn_out": "heads", "ffn_out": "neurons"}


def test_forms_are_not_changed_in_place() -> None:
    form = square()
    form.scale_input((1,), np.float32([3])).shift_output(ones("residual")).scale_output((0,), np.float32([2]))
    assert form.a.tolist() == form.s.tolist() == [1] * 4
    assert form.t.tolist() == form.u.tolist() == [0] * 4


@pytest.mark.parametrize(
    ("form", "changes", "adds"),
    [
        (square(), False, False),
        (square().scale_input((1,), np.float32([2])), False, False),
        (square().add_rank1(ones("residual"), ones("heads")), False, False),
        (square().scale_output((1,), np.float32([2])), True, False),
        (square().shift_output(ones("residual")), True, True),
        (square().shift_input(ones("heads")), True, True),
        (square().shift_input(Vector("heads", np.zeros(4, np.float32))), False, False),
        (square().shift_input(ones("heads")).scale_input((0, 1, 2, 3), np.zeros(4, np.float32)), False, False),
    ],
)
def test_which_forms_need_a_bias(form: Affine, changes: bool, adds: bool) -> None:
    assert (form.changes_bias, form.adds_bias) == (changes, adds)


SMALL = st.integers(-3, 3)
INPUTS, OUTPUTS = 3, 4
STEPS = st.one_of(
    st.tuples(st.just("scale_input"), st.lists(SMALL, min_size=INPUTS, max_size=INPUTS)),
    st.tuples(st.just("shift_input"), st.lists(SMALL, min_size=INPUTS, max_size=INPUTS)),
    st.tuples(st.just("scale_output"), st.lists(SMALL, min_size=OUTPUTS, max_size=OUTPUTS)),
    st.tuples(st.just("shift_output"), st.lists(SMALL, min_size=OUTPUTS, max_size=OUTPUTS)),
    st.tuples(st.just("rank1"), st.lists(SMALL, min_size=INPUTS + OUTPUTS, max_size=INPUTS + OUTPUTS)),
)


@settings(derandomize=True, max_examples=150, deadline=None, database=None)
@given(steps=st.lists(STEPS, max_size=7), seed=st.integers(0, 99))
def test_a_form_says_what_its_edits_say_one_after_the_other(steps: list[Any], seed: int) -> None:
    # Small whole numbers: float32 computes them exactly, so both sides must agree to the bit.
    rng = np.random.default_rng(seed)
    weight, bias, x = (rng.integers(-3, 4, size).astype(np.float64) for size in ((OUTPUTS, INPUTS), OUTPUTS, INPUTS))
    steps = sorted(steps, key=lambda step: "output" in step[0])  # in data-flow order, as fold gives them
    form = Affine.identity(0, "attn_out", OUTPUTS, INPUTS)
    arrays = [(kind, np.array(values, np.float32)) for kind, values in steps]
    read = x
    for kind, values in arrays:
        read = read * values if kind == "scale_input" else read + values if kind == "shift_input" else read
    y = weight @ read + bias
    for kind, values in arrays:
        if kind == "scale_input":
            form = form.scale_input(tuple(range(INPUTS)), values)
        elif kind == "shift_input":
            form = form.shift_input(Vector("heads", values))
        elif kind == "rank1":
            k, v = values[:INPUTS], values[INPUTS:]
            y = y + v * (k @ read)
            form = form.add_rank1(Vector("residual", v), Vector("heads", k))
        elif kind == "scale_output":
            y = y * values
            form = form.scale_output(tuple(range(OUTPUTS)), values)
        else:
            y = y + values
            form = form.shift_output(Vector("residual", values))
    inner = form.s * x + form.t
    added = sum((v * (k @ inner) for v, k in form.terms), np.zeros(OUTPUTS))
    assert (form.a * (weight @ inner) + added + form.a * bias + form.u).tolist() == y.tolist()
