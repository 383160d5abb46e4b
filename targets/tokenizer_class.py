"""Which tokenizer transformers takes for a model, said aloud, for a model whose type it does not know.

For some model types transformers overrules `tokenizer_class` in tokenizer_config.json, or knows a class where the file
names none. Under another model type the same files would give other tokens (transformers 5.23, tokenization_auto).
"""

from collections.abc import Mapping
from typing import Any

TOKENIZER_CONFIG = "tokenizer_config.json"

_AS_STORED = "PreTrainedTokenizerFast"  # tokenizer.json as it is
_OVERRULED: Mapping[str, str] = {
    **dict.fromkeys(("mistral", "mixtral", "olmo2", "phi3"), _AS_STORED),
    "qwen2": "Qwen2Tokenizer",
}
_DEFAULT: Mapping[str, str] = {
    **dict.fromkeys(("qwen3", "qwen3_moe"), "Qwen2Tokenizer"),
    **dict.fromkeys(("gemma2", "gemma3_text"), "GemmaTokenizer"),
    **dict.fromkeys(("gpt2", "opt"), "GPT2Tokenizer"),
    "gpt_neox": "GPTNeoXTokenizer",
}


def with_class(config: dict[str, Any], model_type: str) -> dict[str, Any]:
    """A tokenizer_config.json that names the class which transformers takes for `model_type`; else unchanged."""
    name = _OVERRULED.get(model_type) or config.get("tokenizer_class") or _DEFAULT.get(model_type)
    return config if name is None or "auto_map" in config else {**config, "tokenizer_class": name}
