"""The command line: bad input ends in a clear error, exit code 1 or 2, and costs nobody a file."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from austeer.compiler import Program, Scale, Shift
from austeer.compiler.cli import main
from austeer.compiler.tensors import read_header
from tests.tiny import Tiny

PAIR = {"prompt": "It was", "positive": " good", "negative": " bad"}


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(folder: Path, *arguments: object, code: int = 1) -> str:
    """Runs a command that must fail without a traceback and without a trace; returns its message."""
    before = files(folder)
    result = run(*arguments)
    assert result.exit_code == code, result.output
    assert isinstance(result.exception, SystemExit)
    assert "Traceback" not in result.output
    assert files(folder) == before
    return result.output


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    Tiny("llama", layers=1).save(folder)
    return folder


@pytest.fixture
def program(model: Path, tmp_path: Path) -> Path:
    path = tmp_path / "program.safetensors"
    Program.of([Scale(0, "ffn", (1,), (0.5,))], model=model).save(path)
    return path


# --- pairs files -------------------------------------------------------------

LINE = json.dumps(PAIR)
BAD_PAIRS: dict[str, tuple[bytes | None, str]] = {
    "missing": (None, "cannot be read"),
    "empty": (b"\n", "holds no pairs"),
    "not JSON on line 3": (f"{LINE}\n{LINE}\n{{oops\n".encode(), ":3: not JSON"),
    "missing key": (b'{"prompt": "a", "positive": "b"}\n', "'negative'"),
    "wrong type": (b'{"prompt": "a", "positive": "b", "negative": 3}\n', "must be a string"),
    "not UTF-8": (f"{LINE}\n".encode() + b'{"prompt": "\xff"}\n', ":2: not UTF-8"),
}


@pytest.mark.parametrize("case", BAD_PAIRS)
def test_bad_pairs(case: str, model: Path, tmp_path: Path):
    content, message = BAD_PAIRS[case]
    pairs = tmp_path / "pairs.jsonl"
    if content is not None:
        pairs.write_bytes(content)
    output = refused(tmp_path, "steer", model, "--pairs", pairs, "-o", tmp_path / "out")
    assert message in output
    assert str(pairs) in output


# --- models ------------------------------------------------------------------


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def shard(folder: Path) -> None:
    """Turns a single-file model into two shards with an index."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for part, held in parts.items():
        save_file({name: tensors[name] for name in held}, folder / part, metadata={"format": "pt"})
    places = {name: part for part, held in parts.items() for name in held}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def edit_index(folder: Path, changes: dict[str, str]) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] |= changes
    path.write_text(json.dumps(index))


def without_shard(folder: Path) -> None:
    shard(folder)
    (folder / "b.safetensors").unlink()


def cut_short(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def phantom(folder: Path) -> None:
    shard(folder)
    edit_index(folder, {"phantom.weight": "a.safetensors"})


def escaping(folder: Path) -> None:
    shard(folder)
    edit_index(folder, {"model.norm.weight": "../model.safetensors"})


def lying(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"shape":[20]', b'"shape":[21]', 1))


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def adapter(folder: Path) -> None:
    (folder / "config.json").rename(folder / "adapter_config.json")


def gguf(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model.gguf")


BAD_MODELS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json"),
    "unknown architecture": (lambda folder: edit_config(folder, model_type="mamba"), "'mamba' is not in the table"),
    "missing shard": (without_shard, "b.safetensors"),
    "shard cut short": (cut_short, "100 of "),
    "phantom tensor": (phantom, "phantom.weight"),
    "index leaves the folder": (escaping, "../model.safetensors"),
    "lying header": (lying, "does not fill"),
    "pickle": (pickled, "safetensors"),
    "quantised": (lambda folder: edit_config(folder, quantization_config={"bits": 4}), "quantise"),
    "adapter": (adapter, "erge"),
    "GGUF": (gguf, "GGUF"),
    "multimodal": (lambda folder: edit_config(folder, vision_config={}), "language model"),
    "own code": (lambda folder: edit_config(folder, auto_map={"AutoModel": "x.Y"}), "auto_map"),
    "sizes of another model": (lambda folder: edit_config(folder, intermediate_size=99), "shape"),
    "config without sizes": (lambda folder: edit_config(folder, hidden_size=None), "'hidden_size'"),
    "text for a size": (lambda folder: edit_config(folder, num_key_value_heads="two"), "num_key_value_heads"),
}


@pytest.mark.parametrize("case", BAD_MODELS)
def test_bad_models(case: str, model: Path, program: Path, tmp_path: Path):
    change, message = BAD_MODELS[case]
    change(model)
    assert message in refused(tmp_path, "build", model, program, "-o", tmp_path / "out")


def test_a_model_that_is_nowhere(program: Path, tmp_path: Path):
    assert "no such" in refused(tmp_path, "build", tmp_path / "nowhere", program, "-o", tmp_path / "out")


@contextmanager
def unprivileged() -> Iterator[None]:
    """Root may read everything, so it becomes nobody for a while."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="needs POSIX users")
def test_unreadable_weights(model: Path, program: Path):
    folder = Path(tempfile.mkdtemp())
    try:
        folder.chmod(0o777)
        shutil.copytree(model, folder / "model")
        shutil.copy(program, folder)
        (folder / "model" / "model.safetensors").chmod(0)
        with unprivileged():
            result = run("build", folder / "model", folder / program.name, "-o", folder / "out")
        assert result.exit_code == 1
        assert re.search(r"model\.safetensors.*(denied|cannot be read)", result.output, re.IGNORECASE)
        assert sorted(path.name for path in folder.iterdir()) == ["model", "program.safetensors"]
    finally:
        shutil.rmtree(folder)


# --- outputs -----------------------------------------------------------------


@pytest.mark.parametrize("kind", ["empty folder", "file", "dangling link"])
def test_output_exists(kind: str, model: Path, program: Path, tmp_path: Path):
    out = tmp_path / "out"
    {"empty folder": out.mkdir, "file": out.touch, "dangling link": lambda: out.symlink_to("gone")}[kind]()
    assert "exists" in refused(tmp_path, "build", model, program, "-o", out)
    assert os.path.lexists(out)


def test_file_size_limit(model: Path, program: Path, tmp_path: Path):
    resource = pytest.importorskip("resource")

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))

    command = [sys.executable, "-m", "austeer.compiler.cli", "build", model, program, "-o", tmp_path / "out"]
    done = subprocess.run(command, preexec_fn=limit, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Nothing was written" in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "program.safetensors"]


def test_disk_full(model: Path, program: Path, tmp_path: Path):
    """On a real file system of 16 KB, in a mount namespace of its own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    build = f"{sys.executable} -m austeer.compiler.cli build {model} {program} -o {disk}/out"
    script = f"mount -t tmpfs -o size=16k none {disk} || exit 99; {build}; code=$?; ls -A {disk}; exit $code"
    try:
        done = subprocess.run(["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("no unshare command here")
    if done.returncode == 99 or "unshare" in done.stderr:
        pytest.skip("mount namespaces are not allowed here")
    assert done.returncode == 1
    assert "the disk is full" in done.stderr
    assert done.stdout == ""  # no output and no litter


# --- options and programs ----------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--top-k", "0", "--top-k"),
        ("--top-k", "21", "20 units"),
        ("--alpha", "nan", "--alpha"),
        ("--max-drift", "0", "--max-drift"),
        ("--site", "mlp", "mlp"),
        ("--site", "heads,mlp", "mlp"),
        ("--segments", "2", "--method fusion"),
        ("--trials", "0", "at least 1"),
        ("--picture", "search.pdf", ".png and .svg"),
    ],
)
def test_impossible_options(option: str, value: str, message: str, model: Path, tmp_path: Path):
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(LINE)
    command = ("steer", model, "--pairs", pairs, "-o", tmp_path / "out", option, value)
    assert message in refused(tmp_path, *command, code=2)


def test_a_site_without_a_fold_is_refused_before_any_model_runs(model: Path, tmp_path: Path):
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(LINE)
    output = refused(
        tmp_path, "steer", model, "--pairs", pairs, "-o", tmp_path / "out", "--site", "ffn", "--site", "layer"
    )
    assert "steering at site residual" in output
    assert "read through a norm" in output
    assert "--program-only" in output


def test_a_program_for_another_model(model: Path, tmp_path: Path):
    other = tmp_path / "other"
    Tiny("llama", layers=2).save(other)
    Program.of([Scale(1, "ffn", (1,), (0.5,))], model=other).save(tmp_path / "other.safetensors")
    output = refused(tmp_path, "build", model, tmp_path / "other.safetensors", "-o", tmp_path / "out")
    assert "layers 2, not 1" in output


def test_a_shift_without_a_bias_is_refused(tmp_path: Path):
    base = tmp_path / "model"
    Tiny("mixtral", layers=1).save(base)
    Program.of([Shift(0, "ffn", [1.0] * 20)], model=base).save(tmp_path / "shift.safetensors")
    output = refused(tmp_path, "build", base, tmp_path / "shift.safetensors", "-o", tmp_path / "out")
    assert "shift at layer 0, site ffn" in output
    assert "no mlp.down_proj.bias in mixtral" in output
    assert "Use Scale at heads" in output  # the way out


def test_a_damaged_program(model: Path, program: Path, tmp_path: Path):
    program.write_bytes(program.read_bytes()[:-1])
    assert "not a program" in refused(tmp_path, "build", model, program, "-o", tmp_path / "out")


# --- what works --------------------------------------------------------------


def test_dry_run_writes_nothing_and_says_what_build_does(model: Path, program: Path, tmp_path: Path):
    before = files(tmp_path)
    plan = json.loads(run("build", model, program, "--dry-run", "--json").stdout)
    assert files(tmp_path) == before
    assert plan["out"] is None
    projection = "model.layers.0.mlp.down_proj"
    assert {job["tensor"] for job in plan["tensors"]} == {f"{projection}.weight", f"{projection}.bias"}

    done = json.loads(run("build", model, program, "-o", tmp_path / "out", "--json").stdout)
    assert done["out"] == str(tmp_path / "out")
    assert {**done, "out": None} == plan
    tensors, _ = read_header(model / "model.safetensors")
    old, new = ((folder / "model.safetensors").read_bytes() for folder in (model, tmp_path / "out"))
    changed = sum(a != b for a, b in zip(old, new, strict=True))
    assert 0 < changed <= plan["bytes_to_rewrite"] <= sum(tensor.nbytes for tensor in tensors.values())


def test_inspect_text_is_a_program_that_build_accepts(model: Path, program: Path, tmp_path: Path):
    text = tmp_path / "program.txt"
    text.write_text(run("inspect", program, "--text").stdout)
    for source, out in ((program, "a"), (text, "b")):
        assert run("build", model, source, "-o", tmp_path / out).exit_code == 0
    assert files(tmp_path / "a")["model.safetensors"] == files(tmp_path / "b")["model.safetensors"]


def test_inspect_json_of_program_and_checkpoint(model: Path, program: Path, tmp_path: Path):
    run("build", model, program, "-o", tmp_path / "out")
    alone = json.loads(run("inspect", program, "--json").stdout)
    compiled = json.loads(run("inspect", tmp_path / "out", "--json").stdout)
    assert alone["edits"] == [{"kind": "scale", "layer": 0, "site": "ffn", "units": [1], "gamma": [0.5]}]
    assert {key: compiled[key] for key in ("sha256", "model", "edits")} == alone
    assert {entry["tensor"] for entry in compiled["lowering"]} == {
        "model.layers.0.mlp.down_proj.weight",
        "model.layers.0.mlp.down_proj.bias",
    }
    for path in (program, tmp_path / "out"):
        assert run("inspect", path).exit_code == 0


def test_errors_with_json_are_json_on_stdout(model: Path, tmp_path: Path):
    result = run("build", model, tmp_path / "gone", "-o", tmp_path / "out", "--json")
    assert result.exit_code == 1
    assert "gone" in json.loads(result.stdout)["error"]


def test_help_is_quick_because_it_imports_nothing_heavy():
    code = "import sys, austeer.compiler.cli as cli; cli.main(['--help'], standalone_mode=False); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "click" in loaded
    assert not loaded & {"torch", "transformers", "numpy", "rich", "huggingface_hub", "safetensors"}
