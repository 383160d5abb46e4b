"""restore with what it cannot use: a clear error before any work, the right exit code, and not a file more."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from austeer.compiler.head_map import HeadMap
from austeer.compiler.verbs.demo import MODEL
from benchmarks.pruners import magnitude, structured
from tests.compiler.test_cli import edit_config, refused
from tests.tiny import Tiny

ROWS = [{"prompt": f"Tom saw {number} cats.", "response": f" He had {number} fish."} for number in range(12)]


@pytest.fixture
def pruned(tmp_path: Path) -> Path:
    magnitude(MODEL, tmp_path / "pruned")
    return tmp_path / "pruned"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return written(tmp_path / "data.jsonl", ROWS)


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever loads a model fails the test."""

    def load(*_: Any, **__: Any) -> None:
        pytest.fail("a model was loaded")

    monkeypatch.setattr("austeer.compiler.verbs.restoring.load_model", load)


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def says(folder: Path, *arguments: object, code: int = 1, dense: Path = MODEL, pruned: Path | None = None) -> str:
    """The message of a refusal."""
    asked = ["restore", pruned or folder / "pruned", "--dense", dense, "--data", folder / "data.jsonl"]
    return refused(folder, *asked, "-o", folder / "out", "--device", "cpu", *arguments, code=code)


# ---- options ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message", "code"),
    [
        (["--top-heads", "x"], "'x' is neither a whole number nor all", 2),
        (["--top-heads", 0], "--top-heads must be at least 1, got 0", 2),
        (["--top-heads", 33], "--top-heads 33 is more than the 32 heads of all layers; or say all", 2),
        (["--components", 0], "--components must be at least 1", 2),
        (["--epochs", -1], "--epochs must be 0, for lost components alone, or more, got -1", 2),
        (["--lr", 0], "--lr must be a number above 0, and at most 1e+37, got 0", 2),
        (["--lr", -1], "--lr must be a number above 0", 2),
        (["--lr", "nan"], "--lr must be a number above 0", 2),
        (["--lr", 1e39], "--lr must be a number above 0, and at most 1e+37, got 1e+39", 2),
        (["--batch-size", 0], "--batch-size must be at least 1", 2),
        (["--picture", "heads.gif"], "writes .png and .svg files", 2),
        (["--target", "abacus"], "abacus", 2),
        (["--form", "lora"], "a Shift is a constant", 1),
        (["--form", "gguf", "--target", "vllm"], "reads no GGUF", 2),
        (["--system", "Be kind."], "--system needs --chat", 2),
        (["--chat", "--raw"], "exclude each other", 2),
        (["--pairs", "gone.jsonl"], "cannot be read", 1),
        (["--head-map", "gone.json"], "cannot be read", 1),
        (["--checkpoint", "gone/state"], "there is no directory", 1),
    ],
)
@pytest.mark.usefixtures("pruned", "data", "no_model")
def test_options_that_cannot_be_meant(options: list[object], message: str, code: int, tmp_path: Path):
    assert message in says(tmp_path, *options, code=code)


@pytest.mark.usefixtures("pruned", "data", "no_model")
def test_a_form_that_holds_no_constant_names_the_way_out(tmp_path: Path):
    assert "Or write the program alone with --program-only" in says(tmp_path, "--form", "lora")


@pytest.mark.usefixtures("pruned", "data", "no_model")
def test_the_output_is_not_overwritten(tmp_path: Path):
    (tmp_path / "out").write_text("mine")
    assert "exists already" in says(tmp_path)


@pytest.mark.usefixtures("data", "no_model")
def test_constants_that_differ_between_heads_of_a_group_are_refused_now(tmp_path: Path):
    """They have no place in vLLM's qwen3_moe, whose one bias is that of the values."""
    Tiny("qwen3_moe", vocabulary=616, biases=False).save(tmp_path / "dense")
    message = says(tmp_path, "--target", "vllm", dense=tmp_path / "dense", pruned=tmp_path / "dense")
    assert "the vector differs between heads that share one value head" in message


# ---- models -----------------------------------------------------------------------------


def fewer_layers(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if ".layers.3." not in name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    edit_config(folder, num_hidden_layers=3)


def other_tokenizer(folder: Path) -> None:
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokens = list(tokenizer["model"]["vocab"])[-2:]
    ids = [tokenizer["model"]["vocab"][token] for token in tokens]
    tokenizer["model"]["vocab"] |= dict(zip(tokens, ids[::-1], strict=True))
    path.write_text(json.dumps(tokenizer))


def cut_short(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def without_config(folder: Path) -> None:
    (folder / "config.json").unlink()


BAD_MODELS: dict[str, tuple[Callable[[Path], None], str]] = {
    "other layer count": (fewer_layers, "layers"),
    "other tokenizer": (other_tokenizer, "the tokenizers of the dense and the pruned model differ"),
    "cut short": (cut_short, "model.safetensors"),
    "without config.json": (without_config, "config.json"),
}


@pytest.mark.parametrize("case", BAD_MODELS)
@pytest.mark.usefixtures("data", "no_model")
def test_pruned_models_that_do_not_fit(case: str, pruned: Path, tmp_path: Path):
    spoil, message = BAD_MODELS[case]
    spoil(pruned)
    assert message in says(tmp_path)


@pytest.mark.usefixtures("pruned", "data", "no_model")
def test_dense_and_pruned_swapped(tmp_path: Path):
    message = says(tmp_path, dense=tmp_path / "pruned", pruned=MODEL)
    assert "the dense and the pruned model are swapped" in message
    assert "fewer zeros" in message


@pytest.mark.usefixtures("data", "no_model")
def test_not_pruned_at_all(tmp_path: Path):
    assert "is not pruned" in says(tmp_path, pruned=MODEL)


@pytest.mark.usefixtures("data", "no_model")
def test_a_model_that_is_not_there(tmp_path: Path):
    assert "gone" in says(tmp_path, pruned=tmp_path / "gone")


@pytest.mark.usefixtures("data", "no_model")
@pytest.mark.parametrize("heads", [[[0, 1]], [[0, 9, 2, 3]] * 4, "all"])
def test_a_map_of_other_heads(heads: HeadMap, tmp_path: Path):
    structured(MODEL, tmp_path / "pruned")
    (tmp_path / "map.json").write_text(json.dumps(heads))
    assert str(tmp_path / "map.json") in says(tmp_path, "--head-map", tmp_path / "map.json")


@pytest.mark.usefixtures("data")
@pytest.mark.parametrize("epochs", [0, 1])
def test_a_pruned_model_that_computes_no_numbers(epochs: int, pruned: Path, tmp_path: Path):
    tensors = load_file(pruned / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, pruned / "model.safetensors", metadata={"format": "pt"})
    message = says(tmp_path, "--epochs", epochs, "--top-heads", "all")
    assert "pruned: what the heads of layer 2 put out is not finite" in message


# ---- data -------------------------------------------------------------------------------

LINE = json.dumps(ROWS[0])
BAD_DATA: dict[str, tuple[str | None, str]] = {
    "missing": (None, "cannot be read"),
    "empty": ("\n", "holds no samples"),
    "without responses": (f'{LINE}\n{{"prompt": "Tom was"}}\n', ":2: no 'response'"),
    "pairs": ('{"prompt": "a", "positive": "b", "negative": "c"}\n', ":1: no 'response'"),
    "not JSON": (f"{LINE}\n{{oops\n", ":2: not JSON"),
    "too few prompts": (f"{LINE}\n" * 20, "1 different prompts are too few"),
}


@pytest.mark.parametrize("case", BAD_DATA)
@pytest.mark.usefixtures("pruned", "no_model")
def test_data_that_cannot_be_used(case: str, tmp_path: Path):
    content, message = BAD_DATA[case]
    if content is not None:
        (tmp_path / "data.jsonl").write_text(content)
    found = says(tmp_path)
    assert message in found
    assert str(tmp_path / "data.jsonl") in found


@pytest.mark.usefixtures("pruned")
@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (ROWS[:9], "at least 10 different prompts"),
        ([{**row, "response": ""} for row in ROWS], "no sample is left to fit to"),
        ([{**row, "prompt": row["prompt"] * 99} for row in ROWS], "give more samples, or a larger --max-length"),
        ([{**row, "response": " He was happy."} for row in ROWS], "no other answer can be set against the right one"),
    ],
)
def test_samples_that_leave_nothing_to_do(rows: list[dict[str, Any]], message: str, tmp_path: Path):
    written(tmp_path / "data.jsonl", rows)
    assert message in says(tmp_path)
