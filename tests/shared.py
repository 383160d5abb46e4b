"""What several tests share: the data beside the repository, and tiny random models of every family."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

SHARED = Path(__file__).resolve().parents[1] / ".." / "shared"


def shared(name: str) -> Path:
    """A file or folder of the shared data; the test is skipped where it is absent."""
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"shared/{name} does not lie beside the repository")
    return path


_SIZES = {
    "vocab_size": 64,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
_GROUPED = dict(_SIZES, num_key_value_heads=2)
_OPT = {"vocab_size": 64, "hidden_size": 24, "ffn_dim": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
_MOE = dict(_GROUPED, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)

# Names are a model type and, after a dash, what is special.
TINY: dict[str, dict[str, Any]] = {
    "llama": dict(_GROUPED, head_dim=8),
    "mistral": dict(_GROUPED, head_dim=8, sliding_window=None),
    "mistral-window": dict(_GROUPED, head_dim=8, sliding_window=4),
    "qwen2": _GROUPED,
    "qwen2-window": dict(_GROUPED, use_sliding_window=True, sliding_window=4, max_window_layers=1),
    "qwen3": dict(_GROUPED, head_dim=8),
    "qwen3_moe": dict(_MOE, head_dim=8),
    "qwen3_moe-dense": dict(_MOE, head_dim=8, mlp_only_layers=[1]),
    "mixtral": dict(_GROUPED, num_local_experts=4, num_experts_per_tok=2, sliding_window=5),
    "gemma2": dict(_GROUPED, head_dim=8, sliding_window=4, final_logit_softcapping=2.0),
    "gemma3_text": dict(_GROUPED, head_dim=8, sliding_window=4, layer_types=["sliding_attention", "full_attention"]),
    "phi3": dict(_GROUPED, pad_token_id=0),
    "phi3-window": dict(_GROUPED, pad_token_id=0, sliding_window=4),
    "olmo2": _GROUPED,
    "gpt2": {"vocab_size": 64, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "gpt_neox": _SIZES,
    "opt": dict(_OPT, word_embed_proj_dim=24, max_position_embeddings=128),
    "opt-post": dict(_OPT, word_embed_proj_dim=16, max_position_embeddings=128, do_layer_norm_before=False),
}


@cache
def tiny(name: str) -> Any:
    """A model of two layers with large random weights, so that an error anywhere shows. Shared: do not change it."""
    kind = name.partition("-")[0]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **TINY[name]))
        for parameter in model.parameters():
            fresh = torch.randn_like(parameter) * (0.3 if parameter.ndim > 1 else 0.1)
            parameter.data = fresh if parameter.ndim > 1 else parameter.data + fresh
    return model.eval().requires_grad_(False)
