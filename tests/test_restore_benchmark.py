"""The benchmark of restoring, small: its baselines are what they say, and it compares like with like."""

import json
from pathlib import Path

import pytest
import torch

from austeer.compiler.forward import run_texts
from austeer.compiler.interpreter import interpret
from austeer.compiler.live import live_facts, load_model, load_tokenizer, port
from austeer.compiler.response_loss import mean_loss
from austeer.compiler.responses import Response, Sample, encode_responses
from austeer.compiler.verbs.demo import MODEL
from austeer.passes.schedule import Schedule
from benchmarks import prunings, restore
from benchmarks.baselines import flap, lora, mean_compensation
from benchmarks.pruners import magnitude, structured
from benchmarks.report import Report

STORIES = (MODEL / "neutral.txt").read_text("utf-8").splitlines()


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pruned") / "model"
    magnitude(MODEL, out)
    return out


def responses(count: int, start: int = 0) -> tuple[Response, ...]:
    samples = [Sample("", text, str(row)) for row, text in enumerate(STORIES[start : start + count])]
    return encode_responses(load_tokenizer(MODEL), samples, 64)[0]


def outputs(folder: Path, texts: tuple[Response, ...], *, program: object = None) -> dict[object, torch.Tensor]:
    """The mean output of each projection over all tokens."""
    model, seen = load_model(folder, dtype="float32", device="cpu"), {}
    facts = live_facts(model)
    places = [(layer, site) for layer in range(facts.geometry.layers) for site in ("attn", "ffn")]
    with interpret(model, program) if program else torch.no_grad():
        for place in places:  # behind the program's own hooks
            see = lambda _, __, output, place=place: seen.setdefault(place, []).append(output[0])  # noqa: E731
            port(model, facts, *place).module.register_forward_hook(see)
        for text in texts:
            run_texts(model, [text.text])
    return {place: torch.cat(found).mean(0) for place, found in seen.items()}


def test_mean_compensation_gives_every_projection_its_dense_mean(pruned: Path):
    texts = responses(6)
    dense, before = outputs(MODEL, texts), outputs(pruned, texts)
    after = outputs(pruned, texts, program=mean_compensation(MODEL, pruned, texts))
    assert len(after) == 2 * 4
    for place, mean in dense.items():
        assert (before[place] - mean).abs().max() > 1e-2
        torch.testing.assert_close(after[place], mean, rtol=0, atol=1e-4)


@pytest.mark.parametrize("in_shape", [True, False])
def test_flaps_bias_is_what_the_removed_units_gave_on_average(in_shape: bool, tmp_path: Path):
    """In the first layer, whose input is the dense one, the projection has its dense mean again."""
    texts = responses(6)
    structured(MODEL, tmp_path / "model", in_shape=in_shape)
    after = outputs(tmp_path / "model", texts, program=flap(MODEL, tmp_path / "model", texts))
    dense, before = outputs(MODEL, texts), outputs(tmp_path / "model", texts)
    torch.testing.assert_close(after[0, "attn"], dense[0, "attn"], rtol=0, atol=1e-4)
    assert (before[0, "attn"] - dense[0, "attn"]).abs().max() > 1e-2


def test_lora_has_about_the_parameters_that_it_should_and_learns(pruned: Path):
    pytest.importorskip("peft", reason="it comes with the engines")
    texts, budget = responses(8), 1500
    learned = lora(pruned, texts, Schedule(1e-2, 8), budget)
    assert learned.parameters == 2 * 4 * (96 + 96)  # rank 2
    names = {name for name, weight in learned.model.named_parameters() if weight.requires_grad}
    assert all("o_proj.lora_" in name for name in names)
    assert len(names) == 2 * 4
    before = mean_loss(load_model(pruned, dtype="float32", device="cpu"), texts, 4096)
    assert mean_loss(learned.model, texts, 4096) < before - 0.05


def test_recovered_is_nothing_for_the_pruned_model_and_everything_for_the_dense_one():
    dense, pruned = [1.0, 2.0, 3.0], [3.0, 5.0, 4.0]
    assert restore.recovered(dense, pruned, pruned).value == 0
    assert restore.recovered(dense, pruned, dense).value == 100
    half = restore.recovered(dense, pruned, [2.0, 3.5, 4.0])
    assert half.value == pytest.approx(100 * 2.5 / 6)
    assert half.low < half.value < half.high


@pytest.mark.slow
def test_every_method_is_measured_on_the_same_pruned_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("peft", reason="it comes with the engines")
    rows = (json.dumps({"text": text}) for text in STORIES[:40])
    (tmp_path / "stories.jsonl").write_text("\n".join(rows), "utf-8")
    monkeypatch.setattr(restore, "DATA", {MODEL.name: "stories.jsonl"})
    monkeypatch.setattr(restore, "FOLDER", tmp_path / "benchmarks")
    monkeypatch.setattr(restore, "FIT", slice(30))
    monkeypatch.setattr(restore, "HELD_OUT", slice(30, 40))
    monkeypatch.setattr(restore, "RATES", (1e-2,))
    monkeypatch.setattr(restore, "CURVE", (5, 16, 99))
    monkeypatch.setattr(restore, "prunings_of", lambda _: prunings.PRUNINGS[:1])
    (report,) = restore.run(MODEL.parent, tmp_path, None, epochs=4, curve=True)
    methods = [row.what.removeprefix("magnitude 50 %: ") for row in report.rows]
    restored = ["restored, untrained", "restored, 5 heads", restore.HALF, restore.ALL]  # half are 16, all 32
    assert methods == ["nothing", "FLAP's bias", "mean compensation", "LoRA", *restored]
    found = report.details["magnitude 50 %"]["nats_per_token"]
    lost = found["pruned"] - found["dense"]
    for row, method in zip(report.rows[1:], methods[1:], strict=True):
        assert row.found.value == pytest.approx(100 * (found["pruned"] - found[method]) / lost)
        assert row.found.low <= row.found.value <= row.found.high
    assert found[restore.ALL] < found["pruned"]
    assert not list((tmp_path / "benchmarks").iterdir())


def test_without_models_it_says_so():
    (report,) = restore.run(None, None, None)
    assert isinstance(report, Report)
    assert not report.rows
    assert not report.broken
    assert report.method.startswith("Not run: no real models.")


def test_gpt2_has_no_heads_cut():
    from austeer.compiler.facts import facts_of

    sizes = {"model_type": "gpt2", "n_embd": 24, "n_layer": 2, "n_head": 4}
    names = [pruning.name for pruning in prunings.prunings_of(facts_of("it", sizes))]
    assert names == [pruning.name for pruning in prunings.PRUNINGS[:-1]]


def test_other_peoples_pruners_run_from_the_interpreter_that_is_given(tmp_path: Path):
    """In a stand-in environment: an interpreter that writes down what it is asked to run."""
    said, python = tmp_path / "said", tmp_path / "python"
    python.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {said}\n')
    python.chmod(0o755)
    half = next(pruning for pruning in prunings.PRUNINGS if pruning.name.startswith("2:4"))
    assert half.apply(MODEL, tmp_path / "out", tmp_path / "data", python) == "llmcompressor"
    script, *arguments = said.read_text().splitlines()
    assert Path(script).is_file()
    wanted = [MODEL, tmp_path / "out", "--data", tmp_path / "data", "--pattern", "2:4"]
    assert arguments == [str(argument) for argument in wanted]
    python.write_text("#!/bin/sh\necho broken >&2; exit 3\n")
    with pytest.raises(RuntimeError, match=r"prune_with_llmcompressor\.py .* failed:\nbroken"):
        half.apply(MODEL, tmp_path / "out", tmp_path / "data", python)
