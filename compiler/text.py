"""The readable text form of a program; parse(render(program)) == program, bit for bit.

    model "stories260K" llama layers=5 residual=64 heads=64 neurons=172
    layer 0 ffn scale 3:0.5 17:-0.25
    layer 1 heads shift 0.1 0 -0.3 ...
    layer 2 neurons rank1 strength 0.5 k 1 0 ... v 0 1 ...

One edit a line, in program order; `#` starts a comment line. Numbers are the shortest that give the float32.
"""

import json
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import numpy as np

from austeer.compiler.edits import Edit, Rank1, Scale, Shift, edit_from
from austeer.compiler.errors import ProgramError
from austeer.compiler.facts import Geometry
from austeer.compiler.program import Program

Parsed = TypeVar("Parsed")

SIZES = ("layers", "residual", "heads", "neurons")


def is_text(data: bytes) -> bool:
    """Whether the bytes of a program file are its text form, and not safetensors, which starts with a length."""
    if int.from_bytes(data[:8], "little") <= len(data) and len(data) > 8:  # eight characters make a huge number
        return False
    return data.lstrip()[:5] in (b"model", b"") or data.lstrip()[:1] == b"#"


def render(program: Program) -> str:
    """The text form of a program; its provenance is a comment, which `parse` passes over."""
    model = program.model
    sizes = " ".join(f"{size}={getattr(model, size)}" for size in SIZES)
    head = f"model {json.dumps(model.name)} {model.architecture} {sizes}"
    source = [f"# from {program.provenance}"] if program.provenance else []
    return "\n".join([*source, head, *map(_render_edit, program.edits)]) + "\n"


def parse(text: str) -> Program:
    """The program of a text form; ProgramError names the line that cannot be read."""
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1)]
    lines = [(number, line) for number, line in lines if line and not line.startswith("#")]
    if not lines:
        raise ProgramError("an empty text; a program starts with a model line")
    model = _at(*lines[0], _parse_model)
    return Program(model, tuple(_at(number, line, _parse_edit) for number, line in lines[1:]))


def _at(number: int, line: str, parser: Callable[[str], Parsed]) -> Parsed:
    try:
        return parser(line)
    except (ValueError, IndexError) as error:
        raise ProgramError(f"line {number}: cannot be read ({error}): {line[:80]!r}") from None
    except ProgramError as error:
        raise type(error)(f"line {number}: {error}") from None


def _parse_model(line: str) -> Geometry:
    word, rest = line.split(maxsplit=1)
    if word != "model":
        raise ValueError('expected: model "NAME" ARCHITECTURE layers=... residual=... heads=... neurons=...')
    name, end = json.JSONDecoder().raw_decode(rest)
    architecture, *sizes = rest[end:].split()
    fields = {key: int(value) for key, value in (size.split("=") for size in sizes)}
    return Geometry.from_plain({"name": name, "architecture": architecture, **fields})


def _parse_edit(line: str) -> Edit:
    words = line.split()
    if words[0] != "layer":
        raise ValueError("expected: layer NUMBER SITE KIND ...")
    layer, site, kind, rest = int(words[1]), words[2], words[3], words[4:]
    if kind not in PARSERS:
        raise ValueError(f"unknown kind {kind!r}; known are {', '.join(PARSERS)}")
    return edit_from({"kind": kind, "layer": layer, "site": site, **PARSERS[kind](rest)}, "edit")


def _parse_scale(words: list[str]) -> dict[str, Any]:
    pairs = [word.split(":") for word in words]
    return {"units": [int(unit) for unit, _ in pairs], "gamma": [float(gamma) for _, gamma in pairs]}


def _parse_rank1(words: list[str]) -> dict[str, Any]:
    k, v = words.index("k"), words.index("v")
    if words[0] != "strength" or k != 2 or v < k:
        raise ValueError("expected: rank1 strength NUMBER k NUMBERS v NUMBERS")
    return {
        "strength": float(words[1]),
        "k": [float(word) for word in words[k + 1 : v]],
        "v": [float(word) for word in words[v + 1 :]],
    }


def _parse_shift(words: list[str]) -> dict[str, Any]:
    return {"vector": [float(word) for word in words]}


PARSERS = {"scale": _parse_scale, "shift": _parse_shift, "rank1": _parse_rank1}


def _render_edit(edit: Edit) -> str:
    return f"layer {edit.layer} {edit.site} {edit.kind} {_render_rest(edit)}"


def _render_rest(edit: Edit) -> str:
    if isinstance(edit, Scale):
        return " ".join(f"{unit}:{_number(gamma)}" for unit, gamma in zip(edit.units, edit.gamma, strict=True))
    if isinstance(edit, Shift):
        return _numbers(edit.vector)
    assert isinstance(edit, Rank1), edit
    return f"strength {_number(edit.strength)} k {_numbers(edit.k)} v {_numbers(edit.v)}"


def _numbers(values: Iterable[float]) -> str:
    return " ".join(map(_number, values))


def _number(value: float) -> str:
    return str(np.float32(value))
