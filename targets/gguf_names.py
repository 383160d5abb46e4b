"""What llama.cpp calls the models and tensors that edits change, and which output biases it reads: as data."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from austeer.compiler.patch import Part, Role

Bias = Literal["optional", "required", "none"]
ROLES: tuple[Role, ...] = ("attn_out", "ffn_out")
STEMS: Mapping[Role, str] = {"attn_out": "attn_output", "ffn_out": "ffn_down"}


@dataclass(frozen=True)
class Dialect:
    """One architecture of llama.cpp: the Hugging Face model types it runs, and its output biases.

    A GGUF with a bias that its architecture does not read is refused by llama.cpp, and so is one that lacks a
    required bias. Experts never have one here.
    """

    name: str
    model_types: tuple[str, ...]
    attn_out: Bias = "none"
    ffn_out: Bias = "none"

    def bias(self, role: Role) -> Bias:
        """Whether llama.cpp reads a bias of this projection."""
        return self.attn_out if role == "attn_out" else self.ffn_out


# Read in llama.cpp's loaders (src/models/*.cpp of 0c1e57098); loaded and run by the tests in tests/engines.
DIALECTS: Mapping[str, Dialect] = {
    dialect.name: dialect
    for dialect in (
        Dialect("llama", ("llama", "mistral", "mixtral"), "optional", "optional"),
        Dialect("qwen2", ("qwen2",)),
        Dialect("qwen3", ("qwen3",)),
        Dialect("qwen3moe", ("qwen3_moe",)),
        Dialect("gemma2", ("gemma2",)),
        Dialect("gemma3", ("gemma3_text",)),
        Dialect("phi3", ("phi3",)),
        Dialect("olmo2", ("olmo2",)),
        Dialect("gpt2", ("gpt2",), "required", "required"),
        Dialect("gptneox", ("gpt_neox",), "required", "required"),
    )
}


def dialect_of(model_type: str) -> Dialect | None:
    """The architecture of llama.cpp that runs a Hugging Face model type, if there is one."""
    return next((dialect for dialect in DIALECTS.values() if model_type in dialect.model_types), None)


@dataclass(frozen=True)
class Place:
    """Where a tensor of a checkpoint is in the GGUF: a whole tensor, or one expert of a stack.

    `same`: whether it has the same values there; the converter permutes queries and keys, and adds 1 to norms.
    """

    name: str
    expert: int | None = None
    transposed: bool = False
    same: bool = True


def tensor_name(layer: int, role: Role, part: Part = "weight", *, experts: bool = False) -> str:
    """The tensor of an output projection; all experts of a layer are one tensor [experts, out, in]."""
    return f"blk.{layer}.{STEMS[role]}{'_exps' if experts else ''}.{part}"


def place_of(name: str, *, transposed: bool) -> Place:
    """The place of a tensor of a block, by its name in the checkpoint; KeyError for any other."""
    found = re.fullmatch(r".*?\b(\d+)\.(.*?)(?:\.experts\.(\d+)\.(\w+))?(?:\.(weight|bias))?", name)
    if found is None:
        raise KeyError(name)
    layer, module, expert, _, part = found.groups()
    if expert is not None:
        return Place(f"blk.{layer}.ffn_down_exps.weight", int(expert))
    stem = NAMES[module]
    same = stem not in ("attn_q", "attn_k", "attn_qkv") and "norm" not in stem
    return Place(f"blk.{layer}.{stem}.{part or 'weight'}", None, transposed and part == "weight", same)


NAMES: Mapping[str, str] = {
    "self_attn.o_proj": "attn_output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.down_proj": "ffn_down",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.experts.down_proj": "ffn_down_exps",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",  # post_attention_norm where it comes before the residual
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
    "attn.c_proj": "attn_output",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
    "attention.dense": "attn_output",
    "attention.query_key_value": "attn_qkv",
    "mlp.dense_4h_to_h": "ffn_down",
    "mlp.dense_h_to_4h": "ffn_up",
}
"""The modules of a block, by their names in transformers and in llama.cpp."""
