"""Architectures that are another one with different words, as data: rewriting config.json is the whole translation.

mistral, qwen2 and phi3 are llama without some biases. Written as llama they have them all, and every engine's
llama honours them; the logits are bit-identical. A mistral whose window matters is a smollm3.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Reexpression:
    """How a config.json of one architecture says the same in another.

    `defaults`: what an absent key means at home, where it would mean something else abroad. `drops`: keys that
    engines would read there. `blocked`: why this very model has no such translation, or None.
    """

    home: str
    abroad: str
    defaults: Config
    drops: tuple[str, ...]
    blocked: Callable[[Config], str | None]
    sets: Callable[[Config], Config] = field(default=lambda _: {})

    def translate(self, config: Config, class_name: str) -> dict[str, Any]:
        """The new config.json: the old one's keys in their order, then what is new."""
        given = {key: value for key, value in config.items() if key not in self.drops}
        absent = {key: value for key, value in self.defaults.items() if key not in given}
        if "rope_theta" in (given.get("rope_parameters") or {}):  # where transformers 5 keeps it
            absent.pop("rope_theta", None)
        return {**given, **absent, "model_type": self.abroad, "architectures": [class_name], **self.sets(config)}


def _window(config: Config, default: int | None) -> int | None:
    """The attention window where it is shorter than the model's own context, else None."""
    window = config.get("sliding_window", default)
    context = config.get("max_position_embeddings")
    return window if window is not None and (context is None or window < context) else None


def _blocked_mistral(config: Config) -> str | None:
    if config.get("hidden_size", 0) % config.get("num_attention_heads", 1):
        return "its width is no multiple of its heads, which llama's must be in transformers"
    window = _window(config, 4096)
    return f"its attention slides over {window} tokens, which llama's does not" if window else _odd_rope(config)


def _odd_rope(config: Config) -> str | None:
    rope = config.get("rope_parameters") or {}
    odd = sorted(key for key in (*config, *rope) if key.startswith("llama_4_scaling"))
    return f"its rope has {', '.join(odd)}, which llama's has not" if odd else None


def _blocked_qwen2(config: Config) -> str | None:
    if config.get("use_sliding_window"):
        return "some of its layers slide (use_sliding_window), and no layer of a llama does"
    return "it has dual chunk attention" if config.get("dual_chunk_attention_config") else None


def _blocked_phi3(config: Config) -> str | None:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        return f"its rope is {kind}, which engines compute differently for llama"
    rotary = config.get("partial_rotary_factor", rope.get("partial_rotary_factor", 1.0))
    if rotary != 1.0:
        return f"it rotates only {rotary} of each head"
    window = _window(config, None)
    return f"its attention slides over {window} tokens, which llama's does not" if window else None


def _all_sliding(config: Config) -> Config:
    layers = config["num_hidden_layers"]
    return {
        "sliding_window": config.get("sliding_window", 4096),
        "use_sliding_window": True,
        "layer_types": ["sliding_attention"] * layers,
        "no_rope_layers": [1] * layers,
    }


ROPE = {"rope_theta": 10000.0}
SLIDING = ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types")
MISTRAL_SAYS = {**ROPE, "max_position_embeddings": 131072, "num_key_value_heads": 8}

REEXPRESSIONS = (
    Reexpression("mistral", "llama", MISTRAL_SAYS, SLIDING, _blocked_mistral),
    Reexpression(
        "mistral",
        "smollm3",
        {**MISTRAL_SAYS, "tie_word_embeddings": False, "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2},
        SLIDING,
        _odd_rope,
        _all_sliding,
    ),
    Reexpression(
        "qwen2",
        "llama",
        {**ROPE, "max_position_embeddings": 32768, "bos_token_id": None, "eos_token_id": None},
        SLIDING,
        _blocked_qwen2,
    ),
    Reexpression(
        "phi3",
        "llama",
        {
            **ROPE, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": 32000,
            "pad_token_id": 32000,
        },
        (*SLIDING, "original_max_position_embeddings", "partial_rotary_factor", "embd_pdrop", "resid_pdrop"),
        _blocked_phi3,
    ),
)  # fmt: skip


def carriers(architecture: str) -> tuple[str, ...]:
    """The architectures a model can be written as, its own first."""
    return (architecture, *(entry.abroad for entry in REEXPRESSIONS if entry.home == architecture))


def reexpression(home: str, abroad: str) -> Reexpression:
    """The entry for two architectures; KeyError if there is none."""
    return next(entry for entry in REEXPRESSIONS if (entry.home, entry.abroad) == (home, abroad))
