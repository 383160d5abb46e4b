"""Gates on real data: steering that acts in what a story tells, and leaves alone what its people say.

The two kinds of text: `when` are prompts for an emotion without any quotation mark, `unless` is direct speech of at
least 25 characters, with its marks, from stories whose marks come in twos. Emotions are tested on prompts, and drift on
speech, of stories that nothing was fitted to (the test rows of the prompts are from the first half of the stories).
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from austeer.compiler import Edit, Gated, Program, Scale
from austeer.compiler.gate_check import Side, SideCheck, check_gates
from austeer.compiler.live import load_model, load_tokenizer
from austeer.compiler.measure import effects
from austeer.compiler.pairs import Pair
from austeer.compiler.tokens import encode_pairs, encode_texts
from austeer.compiler.verbs.build import build
from austeer.compiler.verbs.common import Settings
from austeer.compiler.verbs.steer import steer
from tests.shared import shared

pytestmark = pytest.mark.slow
CPU = Settings(device="cpu", dtype="float32")
TRIALS = 12
KEYS = ("prompt", "positive", "negative")


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in shared(f"data/{name}.jsonl").read_text("utf-8").splitlines()]


def told(split: str) -> list[dict[str, str]]:
    """Prompts that only tell."""
    found = [row for row in rows("tinystories_emotion") if row["split"] == split and '"' not in row["prompt"]]
    return [{key: row[key] for key in KEYS} for row in found]


def spoken(stories: Sequence[dict[str, Any]]) -> list[str]:
    """What is said in stories."""
    texts = [story["text"].replace("\n", " ") for story in stories if story["text"].count('"') % 2 == 0]
    return [speech for text in texts for speech in re.findall(r'"[^"]*"', text) if len(speech) >= 25]


def write(path: Path, entries: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries), "utf-8")
    return path


@dataclass(frozen=True)
class Compared:
    """The compiled models on held-out texts of both sides: with gates, and without them at the same effect."""

    gated: dict[str, SideCheck]
    ungated: dict[str, SideCheck]


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Compared:
    base, folder = shared("models/stories260K"), tmp_path_factory.mktemp("selectivity")
    stories = rows("tinystories_text")
    pairs = write(folder / "told.jsonl", told("train"))
    unless = write(folder / "spoken.jsonl", [{"text": text} for text in spoken(stories[100:])])
    sides = held_out(base, stories[:100])
    found = {
        "gated": steer(
            str(base), pairs, folder / "found-gated", program_only=True, adaptive=True, when=pairs, unless=unless,
            trials=TRIALS, settings=CPU,
        ),
        "ungated": steer(str(base), pairs, folder / "found", program_only=True, trials=TRIALS, settings=CPU),
    }  # fmt: skip
    assert any("nothing is edited in layers that do not tell the texts apart: 0 (0." in n for n in found["gated"].notes)
    programs = equal_in_effect(base, {name: steering.program for name, steering in found.items()}, sides["when"])
    checks: dict[str, dict[str, SideCheck]] = {}
    for name, program in programs.items():
        program.save(folder / f"{name}.safetensors")
        build(str(base), [folder / f"{name}.safetensors"], folder / name, approximate=name == "gated")
        checks[name] = check(base, program, sides, folder / name)
    return Compared(checks["gated"], checks["ungated"])


def held_out(base: Path, stories: Sequence[dict[str, Any]]) -> dict[str, Side]:
    tokenizer = load_tokenizer(base)
    pairs = encode_pairs(tokenizer, [Pair(**row) for row in told("test")], 256).pairs
    texts, _ = encode_texts(tokenizer, spoken(stories), 256)
    return {"when": Side(tuple(pair.prefix + pair.positive for pair in pairs), pairs), "unless": Side(texts)}


def check(base: Path, program: Program, sides: dict[str, Side], out: Path) -> dict[str, SideCheck]:
    settings: dict[str, Any] = {"dtype": "float32", "device": "cpu"}
    return check_gates(base, program, sides, lambda: load_model(out, **settings), **settings, batch_tokens=4096)


def equal_in_effect(base: Path, programs: dict[str, Program], side: Side) -> dict[str, Program]:
    """Both programs, the stronger one weakened to the margin of the other."""
    model = load_model(base, dtype="float32", device="cpu")

    def margin(program: Program) -> float:
        return effects(model, side.pairs, [program], 4096)[0].margin

    weak, strong = sorted(programs, key=lambda name: margin(programs[name]))
    low, high, wanted = 0.0, 1.0, margin(programs[weak])
    for _ in range(10):
        middle = (low + high) / 2
        low, high = (middle, high) if margin(weakened(programs[strong], middle)) < wanted else (low, middle)
    return {weak: programs[weak], strong: weakened(programs[strong], high)}


def weakened(program: Program, factor: float) -> Program:
    """What each edit adds, times a factor."""
    return replace(program, edits=tuple(_weakened(edit, factor) for edit in program.edits))


def _weakened(edit: Edit, factor: float) -> Edit:
    if isinstance(edit, Gated):
        assert edit.neurons is not None
        neurons = replace(edit.neurons, down=factor * edit.neurons.down)
        return replace(edit, edit=_weakened(edit.edit, factor), neurons=neurons)
    assert isinstance(edit, Scale)
    return replace(edit, gamma=factor * edit.gamma)


def test_the_drift_where_nothing_should_happen_falls_to_a_quarter(compared: Compared) -> None:
    gated, ungated = compared.gated, compared.ungated
    for side in (gated, ungated):
        effect, before = side["when"].effect, side["when"].base_effect
        assert effect is not None
        assert before is not None
        assert effect.margin > before.margin + 0.3
    assert gated["when"].effect is not None
    assert ungated["when"].effect is not None
    # Equal with hooks; in weights the gated edits are approximate.
    assert ungated["when"].effect.margin == pytest.approx(gated["when"].effect.margin, abs=0.05)
    assert gated["unless"].mean_kl <= ungated["unless"].mean_kl / 4
    assert gated["when"].mean_kl > 4 * gated["unless"].mean_kl
