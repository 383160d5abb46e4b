"""Headers agree with the safetensors package, conversions with torch, bit for bit."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from austeer.compiler.errors import CheckpointError
from austeer.compiler.tensors import STORAGE, from_float32, read_header, storage_dtype, to_float32

TORCH = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
BITS16 = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)


def hard_float32() -> np.ndarray:
    """Every exponent, all ties of both 16-bit types and their neighbours, and the specials; both signs."""
    rng = np.random.default_rng(0)
    anything = rng.integers(0, 1 << 32, 200_000, dtype=np.uint32)
    bfloat16_ties = (np.arange(1 << 16, dtype=np.uint32) << 16) | 0x8000
    every_half = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
    finite = np.sort(every_half[np.isfinite(every_half)])
    half_ties = ((finite[1:].astype(np.float64) + finite[:-1]) / 2).astype(np.float32).view(np.uint32)
    ties = np.concatenate([bfloat16_ties, half_ties])
    specials = np.array([0, 1, 0x7FFFFF, 0x800000, 0x7F7FFFFF, 0x7F800000, 0x7F800001, 0x7FC00000], np.uint32)
    bits = np.concatenate([anything, ties, ties + 1, ties - 1, specials, specials | 0x80000000, ~specials])
    return bits.view(np.float32)


def same_numbers(ours: np.ndarray, theirs: np.ndarray) -> bool:
    """Bits are equal, signs of zeros included, but for the payloads of NaNs."""
    assert ours.dtype == theirs.dtype
    both_nan = np.isnan(ours) & np.isnan(theirs)
    return bool(np.all((ours.view(f"u{ours.itemsize}") == theirs.view(f"u{ours.itemsize}")) | both_nan))


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_every_16_bit_pattern_reads_as_in_torch(dtype):
    expected = BITS16.view(TORCH[dtype]).to(torch.float32).numpy()
    values = to_float32(BITS16.numpy().tobytes(), dtype)
    assert np.isnan(values).sum() > 0
    assert same_numbers(values, expected)


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_every_16_bit_number_survives_the_round_trip(dtype):
    bits = BITS16.numpy().view(np.uint16)
    values = to_float32(bits.tobytes(), dtype)
    back = from_float32(values, dtype).view(np.uint16)
    assert np.array_equal(back[~np.isnan(values)], bits[~np.isnan(values)])
    if dtype == "BF16":
        assert np.array_equal(back, bits)  # bit operations keep even a NaN's payload


@pytest.mark.parametrize("dtype", list(STORAGE))
def test_float32_is_stored_as_torch_stores_it(dtype):
    values = hard_float32()
    expected = torch.from_numpy(values.copy()).to(TORCH[dtype])
    stored = from_float32(values, dtype)
    assert stored.dtype == storage_dtype(dtype)
    assert same_numbers(to_float32(stored, dtype), expected.to(torch.float32).numpy())


def test_float64_reads_rounded_as_in_torch():
    rng = np.random.default_rng(1)
    values = rng.standard_normal(100_000) * 10.0 ** rng.integers(-50, 50, 100_000)
    expected = torch.from_numpy(values).to(torch.float32).numpy()
    assert np.isinf(expected).any()
    assert same_numbers(to_float32(values.tobytes(), "F64"), expected)


@pytest.mark.parametrize("dtype", list(STORAGE))
def test_shapes_are_kept_and_values_writable(dtype):
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    for layout in (values, values.T, values[:, 0], values[1, 1:2].reshape(())):
        stored = from_float32(layout, dtype)
        back = to_float32(stored, dtype)
        assert np.array_equal(back, layout)
        back += 1  # a view of the stored bytes would change them, or refuse
        assert np.array_equal(to_float32(stored, dtype), layout)


@pytest.mark.parametrize("dtype", ["I8", "F8_E4M3", "float32"])
def test_other_dtypes_are_an_error(dtype):
    with pytest.raises(CheckpointError, match=f"{dtype} cannot be edited"):
        to_float32(b"", dtype)


@given(st.floats(width=32, allow_nan=False))
def test_bfloat16_is_the_nearest_number(value):
    stored = to_float32(from_float32(np.array([value], np.float32), "BF16"), "BF16")[0]
    theirs = torch.tensor([value]).to(torch.bfloat16).to(torch.float32).item()
    assert stored == np.float32(theirs)


def write(path: Path) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    tensors = {
        "b.weight": torch.randn(3, 5, dtype=torch.bfloat16),
        "a.bias": torch.randn(7),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "none": torch.zeros(0, 4),
        "mask": torch.tensor([True, False]),
    }
    save_file(tensors, path, metadata={"format": "pt"})
    return tensors


def test_offsets_lead_to_the_bytes(tmp_path):
    path = tmp_path / "model.safetensors"
    tensors = write(path)
    found, header = read_header(path)
    data = path.read_bytes()
    assert found.keys() == tensors.keys()
    assert header.metadata == {"format": "pt"}
    for name, tensor in tensors.items():
        info = found[name]
        raw = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        assert (info.name, info.file, info.shape) == (name, path, tuple(tensor.shape))
        assert data[info.offset : info.offset + info.nbytes] == raw


def test_dtypes_are_named_as_safetensors_names_them(tmp_path):
    write(tmp_path / "m.safetensors")
    found, _ = read_header(tmp_path / "m.safetensors")
    with safe_open(tmp_path / "m.safetensors", framework="pt") as theirs:
        assert {name: info.dtype for name, info in found.items()} == {
            name: theirs.get_slice(name).get_dtype()
            for name in theirs.keys()  # noqa: SIM118
        }


def test_header_digest_and_size(tmp_path):
    path = tmp_path / "m.safetensors"
    write(path)
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    _, header = read_header(path)
    assert header.sha256 == hashlib.sha256(data[:end]).hexdigest()
    assert header.size == len(data)
    changed = data[:end] + bytes(len(data) - end)
    path.write_bytes(changed)
    assert read_header(path)[1] == header  # the digest is of the header alone
