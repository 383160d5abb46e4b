"""The model card: what was edited is said, and the base's licence goes along."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from austeer.compiler import Edit, Fitted, Gate, Gated, Program, Rank1, Scale, Shift
from austeer.compiler.card import describe, read_card, render_card
from tests.compiler.test_certificate import CERTIFICATE
from tests.compiler.test_program import EDITS, MODEL, PROGRAM

GATED = Gated(Shift(0, "ffn", [3, 0, 4]), Gate([12, 0, 5], 0.5, 8.0))
NEURONS = Fitted(np.ones((2, 3)), [1, 2], np.ones((2, 3)), [1, 2], np.ones((3, 2)))


def card(
    program: Program = PROGRAM, base_card: dict[str, Any] | None = None, certificate: Any = None
) -> tuple[Any, str]:
    """(metadata, text) of a card."""
    text = render_card(program, "org/base", base_card or {}, certificate).decode()
    _, front, body = text.split("---\n", 2)
    return yaml.safe_load(front), body


def test_metadata() -> None:
    front, _ = card()
    assert front == {
        "base_model": "org/base",
        "library_name": "transformers",
        "tags": ["austeer-compile", "activation-steering", "edited-weights"],
    }


def test_licence_and_language_are_inherited_and_nothing_else() -> None:
    base = {
        "license": "other",
        "license_name": "llama3",
        "license_link": "LICENSE",
        "language": ["en", "de"],
        "pipeline_tag": "text-generation",
        "tags": ["chat"],
        "model-index": [1],
    }
    front, body = card(base_card=base)
    assert {key: front[key] for key in base if key in front} == {
        **{key: base[key] for key in base if key not in ("tags", "model-index")},
        "tags": ["austeer-compile", "activation-steering", "edited-weights"],
    }
    assert "Licence, from the base's card: llama3." in body


@pytest.mark.parametrize(
    ("base", "text"), [({"license": "mit"}, "card: mit."), ({}, "states no licence; ask its authors")]
)
def test_the_licence_is_stated(base: dict[str, Any], text: str) -> None:
    assert text in card(base_card=base)[1]


def test_every_edit_is_listed() -> None:
    _, body = card()
    assert body.startswith("\n# org/base, steered\n")
    assert "This is `org/base` **with edited weights**" in body
    assert f"Program `{PROGRAM.sha256}`, 3 edits." in body
    assert "| 1 | ffn | scale | 2 units (2: x1.5, 0: x0.75) |" in body
    assert r"| 0 | heads | shift | \|vector\| = 5.477 |" in body
    assert r"| 0 | neurons | rank1 | strength 0.5, \|k\| = 2.236, \|v\| = 2.236 |" in body
    rows = [line for line in body.splitlines() if line.startswith(("| 0", "| 1"))]
    assert all(line.replace(r"\|", "").count("|") == 5 for line in rows)


def test_of_many_edits_the_first_are_listed_and_the_rest_counted() -> None:
    many = Program(MODEL, tuple(Shift(0, "ffn", [number, 0, 0]) for number in range(60)))
    _, body = card(many)
    assert "60 edits" in body
    assert body.count("| 0 | ffn | shift |") == 50
    assert "| … | | | 10 more in `austeer.json` |" in body


@pytest.mark.parametrize(
    ("edit", "text"),
    [
        (
            Scale(0, "ffn", range(10), 1.0),
            "10 units (0: x2, 1: x2, 2: x2, 3: x2, 4: x2, 5: x2, 6: x2, 7: x2, … 2 more)",
        ),
        (Scale(0, "ffn", [], []), "0 units ()"),
        (Shift(0, "ffn", [3e38] * 4), "|vector| = 6e+38"),
        (EDITS[2], "strength 0.5, |k| = 2.236, |v| = 2.236"),
        (Rank1(0, "heads", [0], [0], -1e-9), "strength -1e-09, |k| = 0, |v| = 0"),
        (GATED, "shift of |vector| = 5; gate |w| = 13, b 0.5, delta 8"),
        (
            Gated(Scale(0, "ffn", [2], 0.5), GATED.gate, NEURONS),
            "scale of 1 units (2: x1.5); gate |w| = 13, b 0.5, delta 8; 2 fitted neurons",
        ),
        (
            replace(GATED, replaces=(5, 3)),
            "shift of |vector| = 5; gate |w| = 13, b 0.5, delta 8; in the place of 2 neurons",
        ),
    ],
)
def test_descriptions(edit: Edit, text: str) -> None:
    assert describe(edit) == text


def test_a_gated_edit_is_a_row() -> None:
    _, body = card(Program(MODEL, (GATED,)))
    row = r"| 0 | ffn | gated | shift of \|vector\| = 5; gate \|w\| = 13, b 0.5, delta 8 |"
    assert row in body.splitlines()


def test_an_approximation_is_said_whatever_is_approximated() -> None:
    from dataclasses import replace

    body = " ".join(card(certificate=replace(CERTIFICATE, approximate=True))[1].split())
    assert "no stock block carries all of these edits exactly" in body
    assert "in `austeer.json` under `lowering`" in body


def test_the_certificate_is_shown_with_its_verdict() -> None:
    assert "Not measured at build time." in card()[1]
    body = card(certificate=CERTIFICATE)[1]
    assert "Measured in float32 on 40 tokens of 3 texts" in body
    assert "The certificate holds." in body
    assert "| 1e-09 | 0.5 |" in body
    from dataclasses import replace

    assert "does NOT hold" in card(certificate=replace(CERTIFICATE, base_mean_kl=0.0))[1]


def test_equal_inputs_give_equal_bytes() -> None:
    one, other = ({"license": "mit", "language": "en"}, {"language": "en", "license": "mit"})
    assert render_card(PROGRAM, "b", one, None) == render_card(PROGRAM, "b", other, None)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("---\nlicense: mit\n---\n# Title\n", {"license": "mit"}),
        ("---\r\nlicense: mit\r\n---\r\n", {"license": "mit"}),
        ("---\nlicense: mit\n", {"license": "mit"}),
        ("# No metadata\n---\nlicense: mit\n---\n", {}),
        ("---\n- a\n- list\n---\n", {}),
        ("---\nlicense: [\n---\n", {}),
        ("---\nlicense: !!python/object/apply:os.getcwd []\n---\n", {}),
        ("---\n---\n", {}),
        ("", {}),
    ],
)
def test_the_base_s_own_card(text: str, expected: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(text.encode())
    assert read_card(tmp_path) == expected


def test_a_base_without_a_readable_card(tmp_path: Path) -> None:
    assert read_card(tmp_path) == {}
    (tmp_path / "README.md").write_bytes(b"---\nlicense: \xff\n---\n")
    assert read_card(tmp_path) == {}
