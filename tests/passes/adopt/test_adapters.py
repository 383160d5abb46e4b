"""LoRA and IA3 adapters that PEFT wrote: the model with the adapter = the interpreter with the imported program."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from austeer.compiler import InputError, Program, ProgramError, Rank1, Refused, Scale, interpret
from austeer.compiler.facts import ModelFacts, read_facts
from austeer.passes.adopt.artefact import Adopted, Asked
from austeer.passes.adopt.formats import recognise
from tests.tiny import Tiny, load, logits, on_disk, tokens

peft = pytest.importorskip("peft", reason="peft, which writes adapters, is not installed")

# PEFT asks transformers 5.23 for an attribute under its old name.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

LLAMA = Tiny("llama")  # 4 heads in 2 groups of keys and values, with biases
OUTPUTS = {
    "llama": ("o_proj", "down_proj"),
    "qwen2": ("o_proj", "down_proj"),
    "phi3": ("o_proj", "down_proj"),
    "gemma2": ("o_proj", "down_proj"),
    "opt": ("out_proj", "fc2"),
    "gpt_neox": ("attention.dense", "dense_4h_to_h"),
    "gpt2": ("attn.c_proj", "mlp.c_proj"),
}


@torch.inference_mode()
def trained(tiny: Tiny, config: Any, folder: Path) -> torch.Tensor:
    """Saves an adapter with random weights, as PEFT does, in `folder`; returns the logits of the model with it."""
    model = peft.get_peft_model(load(on_disk(tiny)), config)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name or "ia3_" in name:
            parameter.copy_(parameter + 0.5 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return logits(model.eval(), tokens())


def adopted(folder: Path, tiny: Tiny, layers: frozenset[int] | None = None) -> Adopted:
    kind, file = recognise(folder)
    return kind.read(file, facts(tiny), Asked(layers=layers))


def facts(tiny: Tiny) -> ModelFacts:
    return read_facts(on_disk(tiny))


def interpreted(tiny: Tiny, found: Adopted) -> torch.Tensor:
    model = load(on_disk(tiny))
    with interpret(model, Program.of(found.edits, model=on_disk(tiny))):
        return logits(model, tokens())


def assert_same(tiny: Tiny, found: Adopted, expected: torch.Tensor) -> None:
    scale = expected.abs().max()
    assert (interpreted(tiny, found) - expected).abs().max() < 1e-5 * scale
    assert (logits(load(on_disk(tiny)), tokens()) - expected).abs().max() > 1e-2 * scale  # the adapter does something


def lora(**more: Any) -> Any:
    return peft.LoraConfig(**{"r": 3, "lora_alpha": 5, "target_modules": list(OUTPUTS["llama"]), **more})


def ia3(*modules: str, feedforward: tuple[str, ...] = ()) -> Any:
    transposed = any(module.startswith("c_") or ".c_" in module for module in modules)  # gpt2's
    return peft.IA3Config(
        target_modules=list(modules), feedforward_modules=list(feedforward), fan_in_fan_out=transposed
    )


# ---- LoRA ---------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", OUTPUTS)
def test_lora_on_the_output_projections(architecture: str, tmp_path: Path) -> None:
    tiny = Tiny(architecture)
    modules = list(OUTPUTS[architecture])
    expected = trained(tiny, lora(target_modules=modules, fan_in_fan_out=architecture == "gpt2"), tmp_path)
    assert_same(tiny, adopted(tmp_path, tiny), expected)


@pytest.mark.parametrize(
    "more",
    [
        {"use_rslora": True},
        {"rank_pattern": {"o_proj": 5, "layers.1.mlp.down_proj": 1}},
        {"alpha_pattern": {"down_proj": 11}, "use_rslora": True, "rank_pattern": {"down_proj": 2}},
        {"layers_to_transform": [1]},
        {"lora_dropout": 0.5},
        {"init_lora_weights": False},
        {"target_modules": "all-linear", "exclude_modules": r".*\.(q|k|v|gate|up)_proj"},
    ],
)
def test_lora_with_settings_of_peft(more: dict[str, Any], tmp_path: Path) -> None:
    expected = trained(LLAMA, lora(**more), tmp_path)
    assert_same(LLAMA, adopted(tmp_path, LLAMA), expected)


def test_only_the_layers_that_are_asked_for(tmp_path: Path) -> None:
    trained(LLAMA, lora(), tmp_path)
    assert {edit.layer for edit in adopted(tmp_path, LLAMA, frozenset({1})).edits} == {1}


def test_one_edit_a_rank(tmp_path: Path) -> None:
    trained(LLAMA, lora(r=2, lora_alpha=3), tmp_path)
    edits = adopted(tmp_path, LLAMA).edits
    assert len(edits) == 2 * 2 * 2
    assert all(isinstance(edit, Rank1) and edit.strength == 1.5 for edit in edits)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"use_dora": True}, "use_dora=True"),
        ({"bias": "lora_only"}, "bias='lora_only'"),
        ({"modules_to_save": ["norm"]}, "modules_to_save"),
        (
            {"target_modules": ["q_proj", "o_proj", "up_proj"]},
            "4 of its 6 modules .* q_proj, up_proj .* self_attn.o_proj",
        ),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' changed the base"),
    ],
)
def test_what_a_program_cannot_say_is_refused(more: dict[str, Any], words: str, tmp_path: Path) -> None:
    trained(LLAMA, lora(**more), tmp_path)
    with pytest.raises(Refused, match=words):
        adopted(tmp_path, LLAMA)


def test_an_adapter_on_experts_is_refused(tmp_path: Path) -> None:
    trained(LLAMA, lora(target_modules=["down_proj"]), tmp_path)
    sparse = Tiny("qwen3_moe", dense=(1,))
    with pytest.raises(Refused, match=r"1 of its 2 modules .*layers\.0\.mlp\.down_proj"):
        adopted(tmp_path, sparse)


def test_the_name_of_the_base_is_compared(tmp_path: Path) -> None:
    trained(LLAMA, lora(), tmp_path)
    assert adopted(tmp_path, LLAMA).notes == ()
    change_config(tmp_path, base_model_name_or_path="org/other")
    assert adopted(tmp_path, LLAMA).notes == ("it says it was trained on 'other'; the model is 'model'",)


# ---- IA3 ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("modules", "feedforward", "sites"),
    [
        (("v_proj", "down_proj"), ("down_proj",), {"heads", "neurons"}),
        (("v_proj",), (), {"heads"}),
        (("o_proj", "down_proj"), (), {"attn", "ffn"}),
        (("o_proj",), ("o_proj",), {"heads"}),
    ],
)
def test_ia3(modules: tuple[str, ...], feedforward: tuple[str, ...], sites: set[str], tmp_path: Path) -> None:
    expected = trained(LLAMA, ia3(*modules, feedforward=feedforward), tmp_path)
    found = adopted(tmp_path, LLAMA)
    assert_same(LLAMA, found, expected)
    assert {edit.site for edit in found.edits} == sites
    assert all(isinstance(edit, Scale) for edit in found.edits)


@pytest.mark.parametrize("architecture", ["gpt2", "opt", "qwen2"])
def test_ia3_of_other_architectures(architecture: str, tmp_path: Path) -> None:
    tiny, ffn = Tiny(architecture), OUTPUTS[architecture][1]
    values = () if architecture == "gpt2" else ("v_proj",)
    expected = trained(tiny, ia3(*values, ffn, feedforward=(ffn,)), tmp_path)
    assert_same(tiny, adopted(tmp_path, tiny), expected)


@pytest.mark.parametrize(
    ("tiny", "modules", "words"),
    [
        (LLAMA, ("k_proj", "v_proj"), "2 of its 4 modules .* k_proj"),
        (Tiny("gpt2"), ("c_attn",), "c_attn"),
        (Tiny("phi3"), ("qkv_proj",), "qkv_proj"),
    ],
)
def test_ia3_on_keys_or_fused_projections_is_refused(
    tiny: Tiny, modules: tuple[str, ...], words: str, tmp_path: Path
) -> None:
    trained(tiny, ia3(*modules), tmp_path)
    with pytest.raises(Refused, match=words):
        adopted(tmp_path, tiny)


# ---- damage -------------------------------------------------------------------------------


def change_config(folder: Path, **more: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **more}))


def change_tensors(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        file = folder / "adapter_model.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in change(load_file(file)).items()}, file)

    return apply


def first(value: Callable[[Any], Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Changes the first tensor by name, which is lora_A of a down_proj."""
    return lambda tensors: {**tensors, min(tensors): value(tensors[min(tensors)])}


DAMAGE: dict[str, tuple[Callable[[Path], None], type[Exception], str]] = {
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), InputError, "there is no adapter_model"),
    "no JSON": (lambda f: (f / "adapter_config.json").write_text("{"), InputError, "not JSON"),
    "another type": (lambda f: change_config(f, peft_type="VERA"), Refused, "type 'VERA'"),
    "a type of no sense": (lambda f: change_config(f, peft_type=[1]), Refused, "type"),
    "a setting of tomorrow": (lambda f: change_config(f, use_wonder=True), Refused, "use_wonder=True"),
    "another rank": (lambda f: change_config(f, r=4), InputError, r"expected \[4, in\] and \[out, 4\]"),
    "a bias": (lambda f: change_config(f, lora_bias=True), Refused, "lora_bias=True"),
    "alpha of zero": (lambda f: change_config(f, lora_alpha=0), InputError, "lora_alpha of .* is 0"),
    "alpha as text": (lambda f: change_config(f, lora_alpha="8"), InputError, "is '8', not a positive"),
    "a bad pattern": (lambda f: change_config(f, rank_pattern={"(": 1}), InputError, "rank_pattern .* cannot be read"),
    "a list of patterns": (
        lambda f: change_config(f, alpha_pattern=[1]),
        InputError,
        "alpha_pattern .* cannot be read",
    ),
    "half a pair": (
        change_tensors(lambda t: {name: t[name] for name in t if name != min(t)}),
        InputError,
        "has only one of",
    ),
    "three dimensions": (change_tensors(first(lambda a: a[None])), InputError, "expected"),
    "other width": (change_tensors(first(lambda a: a[:, :5])), ProgramError, "k has 5 values"),
    "nan": (change_tensors(first(lambda a: a * np.nan)), ProgramError, "nan or infinity"),
    "whole numbers": (change_tensors(first(lambda a: a.int())), InputError, "dtype I32"),
    "an unknown tensor": (change_tensors(lambda t: {**t, "x": torch.ones(1)}), Refused, "tensor 'x'"),
    "an embedding": (
        change_tensors(lambda t: {**t, "base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(3, 1)}),
        Refused,
        "lora_embedding_A",
    ),
    "cut short": (lambda f: cut(f / "adapter_model.safetensors"), InputError, "cut short"),
}


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_named(case: str, tmp_path: Path) -> None:
    damage, error, words = DAMAGE[case]
    trained(LLAMA, lora(), tmp_path)
    damage(tmp_path)
    with pytest.raises(error, match=words):
        Program.of(adopted(tmp_path, LLAMA).edits, model=on_disk(LLAMA))


@pytest.mark.parametrize("module", ["v_proj", "down_proj"])
@pytest.mark.parametrize("shape", [(11, 1), (1, 11), (12,), (3, 4)])
def test_ia3_of_a_wrong_shape(shape: tuple[int, ...], module: str, tmp_path: Path) -> None:
    trained(LLAMA, ia3("v_proj", "down_proj", feedforward=("down_proj",)), tmp_path)
    change_tensors(lambda tensors: {name: torch.ones(shape) if module in name else tensors[name] for name in tensors})(
        tmp_path
    )
    with pytest.raises(InputError, match=rf"{module}: (ia3_l has shape|11 factors)"):
        adopted(tmp_path, LLAMA)
