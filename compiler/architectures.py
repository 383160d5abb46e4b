"""The architectures the compiler knows, as data: names, orientations, fused parts, biases, spaces.

To add one: write its entry, add it to ARCHITECTURES, and the property tests cover it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

Axis = Literal["residual", "heads", "kv", "neurons"]


@dataclass(frozen=True)
class Flag:
    """A property that config.json decides: it holds when the value under `key` is `value`."""

    key: str
    default: bool = False  # what an absent key means
    value: bool = True


Property: TypeAlias = Flag | bool  # a plain bool where no configuration changes it


def holds(this: Property, config: Mapping[str, Any]) -> bool:
    """Whether a property holds for a model with this config.json."""
    if isinstance(this, Flag):
        return bool(config.get(this.key, this.default)) is this.value
    return this


NO, YES = False, True


@dataclass(frozen=True)
class Linear:
    """A linear map of a block. `outputs` has several axes where one tensor fuses several maps.

    They lie one after another, but where it is `by_head`: there the maps of one head do, and then those of the next.
    """

    name: str
    inputs: Axis
    outputs: tuple[Axis, ...]
    bias: Property = NO
    by_head: bool = False

    @property
    def of_attention(self) -> bool:
        """Whether it belongs to the attention of its block, and not to the FFN."""
        return "heads" in (self.inputs, *self.outputs) or "kv" in self.outputs


@dataclass(frozen=True)
class Experts:
    """The FFN of a mixture-of-experts layer: where the down projections of the experts lie.

    On disk one matrix per expert (`down`, with {expert}) or one 3-D tensor [experts, residual, width]
    (`fused`, as transformers 5 holds it in memory). `module` is the FFN block of the live model. The others
    are keys of config.json: `counts` alternatives for one number, and a layer is dense if `dense_layers` lists
    it or `step` leaves it out.
    """

    down: str
    fused: str
    module: str
    width: str
    counts: tuple[str, ...] = (
        "num_experts",
        "num_local_experts",
    )  # transformers 5 writes the second for both
    dense_layers: str = "mlp_only_layers"
    step: str = "decoder_sparse_step"

    def in_layer(self, layer: int, config: Mapping[str, Any]) -> bool:
        """Whether this layer is a mixture of experts."""
        dense, step = config.get(self.dense_layers) or [], config.get(self.step) or 1
        return layer not in dense and (layer + 1) % step == 0


@dataclass(frozen=True)
class Sizes:
    """The keys of config.json that hold a model's sizes, and what an absent one means."""

    layers: str = "num_hidden_layers"
    residual: str = "hidden_size"
    neurons: str = "intermediate_size"
    heads: str = "num_attention_heads"
    kv_heads: str = "num_key_value_heads"  # absent: as many as heads
    head_dim: str = "head_dim"  # absent: head_dim_default, else residual / heads
    head_dim_default: int | None = None
    neurons_per_residual: int | None = None  # neurons absent: this times residual


@dataclass(frozen=True)
class Activation:
    """The key of config.json that names the activation function of the FFN, and what an absent one means."""

    key: str = "hidden_act"
    default: str = "silu"

    def of(self, config: Mapping[str, Any]) -> str:
        """Its name in a model with this config.json."""
        return str(config.get(self.key) or self.default)


@dataclass(frozen=True)
class PostNorm:
    """An RMS norm between the attention's output and the residual stream; its factor may be 1 + weight."""

    name: str
    plus_one: bool
    eps: float  # where config.json has no rms_norm_eps


@dataclass(frozen=True)
class Architecture:
    """One model family.

    A tensor is called `prefix + block.format(layer=...) + linear.name + ".weight"`; checkpoints saved from
    the bare model lack the prefix. Modules of a live transformers model have the same names.
    """

    model_type: str
    class_name: str
    prefix: str
    block: str
    attn_out: Linear
    ffn_out: Linear
    inputs: tuple[Linear, ...]
    transposed: bool = False  # weights stored [in, out] (Conv1D) instead of [out, in]
    post_norm: Property = NO  # a norm between the output projections and the residual stream
    attn_norm: PostNorm | None = None  # that norm, where it is the attention's own
    block_norm: str = ""  # where that norm is the last thing in the block, its name
    attention_part: tuple[str, ...] = ("self_attn.", "input_layernorm.")  # what else of a block is the attention's
    sliding_period: int = 0  # of this many layers the last attends fully, where config.json has no layer_types
    experts: Experts | None = None
    sizes: Sizes = Sizes()
    activation: Activation = Activation()

    @property
    def values(self) -> Linear | None:
        """The map that makes values and nothing else; None where it is fused with queries and keys."""
        alone = [linear for linear in self.inputs if linear.outputs == ("kv",)]  # keys, then values
        return alone[-1] if alone else None

    @property
    def linears(self) -> tuple[Linear, ...]:
        """Every linear map of a block that has no experts."""
        return (self.attn_out, self.ffn_out, *self.inputs)


def attention(bias: Property, out_bias: Property) -> tuple[Linear, ...]:
    """Separate q, k, v and o projections under the names that most families share."""
    return (
        Linear("self_attn.o_proj", "heads", ("residual",), out_bias),
        Linear("self_attn.q_proj", "residual", ("heads",), bias),
        Linear("self_attn.k_proj", "residual", ("kv",), bias),
        Linear("self_attn.v_proj", "residual", ("kv",), bias),
    )


def gated_ffn(bias: Property) -> tuple[Linear, ...]:
    """down, gate and up projections under the names that most families share."""
    return (
        Linear("mlp.down_proj", "neurons", ("residual",), bias),
        Linear("mlp.gate_proj", "residual", ("neurons",), bias),
        Linear("mlp.up_proj", "residual", ("neurons",), bias),
    )


def family(model_type: str, class_name: str, qkv: Property, out: Property, ffn: Property = NO) -> Architecture:
    """A family with the tensor names of llama."""
    attn_out, *qkv_proj = attention(qkv, out)
    ffn_out, *gate_up = gated_ffn(ffn)
    return Architecture(model_type, class_name, "model.", "layers.{layer}.", attn_out, ffn_out, (*qkv_proj, *gate_up))


ATTENTION_BIAS = Flag("attention_bias")
HEAD_128, HEAD_256 = Sizes(head_dim_default=128), Sizes(head_dim_default=256)

LLAMA = family("llama", "LlamaForCausalLM", ATTENTION_BIAS, ATTENTION_BIAS, Flag("mlp_bias"))
SMOLLM3 = replace(LLAMA, model_type="smollm3", class_name="SmolLM3ForCausalLM")
MISTRAL = family("mistral", "MistralForCausalLM", NO, NO)
QWEN2 = family("qwen2", "Qwen2ForCausalLM", YES, NO)
QWEN3 = replace(family("qwen3", "Qwen3ForCausalLM", ATTENTION_BIAS, ATTENTION_BIAS), sizes=HEAD_128)
QWEN3_MOE = replace(
    family("qwen3_moe", "Qwen3MoeForCausalLM", ATTENTION_BIAS, ATTENTION_BIAS),
    experts=Experts("mlp.experts.{expert}.down_proj", "mlp.experts.down_proj", "mlp", "moe_intermediate_size"),
)
MIXTRAL = replace(
    family("mixtral", "MixtralForCausalLM", NO, NO),
    experts=Experts("block_sparse_moe.experts.{expert}.w2", "mlp.experts.down_proj", "mlp", "intermediate_size"),
)
GEMMA2 = replace(
    family("gemma2", "Gemma2ForCausalLM", ATTENTION_BIAS, ATTENTION_BIAS),
    sizes=HEAD_256,
    post_norm=YES,
    attn_norm=PostNorm("post_attention_layernorm", plus_one=True, eps=1e-6),
    sliding_period=2,
    activation=Activation("hidden_activation", "gelu_pytorch_tanh"),
)
GEMMA3 = replace(GEMMA2, model_type="gemma3_text", class_name="Gemma3ForCausalLM", sliding_period=6)
OLMO2 = replace(
    family("olmo2", "Olmo2ForCausalLM", ATTENTION_BIAS, ATTENTION_BIAS),
    post_norm=YES,
    attn_norm=PostNorm("post_attention_layernorm", plus_one=False, eps=1e-5),
)
PHI3 = replace(
    family("phi3", "Phi3ForCausalLM", NO, NO),
    inputs=(
        Linear("self_attn.qkv_proj", "residual", ("heads", "kv", "kv")),
        Linear("mlp.gate_up_proj", "residual", ("neurons", "neurons")),
    ),
)
GPT2 = Architecture(
    "gpt2",
    "GPT2LMHeadModel",
    prefix="transformer.",
    block="h.{layer}.",
    attn_out=Linear("attn.c_proj", "heads", ("residual",), YES),
    ffn_out=Linear("mlp.c_proj", "neurons", ("residual",), YES),
    inputs=(
        Linear("attn.c_attn", "residual", ("heads", "kv", "kv"), YES),
        Linear("mlp.c_fc", "residual", ("neurons",), YES),
    ),
    transposed=True,
    sizes=Sizes("n_layer", "n_embd", "n_inner", "n_head", neurons_per_residual=4),
    activation=Activation("activation_function", "gelu_new"),
)
NEOX_BIAS = Flag("attention_bias", default=True)
GPT_NEOX = Architecture(
    "gpt_neox",
    "GPTNeoXForCausalLM",
    prefix="gpt_neox.",
    block="layers.{layer}.",
    attn_out=Linear("attention.dense", "heads", ("residual",), NEOX_BIAS),
    ffn_out=Linear("mlp.dense_4h_to_h", "neurons", ("residual",), YES),
    inputs=(
        Linear("attention.query_key_value", "residual", ("heads", "kv", "kv"), NEOX_BIAS, by_head=True),
        Linear("mlp.dense_h_to_4h", "residual", ("neurons",), YES),
    ),
    activation=Activation(default="gelu"),
)
OPT_BIAS = Flag("enable_bias", default=True)
OPT_ATTENTION = attention(OPT_BIAS, OPT_BIAS)
OPT = Architecture(
    "opt",
    "OPTForCausalLM",
    prefix="model.",
    block="decoder.layers.{layer}.",
    attn_out=replace(OPT_ATTENTION[0], name="self_attn.out_proj"),
    ffn_out=Linear("fc2", "neurons", ("residual",), OPT_BIAS),
    inputs=(*OPT_ATTENTION[1:], Linear("fc1", "residual", ("neurons",), OPT_BIAS)),
    post_norm=Flag("do_layer_norm_before", default=True, value=False),
    block_norm="final_layer_norm",
    sizes=Sizes(neurons="ffn_dim"),
    activation=Activation("activation_function", "relu"),
)

ARCHITECTURES: Mapping[str, Architecture] = {
    entry.model_type: entry
    for entry in (
        LLAMA, SMOLLM3, MISTRAL, QWEN2, QWEN3, QWEN3_MOE, MIXTRAL, GEMMA2, GEMMA3, PHI3, OLMO2, GPT2, GPT_NEOX, OPT
    )
}  # fmt: skip
