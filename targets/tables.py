"""The targets: per engine and architecture what is loaded, dropped or refused, and the version it was seen on.

The evidence is the engines' own source and, for transformers, llama.cpp, MLX-LM, CTranslate2, ONNX Runtime
GenAI and vLLM, runs; `make test-engines` repeats those. What nobody has looked at is refused.
"""

from collections.abc import Mapping
from dataclasses import replace

from austeer.compiler.target import Row, Target

NATIVE = Row("loads", "loads", "loads", layers=True)
LLAMA = NATIVE
# The stock modules of transformers; what has no flag there is dropped with a line in the load report.
QKV_ONLY = Row("warns", "loads", "warns", layers=True)
ATTENTION = Row("loads", "loads", "warns", layers=True)
NO_BIAS = Row("warns", "warns", "warns")

TRANSFORMERS = Target(
    "transformers",
    "transformers",
    "5.23.0",
    {
        "llama": LLAMA,
        "smollm3": LLAMA,
        "mistral": NO_BIAS,
        "qwen2": QKV_ONLY,
        "qwen3": ATTENTION,
        "qwen3_moe": ATTENTION,
        "mixtral": NO_BIAS,
        "gemma2": ATTENTION,
        "gemma3_text": ATTENTION,
        "phi3": NO_BIAS,
        "olmo2": ATTENTION,
        "gpt2": NATIVE,
        "gpt_neox": NATIVE,
        "opt": NATIVE,
    },
)
VLLM = Target(
    "vllm",
    "vLLM",
    "0.33.0",
    {
        "llama": LLAMA,
        "smollm3": LLAMA,  # by its Transformers backend, as olmo2 and gpt_neox
        "mistral": Row("differs", "differs", "differs"),
        "qwen2": Row("drops", "loads", "drops", layers=True),
        "qwen3": Row("drops", "loads", "drops", layers=True),
        "qwen3_moe": Row("drops", "loads", "drops"),
        "mixtral": Row("drops", "drops", "drops"),
        "gemma2": Row("loads", "loads", "drops", layers=True),
        "gemma3_text": Row("loads", "loads", "drops", layers=True),
        "phi3": Row("differs", "differs", "differs"),
        "olmo2": Row("loads", "loads", "drops", layers=True),
        "gpt2": NATIVE,
        "gpt_neox": NATIVE,
        "opt": NATIVE,
    },
)
SGLANG = Target(
    "sglang",
    "SGLang",
    "0.5.23",
    {
        "llama": Row("loads", "loads", "drops", layers=True),
        "mistral": Row("differs", "differs", "drops"),
        "qwen2": Row("drops", "loads", "drops", layers=True),
        "qwen3": Row("loads", "loads", "drops", layers=True),
        "qwen3_moe": Row("loads", "loads", "drops"),
        "mixtral": Row("drops", "drops", "drops"),
        "gemma2": Row("loads", "loads", "drops", layers=True, period=2),
        "gemma3_text": Row("loads", "loads", "drops", layers=True),
        "phi3": Row("differs", "differs", "drops"),
        "olmo2": Row("loads", "loads", "drops", layers=True),
        "gpt2": NATIVE,
        "gpt_neox": NATIVE,  # by its Transformers backend
        "opt": NATIVE,
    },
)
LLAMA_CPP = Target(
    "llama.cpp",
    "llama.cpp",
    "0c1e57098",
    {
        "llama": Row("optional", "optional", "optional", layers=True),
        "mistral": Row("optional", "optional", "optional"),
        "qwen2": Row("refuses", "optional", "refuses", layers=True),
        "qwen3": Row("refuses", "optional", "refuses", layers=True),
        "qwen3_moe": Row("refuses", "optional", "refuses"),
        "mixtral": Row("optional", "optional", "refuses"),
        "gemma2": Row("refuses", "optional", "refuses", layers=True, period=2),
        "gemma3_text": Row("refuses", "optional", "refuses", layers=True, period=6),
        "phi3": Row("refuses", "optional", "refuses"),
        "olmo2": Row("refuses", "optional", "refuses", layers=True),
        "gpt2": replace(NATIVE, widens=False),  # its converter takes 4 times the residual width
        "gpt_neox": NATIVE,
    },
)
TGI = Target(
    "tgi",
    "Text Generation Inference",
    "db931fcf",
    {
        "llama": LLAMA,
        "mistral": Row("drops", "drops", "drops"),
        "qwen2": Row("drops", "loads", "drops", layers=True),
        "qwen3": Row("loads", "loads", "drops"),  # by its Transformers backend
        "qwen3_moe": Row("loads", "loads", "drops"),  # likewise
        "mixtral": Row("drops", "drops", "drops"),
        "gemma2": Row("drops", "drops", "drops"),
        "gemma3_text": Row("drops", "drops", "drops"),
        "phi3": Row("refuses", "refuses", "refuses"),
        "gpt2": NATIVE,
        "gpt_neox": NATIVE,
        "opt": NATIVE,
    },
)
MLX_LM = Target(
    "mlx-lm",
    "MLX-LM",
    "0.32.2",
    {
        "llama": LLAMA,
        "mistral": Row("differs", "differs", "differs"),
        "qwen2": Row("refuses", "loads", "refuses", layers=True),
        "qwen3": Row("refuses", "refuses", "refuses"),
        "qwen3_moe": Row("refuses", "refuses", "refuses"),
        "mixtral": Row("refuses", "refuses", "refuses"),
        "gemma2": Row("refuses", "refuses", "refuses"),
        "gemma3_text": Row("refuses", "refuses", "refuses"),
        "phi3": Row("refuses", "refuses", "refuses"),
        "olmo2": Row("loads", "loads", "differs", layers=True),
        "gpt2": NATIVE,
        "gpt_neox": NATIVE,
    },
)
CTRANSLATE2 = Target(
    "ctranslate2",
    "CTranslate2",
    "4.8.5",
    {
        "llama": LLAMA,
        "mistral": NO_BIAS,
        "qwen2": QKV_ONLY,
        "qwen3": ATTENTION,
        "gemma2": "CTranslate2 4.8.5 leaves out gemma2's attention softcap, so even the base differs by 0.3",
        "gemma3_text": ATTENTION,
        "phi3": "CTranslate2 4.8.5 cannot read a phi3 that transformers 5 wrote",
        "gpt2": NATIVE,
        "gpt_neox": NATIVE,
        "opt": NATIVE,
    },
)
ONNX = Target(
    "onnxruntime-genai",
    "ONNX Runtime GenAI",
    "0.18.0",
    {
        "llama": LLAMA,
        "mistral": NO_BIAS,
        "qwen2": QKV_ONLY,
        "qwen3": Row("loads", "loads", "warns"),
        "gemma2": Row("loads", "loads", "warns"),
        "gemma3_text": Row("loads", "loads", "warns"),
        "phi3": NO_BIAS,
    },
)

ENGINES = (TRANSFORMERS, VLLM, SGLANG, LLAMA_CPP, TGI, MLX_LM, CTRANSLATE2, ONNX)
PORTABLE = Target("portable", "portable", "(all of the above)", members=ENGINES)
TARGETS: Mapping[str, Target] = {target.name: target for target in (*ENGINES, PORTABLE)}
