"""Every way in which a safetensors file can lie about itself is its own error."""

import json
import struct

import pytest
from safetensors import SafetensorError, deserialize

from austeer.compiler.errors import CheckpointError
from austeer.compiler.tensors import BITS, read_header


def entry(begin=0, end=4, shape=(1,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def packed(header, data=b"\0" * 4, length=None):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


ONE = packed({"a": entry()})  # a good file: a header and four bytes

# What is wrong, the file, words of the message. The safetensors package refuses all but those in LENIENT.
LIES = {
    "empty": (b"", "cut short: it has 0 bytes"),
    "seven bytes": (b"\1" * 7, "cut short: it has 7 bytes"),
    "no header": (struct.pack("<Q", 0) + b"\0" * 8, "a header of 0 bytes"),
    "giant header": (packed({"a": entry()}, length=100_000_001), "a header of 100000001 bytes"),
    "endless header": (packed({"a": entry()}, length=2**64 - 1), f"a header of {2**64 - 1} bytes"),
    "cut in the header": (ONE[:30], f"at least {len(ONE) - 4 - 30} bytes are missing"),
    "cut in the data": (ONE[:-3], f"3 of {len(ONE)} bytes missing; download again"),
    "all data missing": (ONE[:-4], f"4 of {len(ONE)} bytes missing"),
    "bytes at the end": (packed({"a": entry()}, b"\0" * 9), "5 bytes that belong to no tensor"),
    "not an object": (packed(b"[]"), "does not begin with '{'"),
    "leading space": (packed(b' {"a":' + json.dumps(entry()).encode() + b"}"), "does not begin with '{'"),
    "byte order mark": (packed("\ufeff{}".encode()), "does not begin with '{'"),
    "UTF-16": (packed("{}".encode("utf-16-le")), "not JSON in UTF-8"),
    "not UTF-8": (packed(b'{"\xff": 1}'), "not JSON in UTF-8"),
    "broken JSON": (packed(b'{"a": '), "not JSON in UTF-8"),
    "two objects": (packed(b"{}{}"), "not JSON in UTF-8"),
    "half a surrogate": (packed(b'{"\\ud800":' + json.dumps(entry()).encode() + b"}"), "not JSON in UTF-8"),
    "deep nesting": (packed(b'{"a":' + b"[" * 200_000), "not JSON in UTF-8"),
    "endless number": (packed(b'{"a":' + b"9" * 5000 + b"}"), "not JSON in UTF-8"),
    "name twice": (
        packed(b'{"a":' + json.dumps(entry()).encode() + b',"a":' + json.dumps(entry()).encode() + b"}"),
        "names 'a' twice",
    ),
    "field twice": (
        packed(b'{"a":{"dtype":"F32","shape":[1],"shape":[1],"data_offsets":[0,4]}}'),
        "names 'shape' twice",
    ),
    "entry is a list": (packed({"a": [1]}), "'a' lacks dtype, shape or data_offsets"),
    "no dtype": (packed({"a": {"shape": [1], "data_offsets": [0, 4]}}), "'a' lacks dtype"),
    "no shape": (packed({"a": {"dtype": "F32", "data_offsets": [0, 4]}}), "'a' lacks dtype"),
    "no offsets": (packed({"a": {"dtype": "F32", "shape": [1]}}), "'a' lacks dtype"),
    "unknown dtype": (packed({"a": entry(dtype="F33")}), "unknown dtype 'F33'"),
    "dtype is a list": (packed({"a": entry(dtype=["F32"])}), "unknown dtype"),
    "negative length": (packed({"a": entry(shape=[-1])}), r"the shape \[-1\]"),
    "two negative lengths": (packed({"a": entry(shape=[-1, -1])}), r"the shape \[-1, -1\]"),
    "length is a float": (packed({"a": entry(shape=[1.0])}), r"the shape \[1.0\]"),
    "length is a bool": (packed({"a": entry(shape=[True])}), r"the shape \[True\]"),
    "shape is text": (packed({"a": {**entry(), "shape": "1"}}), "the shape '1'"),
    "one offset": (packed({"a": {**entry(), "data_offsets": [0]}}), r"the data_offsets \[0\]"),
    "three offsets": (packed({"a": {**entry(), "data_offsets": [0, 4, 4]}}), "the data_offsets"),
    "negative offset": (packed({"a": entry(-4, 0)}), "the data_offsets"),
    "offsets swapped": (packed({"a": entry(4, 0)}), "the data_offsets"),
    "offset is a float": (packed({"a": entry(0, 4.0)}), "the data_offsets"),
    "shape too small": (packed({"a": entry(0, 8)}, b"\0" * 8), "does not fill its 8 bytes"),
    "shape too large": (packed({"a": entry(shape=[2])}), "does not fill its 4 bytes"),
    "64-bit overflow": (packed({"a": entry(shape=[2**62, 4, 1])}), "does not fill its 4 bytes"),
    "overflow to right": (packed({"a": entry(shape=[2**64 + 1])}), "does not fill its 4 bytes"),
    "half a byte": (packed({"a": entry(0, 1, [1], "F4")}, b"\0"), "does not fill its 1 bytes"),
    "overlap": (packed({"a": entry(0, 8, [2]), "b": entry(4, 8)}, b"\0" * 8), "'b' overlaps"),
    "same bytes twice": (packed({"a": entry(), "b": entry()}), "'b' overlaps"),
    "gap at the start": (packed({"a": entry(4, 8)}, b"\0" * 8), "'a' leaves a gap"),
    "gap in between": (packed({"a": entry(), "b": entry(8, 12)}, b"\0" * 12), "'b' leaves a gap"),
    "metadata is a list": (packed({"__metadata__": []}, b""), "__metadata__ does not map text to text"),
    "metadata of numbers": (
        packed({"__metadata__": {"a": 1}}, b""),
        "__metadata__ does not map text to text",
    ),
    "Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    "zip of torch.save": (b"PK\x03\x04\x00\x00\x08\x08" + b"\0" * 99, "zip archive"),
    "pickle": (b"\x80\x02}q\x00(X\x01\x00\x00\x00" + b"\0" * 99, "a pickle"),
    "GGUF": (b"GGUF\x03\x00\x00\x00" + b"\0" * 99, "a GGUF file"),
    "web page": (b"<!DOCTYPE html><html></html>" + b" " * 99, "a web page"),
    "error answer": (b'{"error":"Repository not found"}' + b" " * 99, "an error answer"),
}
LENIENT = {"leading space", "name twice", "field twice"}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_named(tmp_path, lie):
    data, words = LIES[lie]
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=words) as caught:
        read_header(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("lie", sorted(LIES.keys() - LENIENT))
def test_the_safetensors_package_refuses_it_too(lie):
    with pytest.raises(SafetensorError):
        deserialize(LIES[lie][0])


GOOD = {
    "no tensors": packed({}, b""),
    "one tensor": ONE,
    "padded": packed(json.dumps({"a": entry()}).encode() + b"   "),
    "not in order": packed({"a": entry(4, 8), "b": entry(0, 4)}, b"\0" * 8),
    "empty tensors between": packed({"a": entry(), "b": entry(4, 4, [0]), "c": entry(4, 8)}, b"\0" * 8),
    "empty tensor at a full one": packed({"a": entry(), "b": entry(0, 0, [0])}),
    "empty and huge": packed({"a": entry(0, 0, [0, 2**40])}, b""),
    "scalar": packed({"a": entry(shape=[])}),
    "more fields": packed({"a": {**entry(), "note": 1}}),
    "a name of any text": packed({"ключ\n": entry()}),
}


@pytest.mark.parametrize("name", GOOD)
def test_what_the_format_allows_is_read(tmp_path, name):
    path = tmp_path / "model.safetensors"
    path.write_bytes(GOOD[name])
    found, _ = read_header(path)
    theirs = dict(deserialize(GOOD[name]))
    assert {key: list(info.shape) for key, info in found.items()} == {
        key: value["shape"] for key, value in theirs.items()
    }


@pytest.mark.parametrize("dtype", BITS)
def test_every_dtype_has_the_size_that_safetensors_gives_it(tmp_path, dtype):
    path = tmp_path / "model.safetensors"
    path.write_bytes(packed({"a": entry(0, BITS[dtype], [8], dtype)}, b"\0" * BITS[dtype]))
    assert read_header(path)[0]["a"].nbytes == BITS[dtype]
    assert len(deserialize(path.read_bytes())[0][1]["data"]) == BITS[dtype]


def test_a_missing_file_and_a_directory(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_header(tmp_path / "nothing.safetensors")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_header(tmp_path)
