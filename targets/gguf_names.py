"""What llama.cpp calls the models and tensors that edits change, and which output biases it reads: as data."""

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


def tensor_name(layer: int, role: Role, part: Part = "weight", *, experts: bool = False) -> str:
    """The tensor of an output projection; all experts of a layer are one tensor [experts, out, in]."""
    return f"blk.{layer}.{STEMS[role]}{'_exps' if experts else ''}.{part}"
