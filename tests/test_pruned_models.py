"""A pruned model stays pruned: head shifts in every layer, for every target, form and architecture, fill no zero.

What each target does is said by the table of tests/passes/cells.py, so that a product that refuses everything, or
takes another way than that, cannot pass.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from austeer.compiler import Edit, Program, Refused, Scale, Shift, UsageError, interpret
from austeer.compiler.gguf import read_gguf
from austeer.compiler.verbs.bases import open_base
from austeer.compiler.verbs.build import build
from austeer.compiler.verbs.common import Compiled
from austeer.targets.llama_cpp import SCRIPT, VARIABLE, convert
from austeer.targets.tables import TARGETS
from tests.engines.llama_cpp import use_converter
from tests.passes.cells import ARCHITECTURES, CELLS, shift
from tests.tiny import VARIANTS, Tiny, load, logits, on_disk, scratch, stored, tokens

BLOCK = re.compile(r"\.(?:layers|h)\.(\d+)\.")
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}  # of phi3


# ---- pruned models --------------------------------------------------------------------------


def half_of_each_row(weight: torch.Tensor) -> torch.Tensor:
    return _without_smallest(weight, weight.shape[-1] // 2)


def two_of_four(weight: torch.Tensor) -> torch.Tensor:
    return _without_smallest(weight.reshape(-1, 4), 2).reshape(weight.shape)


def rows_and_columns(weight: torch.Tensor) -> torch.Tensor:
    """As where heads, neurons and units of the residual are removed by zeros, and the shape is kept."""
    weight = weight.clone()
    weight[: len(weight) // 4] = 0
    weight[..., : weight.shape[-1] // 4] = 0
    return weight


def _without_smallest(rows: torch.Tensor, count: int) -> torch.Tensor:
    """By a product with a mask, as pruners do it: half of the zeros are negative."""
    smallest = rows.abs().argsort(-1)[..., :count]
    return rows * torch.ones_like(rows).scatter(-1, smallest, 0)


# Each in another dtype too.
PRUNERS: Mapping[str, tuple[Callable[[torch.Tensor], torch.Tensor], torch.dtype]] = {
    "unstructured": (half_of_each_row, torch.float32),
    "2:4": (two_of_four, torch.bfloat16),
    "structured": (rows_and_columns, torch.float16),
}


@cache
def pruned(tiny: Tiny, how: str) -> Path:
    """The model with all matrices of its blocks pruned, in a folder of its own. Do not change it."""
    prune, dtype = PRUNERS[how]
    folder = scratch() / "pruned"
    folder.mkdir()
    for path in on_disk(tiny).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(folder / "model.safetensors").items()}
    changed = {name: prune(tensor) if of_block(name, tensor) else tensor for name, tensor in tensors.items()}
    save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def of_block(name: str, tensor: torch.Tensor) -> bool:
    return tensor.ndim > 1 and BLOCK.search(name) is not None


def restored(tiny: Tiny, base: Path, folder: Path, *, alike: bool = False) -> Path:
    """A program as `restore` makes it: a shift of all heads in every layer."""
    edits = [shift(tiny, "heads", layer, alike=alike) for layer in range(tiny.layers)]
    return saved(edits, base, folder / "restored.safetensors")


def saved(edits: list[Any], base: Path, path: Path) -> Path:
    Program.of(edits, model=base).save(path)
    return path


# ---- what is expected, from the table ---------------------------------------------------------


def way(target: str, tiny: Tiny) -> str:
    """The letter of the table for a shift at heads; "-" too where the target loses a bias that the model has."""
    letters = CELLS[target].split()[ARCHITECTURES.split().index(tiny.architecture)]
    at_heads, _, at_ffn, _ = letters
    lost = tiny.native(Shift, 0, "heads") and at_heads not in "BL"
    lost |= tiny.native(Shift, tiny.layers - 1, "ffn") and at_ffn not in "BL"
    return "-" if lost else at_heads


def new_names(name: str, letter: str) -> list[str]:
    """Where a tensor of the base is in the output: a split layer is two, and a llama has no fused maps."""
    if letter == "S":
        later = not ("self_attn" in name or "input_layernorm" in name)
        return [BLOCK.sub(lambda found: f".layers.{2 * int(found[1]) + later}.", name)]
    parts = next((parts for fused, parts in FUSED.items() if letter == "L" and fused in name), None)
    return [re.sub(r"(qkv|gate_up)_proj", part, name) for part in parts] if parts else [name]


REFUSED = (
    r"cannot carry this program.*\n  "
    "(shift at layer 0, site heads: |the base has |.* does not have the architecture|.* leaves out )"
)
PAIRS = [(name, target) for name in VARIANTS for target in TARGETS]
CARRIED = [(name, target) for name, target in PAIRS if way(target, VARIANTS[name]) != "-"]


def test_the_table_says_no_to_some() -> None:
    ways = {pair: way(pair[1], VARIANTS[pair[0]]) for pair in PAIRS}
    assert Counter(ways.values()) == {"B": 103, "L": 27, "S": 2, "V": 3, "-": 72}
    assert [name for name, target in PAIRS if (name, target) not in CARRIED and target == "transformers"] == ["mixtral"]


# ---- the form checkpoint ------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "target"), sorted({*PAIRS} - {*CARRIED}))
def test_what_is_refused(name: str, target: str, tmp_path: Path) -> None:
    base = pruned(VARIANTS[name], "unstructured")
    program = restored(VARIANTS[name], base, tmp_path)
    with pytest.raises(Refused, match=REFUSED):
        build(str(base), [program], tmp_path / "out", target=target)


@pytest.mark.parametrize("how", PRUNERS)
@pytest.mark.parametrize(("name", "target"), CARRIED)
def test_no_target_fills_a_zero(name: str, target: str, how: str, tmp_path: Path) -> None:
    tiny = VARIANTS[name]
    base, letter, out = pruned(tiny, how), way(target, tiny), tmp_path / "out"
    build(str(base), [restored(tiny, base, tmp_path, alike=letter == "V")], out, target=target)
    declared = {entry["tensor"] for entry in json.loads((out / "austeer.json").read_text())["lowering"]}
    before, after = stored(base), stored(out)
    for old, tensor in before.items():
        names = new_names(old, letter)
        found = torch.cat([after.pop(name) for name in names])
        assert (found.shape, found.dtype) == (tensor.shape, tensor.dtype), old
        if old.endswith(".bias") and names[0] in declared:
            assert bits(found) != bits(tensor), old
            declared -= {*names}
        else:
            assert bits(found) == bits(tensor), old
        assert not of_block(old, tensor) or is_pruned(found, how), old
    assert {*after} >= declared, "only biases are edited"
    assert letter == "S" or all(tensor.ndim == 1 and new.endswith(".bias") for new, tensor in after.items())


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def is_pruned(weight: torch.Tensor, how: str) -> bool:
    if how == "2:4":
        return bool(((weight.reshape(-1, 4) == 0).sum(-1) == 2).all())
    return bool((weight == 0).float().mean() > 0.2)


# ---- the other forms ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
def test_model_code_leaves_every_tensor_as_it_is(name: str, tmp_path: Path) -> None:
    tiny = VARIANTS[name]
    base = pruned(tiny, "2:4")
    program = restored(tiny, base, tmp_path)
    for target in TARGETS:
        out = tmp_path / target
        if target not in ("transformers", "vllm"):
            with pytest.raises(UsageError, match="runs no model code; transformers and vllm do"):
                build(str(base), [program], out, target=target, form="model-code")
            continue
        build(str(base), [program], out, target=target, form="model-code")
        before, after = stored(base), stored(out)
        assert all(bits(after.pop(old)) == bits(tensor) for old, tensor in before.items())
        assert len(after) == tiny.layers
        assert all(".austeer." in new and tensor.ndim == 1 for new, tensor in after.items())


@pytest.mark.parametrize("name", VARIANTS)
def test_no_adapter_holds_a_shift(name: str, tmp_path: Path) -> None:
    tiny = VARIANTS[name]
    base = pruned(tiny, "unstructured")
    program = restored(tiny, base, tmp_path)
    for target in TARGETS:
        with pytest.raises(Refused, match=rf"{tiny.layers} of .* cannot be an adapter|does not serve a PEFT adapter"):
            build(str(base), [program], tmp_path / "out", target=target, form="lora")
    assert not (tmp_path / "out").exists()


# ---- the form gguf --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("target", ["llama.cpp", "portable"])
def test_what_is_carried_as_gguf(target: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / SCRIPT).write_text("")  # nothing is written, so nothing is asked of the converter
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    tiny = VARIANTS[name]
    base, letter = pruned(tiny, "unstructured"), way(target, tiny)
    program = Program.load(restored(tiny, base, tmp_path, alike=letter == "V"))
    if letter != "-" and tiny.architecture != "gpt2":
        assert Compiled.of(program, open_base(str(base)), target, "gguf").plan.lowering
        return
    with pytest.raises(Refused, match=REFUSED if letter == "-" else "takes it for granted that a gpt2 has 4 × 24"):
        Compiled.of(program, open_base(str(base)), target, "gguf")


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.parametrize(("name", "how"), [("llama-unbiased", "2:4"), ("phi3", "unstructured"),
                                           ("qwen3-unbiased", "structured")])  # fmt: skip
def test_no_gguf_fills_a_zero(name: str, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_converter(monkeypatch, tmp_path / "converter")
    tiny = VARIANTS[name]
    base, letter = pruned(tiny, how), way("llama.cpp", tiny)
    program = restored(tiny, base, tmp_path)
    kind = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}[PRUNERS[how][1]]
    convert(base, tmp_path / "base.gguf", kind)
    build(str(base), [program], tmp_path / "out", form="gguf")
    before, after = matrices(tmp_path / "base.gguf"), matrices(next((tmp_path / "out").glob("*.gguf")))
    if letter == "L":  # another converter: other names, and other orders of rows
        assert sorted(rows_of(after)) == sorted(rows_of(before))
    else:
        assert all(after.pop(in_gguf(old, letter)) == data for old, data in before.items())
        assert (after != {}) == (letter == "S")
    if letter == "B":
        build(str(tmp_path / "base.gguf"), [program], tmp_path / "patched", form="gguf")
        assert matrices(next((tmp_path / "patched").glob("*.gguf"))) == before


def matrices(path: Path) -> dict[str, list[bytes]]:
    """The rows of every matrix of the blocks of a GGUF."""
    found, data = read_gguf(path), path.read_bytes()
    return {
        name: [data[start : start + step] for start in range(tensor.offset, tensor.offset + tensor.nbytes, step)]
        for name, tensor in found.tensors.items()
        if name.startswith("blk.") and len(tensor.shape) > 1
        for step in [tensor.nbytes // tensor.shape[0]]
    }


def rows_of(tensors: Mapping[str, list[bytes]]) -> Iterator[bytes]:
    return (row for rows in tensors.values() for row in rows)


def in_gguf(name: str, letter: str) -> str:
    """A split layer is two: of its matrices those of the attention are in the first."""
    _, layer, rest = name.split(".", 2)
    return f"blk.{2 * int(layer) + rest.startswith('ffn')}.{rest}" if letter == "S" else name


# ---- steering and restoring in one build ------------------------------------------------------------


TOGETHER = [
    ("llama", "transformers"), ("llama-unbiased", "transformers"), ("gpt2", "transformers"), ("mistral", "portable"),
    ("phi3", "transformers"), ("qwen3-unbiased", "vllm"), ("qwen3_moe-sparse", "sglang"), ("gemma2", "sglang"),
]  # fmt: skip


@pytest.mark.parametrize("order", [("restored", "steered"), ("steered", "restored")], ids=" ".join)
@pytest.mark.parametrize("how", ["unstructured", "2:4"])
@pytest.mark.parametrize(("name", "target"), TOGETHER)
def test_steering_and_restoring_go_together(
    name: str, target: str, how: str, order: tuple[str, ...], tmp_path: Path
) -> None:
    tiny = VARIANTS[name]
    base, letter, out = pruned(tiny, how), way(target, tiny), tmp_path / "out"
    restored(tiny, base, tmp_path)
    saved(list(steering(tiny)), base, tmp_path / "steered.safetensors")
    programs = [tmp_path / f"{one}.safetensors" for one in order]
    report = build(str(base), programs, out, target=target)
    assert any("layer 0, site heads: edited by several programs" in note for note in report.notes)
    before, after = stored(base), stored(out)
    for old, tensor in before.items():
        found = torch.cat([after[new] for new in new_names(old, letter)])
        assert not of_block(old, tensor) or not found[tensor == 0].any(), old
    if how == "unstructured":  # in float32
        check_within(base, out, *map(Program.load, programs))


def steering(tiny: Tiny) -> Iterator[Edit]:
    """What `steer` finds; a factor is negative, which turns zeros over."""
    for layer in range(tiny.layers):
        yield Scale(layer, "heads", (0, 5, 9), (4.0, -2.0, 1.0))
        yield Scale(layer, "ffn", (1, 3, 8), (2.0, -3.0, 0.5))


def check_within(base: Path, out: Path, first: Program, second: Program) -> None:
    """The compiled model does what the second program does to what the first one did; in turn it is another thing."""
    model, ids = load(base), tokens()
    expected, reverse = (nested(model, ids, *pair) for pair in ((first, second), (second, first)))
    scale = expected.abs().max()
    assert (logits(load(out), ids) - expected).abs().max() <= 1e-5 * scale
    assert (reverse - expected).abs().max() > 0.01 * scale


def nested(model: Any, ids: torch.Tensor, first: Program, second: Program) -> torch.Tensor:
    with interpret(model, first), interpret(model, second):
        return logits(model, ids)
