"""import: the verb and its command; what it records, and what it refuses without a trace."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from austeer.compiler import OutputError, Program, ProgramError, Rank1, Scale, Shift, SpaceError, UsageError
from austeer.compiler.cli import main
from austeer.compiler.text import parse, render
from austeer.compiler.verbs.importing import import_artefact
from austeer.passes.adopt.artefact import strengthened
from austeer.passes.compose import compose
from tests.tiny import Tiny, on_disk

MODEL = on_disk(Tiny("llama"))  # 2 layers, residual 20


@pytest.fixture
def artefact(tmp_path: Path) -> Path:
    path = tmp_path / "v.safetensors"
    save_file({"0": torch.ones(20), "1": torch.arange(20.0)}, path, metadata={"layer_type": "decoder_block"})
    return path


def run(*arguments: object) -> Any:
    return CliRunner().invoke(main, ["import", *map(str, arguments)])


def test_the_program_and_where_it_comes_from(artefact: Path, tmp_path: Path) -> None:
    out = tmp_path / "p.safetensors"
    report = import_artefact(artefact, str(MODEL), out, layers="1", strength=-2)
    program = Program.load(out)
    assert program == Program.of([Shift(1, "residual", -2 * np.arange(20.0))], model=MODEL)
    digest = hashlib.sha256(artefact.read_bytes()).hexdigest()
    assert program.provenance == (
        f"steering vectors by layer 'v.safetensors' (SHA-256 {digest}), layers 1, strength -2"
    )
    assert report.plain()["provenance"] == program.provenance
    assert str(tmp_path) not in program.provenance


def test_provenance_is_no_part_of_what_a_program_is(tmp_path: Path) -> None:
    edits = [Scale(0, "ffn", (1,), 0.5)]
    plain = Program.of(edits, model=MODEL)
    told = Program(plain.model, plain.edits, "somewhere")
    assert told == plain
    assert told.sha256 == plain.sha256
    told.save(tmp_path / "told")
    plain.save(tmp_path / "plain")
    assert b"provenance" not in (tmp_path / "plain").read_bytes()
    both, _ = compose([Program.load(tmp_path / "told"), Program.load(tmp_path / "plain"), told])
    assert both.provenance == "somewhere"


def test_provenance_is_one_line_and_a_comment_in_the_text_form() -> None:
    model = Program.of([], model=MODEL).model
    program = Program(model, (Scale(0, "ffn", (1,), 0.5),), "α somewhere")
    assert render(program).startswith("# from α somewhere\nmodel ")
    assert parse(render(program)) == program
    for text in ("a\nlayer 0 ffn scale 2:1", "\x1b[2J", "a\u2028b"):
        with pytest.raises(ProgramError, match="one line of printable text"):
            Program(model, (), text)


def test_the_command(artefact: Path, tmp_path: Path) -> None:
    out = tmp_path / "p.safetensors"
    result = run(artefact, "--model", MODEL, "-o", out, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["edits"] == 2
    assert report["format"] == "steering vectors by layer"
    assert report["sha256"] == Program.load(out).sha256
    shown = CliRunner().invoke(main, ["inspect", str(out)])
    assert f"from {report['provenance']}" in " ".join(shown.output.split())
    inspected = json.loads(CliRunner().invoke(main, ["inspect", str(out), "--json"]).stdout)
    assert inspected["provenance"] == report["provenance"]


def test_the_command_in_words(artefact: Path, tmp_path: Path) -> None:
    result = run(artefact, "--model", MODEL, "-o", tmp_path / "p", "--layers", "0")
    assert result.exit_code == 0, result.output
    assert "1 edit" in result.output or "shift" in result.output
    assert f"Written: {tmp_path / 'p'}" in result.output


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--top-k", "3"], 2, "--top-k mean nothing to a file of the format 'steering vectors by layer'"),
        (["--site", "heads", "--alpha", "1", "--top-k", "2"], 2, "--top-k and --alpha mean nothing"),
        (["--site", "nowhere"], 2, "unknown site 'nowhere'"),
        (["--strength", "nan"], 2, "--strength must be a finite number"),
        (["--layers", "3-1"], 2, "'3-1' is no layer and no range"),
        (["--layers", "1,,2"], 2, "'' is no layer"),
        (["--layers", "0-99999999"], 2, "no layer and no range"),
        (["--layers", "-1"], 2, "no layer and no range"),
        (["--layers", "7"], 1, "no vector for layer 7"),
        (["--site", "heads"], 1, "vector has 20 values; the heads space"),
        (["--strength", "1e38"], 1, "nan or infinity"),
    ],
)
def test_what_cannot_be_meant_leaves_no_file(
    options: list[str], code: int, words: str, artefact: Path, tmp_path: Path
) -> None:
    result = run(artefact, "--model", MODEL, "-o", tmp_path / "p", *options)
    assert result.exit_code == code, result.output
    assert words in result.output
    assert isinstance(result.exception, SystemExit)
    assert [path.name for path in tmp_path.iterdir()] == [artefact.name]


def test_errors_name_the_artefact_once(artefact: Path, tmp_path: Path) -> None:
    with pytest.raises(SpaceError) as caught:
        import_artefact(artefact, str(MODEL), tmp_path / "p", site="heads")
    assert str(caught.value).count(str(artefact)) == 1


def test_an_existing_program_stays(artefact: Path, tmp_path: Path) -> None:
    (tmp_path / "p").write_text("mine")
    with pytest.raises(OutputError):
        import_artefact(artefact, str(MODEL), tmp_path / "p")
    assert (tmp_path / "p").read_text() == "mine"


def test_an_artefact_that_does_nothing(tmp_path: Path) -> None:
    np.save(tmp_path / "v.npy", np.zeros((2, 20)))
    result = run(tmp_path / "v.npy", "--model", MODEL, "-o", tmp_path / "p", "--site", "residual")
    assert result.exit_code == 1
    assert "changes nothing" in result.output


def test_options_that_are_missing_are_asked_for(tmp_path: Path) -> None:
    np.save(tmp_path / "v.npy", np.ones((2, 20)))
    with pytest.raises(UsageError, match=r"v\.npy: this artefact does not say what its vectors were added to"):
        import_artefact(tmp_path / "v.npy", str(MODEL), tmp_path / "p")


def test_strength_multiplies_what_an_edit_does() -> None:
    scale, shift = Scale(0, "ffn", (1, 2), (0.5, -1.0)), Shift(0, "ffn", np.ones(20))
    rank1 = Rank1(0, "heads", np.ones(24), np.ones(20), 0.5)
    assert strengthened(scale, 3) == Scale(0, "ffn", (1, 2), (1.5, -3.0))
    assert strengthened(shift, 3) == Shift(0, "ffn", 3 * np.ones(20))
    assert strengthened(rank1, 3) == Rank1(0, "heads", np.ones(24), np.ones(20), 1.5)
