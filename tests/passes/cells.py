"""What each engine does with a shift, said a second time: from the evidence (sources and runs), not from the product.

Four letters for the sites heads, attn, ffn and residual of a model that has no biases of its own, and for a vector
that is not alike for the heads of a group:

B the projection's own bias, L the same in the model written as llama, S a split layer, C a constant layer after the
block (c: in the model written as llama), V only the bias of v_proj, and so only for vectors alike in their groups,
- no way at all.
"""

from collections.abc import Iterator

from austeer.compiler import Gate, Gated, Shift
from austeer.compiler.facts import ModelFacts, facts_of
from tests.tiny import Tiny

SITES = ("heads", "attn", "ffn", "residual")
ARCHITECTURES = "llama smollm3 mistral qwen2 qwen3 qwen3_moe mixtral gemma2 gemma3_text phi3 olmo2 gpt2 gpt_neox opt"
CELLS = {
    #                  llama sm3  mist qw2  qw3  moe  mixt gem2 gem3 phi3 olm2 gpt2 neox opt
    "transformers": "BBBB BBBB LLLL LLLL BBCC BBCC ---- BB-C BB-C LLLL BB-C BBBB BBBB BBBB",
    "vllm": "BBBB BBBB LLLL LLLL SSCC V--- ---- BB-C BB-C LLLL BB-C BBBB BBBB BBBB",
    "sglang": "BBCC ---- LLcc LLCC BBCC BB-- ---- BB-C BB-C LLcc BB-C BBBB BBBB BBBB",
    "llama.cpp": "BBBB ---- LLLL LLLL SSCC V--- ---- V--C V--C LLLL V--C BBBB BBBB ----",
    "tgi": "BBBB ---- LLLL LLLL BB-- BB-- ---- ---- ---- LLLL ---- BBBB BBBB BBBB",
    "mlx-lm": "BBBB ---- LLLL LLLL ---- ---- ---- ---- ---- LLLL BB-C BBBB BBBB ----",
    "ctranslate2": "BBBB ---- LLLL LLLL BBCC ---- ---- ---- BB-C LLLL ---- BBBB BBBB BBBB",
    "onnxruntime-genai": "BBBB ---- LLLL LLLL BB-- ---- ---- BB-- BB-- LLLL ---- ---- ---- ----",
    "portable": "BBCC ---- LLcc LLCC ---- ---- ---- ---- ---- LLcc ---- ---- ---- ----",
}
# Gates, for which neurons are appended to the FFN: N with biases (n: in the model written as llama), D without, where a
# constant direction has to stand for them (d: as llama), - where FFNs are not widened, or a norm follows.
GATES = {
    # in the order of ARCHITECTURES
    "transformers": "N N n n D - - - - n - N N N",
    "vllm": "N N n n D - - - - n - N N N",
    "sglang": "D - D D D - - - - D - N N N",
    "llama.cpp": "N - n n D - - - - n - - N -",
    "tgi": "N - n n D - - - - n - N N N",
    "mlx-lm": "N - n n D - - - - n - N N -",
    "ctranslate2": "N - n n D - - - - n - N N N",
    "onnxruntime-genai": "N - n n D - - - - n - - - -",
    "portable": "D - D D D - - - - d - - - -",
}
ROUTES = {"B": "bias", "L": "bias", "S": "split-layer", "C": "constant-layer", "c": "constant-layer", "V": "value-bias"}
PERIODS = {("sglang", "gemma2"): 2, ("llama.cpp", "gemma2"): 2, ("llama.cpp", "gemma3_text"): 6}
# What an engine does not run at all, or not rightly; as llama it may run it all the same.
ABSENT = {
    "transformers": "",
    "vllm": "",
    "sglang": "smollm3",
    "llama.cpp": "smollm3 opt",
    "tgi": "smollm3 olmo2",
    "mlx-lm": "smollm3 opt",
    "ctranslate2": "smollm3 qwen3_moe mixtral gemma2 olmo2",
    "onnxruntime-genai": "smollm3 qwen3_moe mixtral olmo2 gpt2 gpt_neox opt",
    "portable": "smollm3 qwen3_moe mixtral gemma2 olmo2 gpt2 gpt_neox opt",
}
# Engines that do not load a file with a bias that they have no place for.
REFUSE_O_PROJ = {("llama.cpp", name) for name in ("qwen3", "qwen3_moe", "gemma2", "gemma3_text", "olmo2")}


def cells() -> Iterator[tuple[str, str, str, str]]:
    """(target, architecture, site, letter)."""
    for target, words in CELLS.items():
        for architecture, letters in zip(ARCHITECTURES.split(), words.split(), strict=True):
            for site, letter in zip(SITES, letters, strict=True):
                yield target, architecture, site, letter


def plain_model(architecture: str) -> Tiny:
    """Without biases where the family has a choice, and without experts in the layers that are edited."""
    return Tiny(architecture, biases=False, dense=(0, 1))


def facts(tiny: Tiny) -> ModelFacts:
    """From the configuration alone: nothing is written."""
    return facts_of("tiny", {"model_type": tiny.architecture, **tiny.config})


def shift(tiny: Tiny, site: str, layer: int = 0, *, alike: bool = False) -> Shift:
    """Every value another, or at heads the same for all heads of a group."""
    model = facts(tiny)
    width = model.geometry.heads if site == "heads" else model.geometry.width("residual")
    values = [0.1 + 0.01 * (7 * unit % 31) for unit in range(width)]
    if alike:
        group, size = width // model.kv, model.head_dim
        values = [values[(unit // (group * size)) * size + unit % size] for unit in range(width)]
    return Shift(layer, site, values)  # pyright: ignore[reportArgumentType]


def gate_cells() -> Iterator[tuple[str, str, str]]:
    """(target, architecture, letter)."""
    for target, letters in GATES.items():
        for architecture, letter in zip(ARCHITECTURES.split(), letters.split(), strict=True):
            yield target, architecture, letter


def gated(tiny: Tiny, site: str = "attn", layer: int = 0, *, constant: bool = False) -> Gated:
    """A gated shift, with or without a direction that is taken for constant."""
    width = facts(tiny).geometry.residual
    direction = [0.1 + 0.01 * unit for unit in range(width)]
    return Gated(shift(tiny, site, layer), Gate(direction[::-1], 0.5, 2.0, direction if constant else ()))
