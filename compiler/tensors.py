"""Tensors in safetensors files: where their bytes lie, and what numbers those bytes are.

The headers are read here and not by the safetensors package, which does not tell byte offsets.
"""

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from austeer.compiler.errors import CheckpointError

# fmt: off
BITS = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8,
    "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}
# fmt: on
"""Bits of one value, for every dtype that safetensors knows."""

STORAGE = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "F64": "<f8"}
"""How numpy holds the dtypes that can be edited; bfloat16, which it lacks, as its bits."""

_LENGTH_BYTES = 8
_ALIGNMENT = 8  # of the data, so that engines can map it
_MAX_HEADER = 100_000_000
_FOREIGN = {
    b"version https://git-lfs": "a Git LFS pointer, not the file itself: run `git lfs pull`",
    b"PK\x03\x04": "a zip archive, as torch.save writes: pickle is not read here; save it as safetensors",
    b"\x80": "a pickle, which is never read here; save it as safetensors",
    b"GGUF": "a GGUF file; use the Hugging Face checkpoint it was made from",
    b"<": "a web page, most likely an error answer of the server: download again",
    b'{"error': "an error answer of the server: download again",
}


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a safetensors file: its type, and the absolute place of its bytes in the file."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Header:
    """What is true of a whole safetensors file; `sha256` is that of the 8 length bytes and the JSON."""

    size: int
    sha256: str
    metadata: dict[str, str]


def read_header(path: Path) -> tuple[dict[str, TensorInfo], Header]:
    """The tensors of a safetensors file, in the order of their bytes, without reading the bytes themselves.

    Raises CheckpointError, which names the file, for everything that the format forbids.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(_LENGTH_BYTES)
            length = int.from_bytes(start, "little")
            if len(start) < _LENGTH_BYTES or not 2 <= length <= min(_MAX_HEADER, size - _LENGTH_BYTES):
                raise CheckpointError(_not_a_header(start + file.read(24), size))
            header = start + file.read(length)
        entries, metadata = _parse(header[_LENGTH_BYTES:])
        tensors = [_tensor(path, name, entry, len(header)) for name, entry in entries.items()]
        digest = hashlib.sha256(header).hexdigest()
        return _covering(tensors, len(header), size), Header(size, digest, metadata)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None


def render_header(tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: dict[str, str]) -> bytes:
    """The bytes before the data of a file with these (name, dtype, shape), their data in this order without gaps."""
    entries: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    position = 0
    for name, dtype, shape in tensors:
        end = position + nbytes_of(dtype, shape)
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text


def nbytes_of(dtype: str, shape: tuple[int, ...]) -> int:
    """The size of a tensor's data."""
    return math.prod(shape) * BITS[dtype] // 8


def storage_dtype(dtype: str) -> "np.dtype[Any]":
    """The numpy dtype that holds a stored dtype bit for bit; CheckpointError unless F32, F16, BF16 or F64."""
    if dtype not in STORAGE:
        raise CheckpointError(f"values of dtype {dtype} cannot be edited, only {', '.join(STORAGE)}")
    return np.dtype(STORAGE[dtype])


def to_float32(raw: "bytes | bytearray | memoryview | NDArray[Any]", dtype: str) -> NDArray[np.float32]:
    """Stored values as new, writable float32: flat from bytes, in its own shape from an array.

    Exact, but for F64, which rounds to nearest even. The same on every machine, but for the payload of
    a NaN. Raises CheckpointError as `storage_dtype` does.
    """
    kind = storage_dtype(dtype)
    stored = raw.view(kind) if isinstance(raw, np.ndarray) else np.frombuffer(raw, kind)
    if dtype == "BF16":
        return (stored.astype(np.uint32) << 16).view(np.float32)
    with np.errstate(all="ignore"):
        return stored.astype(np.float32)


def from_float32(values: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    """Float32 values, of any shape, as stored ones (`storage_dtype`), rounded to nearest even.

    What is too large becomes infinite and a NaN stays one, as in torch; whether that is an error is the
    caller's to say. Raises CheckpointError as `storage_dtype` does.
    """
    kind = storage_dtype(dtype)
    if dtype == "BF16":
        return _bfloat16(np.ascontiguousarray(values, np.float32)).astype(kind).reshape(values.shape)
    with np.errstate(all="ignore"):
        return values.astype(kind)


def _bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint32]:
    bits = values.reshape(-1).view(np.uint32)
    # Just under half of the last kept bit, and that bit itself: this carries where nearest-even rounds up.
    rounded = bits >> np.uint32(16)
    rounded &= np.uint32(1)
    rounded += np.uint32(0x7FFF)
    rounded += bits
    rounded >>= np.uint32(16)
    nan = (bits & 0x7FFFFFFF) > 0x7F800000
    if nan.any():
        # A NaN could round to infinity: it is cut instead, and made quiet lest the cut take its last set bit.
        lost = (bits[nan] & 0xFFFF != 0).astype(np.uint32)
        rounded[nan] = bits[nan] >> 16 | lost << 6
    return rounded


def _not_a_header(start: bytes, size: int) -> str:
    for magic, what in _FOREIGN.items():
        if start.startswith(magic):
            return f"this is not a safetensors file but {what}"
    if size < _LENGTH_BYTES + 2:
        return f"the file is cut short: it has {size} bytes, too few for any safetensors file; download again"
    length = int.from_bytes(start[:_LENGTH_BYTES], "little")
    if not 2 <= length <= _MAX_HEADER:
        return f"this is not a safetensors file: its first 8 bytes give a header of {length} bytes"
    missing = length + _LENGTH_BYTES - size
    return f"the file is cut short inside its header: at least {missing} bytes are missing; download again"


def _parse(header: bytes) -> tuple[dict[str, Any], dict[str, str]]:
    # Strict from the first byte: json alone would take white space, UTF-16 and names that are no valid text.
    if not header.startswith(b"{"):
        raise CheckpointError("the header does not begin with '{'; the file is damaged, or not safetensors")
    try:
        entries: dict[str, Any] = json.loads(header.decode(), object_pairs_hook=_without_duplicates)
        for name in entries:
            name.encode()
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"the header is not JSON in UTF-8 ({error}); the file is damaged") from None
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise CheckpointError("the header's __metadata__ does not map text to text")
    return entries, cast("dict[str, str]", metadata)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        twice = next(name for name, times in Counter(name for name, _ in pairs).items() if times > 1)
        raise CheckpointError(f"the header names {twice!r} twice; loaders would disagree on which one counts")
    return entries


def _tensor(path: Path, name: str, entry: Any, data: int) -> TensorInfo:
    fields = cast("dict[str, Any]", entry) if isinstance(entry, dict) else {}
    if not fields.keys() >= {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"tensor {name!r} lacks dtype, shape or data_offsets in the header")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise CheckpointError(f"tensor {name!r} has the unknown dtype {dtype!r}")
    if not _counts(shape):
        raise CheckpointError(f"tensor {name!r} has the shape {shape!r}, not a list of whole numbers from 0")
    if not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"tensor {name!r} has the data_offsets {offsets!r}, not [begin, end]")
    begin, end = offsets
    _check_length(name, dtype, tuple(shape), end - begin)
    return TensorInfo(name, path, dtype, tuple(shape), data + begin, end - begin)


def _counts(values: Any) -> bool:
    # `type is int`: in Python a bool is an int too.
    items = cast("list[Any]", values) if isinstance(values, list) else [None]
    return all(type(item) is int and item >= 0 for item in items)


def _check_length(name: str, dtype: str, shape: tuple[int, ...], nbytes: int) -> None:
    bits = BITS[dtype]
    # Not math.prod: a long list of large numbers would grow without bound before it is found wrong.
    for length in sorted(shape):
        bits = min(bits * length, 2**70)
    if bits != 8 * nbytes:
        what = f"tensor {name!r}, {dtype} of shape {list(shape)}"
        raise CheckpointError(f"{what}, does not fill its {nbytes} bytes; the file is damaged")


def _covering(tensors: list[TensorInfo], data: int, size: int) -> dict[str, TensorInfo]:
    ordered = sorted(tensors, key=lambda tensor: (tensor.offset, tensor.nbytes))
    end = data
    for tensor in ordered:
        if tensor.offset != end:
            what = "overlaps the tensor before it" if tensor.offset < end else "leaves a gap before it"
            raise CheckpointError(f"tensor {tensor.name!r} {what}; the file is damaged")
        end += tensor.nbytes
    if size < end:
        raise CheckpointError(f"the file is cut short: {end - size} of {end} bytes missing; download again")
    if size > end:
        raise CheckpointError(f"the file has {size - end} bytes that belong to no tensor; download again")
    return {tensor.name: tensor for tensor in ordered}
