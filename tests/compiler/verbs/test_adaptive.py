"""steer --adaptive on the demo model: stories in which it acts, and the same words in no order, where it does not."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from austeer.compiler import CheckFailed, Gated, PairsError, Program, Refused, Scale, Shift, UsageError
from austeer.compiler.cli import main
from austeer.compiler.manifest import PROGRAM, read_manifest
from austeer.compiler.pairs import holds_pairs
from austeer.compiler.verbs.adaptive import texts_sha256
from austeer.compiler.verbs.build import build
from austeer.compiler.verbs.common import Settings
from austeer.compiler.verbs.demo import MODEL
from austeer.compiler.verbs.steer import Steering, steer
from austeer.compiler.verbs.verify import verify
from tests.tiny import Tiny, on_disk

CPU = Settings(device="cpu")
PAIRS, NEUTRAL = MODEL / "pairs.jsonl", MODEL / "neutral.txt"
FIXED = {"top_k": 4, "alpha": 2.0, "neutral": NEUTRAL, "settings": CPU}


def rows() -> list[dict[str, str]]:
    return [json.loads(line) for line in PAIRS.read_text().splitlines()]


def disordered(text: str, seed: int) -> str:
    words = text.split()
    random.Random(seed).shuffle(words)
    return " ".join(words)


@pytest.fixture(scope="module")
def unless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "unless.txt"
    texts = [disordered(row["prompt"] + row["positive"], number) for number, row in enumerate(rows())]
    path.write_text("".join(f"{text}\n" for text in texts))
    return path


@pytest.fixture(scope="module")
def steered(unless: Path, tmp_path_factory: pytest.TempPathFactory) -> Steering:
    out = tmp_path_factory.mktemp("adaptive") / "out"
    return steer(str(MODEL), PAIRS, out, adaptive=True, when=PAIRS, unless=unless, gate_neurons=64, **FIXED)


def test_every_edit_stands_behind_a_gate_that_names_its_texts(steered: Steering, unless: Path) -> None:
    assert steered.program.edits
    for edit in steered.program.edits:
        assert isinstance(edit, Gated)
        assert isinstance(edit.edit, Scale)
        assert edit.neurons is not None
        assert edit.neurons.count <= 64
        origin = edit.gate.origin
        assert origin is not None
        assert origin.unless == texts_sha256(unless.read_text().splitlines())
        assert origin.when == texts_sha256(row["prompt"] + row["positive"] for row in rows())
        assert origin.auc > 0.75
        assert origin.open_when > 4 * origin.open_unless


def test_a_file_of_lines_has_the_hash_that_anybody_can_compute(unless: Path) -> None:
    import hashlib

    assert texts_sha256(unless.read_text().splitlines()) == hashlib.sha256(unless.read_bytes()).hexdigest()


def test_both_sides_are_measured_and_written_down(steered: Steering) -> None:
    out = Path(str(steered.out))
    manifest, card = read_manifest(out), (out / "README.md").read_text()
    when, unless = (steered.sides[name] for name in ("when", "unless"))
    assert when.mean_kl > 0
    assert 1 - when.top1_agreement > 2 * (1 - unless.top1_agreement)
    assert min(gate.open for gate in when.gates.values()) > 4 * max(gate.open for gate in unless.gates.values())
    assert manifest["sides"] == json.loads(json.dumps(steered.plain()["sides"]))
    assert manifest["gates"] == steered.plain()["gates"]
    record = manifest["steer"]["gating"]
    assert record["when"]["held_out_texts"] == 40
    assert all(0 < entry["held_out_r2"] < 1 for entry in record["distilled"])
    assert {entry["gate"] for entry in record["gates"]} == {"95% closed", "99% closed", "90% closed"}
    assert all(0 < entry["rounding"]["bfloat16"]["largest"] < 0.05 for entry in record["gates"])
    assert manifest["steer"]["gate"] == "95% closed"
    assert "## Where it acts" in card
    assert steered.certificate is not None
    assert steered.certificate.approximate
    assert "approximate" in card
    text = (out / "austeer.json").read_text()
    assert not any(row["prompt"] in text for row in rows())


def test_the_checkpoint_verifies_and_its_program_builds_again(steered: Steering, tmp_path: Path) -> None:
    out = Path(str(steered.out))
    assert verify(out, base=str(MODEL), texts=NEUTRAL, settings=CPU).passed
    with pytest.raises(Refused, match="--approximate"):
        build(str(MODEL), [out / PROGRAM], tmp_path / "again")
    build(str(MODEL), [out / PROGRAM], tmp_path / "again", texts=NEUTRAL, approximate=True, settings=CPU)
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


def test_the_gates_are_part_of_the_search(unless: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {**FIXED, "alpha": None, "trials": 4, "program_only": True, "gate_neurons": 8}
    found = steer(str(MODEL), PAIRS, tmp_path / "p", adaptive=True, when=PAIRS, unless=unless, **options)
    assert found.choice.search is not None
    gates = [trial.point["gate"] for trial in found.choice.search.table]
    assert set(gates) == {"95% closed", "99% closed", "90% closed"}


def test_replaced_neurons_leave_every_shape(unless: Path, tmp_path: Path) -> None:
    options = {**FIXED, "alpha": 8.0}
    found = steer(
        str(MODEL), PAIRS, tmp_path / "out", adaptive=True, when=PAIRS, unless=unless, gate_neurons=8, neurons="reuse",
        **options,
    )  # fmt: skip
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["intermediate_size"] == json.loads((MODEL / "config.json").read_text())["intermediate_size"]
    assert all(isinstance(edit, Gated) and len(edit.replaces) == edit.count for edit in found.program.edits)
    assert any("the replaced neurons wrote" in note for note in found.notes)


def test_model_code_needs_no_neurons(unless: Path, tmp_path: Path) -> None:
    found = steer(
        str(MODEL), PAIRS, tmp_path / "out", adaptive=True, when=PAIRS, unless=unless, form="model-code", **FIXED
    )
    assert all(isinstance(edit, Gated) and edit.neurons is None for edit in found.program.edits)
    assert found.certificate is not None
    assert not found.certificate.approximate


def test_fusion_in_gates_is_exact(unless: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"alpha": 0.5, "neutral": NEUTRAL, "settings": CPU}
    found = steer(
        str(MODEL), PAIRS, tmp_path / "out", method="fusion", adaptive=True, when=PAIRS, unless=unless, **options
    )
    assert all(isinstance(edit, Gated) and isinstance(edit.edit, Shift) for edit in found.program.edits)
    assert found.certificate is not None
    assert not found.certificate.approximate


def test_without_files_the_sides_of_the_pairs_take_their_place(tmp_path: Path) -> None:
    found = steer(str(MODEL), PAIRS, tmp_path / "p", adaptive=True, program_only=True, gate_neurons=4, **FIXED)
    (origin,) = {edit.gate.origin for edit in found.program.edits if isinstance(edit, Gated)}
    assert origin is not None
    assert origin.when == texts_sha256(row["prompt"] + row["negative"] for row in rows())


# ---- bad input ------------------------------------------------------------------------------


def test_texts_that_differ_in_nothing(tmp_path: Path) -> None:
    """Seeded halves of one and the same kind of text."""
    texts = [row["prompt"] for row in rows()]
    for name, part in (("when", texts[::2]), ("unless", texts[1::2])):
        (tmp_path / name).write_text("\n".join(part))
    with pytest.raises(CheckFailed, match=r"held-out AUC by token is layer 0 0\.\d\d, layer 1 0\.\d\d"):
        steer(
            str(MODEL),
            PAIRS,
            tmp_path / "o",
            adaptive=True,
            when=tmp_path / "when",
            unless=tmp_path / "unless",
            **FIXED,
        )
    assert not (tmp_path / "o").exists()


def test_texts_on_both_sides(tmp_path: Path) -> None:
    with pytest.raises(PairsError, match="200 of the when texts are unless texts too"):
        steer(str(MODEL), PAIRS, tmp_path / "o", adaptive=True, when=PAIRS, unless=PAIRS, **FIXED)


@pytest.mark.parametrize(("text", "words"), [("", "holds no texts"), ("one\ntwo\n", "at least 5 different texts")])
def test_too_few_texts(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "few").write_text(text)
    with pytest.raises(PairsError, match=words):
        steer(str(MODEL), PAIRS, tmp_path / "o", adaptive=True, when=PAIRS, unless=tmp_path / "few", **FIXED)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"when": PAIRS}, "add --adaptive"),
        ({"adaptive": True, "when": PAIRS}, "--when and --unless need each other"),
        ({"adaptive": True, "form": "lora"}, "no adapter holds"),
        ({"adaptive": True, "neurons": "borrow"}, "append or reuse"),
        ({"adaptive": True, "gate_neurons": 1}, "at least 2"),
    ],
)
def test_options_that_do_not_go_together(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=words):
        steer(str(MODEL), PAIRS, tmp_path / "o", **options, **FIXED)


@pytest.mark.parametrize(("architecture", "words"), [("gemma2", "a norm stands after"), ("mixtral", "experts")])
def test_models_that_host_no_gate_are_refused_before_they_run(architecture: str, words: str, tmp_path: Path) -> None:
    base = on_disk(Tiny(architecture))  # it has no tokenizer either
    with pytest.raises(Refused, match=f"steering with gates cannot be compiled: .*{words}"):
        steer(str(base), PAIRS, tmp_path / "o", adaptive=True, top_k=1, alpha=1, settings=CPU)


def test_on_the_command_line(unless: Path, tmp_path: Path) -> None:
    files = ["--when", str(PAIRS), "--unless", str(unless), "--neutral", str(NEUTRAL)]
    done = CliRunner().invoke(
        main,
        ["steer", str(MODEL), "--pairs", str(PAIRS), "-o", str(tmp_path / "out"), "--adaptive", *files, "--top-k", "2",
         "--alpha", "2", "--gate-neurons", "16", "--device", "cpu"],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "Gates, on texts held out from their fit (threshold in log-odds)" in done.stdout
    assert "The compiled model, on those texts" in done.stdout
    assert Program.load(tmp_path / "out" / PROGRAM).edits


def test_pairs_are_told_from_texts(tmp_path: Path) -> None:
    (tmp_path / "texts").write_text('{"text": "a"}\n')
    (tmp_path / "empty").write_text("")
    assert holds_pairs(PAIRS)
    assert not any(holds_pairs(path) for path in (NEUTRAL, tmp_path / "texts", tmp_path / "empty"))
