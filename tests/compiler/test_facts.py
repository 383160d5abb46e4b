"""Facts come from config.json alone; what is not there or makes no sense is an error that names the key."""

import json
from pathlib import Path
from typing import Any

import pytest

from austeer.compiler import CheckpointError, ProgramError, Refused
from austeer.compiler.facts import Geometry, facts_of, read_facts
from tests.tiny import CONFIGS, Tiny, on_disk

LLAMA = {
    "model_type": "llama",
    "hidden_size": 12,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "num_hidden_layers": 2,
    "intermediate_size": 20,
}
GPT2 = {"model_type": "gpt2", "n_layer": 2, "n_embd": 12, "n_head": 3}
MOE = {**LLAMA, "model_type": "qwen3_moe", "moe_intermediate_size": 8, "num_experts": 4, "head_dim": 4}


def test_sizes() -> None:
    facts = facts_of("m", LLAMA)
    assert facts.geometry == Geometry("m", "llama", layers=2, residual=12, heads=12, neurons=20)
    assert facts.kv == 4
    assert [facts.axis(axis) for axis in ("residual", "heads", "kv", "neurons")] == [12, 12, 4, 20]


@pytest.mark.parametrize(
    ("changes", "heads", "kv"),
    [
        ({"head_dim": 6}, 18, 6),
        ({"head_dim": None}, 12, 4),
        ({"num_key_value_heads": None}, 12, 12),
        ({"num_key_value_heads": 3, "head_dim": 2}, 6, 6),
        ({"model_type": "qwen3"}, 384, 128),
        ({"model_type": "gemma2"}, 768, 256),
    ],
)
def test_heads(changes: dict[str, Any], heads: int, kv: int) -> None:
    facts = facts_of("m", {**LLAMA, **changes})
    assert (facts.geometry.heads, facts.kv) == (heads, kv)


@pytest.mark.parametrize(("changes", "neurons"), [({}, 48), ({"n_inner": None}, 48), ({"n_inner": 7}, 7)])
def test_gpt2_has_four_neurons_per_unit_unless_it_says_otherwise(changes: dict[str, Any], neurons: int) -> None:
    assert facts_of("m", {**GPT2, **changes}).geometry.neurons == neurons


def test_experts() -> None:
    facts = facts_of("m", {**MOE, "mlp_only_layers": [1], "num_hidden_layers": 3})
    assert (facts.expert_count, facts.expert_neurons) == (4, 8)
    assert [facts.has_experts(layer) for layer in range(3)] == [True, False, True]
    facts = facts_of("m", {**MOE, "decoder_sparse_step": 2, "num_hidden_layers": 4})
    assert [facts.has_experts(layer) for layer in range(4)] == [False, True, False, True]
    renamed = {key: value for key, value in MOE.items() if key != "num_experts"}
    assert facts_of("m", {**renamed, "num_local_experts": 5}).expert_count == 5  # as transformers 5 writes it
    assert not facts_of("m", LLAMA).has_experts(0)
    assert facts_of("m", {**MOE, "decoder_sparse_step": None, "mlp_only_layers": None}).has_experts(0)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LLAMA, [False, False]),
        ({**LLAMA, "attention_bias": True}, [True, False]),
        ({**LLAMA, "mlp_bias": True, "attention_bias": None}, [False, True]),
        (GPT2, [True, True]),
        ({**LLAMA, "model_type": "qwen2", "attention_bias": True}, [False, False]),
        ({**LLAMA, "model_type": "gpt_neox"}, [True, True]),
        ({**LLAMA, "model_type": "gpt_neox", "attention_bias": False}, [False, True]),
        ({**LLAMA, "model_type": "opt", "ffn_dim": 4, "enable_bias": False}, [False, False]),
    ],
)
def test_biases_follow_the_flags(config: dict[str, Any], expected: list[bool]) -> None:
    facts = facts_of("m", config)
    assert [facts.has_bias(linear) for linear in (facts.architecture.attn_out, facts.architecture.ffn_out)] == expected


@pytest.mark.parametrize("before", [None, True, False])
def test_opt_norms_its_outputs_only_if_it_says_so(before: bool | None) -> None:
    config = {**LLAMA, "model_type": "opt", "ffn_dim": 4}
    config |= {} if before is None else {"do_layer_norm_before": before}
    assert facts_of("m", config).post_norm is (before is False)


@pytest.mark.parametrize("model_type", ["mamba", "LLAMA", None, ["llama"], ""])
def test_an_unknown_architecture_is_refused_with_what_to_do(model_type: Any) -> None:
    with pytest.raises(Refused, match=r"mine: architecture .* is not in the table; known are llama.*architectures\.py"):
        facts_of("mine", {**LLAMA, "model_type": model_type})


@pytest.mark.parametrize("value", [0, -1, 1.5, "2", None, True, [3]])
@pytest.mark.parametrize("key", ["hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size"])
def test_sizes_that_make_no_sense_name_their_key(key: str, value: Any) -> None:
    with pytest.raises(CheckpointError, match=f"m: .*'{key}'"):
        facts_of("m", {**LLAMA, key: value})


@pytest.mark.parametrize("value", [-1, 1.5, "2", True, [3], {}])
@pytest.mark.parametrize("key", ["head_dim", "num_key_value_heads"])
def test_optional_sizes_that_make_no_sense_name_their_key(key: str, value: Any) -> None:
    if value == {}:
        value = {"a": 1}
    with pytest.raises(CheckpointError, match=f"m: .*'{key}'"):
        facts_of("m", {**LLAMA, key: value})


@pytest.mark.parametrize("key", ["num_experts", "moe_intermediate_size"])
@pytest.mark.parametrize("value", [0, "4", None])
def test_sizes_of_experts_name_their_key(key: str, value: Any) -> None:
    with pytest.raises(CheckpointError, match=f"'{key}'"):
        facts_of("m", {**MOE, key: value})


def test_a_folder_s_facts_bear_its_name(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/config.json").write_text(json.dumps(LLAMA))
    assert read_facts(tmp_path / "mine").geometry.name == "mine"
    assert read_facts(tmp_path / "mine/../mine") == read_facts(tmp_path / "mine")
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    assert read_facts(tmp_path / "link").geometry.name == "mine"


@pytest.mark.parametrize("architecture", CONFIGS)
def test_facts_of_a_saved_model(architecture: str) -> None:
    tiny = Tiny(architecture)
    facts = read_facts(on_disk(tiny))
    residual = 24 if architecture in ("gpt2", "gpt_neox", "opt") else 20
    neurons = 28
    assert facts.geometry == Geometry(on_disk(tiny).name, architecture, 2, residual, 24, neurons)
    assert [facts.has_experts(layer) for layer in range(2)] == [tiny.has_experts(layer) for layer in range(2)]


GEOMETRY = Geometry("m", "llama", 1, 2, 3, 4)


def test_a_geometry_as_plain_values_and_back() -> None:
    assert Geometry.from_plain(GEOMETRY.plain()) == GEOMETRY
    assert [GEOMETRY.width(space) for space in ("residual", "heads", "neurons")] == [2, 3, 4]


@pytest.mark.parametrize(
    "plain",
    [
        None,
        [],
        {},
        {**GEOMETRY.plain(), "more": 1},
        {key: value for key, value in GEOMETRY.plain().items() if key != "heads"},
        {**GEOMETRY.plain(), "heads": 0},
        {**GEOMETRY.plain(), "heads": 1.0},
        {**GEOMETRY.plain(), "heads": True},
        {**GEOMETRY.plain(), "heads": "3"},
    ],
)
def test_what_is_no_geometry(plain: Any) -> None:
    with pytest.raises(ProgramError, match="a program's model"):
        Geometry.from_plain(plain)


def test_same_shape_ignores_the_name() -> None:
    assert GEOMETRY.same_shape(Geometry("other", "llama", 1, 2, 3, 4))
    assert not GEOMETRY.same_shape(Geometry("m", "qwen2", 1, 2, 3, 4))
    assert not GEOMETRY.same_shape(Geometry("m", "llama", 1, 2, 3, 5))
