"""The readable text form of a program; parse(render(program)) == program, bit for bit.

    model "stories260K" llama layers=5 residual=64 heads=64 neurons=172
    layer 0 ffn scale 3:0.5 17:-0.25
    layer 1 heads shift 0.1 0 -0.3 ...
    layer 2 neurons rank1 strength 0.5 k 1 0 ... v 0 1 ...
    layer 3 ffn gated scale 3:0.5 gate delta 8 b -0.5 w 0.1 0 ...

A gate may go on with `constant NUMBERS` and with `origin` and its five values, and a gated edit with `neurons` and
its five named lists, row by row; `replaces NEURONS` stands before its gate. One edit a line, in program order; `#`
starts a comment line. Numbers are the shortest that give the float32.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, fields
from typing import Any, TypeVar

import numpy as np

from austeer.compiler.edits import Edit, Rank1, Scale, Shift
from austeer.compiler.errors import ProgramError
from austeer.compiler.facts import Geometry
from austeer.compiler.gates import Gated
from austeer.compiler.kinds import edit_from
from austeer.compiler.program import Program

Parsed = TypeVar("Parsed")

HASHES = ("when", "unless")
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
    except (ValueError, IndexError, KeyError) as error:
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
    return edit_from(_parse_fields({"layer": int(words[1]), "site": words[2]}, words[3], words[4:]), "edit")


def _parse_fields(place: dict[str, Any], kind: str, rest: list[str]) -> dict[str, Any]:
    if kind == Gated.kind:
        return _parse_gated(place, rest)
    if kind not in PARSERS:
        raise ValueError(f"unknown kind {kind!r}; known are {', '.join((*PARSERS, Gated.kind))}")
    return {"kind": kind, **place, **PARSERS[kind](rest)}


def _parse_gated(place: dict[str, Any], words: list[str]) -> dict[str, Any]:
    rest, last = _split(words, "neurons")
    rest, origin = _split(rest, "origin")
    rest, gate = _split(rest, "gate")
    inner, replaces = _split(rest, "replaces")
    numbers, neurons = _named(gate), _named(last)
    one: dict[str, Any] = {name: values[0] for name, values in numbers.items() if name in ("delta", "b")}
    if origin:
        one["origin"] = _parse_origin(origin)
    gated = {"kind": Gated.kind, **place, "edit": _parse_fields(place, inner[0], inner[1:])}
    gated["replaces"] = [int(word) for word in replaces]
    if neurons:
        count, residual = len(neurons["gate_bias"]), len(numbers["w"])
        shapes = {"gate": (count, residual), "up": (count, residual), "down": (residual, count)}
        gated["neurons"] = {name: np.reshape(row, shapes.get(name, (count,))) for name, row in neurons.items()}
    return {**gated, "gate": {**numbers, **one}}


def _split(words: list[str], name: str) -> tuple[list[str], list[str]]:
    """What stands before a word, and what after its first occurrence."""
    place = words.index(name) if name in words else len(words)
    return words[:place], words[place + 1 :]


def _parse_origin(words: list[str]) -> dict[str, Any]:
    pairs = dict(zip(words[::2], words[1::2], strict=True))
    return {name: value if name in HASHES else float(value) for name, value in pairs.items()}


def _named(words: list[str]) -> dict[str, list[float]]:
    """The lists of numbers that follow each name."""
    found: dict[str, list[float]] = {}
    name = ""
    for word in words:
        if word.isidentifier() and word not in ("nan", "inf"):
            name, found[word] = word, []
        else:
            found[name].append(float(word))
    return found


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
    if isinstance(edit, Gated):
        return _render_gated(edit)
    if isinstance(edit, Scale):
        return " ".join(f"{unit}:{_number(gamma)}" for unit, gamma in zip(edit.units, edit.gamma, strict=True))
    if isinstance(edit, Shift):
        return _numbers(edit.vector)
    assert isinstance(edit, Rank1), edit
    return f"strength {_number(edit.strength)} k {_numbers(edit.k)} v {_numbers(edit.v)}"


def _render_gated(gated: Gated) -> str:
    gate, neurons = gated.gate, gated.neurons
    words = [gated.edit.kind, _render_rest(gated.edit)]
    words += ["replaces", *map(str, gated.replaces)] if gated.replaces else []
    words += ["gate delta", _number(gate.delta), "b", _number(gate.b), "w", _numbers(gate.w)]
    words += ["constant", _numbers(gate.constant)] if len(gate.constant) else []
    if gate.origin:
        values = asdict(gate.origin).items()
        words += ["origin", *(f"{name} {_number(value) if name not in HASHES else value}" for name, value in values)]
    for part in fields(neurons) if neurons else ():
        words += ["neurons"] if part.name == "gate" else []
        words += [part.name, _numbers(getattr(neurons, part.name).flat)]
    return " ".join(words)


def _numbers(values: Iterable[float]) -> str:
    return " ".join(map(_number, values))


def _number(value: float) -> str:
    return str(np.float32(value))
