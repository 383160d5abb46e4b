"""The reader of GGUF headers: against the gguf package, and against files that lie about themselves."""

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from austeer.compiler.errors import InputError
from austeer.compiler.gguf import read_gguf

ARRAYS = {
    "direction.1": np.arange(5, dtype=np.float32),
    "a": np.arange(6, dtype=np.float16).reshape(2, 3),
    "b": np.arange(24, dtype=np.float64).reshape(2, 3, 4),
}


@pytest.mark.parametrize("alignment", [None, 64])
def test_what_the_gguf_package_writes_is_read(alignment: int | None, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="the gguf package is not installed")
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    if alignment:
        writer.add_custom_alignment(alignment)
    fields = {
        "text": ("string", "é"), "one": ("uint8", 1), "two": ("int8", -2), "three": ("uint16", 3),
        "four": ("int16", -4), "five": ("uint32", 5), "six": ("int32", -6), "seven": ("uint64", 2**63),
        "eight": ("int64", -(2**62)), "nine": ("float32", 0.5), "ten": ("float64", 0.1), "yes": ("bool", True),
        "texts": ("array", ["a", "", "ü"]), "numbers": ("array", [1, 2, 3]), "nested": ("array", [[1], [2, 3]]),
    }  # fmt: skip
    for name, (kind, value) in fields.items():
        getattr(writer, f"add_{kind}")(name, value)
    for name, array in ARRAYS.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    found = read_gguf(tmp_path / "m.gguf")
    assert {name: found.metadata[name] for name in fields} == {name: value for name, (_, value) in fields.items()}
    assert found.metadata["general.architecture"] == "llama"
    assert list(found.tensors) == list(ARRAYS)
    for name, array in ARRAYS.items():
        tensor = found.tensors[name]
        assert tensor.shape == array.shape
        assert tensor.nbytes == array.nbytes
        assert tensor.offset % (alignment or 32) == 0
        assert (found.values(tensor) == array).all()


def test_a_quantised_tensor_is_listed_and_not_read(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(packed(tensors=[info("q", (32,), kind=8)], data=bytes(34)))
    found = read_gguf(tmp_path / "m.gguf")
    assert found.tensors["q"].kind == "Q8_0"
    with pytest.raises(InputError, match="'q' is of Q8_0"):
        found.values(found.tensors["q"])
    with pytest.raises(InputError, match="'q' is quantised"):
        _ = found.tensors["q"].nbytes


# ---- files by hand ------------------------------------------------------------------------


def text(value: str | bytes) -> bytes:
    raw = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(raw)) + raw


def entry(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def info(name: str, shape: tuple[int, ...] = (1,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


ONE = info("a")


def packed(
    metadata: tuple[bytes, ...] = (),
    tensors: Any = (ONE,),
    data: bytes = bytes(4),
    version: int = 3,
    counts: tuple[int, int] | None = None,
) -> bytes:
    counted = counts or (len(tensors), len(metadata))
    head = b"GGUF" + struct.pack("<IQQ", version, *counted) + b"".join(metadata) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + data


HUGE = 2**64 - 1
LIES = {
    "empty": (b"", "the file is empty"),
    "another file": (b"\x93NUMPY" + bytes(64), "does not begin with 'GGUF'"),
    "three bytes": (b"GGU", "cut short"),
    "first version": (packed(version=1), "GGUF version 1; known are 2 and 3"),
    "big-endian": (b"GGUF" + struct.pack(">I", 3) + bytes(64), f"GGUF version {3 << 24}"),
    "no counts": (b"GGUF\3\0\0\0", "cut short"),
    "endless tensors": (packed(counts=(HUGE, 0)), "cut short"),
    "endless metadata": (packed((entry("x", 7, b"\1"),), tensors=(), counts=(0, HUGE)), "cut short|is there twice"),
    "endless name": (packed((struct.pack("<Q", HUGE),)), f"promises {HUGE} more"),
    "endless array": (packed((entry("x", 9, struct.pack("<IQ", 4, HUGE)),)), "cut short"),
    "endless texts": (packed((entry("x", 9, struct.pack("<IQ", 8, 2**60)),)), "cut short"),
    "deep array": (packed((entry("x", 9, struct.pack("<IQ", 9, 1) * 50),)), "unknown type 9"),
    "unknown metadata": (packed((entry("x", 13, bytes(8)),)), "unknown type 13"),
    "no UTF-8": (packed((entry("x", 8, text(b"\xff")),)), "not UTF-8"),
    "key twice": (packed((entry("x", 7, b"\1"), entry("x", 7, b"\0"))), "metadata key 'x' is there twice"),
    "tensor twice": (packed(tensors=(info("a"), info("a"))), "tensor 'a' is there twice"),
    "five dimensions": (packed(tensors=(info("a", (1,) * 5),)), "a tensor of 5 dimensions"),
    "alignment of zero": (packed((entry("general.alignment", 4, bytes(4)),)), "general.alignment is 0"),
    "alignment as text": (packed((entry("general.alignment", 8, text("x")),)), "general.alignment is 'x'"),
    "huge tensor": (packed(tensors=(info("a", (2**40, 2**40)),)), "would end at byte"),
    "far offset": (packed(tensors=(info("a", offset=HUGE),)), "would end at byte"),
    "data missing": (packed(data=bytes(3)), "'a', F32 of shape .* would end at byte"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_named(lie: str, tmp_path: Path) -> None:
    data, words = LIES[lie]
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    with pytest.raises(InputError, match=words) as caught:
        read_gguf(path)
    assert str(path) in str(caught.value)


def test_a_file_by_hand_is_read(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(packed((entry("x", 7, b"\1"),), data=struct.pack("<f", 2.5), version=2))
    found = read_gguf(tmp_path / "m.gguf")
    assert found.metadata == {"x": True}
    assert found.values(found.tensors["a"]).tolist() == [2.5]


def test_every_cut_is_noticed(tmp_path: Path) -> None:
    data = packed((entry("x", 9, struct.pack("<IQ", 8, 1) + text("y")),))
    for size in range(len(data)):
        (tmp_path / "m.gguf").write_bytes(data[:size])
        with pytest.raises(InputError):
            read_gguf(tmp_path / "m.gguf")


def test_a_missing_file_and_a_directory(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing.gguf", tmp_path):
        with pytest.raises(InputError, match="cannot be read"):
            read_gguf(path)
