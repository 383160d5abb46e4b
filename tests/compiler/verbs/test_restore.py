"""restore on the demo model, pruned: trained, baked, certified, reported; nothing that was zero is filled."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from austeer.compiler import CheckFailed, Program, Shift, interpret
from austeer.compiler.cli import main
from austeer.compiler.live import load_tokenizer
from austeer.compiler.manifest import MANIFEST, PROGRAM, read_manifest
from austeer.compiler.pairs import read_pairs, split_by_prompt
from austeer.compiler.recovery import Recovery
from austeer.compiler.responses import Sample, read_samples, split_samples
from austeer.compiler.verbs.build import build
from austeer.compiler.verbs.common import Settings
from austeer.compiler.verbs.demo import MODEL
from austeer.compiler.verbs.inspect import inspect
from austeer.compiler.verbs.restoration import Restoration
from austeer.compiler.verbs.restore import restore
from austeer.compiler.verbs.steer import steer
from austeer.compiler.verbs.verify import verify
from austeer.passes.schedule import Schedule
from benchmarks.pruners import magnitude, structured, two_of_four
from tests.engines.llama_cpp import use_converter
from tests.tiny import Tiny, load, logits, stored

CPU = Settings(device="cpu")
LAYERS, HEADS, DIM = 4, 8, 12  # of the demo model
STORIES = [line.partition(". ") for line in (MODEL / "neutral.txt").read_text().splitlines()]
ROWS = [{"prompt": f"{first}.", "response": f" {rest}"} for first, _, rest in STORIES]
PRUNERS: dict[str, Callable[[Path, Path], None]] = {
    "half": partial(magnitude, share=0.6),
    "2:4": two_of_four,
    "smaller": structured,
    "silent": partial(structured, in_shape=True),
}


def write_rows(path: Path, rows: Sequence[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the data and the demo model, pruned in each way."""
    folder = tmp_path_factory.mktemp("restore")
    write_rows(folder / "data.jsonl", ROWS)
    for name, prune in PRUNERS.items():
        prune(MODEL, folder / name)
    return folder


def restored(here: Path, out: Path, pruned: str = "half", **options: Any) -> Restoration:
    asked: dict[str, Any] = {"dense": str(MODEL), "epochs": 1, "settings": CPU, **options}
    report = restore(str(here / pruned), asked.pop("data", here / "data.jsonl"), out, **asked)
    assert report is not None
    return report


@pytest.fixture(scope="module")
def report(here: Path) -> Restoration:
    return restored(here, here / "out", epochs=4, picture=here / "heads.svg")


def close(found: Any, expected: Any) -> None:
    """By the certificate's rule for float32."""
    limit = max(1e-4, 1e-5 * float(expected.abs().max()))
    assert float((found - expected).abs().max()) <= limit
    assert torch.equal(found.argmax(-1), expected.argmax(-1))


def ids(text: str, model: Path = MODEL) -> Any:
    return torch.tensor([load_tokenizer(model)(text)["input_ids"]])


# ---- the whole verb ---------------------------------------------------------------------


def test_a_stock_model_comes_out_that_equals_the_hooked_pruned_one(here: Path, report: Restoration):
    base, text = load(here / "half"), ids("".join(STORIES[0]))
    plain = logits(base, text)
    with interpret(base, report.restored.program):
        expected = logits(base, text)
    close(logits(load(here / "out"), text), expected)
    assert float((expected - plain).abs().max()) > 0.1
    assert "auto_map" not in json.loads((here / "out" / "config.json").read_text())


def test_verify_and_inspect_take_it(here: Path, report: Restoration):
    outcome = verify(here / "out", base=str(here / "half"), settings=CPU)
    assert outcome.passed, outcome.problems
    seen = inspect(here / "out").plain()
    assert seen["sha256"] == report.restored.program.sha256
    assert [(edit["kind"], edit["site"]) for edit in seen["edits"]] == [("shift", "heads")] * len(seen["edits"])
    assert {entry["tensor"].rpartition("layers.")[2][1:] for entry in seen["lowering"]} >= {".self_attn.o_proj.bias"}


def test_something_is_back_and_the_report_says_what_was_done(here: Path, report: Restoration):
    plain = json.loads(json.dumps(report.plain(), allow_nan=False))
    assert plain["certificate"]["passed"]
    assert plain["out"] == str(here / "out")
    assert plain["loss"]["dense"] < plain["loss"]["restored"] < plain["loss"]["pruned"]
    assert 0 < plain["loss"]["recovered"] < 1
    assert plain["samples"] == {"fitted": 32, "stopped_by": 4, "reported_on": 4}
    assert plain["accuracy"].keys() == plain["loss"].keys()
    assert plain["components"] == 10
    assert plain["parameters"]["trained"] == 16 * (10 + DIM)
    assert 0 < plain["best_step"] <= plain["steps"] <= 16
    assert dict(map(tuple, plain["held_out_losses"]))[plain["best_step"]] == min(
        loss for _, loss in plain["held_out_losses"]
    )
    assert (plain["pruning"], plain["head_map"]) == ("unstructured", [list(range(HEADS))] * LAYERS)


def test_half_of_the_heads_are_chosen_by_importance(report: Restoration):
    importance = np.array(report.plain()["importance"])
    assert importance.shape == (LAYERS, HEADS)
    chosen = np.zeros(importance.shape, bool)
    chosen[tuple(np.transpose(report.plain()["heads"]))] = True
    assert chosen.sum() == LAYERS * HEADS // 2
    assert importance[chosen].min() >= importance[~chosen].max()
    added = {edit.layer: vectors(edit) for edit in report.restored.program.edits}
    assert {(layer, head) for layer, rows in added.items() for head in np.flatnonzero(rows.any(1))} == set(
        map(tuple, np.argwhere(chosen).tolist())
    )


def vectors(edit: Any, heads: int = HEADS) -> Any:
    assert isinstance(edit, Shift)
    return edit.vector.reshape(heads, -1)


def test_zeros_and_parameters_are_counted_as_the_files_have_them(here: Path, report: Restoration):
    before, after = stored(here / "half"), stored(here / "out")
    rows = {row["name"]: row for row in report.plain()["sparsity"]}
    assert rows.keys() == {name for name, tensor in before.items() if tensor.dim() > 1}
    for name, row in rows.items():
        assert row["zeros"] == row["zeros_after"] == int((before[name] == 0).sum())
        assert not bool(after[name][before[name] == 0].any())
    assert rows["model.layers.2.mlp.up_proj.weight"]["share"] == pytest.approx(0.6, abs=0.01)
    added = sum(tensor.numel() for tensor in after.values()) - sum(tensor.numel() for tensor in before.values())
    assert report.plain()["parameters"]["added"] == added > 0


def test_the_losses_are_those_of_held_out_responses(here: Path, report: Restoration):
    held_out = split_samples(read_samples(here / "data.jsonl"), 0)[2]
    for name, folder in (("dense", MODEL), ("pruned", here / "half"), ("restored", here / "out")):
        assert report.plain()["loss"][name] == pytest.approx(surprise(load(folder), held_out), abs=2e-4)


def surprise(model: Any, samples: Sequence[Sample]) -> float:
    """-log p of the responses' tokens, mean over them all, by plain transformers."""
    total, count = 0.0, 0
    for sample in samples:
        prompt, text = ids(sample.prompt), ids(sample.prompt + sample.response)
        own = text[0, prompt.shape[1] :]
        assert torch.equal(text[:, : prompt.shape[1]], prompt)
        found = logits(model, text)[0, prompt.shape[1] - 1 : -1].double().log_softmax(-1)
        total -= float(found.gather(1, own[:, None]).sum())
        count += len(own)
    return total / count


def test_what_is_held_out_changes_nothing_but_the_report(here: Path, tmp_path: Path):
    held_out = {sample.prompt for sample in split_samples(read_samples(here / "data.jsonl"), 0)[2]}
    assert held_out
    other = [{**row, "response": " The end."} if row["prompt"] in held_out else row for row in ROWS]
    data = write_rows(tmp_path / "other.jsonl", other)
    options: dict[str, Any] = {"program_only": True, "epochs": 0}
    first = restored(here, tmp_path / "a", **options)
    second = restored(here, tmp_path / "b", data=data, **options)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert first.restored.loss != second.restored.loss
    assert first.restored.texts != second.restored.texts


def test_the_seed_decides_everything(here: Path, report: Restoration, tmp_path: Path):
    again = restored(here, tmp_path / "a", epochs=4, program_only=True)
    assert (tmp_path / "a").read_bytes() == (here / "out" / PROGRAM).read_bytes()
    assert again.plain()["heads"] == report.plain()["heads"]
    restored(here, tmp_path / "b", epochs=0, program_only=True, settings=replace(CPU, seed=1))
    assert Program.load(tmp_path / "b") != again.restored.program


def test_manifest_and_card_tell_it_without_text_or_path(here: Path, report: Restoration):
    out, manifest = here / "out", read_manifest(here / "out")
    plain, record = report.plain(), manifest["restore"]
    same = ("loss", "accuracy", "heads", "importance", "parameters", "steps", "samples", "pruning", "head_map")
    assert {key: record[key] for key in same} == {key: plain[key] for key in same}
    assert manifest["sparsity"] == plain["sparsity"]
    assert (record["seed"], record["lr"], record["epochs"]) == (0, 0.02, 4)
    assert record["dense"]["id"] == MODEL.name
    card = (out / "README.md").read_text()
    assert "# half, restored" in card
    assert f"| loss, nats per token | {plain['loss']['dense']:.4f} | {plain['loss']['pruned']:.4f} |" in card
    files = [path for path in out.rglob("*") if path.is_file()]
    assert {MANIFEST, PROGRAM} <= {str(path.relative_to(out)) for path in files}
    for path in files:
        data = path.read_bytes()
        assert not any(str(folder).encode() in data for folder in (here, MODEL.parent, Path.home())), path
        assert not any(row[key].encode() in data for row in ROWS for key in row), path


def test_nothing_else_is_left_and_the_picture_is_drawn(here: Path, report: Restoration):
    assert report.out == str(here / "out")
    assert sorted(path.name for path in here.iterdir()) == sorted([*PRUNERS, "data.jsonl", "heads.svg", "out"])
    drawn = (here / "heads.svg").read_text()
    assert "chosen: 16 of 32 heads" in drawn


# ---- lost components --------------------------------------------------------------------


@pytest.mark.parametrize("components", [1, 10, 99])
def test_without_epochs_it_is_the_papers_component(components: int, here: Path, tmp_path: Path):
    """X_h = U S Vᵀ is dense - pruned at the last token of the prompts; Σ_{i≤k} mean(U_i)·S_i·V_i."""
    pairs = write_rows(tmp_path / "pairs.jsonl", [vars(pair) for pair in read_pairs(MODEL / "pairs.jsonl")[:30]])
    options: dict[str, Any] = {"epochs": 0, "top_heads": "all", "components": components, "pairs": pairs}
    found = restored(here, tmp_path / "out", program_only=True, **options)
    prompts = [pair.prompt for pair in split_by_prompt(read_pairs(pairs), 0)[0]]
    lost = last_outputs(MODEL, prompts) - last_outputs(here / "half", prompts)
    for edit in found.restored.program.edits:
        for head, vector in enumerate(vectors(edit)):
            u, s, v = np.linalg.svd(lost[edit.layer, :, head], full_matrices=False)
            expected = sum(u[:, i].mean() * s[i] * v[i] for i in range(min(components, len(s))))
            np.testing.assert_allclose(vector, expected, atol=2e-5)
    assert found.plain()["parameters"] == {"trained": 0, "added": None}
    assert (found.plain()["steps"], found.plain()["held_out_losses"]) == (0, [])


def last_outputs(folder: Path, prompts: Sequence[str]) -> Any:
    """What all heads put out at the last token: float64 [layers, prompts, heads, dim]."""
    model, seen = load(folder), [[] for _ in range(LAYERS)]
    for layer, block in enumerate(model.model.layers):
        block.self_attn.o_proj.register_forward_pre_hook(
            lambda _, inputs, layer=layer: seen[layer].append(inputs[0][0, -1].double().numpy())
        )
    for prompt in prompts:
        logits(model, ids(prompt))
    return np.array(seen).reshape(LAYERS, len(prompts), HEADS, DIM)


@pytest.mark.parametrize(("asked", "count"), [(3, 3), ("all", 32), (32, 32)])
def test_so_many_heads_as_are_asked_for(asked: Any, count: int, here: Path, tmp_path: Path):
    found = restored(here, tmp_path / "out", epochs=0, top_heads=asked, program_only=True)
    assert len(found.plain()["heads"]) == count
    assert sum(int(vectors(edit).any(1).sum()) for edit in found.restored.program.edits) == count


def test_components_that_do_not_help_are_written_with_a_note(here: Path, tmp_path: Path):
    found = restored(here, tmp_path / "out", epochs=0, program_only=True)
    assert found.restored.loss.restored > found.restored.loss.pruned
    assert any("the lost components alone do not help" in note for note in found.notes)


def test_where_restoring_does_not_help_nothing_is_written(here: Path, tmp_path: Path):
    """Steps that are far too large keep the components, which alone do not help."""
    with pytest.raises(CheckFailed, match=r"restoring does not help: the held-out loss is .* Give more data"):
        restored(here, tmp_path / "out", lr=1000.0)
    assert not any(tmp_path.iterdir())


# ---- contrasts --------------------------------------------------------------------------


def test_pairs_say_which_heads_matter_and_are_judged_by(here: Path, tmp_path: Path):
    pairs = write_rows(tmp_path / "pairs.jsonl", [vars(pair) for pair in read_pairs(MODEL / "pairs.jsonl")[:60]])
    found = restored(here, tmp_path / "out", pairs=pairs, epochs=0, program_only=True).plain()
    assert np.array(found["importance"]).max() > 0.8  # a positive and a negative word differ
    held_out = split_by_prompt(read_pairs(pairs), 0)[1]
    assert found["accuracy"]["dense"] == pytest.approx(right(load(MODEL), held_out))
    assert found["accuracy"]["pruned"] == pytest.approx(right(load(here / "half"), held_out))


def right(model: Any, pairs: Sequence[Any]) -> float:
    """How often the positive side is likelier, by plain transformers."""

    def surprise_of(prompt: str, side: str) -> float:
        sample = Sample(prompt, side, "")
        return surprise(model, [sample]) * (ids(prompt + side).shape[1] - ids(prompt).shape[1])

    wins = [surprise_of(pair.prompt, pair.positive) < surprise_of(pair.prompt, pair.negative) for pair in pairs]
    return sum(wins) / len(wins)


def test_heads_that_tell_nothing_are_chosen_with_a_warning(here: Path, tmp_path: Path):
    same = [{"prompt": row["prompt"], "positive": " The end.", "negative": " The end!"} for row in ROWS[:12]]
    rng = np.random.default_rng(0)
    pairs = [{**row, "positive": row["negative"], "negative": row["positive"]} if rng.random() < 0.5 else row
             for row in same]  # fmt: skip
    found = restored(here, tmp_path / "out", pairs=write_rows(tmp_path / "pairs.jsonl", pairs), epochs=0,
                     program_only=True)  # fmt: skip
    assert any("no head tells the contrasts apart better than luck may" in note for note in found.notes)


@pytest.mark.parametrize(
    ("figure", "share"),
    [
        (Recovery(1.0, 3.0, 2.5), 0.25),
        (Recovery(1.0, 3.0, 3.5), -0.25),
        (Recovery(1.0, 1.0, 0.5), None),
        (Recovery(1.0, 0.5, 0.5), None),
        (Recovery(0.8, 0.6, 0.7, rising=True), 0.5),
        (Recovery(0.8, 0.9, 0.85, rising=True), None),
    ],
)
def test_the_part_of_what_was_lost(figure: Recovery, share: float | None):
    assert figure.share == (None if share is None else pytest.approx(share))


# ---- pruned in other ways ---------------------------------------------------------------


def test_two_of_four_stays_that(here: Path, tmp_path: Path):
    found = restored(here, tmp_path / "out", "2:4", top_heads="all")
    assert found.pruning.kind == "2:4"
    rows = [row for row in found.plain()["sparsity"] if "_proj" in row["name"]]
    assert {(row["pattern"], row["pattern_after"]) for row in rows} == {("2:4", "2:4")}


def test_heads_that_nothing_reads_get_nothing(here: Path, tmp_path: Path):
    found = restored(here, tmp_path / "out", "silent", top_heads="all", program_only=True)
    assert found.pruning.kind == "structured"
    for layer in range(LAYERS):
        weight = load_file(here / "silent" / "model.safetensors")[f"model.layers.{layer}.self_attn.o_proj.weight"]
        read = weight.any(0).view(HEADS, DIM).any(1)
        assert not read.all()
        assert [head for at, head in found.plain()["heads"] if at == layer] == read.nonzero()[:, 0].tolist()


def test_heads_of_a_smaller_model_are_known_by_their_rows_or_a_map(here: Path, tmp_path: Path):
    options: dict[str, Any] = {"epochs": 0, "top_heads": "all"}
    found = restored(here, tmp_path / "out", "smaller", **options)
    heads = found.plain()["head_map"]
    assert found.certificate is not None
    assert all(len(kept) < HEADS and kept == sorted(kept) for kept in heads)
    assert found.plain()["importance"] is not None
    assert np.array(found.plain()["importance"]).shape == (LAYERS, len(heads[0]))
    given = tmp_path / "map.json"
    given.write_text(json.dumps(heads))
    same = restored(here, tmp_path / "same", "smaller", head_map=given, program_only=True, **options)
    assert same.restored.program == found.restored.program
    given.write_text(json.dumps([kept[::-1] for kept in heads]))
    other = restored(here, tmp_path / "other", "smaller", head_map=given, program_only=True, **options)
    assert other.restored.program != found.restored.program


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sixteen_bits_are_kept_and_certified_in_float32(dtype: str, here: Path, tmp_path: Path):
    folders = [narrowed(folder, tmp_path / folder.name, dtype) for folder in (MODEL, here / "half")]
    found = restored(here, tmp_path / "out", str(folders[1]), dense=str(folders[0]))
    assert found.certificate is not None
    assert (found.certificate.stored, found.certificate.dtype, found.certificate.passed) == (dtype, "float32", True)
    assert {str(tensor.dtype) for tensor in stored(tmp_path / "out").values()} == {f"torch.{dtype}"}


def narrowed(model: Path, folder: Path, dtype: str) -> Path:
    folder.mkdir()
    for path in model.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    tensors = {name: tensor.to(getattr(torch, dtype)) for name, tensor in stored(model).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "torch_dtype": dtype}))
    return folder


# ---- forms and targets ------------------------------------------------------------------


def test_code_carries_it_too(here: Path, tmp_path: Path):
    found = restored(here, tmp_path / "out", form="model-code")
    assert found.certificate is not None
    assert found.plain()["parameters"]["added"] == len(found.restored.program.edits) * HEADS * DIM
    assert verify(tmp_path / "out", base=str(here / "half"), settings=CPU).passed
    assert not any("zeros_after" in row for row in found.plain()["sparsity"])


def test_a_gguf(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    use_converter(monkeypatch, tmp_path / "converter")
    found = restored(here, tmp_path / "out", form="gguf")
    assert found.certificate is not None
    assert [path.suffix for path in (tmp_path / "out").glob("*.gguf")] == [".gguf"]
    assert found.plain()["parameters"]["added"] == LAYERS * (96 + 96 + 48 + 48)


@pytest.mark.parametrize(
    ("architecture", "target", "carrier", "layers"),
    [("qwen2", "transformers", "llama", 2), ("phi3", "llama.cpp", "llama", 2), ("qwen3", "llama.cpp", "qwen3", 4)],
)
def test_a_model_is_expressed_as_another_or_gets_layers(
    architecture: str, target: str, carrier: str, layers: int, here: Path, tmp_path: Path
):
    """The zeros of each matrix are told by what became of it, whatever its name and place."""
    dense = tmp_path / "dense"
    Tiny(architecture, vocabulary=616, biases=False).save(dense)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (dense / name).write_bytes((MODEL / name).read_bytes())
    if architecture == "phi3":
        magnitude(dense, tmp_path / "pruned")
    else:
        PRUNERS["2:4"](dense, tmp_path / "pruned")
    short = write_rows(tmp_path / "data.jsonl", [{**row, "response": row["response"][:40]} for row in ROWS])
    found = restored(here, tmp_path / "out", str(tmp_path / "pruned"), dense=str(dense), data=short, target=target,
                     settings=replace(CPU, max_length=64), lr=0.2)  # fmt: skip
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["model_type"], config["num_hidden_layers"]) == (carrier, layers)
    rows = found.plain()["sparsity"]
    assert all(row["zeros"] <= row["zeros_after"] and row["pattern"] == row["pattern_after"] for row in rows)
    assert sum(row["zeros"] for row in rows) > 1000
    before, after = stored(tmp_path / "pruned"), stored(tmp_path / "out")
    added = sum(tensor.numel() for tensor in after.values()) - sum(tensor.numel() for tensor in before.values())
    assert found.plain()["parameters"]["added"] == added


def test_steering_and_restoring_compose(here: Path, tmp_path: Path):
    pruned = str(here / "half")
    restored(here, tmp_path / "restored.safetensors", program_only=True)
    steer(pruned, MODEL / "pairs.jsonl", tmp_path / "steered.safetensors", top_k=5, alpha=0.5, program_only=True,
          neutral=MODEL / "neutral.txt", settings=CPU)  # fmt: skip
    programs = [tmp_path / "restored.safetensors", tmp_path / "steered.safetensors"]
    both = build(pruned, programs, tmp_path / "out", texts=MODEL / "neutral.txt", settings=CPU)
    assert both.certificate is not None
    assert both.certificate.passed
    assert {edit.kind for edit in both.compiled.program.edits} == {"shift", "scale"}
    before, after = stored(here / "half"), stored(tmp_path / "out")
    assert not any(bool(after[name][tensor == 0].any()) for name, tensor in before.items())


# ---- the state of the training ----------------------------------------------------------


def test_a_state_that_is_named_stays_and_is_gone_on_from(here: Path, tmp_path: Path):
    whole = restored(here, tmp_path / "whole", epochs=2, program_only=True)
    options: dict[str, Any] = {"program_only": True, "checkpoint": tmp_path / "state"}
    restored(here, tmp_path / "begun", epochs=1, **options)
    assert (tmp_path / "state").is_file()
    more = restored(here, tmp_path / "more", epochs=2, **options)
    assert more.restored.trained.step == whole.restored.trained.step
    assert (tmp_path / "state").is_file()


def test_training_that_breaks_keeps_its_last_good_state_beside_the_output(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    begun = tmp_path / "out.training.safetensors"
    restored(here, tmp_path / "other", checkpoint=begun, program_only=True)
    good = begun.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(Schedule, "rate", lambda *_: float("nan"))
        with pytest.raises(CheckFailed, match="nothing was kept yet"):
            restored(here, tmp_path / "new", epochs=4)
        with pytest.raises(CheckFailed, match=r"stopped after step 5: .*data.jsonl:\d+.* after step 4 is kept in"):
            restored(here, tmp_path / "out", epochs=4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", begun.name]
    assert begun.read_bytes() == good
    restored(here, tmp_path / "out", epochs=4, program_only=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "out"]


# ---- for people -------------------------------------------------------------------------


def test_what_people_read_is_short_and_says_what_is_back(here: Path, tmp_path: Path):
    arguments = ["restore", here / "2:4", "--dense", MODEL, "--data", here / "data.jsonl", "-o", tmp_path / "out",
                 "--epochs", "1", "--top-heads", "3", "--device", "cpu"]  # fmt: skip
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    assert [line.split("│")[1:6] for line in result.stdout.splitlines() if "layers.*.mlp.up_proj" in line] == [
        [" model.layers.*.mlp.up_proj      ", " 4        ", " 50.0%  ", " 50.0%    ", " 2:4     "]
    ]
    order = ["Zeros by kind of matrix", "The 3 heads that got a constant", "What is back", "3 heads: 66 numbers",
             "It holds.", f"Written: {tmp_path / 'out'}"]  # fmt: skip
    places = [result.stdout.index(words) for words in order]
    assert all(first < second for first, second in pairwise(places))
