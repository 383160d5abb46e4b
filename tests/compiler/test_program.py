"""Programs verify themselves, keep their identity, and survive the disk; damaged files are ProgramErrors."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save
from safetensors.torch import save as save_torch

from austeer.compiler import CheckpointError, Edit, Program, ProgramError, Rank1, Refused, Scale, Shift, SpaceError
from austeer.compiler.facts import Geometry
from tests.tiny import Tiny, on_disk, program, scratch

MODEL = Geometry("m", "llama", layers=2, residual=3, heads=4, neurons=6)
SCALE = Scale(1, "ffn", [2, 0], [0.5, -0.25])
EDITS = (SCALE, Shift(0, "heads", [1, 2, 3, 4]), Rank1(0, "neurons", [1, 0, 0, 0, 0, 2], [0, 1, 2], 0.5))
PROGRAM = Program(MODEL, EDITS)


# ---- verification -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("edits", "reason"),
    [
        ([Scale(2, "ffn", [0], 1)], r"edit 0 \(scale at layer 2, site ffn\): m has layers 0 to 1"),
        ([Shift(5, "ffn", [1, 2, 3])], "m has layers 0 to 1"),
        ([SCALE, Scale(0, "ffn", [3], 1)], r"edit 1 .*: unit 3 is outside the site's 3 units"),
        ([Scale(0, "heads", [4], 1)], "unit 4 is outside the site's 4 units"),
        ([Scale(0, "neurons", [6], 1)], "unit 6 is outside the site's 6 units"),
        ([Scale(0, "residual", [3], 1)], "unit 3 is outside the site's 3 units"),
        ([SCALE, Scale(1, "ffn", [0], 1)], r"edit 1 .*: unit 0 is scaled twice; merge the two"),
    ],
)
def test_edits_outside_the_model_or_against_each_other(edits: list[Edit], reason: str) -> None:
    with pytest.raises(ProgramError, match=reason):
        Program(MODEL, tuple(edits))


@pytest.mark.parametrize(
    "edit",
    [
        Shift(0, "heads", [1, 2, 3]),
        Shift(0, "attn", [1, 2, 3, 4]),
        Shift(0, "neurons", [1, 2, 3]),
        Shift(0, "residual", [1, 2]),
        Shift(0, "ffn", []),
        Rank1(0, "heads", [1, 2, 3], [1, 2, 3], 1),
        Rank1(0, "heads", [1, 2, 3, 4], [1, 2, 3, 4], 1),
        Rank1(0, "neurons", [1, 2, 3, 4], [1, 2, 3], 1),
    ],
)
def test_vectors_span_the_space_they_live_in(edit: Edit) -> None:
    with pytest.raises(SpaceError, match=r"edit 0 .*values; the (heads|neurons|residual) space of m has"):
        Program(MODEL, (edit,))


def test_one_unit_may_be_scaled_at_every_site_and_layer() -> None:
    sites = ("heads", "attn", "neurons", "ffn", "residual")
    Program(MODEL, tuple(Scale(layer, site, [0], 1) for layer in (0, 1) for site in sites))


def test_the_model_is_a_folder_or_a_geometry(tmp_path: Path) -> None:
    folder = on_disk(Tiny("llama"))
    made = Program.of([SCALE], model=folder)
    assert made == Program.of(iter([SCALE]), model=str(folder)) == Program.of([SCALE], model=made.model)
    assert made.model == Geometry(folder.name, "llama", layers=2, residual=20, heads=24, neurons=28)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        Program.of([SCALE], model=tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(Refused, match="architecture 'mamba' is not in the table"):
        Program.of([SCALE], model=tmp_path)


def test_the_name_of_a_model_does_not_decide_whether_a_program_fits() -> None:
    PROGRAM.require_fit(replace(MODEL, name="other"))
    for key in ("layers", "residual", "heads", "neurons"):
        with pytest.raises(ProgramError, match=f"made for 'm' and does not fit 'm2'.*{key} .*, not 9"):
            PROGRAM.require_fit(replace(MODEL, name="m2", **{key: 9}))
    with pytest.raises(ProgramError, match="architecture llama, not qwen2"):
        PROGRAM.require_fit(replace(MODEL, architecture="qwen2"))


def test_a_program_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        PROGRAM.edits = ()  # pyright: ignore[reportAttributeAccessIssue]


# ---- identity -----------------------------------------------------------------------------


def test_the_identity_is_the_same_for_ever() -> None:
    # It names programs in manifests and cards: it may change only together with FORMAT.
    assert PROGRAM.sha256 == "b55a43dff826b5a97167f0d183bc47011136c6300d2b93fa72282022ab7130a1"


def test_the_identity_does_not_depend_on_the_model_s_name() -> None:
    assert Program(replace(MODEL, name="other"), EDITS).sha256 == PROGRAM.sha256


@pytest.mark.parametrize(
    "other",
    [
        Program(MODEL, EDITS[:2]),
        Program(MODEL, EDITS[::-1]),
        Program(replace(MODEL, layers=3), EDITS),
        Program(replace(MODEL, architecture="qwen2"), EDITS),
        Program(MODEL, (Scale(1, "ffn", [0, 2], [-0.25, 0.5]), *EDITS[1:])),
        Program(MODEL, (Scale(1, "ffn", [2, 0], [0.5, np.nextafter(np.float32(-0.25), 0)]), *EDITS[1:])),
        Program(MODEL, (Scale(1, "attn", [2, 0], [0.5, -0.25]), *EDITS[1:])),
        Program(MODEL, (*EDITS[:2], Rank1(0, "neurons", EDITS[2].k, EDITS[2].v, 0.25))),  # pyright: ignore[reportAttributeAccessIssue]
    ],
)
def test_every_other_program_has_another_identity(other: Program) -> None:
    assert other.sha256 != PROGRAM.sha256
    assert other != PROGRAM


# ---- files --------------------------------------------------------------------------------


@settings(derandomize=True, max_examples=15, deadline=None, database=None)
@given(seed=st.integers(0, 2**31), architecture=st.sampled_from(("llama", "gpt2", "qwen3_moe")))
def test_save_and_load(seed: int, architecture: str) -> None:
    made = program(Tiny(architecture), seed=seed, share=0.3)
    path = scratch() / "p.safetensors"
    made.save(path)
    again = Program.load(path)
    assert again == made
    assert again.sha256 == made.sha256
    first = path.read_bytes()
    again.save(path)
    assert path.read_bytes() == first
    assert [entry.name for entry in path.parent.iterdir()] == ["p.safetensors"]


def test_a_program_without_edits_is_a_program(tmp_path: Path) -> None:
    empty = Program(MODEL, ())
    empty.save(tmp_path / "p")
    assert Program.load(str(tmp_path / "p")) == empty


def test_a_header_that_looks_like_text_is_read_as_safetensors(tmp_path: Path) -> None:
    # Its length, the first bytes of the file, can be any: here white space and the comment sign.
    for length in range(8960, 9000, 8):
        made = Program(replace(MODEL, name="n" * length), EDITS)
        made.save(tmp_path / "p")
        size = int.from_bytes((tmp_path / "p").read_bytes()[:8], "little")
        made = Program(replace(MODEL, name="n" * (length - size + 0x2320)), EDITS)
        made.save(tmp_path / "p")
        assert Program.load(tmp_path / "p") == made
    assert (tmp_path / "p").read_bytes()[:2] == b" #"


def body(**changes: Any) -> dict[str, Any]:
    edits = [edit.scalars() for edit in EDITS]
    return {"format": 1, "sha256": PROGRAM.sha256, "model": MODEL.plain(), "edits": edits, **changes}


def vectors(**changes: Any) -> dict[str, Any]:
    tensors = {f"{n}.{name}": getattr(edit, name) for n, edit in enumerate(EDITS) for name in edit.vectors}
    return {**tensors, **changes}


def file(content: Any, tensors: dict[str, Any] | None = None, key: str = "austeer-program") -> bytes:
    text = content if isinstance(content, str) else json.dumps(content)
    return save(vectors() if tensors is None else tensors, {key: text})


def with_edit(**fields: Any) -> dict[str, Any]:
    return body(edits=[{**EDITS[0].scalars(), **fields}, *(edit.scalars() for edit in EDITS[1:])])


def without(tensor: str) -> dict[str, Any]:
    return {name: values for name, values in vectors().items() if name != tensor}


GOOD = file(body())

DAMAGED = {
    "nothing": (b"", "an empty text"),
    "no header": (b"\0" * 8, "not a program"),
    "short": (GOOD[:-4], "not a program"),
    "cut in the header": (GOOD[:60], "not a program"),
    "longer": (GOOD + b"\0", "not a program"),
    "pickle": (b"\x80\x04\x95\0\0\0\0\0\0\0\0.", "not a program"),
    "a zip": (b"PK\x03\x04" + b"\0" * 40, "not a program"),
    "json": (b'{"edits": []}', "not a program"),
    "other weights": (save({"a": np.ones(2, np.float32)}), "not a program"),
    "another key": (file(body(), key="other"), "not a program"),
    "no json": (file("{"), "not a program"),
    "deep json": (file("[" * 100_000 + "]" * 100_000), "not a program"),
    "a list": (file([]), "not a program"),
    "a number": (file(5), "not a program"),
    "null": (file("null"), "not a program"),
    "no edits": (file({key: value for key, value in body().items() if key != "edits"}), "not a program"),
    "edits no list": (file(body(edits=5)), "not a program"),
    "edit no object": (file(body(edits=[1, 2, 3])), "edit 0 is not a JSON object"),
    "format 2": (file(body(format=2)), "program format 2; this version reads 1"),
    "no format": (file(body(format=None)), "program format None"),
    "model no object": (file(body(model=3)), "a program's model needs"),
    "model misses a size": (file(body(model={"name": "m"})), "a program's model needs"),
    "model of size 0": (file(body(model={**MODEL.plain(), "layers": 0})), "not positive whole numbers"),
    "model of size true": (file(body(model={**MODEL.plain(), "layers": True})), "not positive whole numbers"),
    "smaller model": (file(body(model={**MODEL.plain(), "layers": 1})), "layers 0 to 0"),
    "wider model": (file(body(model={**MODEL.plain(), "heads": 5})), "the heads space of m has 5"),
    "other hash": (file(body(sha256="0" * 64)), "does not have the SHA-256 it states"),
    "no hash": (file(body(sha256=None)), "does not have the SHA-256 it states"),
    "changed scalar": (file(with_edit(layer=0)), "does not have the SHA-256 it states"),
    "changed vector": (file(body(), vectors(**{"0.gamma": np.ones(2, np.float32)})), "the SHA-256 it states"),
    "one flipped bit": (GOOD[:-1] + bytes([GOOD[-1] ^ 1]), "the SHA-256 it states"),
    "edits in another order": (file(body(edits=body()["edits"][::-1])), "has the fields"),
    "unknown kind": (file(with_edit(kind="gate")), "unknown kind 'gate'"),
    "unknown field": (file(with_edit(note=1)), "a scale has the fields"),
    "unknown site": (file(with_edit(site="mlp")), "site 'mlp' is not one of"),
    "site a list": (file(with_edit(site=["ffn"])), "is not one of"),
    "layer -1": (file(with_edit(layer=-1)), "expected a whole number"),
    "layer 0.5": (file(with_edit(layer=0.5)), "expected a whole number"),
    "units no list": (file(with_edit(units=5)), "units must be a list"),
    "units text": (file(with_edit(units="20")), "expected a whole number"),
    "units null": (file(with_edit(units=None)), "units must be a list"),
    "vector missing": (file(body(), without("0.gamma")), "a scale has the fields"),
    "vector too many": (file(body(), vectors(extra=np.ones(1, np.float32))), "belong to no edit: extra"),
    "vector of no edit": (file(body(), vectors(**{"9.gamma": np.ones(1, np.float32)})), "belong to no edit: 9.gamma"),
    "vector of two dimensions": (file(body(), vectors(**{"0.gamma": np.ones((1, 2), np.float32)})), "one dimension"),
    "vector of no dimension": (file(body(), vectors(**{"0.gamma": np.ones((), np.float32)})), "one dimension"),
    "vector of nan": (file(body(), vectors(**{"0.gamma": np.full(2, np.nan, np.float32)})), "nan or infinity"),
    "vector of complex": (file(body(), vectors(**{"0.gamma": np.ones(2, np.complex64)})), "not a vector of numbers"),
    "vector of bfloat16": (
        save_torch({"0.gamma": torch.ones(2, dtype=torch.bfloat16)}, {"austeer-program": json.dumps(body())}),
        "not a program",
    ),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_files(kind: str, tmp_path: Path) -> None:
    data, reason = DAMAGED[kind]
    path = tmp_path / "p.safetensors"
    path.write_bytes(data)
    with pytest.raises(ProgramError, match=reason) as raised:
        Program.load(path)
    assert str(path) in str(raised.value)


def test_the_undamaged_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "p").write_bytes(GOOD)
    assert Program.load(tmp_path / "p") == PROGRAM


@settings(derandomize=True, max_examples=150, deadline=None, database=None)
@given(data=st.data())
def test_no_changed_byte_goes_unseen(data: Any) -> None:
    changed = bytearray(GOOD)
    place = data.draw(st.integers(0, len(GOOD) - 1))
    changed[place] ^= data.draw(st.integers(1, 255))
    path = scratch() / "p"
    path.write_bytes(changed)
    try:
        again = Program.load(path)
    except ProgramError:
        return
    # The name of the model, and white space, are no part of the identity.
    assert again.sha256 == PROGRAM.sha256
    assert replace(again, model=MODEL) == PROGRAM
    shutil.rmtree(path.parent)


@pytest.mark.parametrize("name", ["absent", "."])
def test_what_is_no_file(name: str, tmp_path: Path) -> None:
    with pytest.raises(ProgramError, match="cannot be read"):
        Program.load(tmp_path / name)
