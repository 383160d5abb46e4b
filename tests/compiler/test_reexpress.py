"""Architectures that are another one in other words: the same logits to the last bit, and nothing else rewritten."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from austeer.compiler.architectures import ARCHITECTURES
from austeer.compiler.checkpoint import Checkpoint
from austeer.compiler.facts import facts_of
from austeer.compiler.form import ModelForm, output_config
from austeer.compiler.layout import Layout
from austeer.compiler.patch import Patch, Touch
from austeer.compiler.reexpress import REEXPRESSIONS, carriers, reexpression
from austeer.targets.checkpoint import Writing, plan, write
from tests.tiny import Tiny, load, logits, on_disk, rewritten, stored, tokens

WINDOW = 4  # of 9 tokens
EVERY_BIAS = {(0, "attn_out"): "bias", (0, "ffn_out"): "bias"}


def written_as(base: Path, abroad: str, folder: Path, routes: Any = EVERY_BIAS) -> Path:
    """The model in another architecture, with the biases that its edits would need, all zero: no edit at all."""
    checkpoint = Checkpoint.open(base)
    layout = Layout.of(checkpoint, facts_of("m", checkpoint.config))
    folder.mkdir()
    nothing = Patch((), tuple(Touch(0, *place, "bias", None) for place in routes))
    write(plan(nothing, layout, ModelForm(ARCHITECTURES[abroad], routes)), folder, Writing())
    return folder


def with_config(base: Path, folder: Path, **changes: Any) -> Path:
    rewritten(base, folder, lambda tensors: tensors)
    config = json.loads((base / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


@pytest.mark.parametrize("routes", [EVERY_BIAS, {(0, "attn_out"): "bias"}, {(0, "ffn_out"): "bias"}])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("home", ["mistral", "qwen2", "phi3"])
def test_as_llama_the_logits_are_the_same_bits(home: str, tied: bool, routes: Any, tmp_path: Path) -> None:
    # phi3's fused maps are split: a matrix product of round sizes gives each row the same bits in either.
    tiny = Tiny(home, tied=tied, head_dim=16, residual=64, neurons=64)
    out = written_as(on_disk(tiny), "llama", tmp_path / "out", routes)
    made, ids = load(out), tokens()
    assert type(made).__name__ == "LlamaForCausalLM"
    assert torch.equal(logits(made, ids), logits(load(on_disk(tiny)), ids))
    tensors = stored(out).values()
    assert json.loads((out / "model.safetensors.index.json").read_text())["metadata"]["total_size"] == sum(
        tensor.nbytes for tensor in tensors
    )


def test_a_window_that_slides_is_a_smollm3_and_no_llama(tmp_path: Path) -> None:
    base = with_config(on_disk(Tiny("mistral")), tmp_path / "base", sliding_window=WINDOW)
    ids, made = tokens(), load(written_as(base, "smollm3", tmp_path / "out"))
    expected = logits(load(base), ids)
    assert (expected - logits(load(on_disk(Tiny("mistral"))), ids)).abs().max() > 0.1  # the window counts
    assert torch.equal(logits(made, ids), expected)
    as_llama = load(written_as(base, "llama", tmp_path / "llama"))
    assert not torch.equal(logits(as_llama, ids), expected)
    assert reexpression("mistral", "llama").blocked(json.loads((base / "config.json").read_text()))


BLOCKED = [
    ("mistral", {"sliding_window": 4}, "slides over 4 tokens"),
    ("mistral", {"sliding_window": ...}, "slides over 4096 tokens"),  # absent, with a longer context
    ("mistral", {"sliding_window": 63}, "slides over 63 tokens"),
    ("mistral", {"sliding_window": 64}, None),
    ("mistral", {"sliding_window": None}, None),
    ("mistral", {"rope_parameters": {"llama_4_scaling_beta": 0.1}}, "llama_4_scaling_beta"),
    ("qwen2", {"use_sliding_window": True}, "use_sliding_window"),
    ("qwen2", {"use_sliding_window": False, "sliding_window": 4}, None),
    ("qwen2", {"dual_chunk_attention_config": {"chunk_size": 8}}, "dual chunk attention"),
    ("phi3", {"sliding_window": 4}, "slides over 4 tokens"),
    ("phi3", {"sliding_window": 64}, None),
    ("phi3", {"rope_scaling": {"type": "longrope"}}, "its rope is longrope"),
    ("phi3", {"rope_parameters": {"rope_type": "su"}}, "its rope is su"),
    ("phi3", {"partial_rotary_factor": 0.75}, "only 0.75 of each head"),
    ("phi3", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "only 0.5 of each head"),
    ("phi3", {"partial_rotary_factor": 1.0, "rope_scaling": None}, None),
]


@pytest.mark.parametrize(("home", "changes", "reason"), BLOCKED)
def test_what_llama_cannot_say_is_blocked(home: str, changes: dict[str, Any], reason: str | None) -> None:
    context = 8192 if changes.get("sliding_window") is ... else 64
    config = {"sliding_window": None, "max_position_embeddings": context, **changes}
    config = {key: value for key, value in config.items() if value is not ...}
    blocked = reexpression(home, "llama").blocked(config)
    assert (blocked is None) if reason is None else (blocked is not None and reason in blocked)


def minimal(home: str) -> dict[str, Any]:
    """Only what a config.json cannot do without: every other key is absent."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 32}
    return {"model_type": home, "vocab_size": 61, **sizes, "num_key_value_heads": 8}


def as_transformers_reads(config: dict[str, Any]) -> Any:
    fields = json.loads(json.dumps(config))  # it changes what it is given
    return AutoConfig.for_model(fields.pop("model_type"), **fields)


@pytest.mark.parametrize(("home", "abroad"), [(entry.home, entry.abroad) for entry in REEXPRESSIONS])
@pytest.mark.parametrize("given", [{}, {"rope_theta": 5e5}, {"rope_parameters": {"rope_type": "default"}}])
def test_what_absent_keys_mean_at_home_they_mean_abroad(home: str, abroad: str, given: dict[str, Any]) -> None:
    config = {**minimal(home), **given}
    translated = reexpression(home, abroad).translate(config, ARCHITECTURES[abroad].class_name)
    before, after = map(as_transformers_reads, (config, translated))
    old, new = before.to_dict(), after.to_dict()
    differing = {key for key in old.keys() & new.keys() if old[key] != new[key]}
    window = {"sliding_window", "layer_types", "use_sliding_window"} if home == "mistral" else set[str]()
    assert differing - window <= {"model_type", "architectures", "rope_parameters", "transformers_version"}
    assert before.rope_parameters["rope_theta"] == after.rope_parameters["rope_theta"]
    assert before.rope_parameters["rope_type"] == after.rope_parameters["rope_type"]
    assert after.head_dim == 1 if hasattr(after, "head_dim") else abroad == "smollm3"


def test_the_config_is_the_original_s_with_keys_changed() -> None:
    tiny = Tiny("mistral")
    config = {"odd": {"a": [1]}, "model_type": "mistral", **tiny.config, "torch_dtype": "float16", "zzz": "é"}
    form = ModelForm(ARCHITECTURES["llama"], EVERY_BIAS)  # pyright: ignore[reportArgumentType]
    made = output_config(facts_of("m", config), form)
    kept = {key: value for key, value in config.items() if key not in ("model_type", "sliding_window")}
    assert {key: made[key] for key in kept} == kept
    assert [key for key in made if key in kept] == list(kept)  # in their order
    added = {"attention_bias": True, "mlp_bias": True, "architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    assert {key: made[key] for key in added} == added
    assert made.keys() - kept.keys() - added.keys() <= {"rope_theta"}
    assert "sliding_window" not in made


def test_who_can_be_what() -> None:
    assert carriers("mistral") == ("mistral", "llama", "smollm3")
    assert carriers("phi3") == ("phi3", "llama")
    assert carriers("qwen3") == ("qwen3",)
