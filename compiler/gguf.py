"""GGUF files: their metadata, and where the bytes of their tensors lie. Reads headers only, and trusts no count."""

import math
import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from austeer.compiler.errors import InputError
from austeer.compiler.tensors import BITS, STORAGE, to_float32

Read = TypeVar("Read")

KINDS = {0: "F32", 1: "F16", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 30: "BF16"}
"""ggml's types that hold one number a value, under the names of safetensors; all others are quantised."""

# fmt: off
QUANTISED = {
    2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K",
    14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S",
    22: "IQ2_S", 23: "IQ4_XS", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
}
# fmt: on
"""Names for messages; a type that is neither here nor above is called by its number."""

_SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))  # type of metadata → struct code
_STRING, _ARRAY = 8, 9
_VERSIONS = (2, 3)
_MAX_DIMENSIONS, _MAX_DEPTH = 4, 8


@dataclass(frozen=True)
class GgufTensor:
    """One tensor: its shape with the slowest axis first (GGUF stores the reverse), and the place of its bytes.

    `kind` is a name of `KINDS`, or of `QUANTISED`, or else `ggml type N`. `offset` counts from the start of the file.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    offset: int

    @property
    def nbytes(self) -> int:
        """The length of its bytes; InputError for a quantised tensor."""
        if self.kind not in BITS:
            raise InputError(f"tensor {self.name!r} is quantised ({self.kind}); use an f32, f16 or bf16 GGUF")
        return math.prod(self.shape) * BITS[self.kind] // 8


@dataclass(frozen=True)
class Gguf:
    """The header of a GGUF file: metadata as plain Python values, tensors in the order of the file.

    The header ends at byte `header_end`, with the table of tensors; their bytes begin at `data`.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]
    header_end: int
    data: int

    @property
    def alignment(self) -> int:
        """What the places of tensors are multiples of, in bytes from `data`."""
        return int(self.metadata.get("general.alignment", 32))

    def values(self, tensor: GgufTensor) -> NDArray[np.float32]:
        """The numbers of a tensor, in its shape; InputError unless it is F32, F16, BF16 or F64."""
        if tensor.kind not in STORAGE:
            raise InputError(f"{self.path}: tensor {tensor.name!r} is of {tensor.kind}; use an f32, f16 or bf16 GGUF")
        with self.path.open("rb") as file:
            file.seek(tensor.offset)
            return to_float32(file.read(tensor.nbytes), tensor.kind).reshape(tensor.shape)


def read_gguf(path: Path) -> Gguf:
    """The header of a little-endian GGUF file of version 2 or 3.

    Raises InputError, which names the file, for a file that is none, is cut short, or contradicts itself.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Reader(data).gguf(path)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError:  # what mmap says of an empty file
        raise InputError(f"{path}: the file is empty; download it again") from None


class _Reader:
    """A place in the bytes of a file, which only moves forward: so no count can ask for more than there is."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 0

    def gguf(self, path: Path) -> Gguf:
        if self.take(4) != b"GGUF":
            raise InputError("this is not a GGUF file: it does not begin with 'GGUF'")
        version = self.number("I")
        if version not in _VERSIONS:
            raise InputError(
                f"GGUF version {version}; known are 2 and 3, little-endian: convert it anew with llama.cpp"
            )
        tensors, entries = self.number("Q"), self.number("Q")
        metadata = self.named(entries, "metadata key", self.entry)
        infos = self.named(tensors, "tensor", self.tensor)
        end, start = self.at, self.aligned(metadata)
        found = {name: _placed(GgufTensor(name, *info), start, len(self.data)) for name, info in infos.items()}
        return Gguf(path, metadata, found, end, start)

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.at:
            raise InputError(
                f"the file is cut short, or damaged: at byte {self.at} of {len(self.data)} it promises {count} more"
            )
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, code: str) -> Any:
        return self.numbers(code, 1)[0]

    def numbers(self, code: str, count: int) -> tuple[Any, ...]:
        return struct.unpack(f"<{count}{code}", self.take(count * struct.calcsize("<" + code)))

    def string(self) -> str:
        at, text = self.at, self.take(self.number("Q"))
        try:
            return text.decode()
        except UnicodeDecodeError:
            raise InputError(f"the text at byte {at} is not UTF-8; the file is damaged") from None

    def named(self, count: int, what: str, read: Callable[[], Read]) -> dict[str, Read]:
        found: dict[str, Read] = {}
        for _ in range(count):
            name = self.string()
            if name in found:
                raise InputError(f"{what} {name!r} is there twice; the file is damaged")
            found[name] = read()
        return found

    def entry(self) -> Any:
        return self.value(self.number("I"))

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY or depth == _MAX_DEPTH:
            raise InputError(f"metadata of the unknown type {kind} before byte {self.at}; the file is damaged")
        inner, count = self.number("I"), self.number("Q")
        if inner in _SCALARS:
            return list(self.numbers(_SCALARS[inner], count))
        return [self.value(inner, depth + 1) for _ in range(count)]

    def tensor(self) -> tuple[tuple[int, ...], str, int]:
        dimensions = self.number("I")
        if dimensions > _MAX_DIMENSIONS:
            raise InputError(f"a tensor of {dimensions} dimensions before byte {self.at}; the file is damaged")
        shape, kind, offset = self.numbers("Q", dimensions), self.number("I"), self.number("Q")
        return shape[::-1], (KINDS | QUANTISED).get(kind, f"ggml type {kind}"), offset

    def aligned(self, metadata: dict[str, Any]) -> int:
        step = metadata.get("general.alignment", 32)
        if type(step) is not int or step < 1:
            raise InputError(f"general.alignment is {step!r}, not a number of bytes; the file is damaged")
        return -(-self.at // step) * step


def _placed(tensor: GgufTensor, start: int, size: int) -> GgufTensor:
    """The tensor with its offset counted from the start of the file."""
    placed = replace(tensor, offset=start + tensor.offset)
    end = placed.offset + (placed.nbytes if placed.kind in BITS else 0)
    if end > size:
        what = f"tensor {placed.name!r}, {placed.kind} of shape {list(placed.shape)}"
        raise InputError(f"{what}, would end at byte {end} of {size}; download it again")
    return placed
