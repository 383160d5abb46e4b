"""build and steer --approximate: measured, chosen, recorded, said; and nothing of it where it was not asked for."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from austeer.compiler import CheckFailed, Edit, Fitted, Gate, Gated, Program, Refused, Scale, Shift
from austeer.compiler.certificate import text_logits
from austeer.compiler.cli import main
from austeer.compiler.interpreter import interpret
from austeer.compiler.live import ffn_input, live_facts, load_model, load_tokenizer
from austeer.compiler.manifest import MANIFEST, read_manifest
from austeer.compiler.neutral import sample_neutral
from austeer.compiler.verbs.build import BuildReport, build
from austeer.compiler.verbs.common import Settings
from austeer.compiler.verbs.demo import MODEL
from austeer.compiler.verbs.inspect import inspect
from austeer.compiler.verbs.show import show
from austeer.compiler.verbs.steer import steer
from austeer.compiler.verbs.verify import verify
from tests.shared import shared
from tests.tiny import rewritten, scratch

CPU = Settings(device="cpu")


def program(folder: Path, *edits: Edit, model: Path = MODEL) -> Path:
    Program.of(edits, model=model).save(folder / "p")
    return folder / "p"


SCALES = (Scale(0, "residual", (1, 5, 40), 1.0), Scale(2, "residual", (7, 20), (2.0, -0.5)))


@pytest.fixture(scope="module")
def untied() -> Path:
    """The demo model with a head of its own."""
    folder = rewritten(
        MODEL, scratch() / "model", lambda t: {**t, "lm_head.weight": t["model.embed_tokens.weight"].clone()}
    )
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    return folder


@pytest.fixture(scope="module")
def built(untied: Path, tmp_path_factory: pytest.TempPathFactory) -> BuildReport:
    folder = tmp_path_factory.mktemp("built")
    source = program(folder, *SCALES, model=untied)
    return build(str(untied), [source], folder / "out", approximate=True, settings=CPU)


def test_the_nearest_is_chosen_and_the_table_recorded(built: BuildReport) -> None:
    assert built.out is not None
    found = built.approximations
    assert found is not None
    figures = {candidate.name: candidate.mean_kl for candidate in found.candidates}
    assert figures.keys() == {"rescale-later", "rescale-earlier", "rescale-both", "linear-neurons"}
    measured = [value for value in figures.values() if value is not None]
    assert len(set(measured)) == 4
    assert figures[found.chosen] == min(measured) < 0.5 * found.base_mean_kl
    assert read_manifest(Path(built.out))["approximations"] == json.loads(json.dumps(found.plain()))
    assert built.plain()["approximations"] == found.plain()


def test_the_figure_is_that_of_the_output(built: BuildReport, untied: Path) -> None:
    """Measured once more, with nothing but transformers and the definition of KL."""
    assert built.out is not None
    assert built.approximations is not None
    base, compiled = (load_model(folder, dtype="float32", device="cpu") for folder in (untied, Path(built.out)))
    texts = sample_neutral(base, load_tokenizer(untied), 16, 64, 0)
    loss = torch.nn.KLDivLoss(reduction="sum", log_target=True)
    total = 0.0
    for text in texts:
        with interpret(base, built.compiled.program):
            expected = text_logits(base, text).double().log_softmax(-1)
        total += float(loss(text_logits(compiled, text).double().log_softmax(-1), expected))
    figures = {candidate.name: candidate.mean_kl for candidate in built.approximations.candidates}
    assert total / sum(map(len, texts)) == pytest.approx(figures[built.approximations.chosen], rel=1e-3)


def test_it_is_said_everywhere(built: BuildReport, capsys: pytest.CaptureFixture[str]) -> None:
    out = Path(str(built.out))
    manifest, card = read_manifest(out), (out / "README.md").read_text()
    assert {entry["edit"] for entry in manifest["lowering"] if not entry["exact"]} == {0, 1}
    assert manifest["certificate"]["approximate"] is True
    assert manifest["certificate"]["passed"] is True
    assert "This compilation is approximate" in card
    assert "behaves\napproximately as the base model" in card
    show(built)
    show(inspect(out))
    shown = capsys.readouterr().out
    assert "rescale-earlier" in shown
    assert shown.count("It holds as an approximation") == 2


def test_verify_makes_the_same_bytes_and_finds_others(built: BuildReport, untied: Path, tmp_path: Path) -> None:
    out = Path(str(built.out))
    checked = verify(out, base=str(untied), settings=CPU)
    assert checked.passed, checked.problems
    assert checked.certificate is not None
    assert checked.certificate.approximate

    def swapped(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: 1.01 * tensor if name == "model.norm.weight" else tensor for name, tensor in tensors.items()}

    copy = tmp_path / "copy"
    copy.mkdir()
    for path in (p for p in out.rglob("*") if p.is_file()):
        (copy / path.relative_to(out)).parent.mkdir(exist_ok=True)
        (copy / path.relative_to(out)).write_bytes(path.read_bytes())
    (file,) = (path for path in copy.glob("*.safetensors") if "model.norm.weight" in load_file(path))
    save_file(swapped(load_file(file)), file, metadata={"format": "pt"})
    assert not verify(copy, base=str(untied), settings=CPU).passed


def test_nothing_is_left_beside_the_output(built: BuildReport) -> None:
    assert sorted(path.name for path in Path(str(built.out)).parent.iterdir()) == ["out", "p"]


def test_what_tied_embeddings_rule_out_is_in_the_table_with_the_reason(tmp_path: Path) -> None:
    report = build(str(MODEL), [program(tmp_path, *SCALES)], tmp_path / "out", approximate=True, settings=CPU)
    assert report.approximations is not None
    refused = {c.name: c.refusal for c in report.approximations.candidates if c.mean_kl is None}
    assert refused.keys() == {"rescale-earlier", "rescale-both"}
    assert report.approximations.chosen in ("rescale-later", "linear-neurons")
    assert all("head" in why for why in refused.values())


def test_without_the_option_it_is_refused_with_the_ways_out(tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"--approximate(.|\n)*site|site(.|\n)*--approximate") as refusal:
        build(str(MODEL), [program(tmp_path, *SCALES)], tmp_path / "out")
    assert "--form model-code" in str(refusal.value)
    assert "Scale at heads, attn, neurons or ffn" in str(refusal.value)


def test_the_option_changes_nothing_for_a_program_that_folds_exactly(tmp_path: Path) -> None:
    source = program(tmp_path, Scale(0, "ffn", (1,), 1.0))
    reports = [build(str(MODEL), [source], tmp_path / str(way), approximate=way) for way in (True, False)]
    assert [report.approximations for report in reports] == [None, None]
    first, second = (sorted((tmp_path / str(way)).iterdir()) for way in (True, False))
    assert [path.name for path in first] == [path.name for path in second]
    for one, other in zip(first, second, strict=True):
        assert one.is_dir() or one.read_bytes() == other.read_bytes(), one.name
    assert "approximations" not in read_manifest(tmp_path / "True")


def test_an_approximation_that_is_too_far_is_not_written(tmp_path: Path) -> None:
    source = program(tmp_path, Scale(0, "residual", tuple(range(8)), (-0.9,) * 8))
    with pytest.raises(CheckFailed, match=r"more than .*, half that of the unedited base"):
        build(str(MODEL), [source], tmp_path / "out", approximate=True, target="sglang", settings=CPU)
    assert [path.name for path in tmp_path.iterdir()] == ["p"]


def test_what_the_target_rules_out_is_not_measured(tmp_path: Path) -> None:
    report = build(
        str(MODEL), [program(tmp_path, *SCALES)], tmp_path / "out", approximate=True, target="sglang", settings=CPU
    )
    assert report.approximations is not None
    (neurons,) = (c for c in report.approximations.candidates if c.name == "linear-neurons")
    assert "SGLang" in neurons.refusal
    assert "keeps no bias of the FFN" in neurons.refusal
    assert report.approximations.chosen == "rescale-later"
    assert verify(tmp_path / "out", base=str(MODEL), settings=CPU).passed


def test_what_is_taken_out_of_the_stream_has_one_way(tmp_path: Path) -> None:
    source = program(tmp_path, Scale(1, "residual", (1, 5), -1.0))
    report = build(str(MODEL), [source], tmp_path / "out", approximate=True, settings=CPU)
    assert report.approximations is not None
    assert report.approximations.chosen == "linear-neurons"
    assert len(report.approximations.fitted) == 2
    assert report.certificate is not None
    assert report.certificate.mean_kl < 0.2 * report.certificate.base_mean_kl
    assert any("neurons appended to the FFN of every layer" in note for note in report.notes)
    assert verify(tmp_path / "out", base=str(MODEL), settings=CPU).passed


def test_the_option_on_the_command_line(tmp_path: Path) -> None:
    command = ["build", str(MODEL), str(program(tmp_path, *SCALES)), "-o", str(tmp_path / "out"), "--device", "cpu"]
    without = CliRunner().invoke(main, [*command, "--json"])
    assert without.exit_code == 1
    assert "--approximate" in json.loads(without.stdout)["error"]
    done = CliRunner().invoke(main, [*command, "--approximate", "--json"])
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["approximations"]["chosen"] == "linear-neurons"
    assert any("neurons appended" in note for note in report["notes"])  # of what is chosen, not of what came first
    assert report["certificate"]["approximate"] is True


def test_the_texts_of_the_user_are_measured(tmp_path: Path) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("Once upon a time there was a little girl named Mia.\nTom went to the park.\n")
    source = program(tmp_path, *SCALES)
    report = build(str(MODEL), [source], tmp_path / "out", texts=texts, approximate=True, settings=CPU)
    assert report.approximations is not None
    assert report.certificate is not None
    assert report.approximations.texts == report.certificate.texts == 2
    assert report.approximations.base_mean_kl == pytest.approx(report.certificate.base_mean_kl)


def test_a_dry_run_measures_nothing_and_says_that(tmp_path: Path) -> None:
    report = build(str(MODEL), [program(tmp_path, *SCALES)], None, approximate=True)
    assert report.out is None
    assert report.approximations is None
    assert any("measured when the checkpoint is written" in note for note in report.notes)


def test_steer_at_the_layer_site(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, pairs = tmp_path / "out", MODEL / "pairs.jsonl"
    report = steer(str(MODEL), pairs, out, site="layer", top_k=4, alpha=1.5, approximate=True, settings=CPU)
    assert {edit.site for edit in report.program.edits} == {"residual"}
    assert report.certificate is not None
    assert report.certificate.approximate
    manifest = read_manifest(out)
    assert manifest["steer"]["site"] == "residual"
    assert manifest["approximations"]["chosen"] == "linear-neurons"
    assert str(tmp_path) not in (out / MANIFEST).read_text()
    show(report)
    assert "linear-neurons" in capsys.readouterr().out
    with pytest.raises(Refused, match="--approximate"):
        steer(str(MODEL), pairs, tmp_path / "other", site="layer", top_k=4, alpha=1.5, settings=CPU)


@pytest.mark.parametrize(
    ("layer", "gamma", "share"), [(0, 1.0, 0.05), (0, -1.0, 0.05), (2, 4.0, 0.05), (2, -1.0, 0.1), (4, -0.5, 0.05)]
)
def test_on_a_trained_model_most_of_the_way_is_gone(layer: int, gamma: float, share: float, tmp_path: Path) -> None:
    model = shared("models/stories260K")
    source = program(tmp_path, Scale(layer, "residual", (3, 17, 30, 52), gamma), model=model)
    report = build(str(model), [source], tmp_path / "out", approximate=True, settings=CPU)
    assert report.certificate is not None
    assert report.certificate.mean_kl < share * report.certificate.base_mean_kl


# ---- gates ----------------------------------------------------------------------------------------


def gated(constant: Sequence[float] = ()) -> Gated:
    """A shift of the demo model, half open."""
    width = Program.of([], model=MODEL).model.residual
    rng = np.random.default_rng(0)
    vector, w = rng.normal(size=(2, width))
    return Gated(Shift(2, "attn", 2 * vector), Gate(0.4 * w, 0.0, 4.0, constant))


@pytest.fixture(scope="module")
def constant() -> list[float]:
    """What is nearest to 1 in what the FFN of layer 2 reads, by least squares."""
    model, seen = load_model(MODEL, dtype="float32", device="cpu"), list[torch.Tensor]()
    ffn_input(model, live_facts(model), 2).module.register_forward_pre_hook(lambda _, args: seen.append(args[0][0]))
    for text in sample_neutral(model, load_tokenizer(MODEL), 16, 64, 7):
        text_logits(model, text)
    h = torch.cat(seen)
    return torch.linalg.lstsq(h, torch.ones(len(h), 1)).solution[:, 0].tolist()


def test_a_gate_without_biases_is_compiled_if_asked_for_and_certified(constant: list[float], tmp_path: Path) -> None:
    source = program(tmp_path, gated(constant))
    with pytest.raises(Refused) as refused:
        build(str(MODEL), [source], tmp_path / "out", target="sglang")
    first, reason, ways = str(refused.value).splitlines()
    assert first == "1 of 1 edits would only be approximated:"
    assert reason.startswith("  gated shift at layer 2, site attn: sglang keeps no bias of the FFN here")
    assert "--approximate" in ways
    assert "--form model-code" in ways
    planned = build(str(MODEL), [source], None, target="sglang", approximate=True)
    assert "approximate: how near it comes is measured when it is written" in planned.notes
    report = build(str(MODEL), [source], tmp_path / "out", target="sglang", approximate=True, settings=CPU)
    assert report.approximations is None  # there is nothing to choose from
    assert report.certificate is not None
    assert report.certificate.approximate
    assert report.certificate.passed  # half the way; of this small model no direction is more constant than 1 ± 0.3
    assert "This compilation is approximate" in (tmp_path / "out" / "README.md").read_text()
    assert verify(tmp_path / "out", base=str(MODEL), settings=CPU).passed


def test_neurons_that_were_fitted_are_compiled_if_asked_for_and_judged(tmp_path: Path) -> None:
    width = Program.of([], model=MODEL).model.residual
    nothing = Fitted(np.zeros((1, width)), [0], np.zeros((1, width)), [0], np.zeros((width, 1)))
    source = program(tmp_path, Gated(Scale(1, "ffn", (1, 5), 4.0), gated().gate, nothing), Scale(0, "ffn", (1,), 0.5))
    with pytest.raises(Refused, match=r"1 of 2 edits .*\n.*gated scale at layer 1, site ffn: .*neurons were fitted"):
        build(str(MODEL), [source], tmp_path / "out")
    with pytest.raises(CheckFailed, match="half that of the unedited base"):
        build(str(MODEL), [program(tmp_path, Gated(Scale(1, "ffn", (1, 5), 4.0), gated().gate, nothing))],
              tmp_path / "out", approximate=True, settings=CPU)  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_gates_in_the_place_of_neurons_are_compiled_if_asked_for_and_certified(tmp_path: Path) -> None:
    source = program(tmp_path, replace(gated(), replaces=(3, 100)))
    with pytest.raises(Refused, match=r"1 of 1 edits .*\n.*gated shift at layer 2, site attn: 2 neurons .* is lost"):
        build(str(MODEL), [source], tmp_path / "out")
    report = build(str(MODEL), [source], tmp_path / "out", approximate=True, settings=CPU)
    assert report.certificate is not None
    assert report.certificate.approximate
    assert report.certificate.passed
    assert "in the place of 2 neurons" in (tmp_path / "out" / "README.md").read_text()
    assert verify(tmp_path / "out", base=str(MODEL), settings=CPU).passed


def test_with_biases_it_is_exact_whether_asked_for_or_not(tmp_path: Path) -> None:
    source = program(tmp_path, gated())
    report = build(str(MODEL), [source], tmp_path / "out", approximate=True, settings=CPU)
    assert report.compiled.exact
    assert report.certificate is None


def test_a_scaled_stream_is_not_approximated_beside_a_gate(tmp_path: Path) -> None:
    source = program(tmp_path, *SCALES, gated())
    with pytest.raises(Refused, match=r"gated shift at layer 2, site attn: .*scale at site residual.*model-code"):
        build(str(MODEL), [source], tmp_path / "out", approximate=True)


def test_an_adapter_has_no_neurons_of_its_own(tmp_path: Path) -> None:
    unfitted = Gated(Scale(1, "ffn", (1, 5), 4.0), gated().gate)
    with pytest.raises(Refused, match="an adapter changes linear maps that are there; use --form checkpoint") as raised:
        build(str(MODEL), [program(tmp_path, gated(), unfitted)], tmp_path / "out", form="lora", target="vllm")
    assert "gated scale at layer 1, site ffn" in str(raised.value)


def test_a_gated_program_is_explained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = program(tmp_path, gated())
    show(inspect(source))
    build(str(MODEL), [source], tmp_path / "out")
    show(inspect(tmp_path / "out"))
    shown = " ".join(capsys.readouterr().out.split())
    assert "shift of |vector|" in shown
    assert "delta 4" in shown
    assert "gate_proj" in shown
    done = CliRunner().invoke(main, ["inspect", str(tmp_path / "out"), "--json"])
    (edit,) = json.loads(done.stdout)["edits"]
    assert (edit["kind"], edit["edit"]["kind"], edit["gate"]["delta"]) == ("gated", "shift", 4.0)
