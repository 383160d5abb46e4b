"""build: programs in, checkpoint out; certified on request."""

import json
from pathlib import Path

import pytest

from austeer.compiler import CheckFailed, Program, Scale, UsageError
from austeer.compiler.manifest import MANIFEST, read_manifest
from austeer.compiler.verbs.build import build
from austeer.compiler.verbs.common import Settings
from austeer.compiler.verbs.demo import MODEL

CPU = Settings(device="cpu")


def program(path: Path, *edits: Scale) -> Path:
    Program.of(edits, model=MODEL).save(path)
    return path


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.txt"
    path.write_text("Once upon a time there was a little girl named Mia.\nTom went to the park.\n")
    return path


def test_without_texts_the_certificate_is_null(tmp_path: Path):
    build(str(MODEL), [program(tmp_path / "p", Scale(0, "ffn", (1,), 0.5))], tmp_path / "out")
    assert read_manifest(tmp_path / "out")["certificate"] is None
    assert "Not measured" in (tmp_path / "out" / "README.md").read_text()


def test_with_texts_the_result_is_certified(tmp_path: Path, texts: Path):
    source = program(tmp_path / "p", Scale(0, "ffn", (1, 5), 2.0))
    report = build(str(MODEL), [source], tmp_path / "out", texts=texts, settings=CPU)
    recorded = read_manifest(tmp_path / "out")["certificate"]
    assert report.certificate is not None
    assert recorded == report.certificate.plain()
    assert recorded["passed"] is True
    fields = (
        "reference dtype texts tokens max_abs_logit_diff mean_kl top1_agreement greedy_equal base_mean_kl "
        "base_top1_agreement"
    )
    assert set(fields.split()) <= recorded.keys()


def test_pairs_are_texts_too(tmp_path: Path):
    source = program(tmp_path / "p", Scale(0, "ffn", (1, 5), 2.0))
    report = build(str(MODEL), [source], tmp_path / "out", texts=MODEL / "pairs.jsonl", settings=CPU)
    assert report.certificate is not None
    assert report.certificate.passed


def test_a_program_without_effect_fails_its_certificate_and_leaves_nothing(tmp_path: Path, texts: Path):
    source = program(tmp_path / "p", Scale(0, "ffn", (1,), 0.0))
    with pytest.raises(CheckFailed, match="makes no difference"):
        build(str(MODEL), [source], tmp_path / "out", texts=texts, settings=CPU)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p", "texts.txt"]


def test_factors_of_several_programs_multiply_with_a_note(tmp_path: Path):
    sources = [program(tmp_path / name, Scale(0, "ffn", (1,), gamma)) for name, gamma in (("a", 1.0), ("b", 0.5))]
    report = build(str(MODEL), sources, tmp_path / "out")
    assert report.compiled.program.edits == (Scale(0, "ffn", (1,), 2.0),)
    assert any("multiply" in note for note in report.notes)


def test_no_program_is_a_usage_error(tmp_path: Path):
    with pytest.raises(UsageError, match="no program"):
        build(str(MODEL), [], tmp_path / "out")


def test_the_manifest_names_no_path(tmp_path: Path):
    build(str(MODEL), [program(tmp_path / "p", Scale(0, "ffn", (1,), 0.5))], tmp_path / "out")
    text = (tmp_path / "out" / MANIFEST).read_text()
    assert json.loads(text)["base"]["id"] == MODEL.name
    assert str(tmp_path) not in text
    assert str(MODEL.parent) not in text
