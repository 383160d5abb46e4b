"""What begins, reads and norms the residual stream in each architecture, besides the output projections, as data."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from austeer.compiler.architectures import Flag, Property

UNTIED, TIED = Flag("tie_word_embeddings"), Flag("tie_word_embeddings", default=True)

StreamRole = Literal["embeddings", "attn_in", "attn_norm", "ffn_in", "ffn_norm", "head_in"]
"""embeddings: what the stream begins with, as rows. attn_in, ffn_in: what reads it in a block. attn_norm, ffn_norm:
the norms of what a block writes. head_in: the norm before the language model's head.
"""


@dataclass(frozen=True)
class Stream:
    """The weights of each role, by their names within the block or, outside of it, after the prefix.

    All have the residual axis last. `reads_normed`: blocks read through a norm, `attn_in` and `ffn_in`; else
    linear maps read the stream as it is. `plus_one`: a norm's factor is 1 + weight. `tied`: whether the head
    uses the embeddings' weight. `parallel`: whether the FFN reads the stream before the attention has written.
    """

    attn_in: tuple[str, ...] = ("input_layernorm",)
    ffn_in: tuple[str, ...] = ("post_attention_layernorm",)
    attn_norm: tuple[str, ...] = ()
    ffn_norm: tuple[str, ...] = ()
    head_in: tuple[str, ...] = ("norm",)
    embeddings: tuple[str, ...] = ("embed_tokens",)
    reads_normed: bool = True
    plus_one: bool = False
    tied: Flag = UNTIED
    parallel: Property = False

    def names(self, role: StreamRole) -> tuple[str, ...]:
        """The modules of a role."""
        return getattr(self, role)


LLAMA = Stream()
POST_NORMS = Stream(attn_norm=("post_attention_layernorm",), ffn_norm=("post_feedforward_layernorm",))
GEMMA = replace(POST_NORMS, ffn_in=("pre_feedforward_layernorm",), plus_one=True, tied=TIED)
OLMO2 = replace(
    POST_NORMS,
    attn_in=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ffn_in=("mlp.gate_proj", "mlp.up_proj"),
    reads_normed=False,
)

STREAMS: Mapping[str, Stream] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "mixtral", "phi3"), LLAMA),
    "smollm3": replace(LLAMA, tied=TIED),
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
    "olmo2": OLMO2,
    "gpt2": Stream(("ln_1",), ("ln_2",), head_in=("ln_f",), embeddings=("wte", "wpe"), tied=TIED),
    "gpt_neox": Stream(
        head_in=("final_layer_norm",),
        embeddings=("embed_in",),
        parallel=Flag("use_parallel_residual", default=True),
    ),
    "opt": Stream(
        ("self_attn_layer_norm",),
        ("final_layer_norm",),
        head_in=("decoder.final_layer_norm",),
        embeddings=("decoder.embed_tokens", "decoder.embed_positions"),
        tied=TIED,
    ),
}
