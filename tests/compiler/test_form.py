"""Inserted layers: what config.json says of them, for every list that a family keeps by layer."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from austeer.compiler import Program, Shift, interpret
from austeer.compiler.architectures import ARCHITECTURES
from austeer.compiler.certificate import greedy
from austeer.compiler.checkpoint import Checkpoint
from austeer.compiler.facts import facts_of
from austeer.compiler.form import ModelForm, Slot, output_config, slots
from austeer.compiler.layout import Layout
from austeer.passes.fold import fold
from austeer.targets.checkpoint import Writing, plan, write
from tests.tiny import CONFIGS, Tiny, load, logits, tokens

WINDOW = 4  # of 9 tokens: a layer that slides where it should not shows
S, F = "sliding_attention", "full_attention"


def inserting(architecture: str, *layers: int, period: int = 1, split: Sequence[int] = ()) -> ModelForm:
    entry = ARCHITECTURES[architecture]
    role: Any = "block" if entry.attn_norm else "ffn_out"
    routes: Any = {(layer, role): "constant-layer" for layer in layers}
    return ModelForm(entry, routes | {(layer, "attn_out"): "split-layer" for layer in split}, period)


# ---- slots and config.json, by hand -------------------------------------------------------------------


def test_slots() -> None:
    assert slots(inserting("llama"), 2) == (Slot(0, 0, 0), Slot(1, 1, 1))
    constant = Slot(0, constant=(0, "ffn_out"))
    assert slots(inserting("llama", 0), 2) == (Slot(0, 0, 0), constant, Slot(1, 1, 1))
    assert slots(inserting("llama", 0, period=3), 1) == (Slot(0, 0, 0), constant, Slot(0), Slot(0))
    halves = (Slot(0, attention=0), Slot(0, ffn=0, constant=(0, "attn_out")))
    assert slots(inserting("llama", 0, split=[0]), 1) == (*halves, constant)


def config_of(architecture: str, form: ModelForm, layers: int = 4, **changes: Any) -> dict[str, Any]:
    config = {"model_type": architecture, **Tiny(architecture, layers=layers).config, **changes}
    return output_config(facts_of("m", {key: value for key, value in config.items() if value is not ...}), form)


@pytest.mark.parametrize(
    ("architecture", "form", "before", "after"),
    [
        ("llama", inserting("llama", 1), {}, {"num_hidden_layers": 5}),
        ("llama", inserting("llama", 0, 3, split=[0]), {}, {"num_hidden_layers": 7}),
        ("qwen3", inserting("qwen3", 1), {"layer_types": [F, S, F, S]}, {"layer_types": [F, S, S, F, S]}),
        (
            "qwen2",
            inserting("qwen2", 1, 3),
            {"use_sliding_window": True, "max_window_layers": 2},
            {"max_window_layers": 3},
        ),
        (
            "qwen2",
            inserting("qwen2", 2),
            {"use_sliding_window": True, "max_window_layers": 2},
            {"max_window_layers": 2},
        ),
        ("qwen2", inserting("qwen2", 0, 2), {"max_window_layers": 28}, {"max_window_layers": 30}),
        ("qwen3_moe", inserting("qwen3_moe", 0), {"mlp_only_layers": [2]}, {"mlp_only_layers": [1, 3]}),
        (  # 1 and 3 have experts, by their number
            "qwen3_moe",
            inserting("qwen3_moe", 1),
            {"mlp_only_layers": [], "decoder_sparse_step": 2},
            {"mlp_only_layers": [0, 2, 3], "decoder_sparse_step": 1},
        ),
        ("smollm3", inserting("smollm3", 1), {"no_rope_layers": [1, 1, 0, 1]}, {"no_rope_layers": [1, 1, 1, 0, 1]}),
        ("gemma2", inserting("gemma2", 1), {"layer_types": ...}, {"layer_types": [S, F, F, S, F]}),
        ("gemma2", inserting("gemma2", 0, period=2), {}, {"layer_types": [S, S, S, F, S, F]}),
        ("gemma3_text", inserting("gemma3_text", 3), {}, {"layer_types": [S] * 5}),
        ("gemma3_text", inserting("gemma3_text", 0), {"sliding_window_pattern": 2}, {"layer_types": [S, S, F, S, F]}),
    ],
)
def test_what_counts_or_lists_layers(
    architecture: str, form: ModelForm, before: dict[str, Any], after: dict[str, Any]
) -> None:
    made = config_of(architecture, form, **before)
    assert {key: made[key] for key in after} == after


# ---- and the models behind --------------------------------------------------------------------------------

LISTED = {
    "qwen2": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2},
    "qwen3": {"use_sliding_window": True, "sliding_window": WINDOW, "layer_types": [S, F, S, F]},
    "qwen3_moe": {"mlp_only_layers": [2]},
    "qwen3_moe-step": {"mlp_only_layers": [], "decoder_sparse_step": 2},
    "smollm3": {"no_rope_layers": [1, 0, 0, 1]},
    "gemma2": {"sliding_window": WINDOW, "layer_types": [S, S, F, F]},
    "gemma2-implicit": {"sliding_window": WINDOW, "layer_types": ...},
    "gemma3_text": {"sliding_window": WINDOW, "layer_types": [F, S, F, S]},
    "gemma3_text-implicit": {"sliding_window": WINDOW, "layer_types": ...},
    "gemma3_text-pattern": {"sliding_window": WINDOW, "layer_types": ..., "sliding_window_pattern": 2},
    "olmo2": {},
    "llama": {},
}


def base_of(name: str, folder: Path, *, layers: int = 4, biases: bool = False) -> Path:
    """A model of this configuration, with just these keys in its config.json."""
    architecture, changes = name.partition("-")[0], LISTED[name]

    class Odd(Tiny):
        @property
        def config(self) -> dict[str, Any]:
            config = {**CONFIGS[architecture](self), "tie_word_embeddings": self.tied, **changes}
            return {key: value for key, value in config.items() if value is not ...}

    tiny = Odd(architecture, layers=layers, biases=biases)
    tiny.save(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": architecture, **tiny.config}))
    return folder


def shifts(form: ModelForm, width: int, scale: float = 0.3) -> list[Shift]:
    rng, sites = np.random.default_rng(0), {"attn_out": "attn", "ffn_out": "residual", "block": "residual"}
    return [Shift(layer, sites[role], scale * rng.normal(size=width)) for layer, role in form.routes]  # pyright: ignore[reportArgumentType]


def compiled(base: Path, form: ModelForm, program: Program, out: Path) -> Path:
    checkpoint = Checkpoint.open(base)
    layout = Layout.of(checkpoint, facts_of("m", checkpoint.config))
    out.mkdir()
    write(plan(fold(program, layout.facts, form), layout, form), out, Writing())
    return out


@pytest.mark.parametrize(("layers", "period"), [([1], 1), ([0, 3], 1), ([0, 1, 2, 3], 2), ([0, 2], 6)])
@pytest.mark.parametrize("name", LISTED)
def test_inserted_layers_do_what_the_interpreter_says(
    name: str, layers: list[int], period: int, tmp_path: Path
) -> None:
    base, form = base_of(name, tmp_path / "base"), inserting(name.partition("-")[0], *layers, period=period)
    program = Program.of(shifts(form, 20), model=base)
    model, ids = load(base), tokens()
    with interpret(model, program):
        wanted = logits(model, ids)
        said = greedy(model, tuple(ids[0].tolist()), 12)
    made = load(compiled(base, form, program, tmp_path / "out"))
    assert made.config.num_hidden_layers == 4 + period * len(layers)
    scale = wanted.abs().max()
    assert (logits(made, ids) - wanted).abs().max() <= 1e-5 * scale
    assert (logits(model, ids) - wanted).abs().max() > 1e-2 * scale
    assert greedy(made, tuple(ids[0].tolist()), 12) == said  # with a cache


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "qwen3_moe", "qwen3_moe-step", "llama"])
def test_split_and_constant_layers_together(name: str, tmp_path: Path) -> None:
    base = base_of(name, tmp_path / "base")
    form = inserting(name.partition("-")[0], 1, 3, split=[0, 1])
    program = Program.of(shifts(form, 20), model=base)
    model, ids = load(base), tokens()
    with interpret(model, program):
        wanted = logits(model, ids)
    made = load(compiled(base, form, program, tmp_path / "out"))
    assert (logits(made, ids) - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert (logits(model, ids) - wanted).abs().max() > 1e-2 * wanted.abs().max()


@pytest.mark.parametrize("name", ["gemma2-implicit", "gemma3_text-pattern"])
def test_a_layer_inserted_without_its_list_would_be_wrong(name: str, tmp_path: Path) -> None:
    # The negative control of the sliding lists: here the number of a layer would decide, and the window counts.
    base, form = base_of(name, tmp_path / "base"), inserting(name.partition("-")[0], 0)
    program = Program.of(shifts(form, 20), model=base)
    out = compiled(base, form, program, tmp_path / "out")
    right = logits(load(out), tokens())
    config = json.loads((out / "config.json").read_text())
    del config["layer_types"]
    (out / "config.json").write_text(json.dumps(config))
    assert (logits(load(out), tokens()) - right).abs().max() > 1e-2


@pytest.mark.parametrize("size", [0.0, 1e-3, 1.0, 300.0])
@pytest.mark.parametrize("name", ["gemma2-implicit", "gemma3_text-implicit", "olmo2", "llama"])
def test_in_bfloat16_the_constant_keeps_its_digits(name: str, size: float, tmp_path: Path) -> None:
    # Measured where it enters, and in the float32 that the certificate computes in.
    base = base_of(name, tmp_path / "base", layers=1)
    tensors = load(base)
    tensors.to(torch.bfloat16).save_pretrained(base)
    form = inserting(name.partition("-")[0], 0)
    (shift,) = shifts(form, 20, size)
    made = load(compiled(base, form, Program.of([shift], model=base), tmp_path / "out"))
    seen: list[torch.Tensor] = []
    for layer in made.model.layers:
        layer.register_forward_hook(lambda _, __, output: seen.append(output))
    logits(made, tokens(1, 5))
    found, wanted = (seen[1] - seen[0])[0], torch.tensor(shift.vector)
    assert (found - wanted).abs().max() <= 2**-8 * wanted.abs().max() + 1e-6 * seen[0].abs().max()
