"""The arithmetic of a patch against plain float64 formulas, and the bytes around what changes."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.torch import save_file

from austeer.compiler import CheckpointError, rewrite
from austeer.compiler.patch import Affine, Vector
from austeer.compiler.rewrite import Matrix, Segment, constant, product, tree_sum, whole
from austeer.compiler.tensors import TensorInfo, read_header
from tests.tiny import scratch

OUT, IN = 5, 7
DTYPES = {"F32": (torch.float32, 2**-24), "F16": (torch.float16, 2**-11), "BF16": (torch.bfloat16, 2**-8)}


def floats(rng: np.random.Generator, *shape: int) -> Any:
    return rng.normal(size=shape).astype(np.float32)


def form_of(rng: np.random.Generator, *parts: str, out: int = OUT, inputs: int = IN) -> Affine:
    """A form of the parts named: s and a touch a few units, U and V are sparse, t and u dense."""
    form = Affine.identity(0, "attn_out", out, inputs)
    if "s" in parts:
        form = form.scale_input((1, 4), floats(rng, 2))
    if "t" in parts:
        form = form.shift_input(Vector("heads", floats(rng, inputs)))
    for _ in range(2 * ("r" in parts)):
        v, k = floats(rng, out) * (rng.random(out) < 0.5), floats(rng, inputs) * (rng.random(inputs) < 0.5)
        form = form.add_rank1(Vector("residual", v), Vector("heads", k))
    if "a" in parts:
        form = form.scale_output((0, 3), floats(rng, 2))
    if "u" in parts:
        form = form.shift_output(Vector("residual", floats(rng, out)))
    return form


def matrix_of(
    weight: torch.Tensor, form: Affine, *, transposed: bool = False, bias: torch.Tensor | None = None
) -> tuple[Matrix, Any]:
    """A matrix in a file of its own, and the tensor info of the bias beside it."""
    stored = weight.T.contiguous() if transposed else weight
    path = scratch() / "m.safetensors"
    save_file({"before": torch.ones(3), "w": stored, "b": torch.zeros(len(form.a)) if bias is None else bias}, path)
    tensors, _ = read_header(path)
    shape = (stored.shape[0], stored.shape[1])
    return Matrix(tensors["w"], tensors["w"].offset, shape, transposed, form), tensors["b"]


def patched(matrix: Matrix) -> torch.Tensor:
    """The weight as [out, in] after its segments were written over its bytes."""
    info = matrix.tensor
    data = bytearray(info.file.read_bytes())
    end = 0
    for segment in matrix.segments():
        assert info.offset <= segment.offset
        assert end <= segment.offset
        end = segment.offset + len(segment.data)
        assert end <= info.offset + info.nbytes
        data[segment.offset : end] = segment.data
    stored = torch.frombuffer(data, dtype=DTYPES[info.dtype][0], offset=info.offset, count=math.prod(info.shape))
    stored = stored.reshape(info.shape)
    return stored.T if matrix.transposed else stored


def rewritten_bias(bias: TensorInfo, matrix: Matrix) -> Segment:
    return whole(bias, constant(matrix, bias))


def expected_weight(weight: torch.Tensor, form: Affine) -> Any:
    """W' = (a⊙W + U Vᵀ)⊙s in float64."""
    wide = weight.double().numpy() * form.a.astype(np.float64)[:, None]
    for v, k in form.terms:
        wide = wide + np.outer(v.astype(np.float64), k.astype(np.float64))
    return wide * form.s.astype(np.float64)


def expected_bias(weight: torch.Tensor, bias: torch.Tensor, form: Affine) -> Any:
    """b' = a⊙(b + W t) + U(Vᵀt) + u in float64."""
    t = form.t.astype(np.float64)
    found = form.a * (bias.double().numpy() + weight.double().numpy() @ t)
    for v, k in form.terms:
        found = found + v.astype(np.float64) * (k.astype(np.float64) @ t)
    return found + form.u


COMBINATIONS = ["s", "a", "r", "sa", "sr", "ar", "sar", "star", "staru", "tu"]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("parts", COMBINATIONS)
def test_weights_and_biases_follow_the_formulas(parts: str, dtype: str, transposed: bool) -> None:
    rng = np.random.default_rng(COMBINATIONS.index(parts))
    kind, unit = DTYPES[dtype]
    weight, bias = torch.tensor(floats(rng, OUT, IN)).to(kind), torch.tensor(floats(rng, OUT)).to(kind)
    form = form_of(rng, *parts)
    matrix, place = matrix_of(weight, form, transposed=transposed, bias=bias)
    found, expected = patched(matrix).double().numpy(), expected_weight(weight, form)
    # One rounding to the stored dtype, beside a few in float32.
    size = np.abs(weight.double().numpy()) + sum((np.abs(np.outer(v, k)) for v, k in form.terms), np.zeros((OUT, IN)))
    slack = 2**-21 * (size * np.abs(form.a)[:, None] + size) * np.maximum(1, np.abs(form.s))
    assert (np.abs(found - expected) <= unit * np.abs(expected) + slack).all()
    untouched = expected == weight.double().numpy()
    assert (patched(matrix)[torch.tensor(untouched)] == weight[torch.tensor(untouched)]).all()
    new = torch.frombuffer(bytearray(rewritten_bias(place, matrix).data), dtype=kind).double().numpy()
    wanted = expected_bias(weight, bias, form)
    assert (np.abs(new - wanted) <= unit * np.abs(wanted) + 1e-6 * (dtype == "F32") + 1e-7).all()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("parts", ["s", "a", "r", "star"])
@pytest.mark.parametrize("block", [1, 3, 8, 20])
def test_the_size_of_blocks_shows_in_no_byte(
    parts: str, block: int, transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(3)
    weight, form = torch.tensor(floats(rng, 13, 11)), form_of(rng, *parts, out=13, inputs=11)
    matrix, bias = matrix_of(weight, form, transposed=transposed)
    before, segments, old = patched(matrix), len(list(matrix.segments())), rewritten_bias(bias, matrix)
    monkeypatch.setattr(rewrite, "BLOCK", block)
    assert parts != "star" or len(list(matrix.segments())) > segments
    assert torch.equal(patched(matrix), before)
    if transposed:  # sums of blocks are added up: the block is a constant of the product, not of the machine
        now = np.frombuffer(rewritten_bias(bias, matrix).data, np.float32)
        assert np.allclose(now, np.frombuffer(old.data, np.float32), rtol=1e-6, atol=1e-7)
    else:
        assert rewritten_bias(bias, matrix).data == old.data


@pytest.mark.parametrize("transposed", [False, True])
def test_only_rows_that_change_are_rewritten(transposed: bool) -> None:
    form = Affine.identity(0, "attn_out", OUT, IN)
    form = form.scale_input((3,), np.float32([2])) if transposed else form.scale_output((3,), np.float32([2]))
    matrix, _ = matrix_of(torch.ones(OUT, IN), form, transposed=transposed)
    assert matrix.runs == [(3, 4)]
    assert matrix.nbytes == matrix.row_bytes == 4 * (OUT if transposed else IN)
    assert [len(segment.data) for segment in matrix.segments()] == [matrix.nbytes]
    assert [segment.offset for segment in matrix.segments()] == [matrix.offset + 3 * matrix.row_bytes]


@pytest.mark.parametrize("parts", COMBINATIONS)
def test_the_planned_bytes_are_those_rewritten(parts: str) -> None:
    rng = np.random.default_rng(5)
    matrix, _ = matrix_of(torch.tensor(floats(rng, OUT, IN)), form_of(rng, *parts))
    assert sum(len(segment.data) for segment in matrix.segments()) == matrix.nbytes
    assert (matrix.nbytes == 0) == (parts == "tu")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("parts", COMBINATIONS)
def test_negative_zeros_outside_of_what_changes_stay_negative(parts: str, dtype: str) -> None:
    rng = np.random.default_rng(7)
    form = form_of(rng, *parts)
    matrix, _ = matrix_of(torch.full((OUT, IN), -0.0, dtype=DTYPES[dtype][0]), form)
    bits = patched(matrix).float().numpy().view(np.uint32)
    moved = np.zeros((OUT, IN), bool)
    for v, k in form.terms:
        moved |= np.outer(v, k) != 0
    flipped = np.signbit(form.a)[:, None] ^ np.signbit(form.s)
    assert (bits[~moved & ~flipped] == 0x80000000).all()
    assert (bits[~moved & flipped] == 0).all()


def test_rounding_is_that_of_the_cast() -> None:
    form = Affine.identity(0, "attn_out", 1, 2).scale_input((0,), np.float32([1 + 2**-9]))
    (narrow,) = matrix_of(torch.tensor([[1.0, 1.0]], dtype=torch.bfloat16), form)[0].segments()
    assert narrow.rounding == pytest.approx(2**-9, rel=0.01)
    (wide,) = matrix_of(torch.tensor([[1.0, 1.0]]), form)[0].segments()
    assert wide.rounding == 0


@pytest.mark.parametrize(
    ("dtype", "value", "factor"),
    [("F16", 6e4, 2.0), ("BF16", 3e38, 2.0), ("F32", 3e38, 2.0), ("F32", math.nan, 2.0)],
)
def test_a_result_that_is_not_finite_names_its_tensor(dtype: str, value: float, factor: float) -> None:
    weight = torch.full((OUT, IN), value, dtype=DTYPES[dtype][0])
    form = Affine.identity(0, "attn_out", OUT, IN).scale_output((2,), np.float32([factor]))
    with pytest.raises(CheckpointError, match=f"w: the edited values do not fit {dtype}"):
        list(matrix_of(weight, form)[0].segments())


@pytest.mark.parametrize("where", ["t", "u"])
def test_a_bias_that_is_not_finite_names_its_tensor(where: str) -> None:
    form, huge = Affine.identity(0, "attn_out", OUT, IN), np.full(IN if where == "t" else OUT, 3e38, np.float32)
    form = form.shift_input(Vector("heads", huge)) if where == "t" else form.shift_output(Vector("residual", huge))
    matrix, bias = matrix_of(torch.ones(OUT, IN), form, bias=torch.full((OUT,), 3e38))
    with pytest.raises(CheckpointError, match="b: the edited values do not fit F32"):
        rewritten_bias(bias, matrix)


@pytest.mark.parametrize("parts", COMBINATIONS)
def test_a_constant_without_a_bias_is_that_of_a_bias_of_zeros(parts: str) -> None:
    rng = np.random.default_rng(11)
    weight, form = torch.tensor(floats(rng, OUT, IN)), form_of(rng, *parts)
    matrix, _ = matrix_of(weight, form)
    assert np.allclose(constant(matrix, None), expected_bias(weight, torch.zeros(OUT), form), rtol=1e-6, atol=1e-6)


def test_nan_in_rows_that_stay_is_not_our_affair() -> None:
    weight = torch.ones(OUT, IN)
    weight[0] = math.nan
    form = Affine.identity(0, "attn_out", OUT, IN).scale_output((2,), np.float32([3]))
    found = patched(matrix_of(weight, form)[0])
    assert found[0].isnan().all()
    assert (found[2] == 3).all()


def test_a_file_that_became_shorter_is_an_error() -> None:
    form = Affine.identity(0, "attn_out", OUT, IN).scale_output((4,), np.float32([3]))
    matrix, _ = matrix_of(torch.ones(OUT, IN), form)
    data = matrix.tensor.file.read_bytes()
    matrix.tensor.file.write_bytes(data[: matrix.offset + 8])
    with pytest.raises(CheckpointError, match="ends inside w"):
        list(matrix.segments())


@settings(derandomize=True, max_examples=60, deadline=None, database=None)
@given(
    values=hnp.arrays(np.float64, st.tuples(st.integers(0, 40), st.integers(1, 3)), elements=st.floats(-1e6, 1e6)),
    axis=st.integers(0, 1),
)
def test_tree_sum(values: Any, axis: int) -> None:
    found = tree_sum(values, axis)
    exact = [math.fsum(line) for line in np.moveaxis(values, axis, -1)]
    assert found.shape == (values.shape[1 - axis],)
    assert np.abs(found - exact).max(initial=0) <= 1e-15 * max(1, np.abs(values).sum()) * 8


def test_tree_sum_adds_in_one_fixed_order() -> None:
    # ((1e16 + 1) + (-1e16 + 1)) by halves: 1e16 + -1e16 first, then 1 + 1. From left to right it would be 1.
    assert tree_sum(np.array([1e16, 1.0, -1e16, 1.0]), 0) == 2


@pytest.mark.parametrize("transposed", [False, True])
def test_the_product_is_exact_to_float64(transposed: bool) -> None:
    rng = np.random.default_rng(1)
    weight, t = torch.tensor(floats(rng, 50, 300)), floats(rng, 300)
    form = Affine.identity(0, "attn_out", 50, 300)
    matrix, _ = matrix_of(weight, form, transposed=transposed)
    assert np.allclose(product(matrix, t), weight.double().numpy() @ t.astype(np.float64), rtol=1e-12, atol=1e-13)


def test_a_matrix_within_a_stack_of_experts(tmp_path: Path) -> None:
    save_file({"w": torch.ones(3, OUT, IN)}, tmp_path / "m.safetensors")
    info = read_header(tmp_path / "m.safetensors")[0]["w"]
    form = Affine.identity(0, "ffn_out", OUT, IN).scale_output((1,), np.float32([2]))
    second = Matrix(info, info.offset + info.nbytes // 3, (OUT, IN), False, form)
    (segment,) = second.segments()
    assert segment.offset == info.offset + 4 * (OUT * IN + IN)
    assert np.frombuffer(segment.data, np.float32).tolist() == [2] * IN
