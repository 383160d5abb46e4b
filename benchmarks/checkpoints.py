"""Synthetic llama checkpoints of any size: valid files, cheap to make, that never pass through a model."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

GB = 10**9
SHARD = 2 * GB
VOCABULARY = 32000
_TILE = 2**22  # bytes of noise, repeated


@dataclass(frozen=True)
class Shape:
    """The sizes of one model family member."""

    hidden: int
    neurons: int
    heads: int
    kv_heads: int

    @property
    def block(self) -> dict[str, tuple[int, ...]]:
        """The tensors of one block."""
        width, kv = self.hidden, self.hidden // self.heads * self.kv_heads
        linear = {
            "self_attn.q_proj": (width, width), "self_attn.k_proj": (kv, width), "self_attn.v_proj": (kv, width),
            "self_attn.o_proj": (width, width), "mlp.gate_proj": (self.neurons, width),
            "mlp.up_proj": (self.neurons, width), "mlp.down_proj": (width, self.neurons),
            "input_layernorm": (width,), "post_attention_layernorm": (width,),
        }  # fmt: skip
        return {f"{name}.weight": shape for name, shape in linear.items()}

    @property
    def ends(self) -> dict[str, tuple[int, ...]]:
        """The tensors outside the blocks."""
        table = (VOCABULARY, self.hidden)
        return {"model.embed_tokens.weight": table, "model.norm.weight": (self.hidden,), "lm_head.weight": table}

    def layers(self, size: int) -> int:
        """How many blocks fit into `size` bytes of bfloat16."""
        return (size - _nbytes(self.ends)) // _nbytes(self.block)

    def config(self, layers: int) -> dict[str, object]:
        """config.json."""
        return {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16",
            "hidden_size": self.hidden, "intermediate_size": self.neurons, "num_hidden_layers": layers,
            "num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads,
            "vocab_size": VOCABULARY, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
        }  # fmt: skip


ONE_B = Shape(2048, 5632, 32, 4)
THREE_B = Shape(3072, 8192, 24, 8)
EIGHT_B = Shape(4096, 14336, 32, 8)


def write_checkpoint(folder: Path, shape: Shape, size: int) -> None:
    """A bfloat16 checkpoint of at most `size` bytes in shards of 2 GB, with its index."""
    folder.mkdir()
    layers = shape.layers(size)
    tensors = dict(shape.ends)
    for layer in range(layers):
        tensors |= {f"model.layers.{layer}.{name}": dims for name, dims in shape.block.items()}
    shards = list(_packed(tensors))
    noise, places = _noise(), {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write_shard(folder / name, shard, noise)
        places |= dict.fromkeys(shard, name)
    index = {"metadata": {"total_size": _nbytes(tensors)}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
    (folder / "config.json").write_text(json.dumps(shape.config(layers)), "utf-8")


def _packed(tensors: dict[str, tuple[int, ...]]) -> Iterator[dict[str, tuple[int, ...]]]:
    shard: dict[str, tuple[int, ...]] = {}
    for name, dims in tensors.items():
        if shard and _nbytes(shard) + _nbytes({name: dims}) > SHARD:
            yield shard
            shard = {}
        shard[name] = dims
    yield shard


def _write_shard(path: Path, tensors: dict[str, tuple[int, ...]], noise: memoryview) -> None:
    header, end = {}, 0
    for name, dims in tensors.items():
        start, end = end, end + _nbytes({name: dims})
        header[name] = {"dtype": "BF16", "shape": dims, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for start in range(0, end, len(noise)):
            file.write(noise[: end - start])


def _noise() -> memoryview:
    """Bfloat16 bits of both signs with magnitudes from 2**-7 to 2: never infinity or NaN."""
    bits = np.random.default_rng(0).integers(0, 2**16, _TILE // 2, np.uint16)
    return memoryview((bits & 0x83FF | 0x3C00).astype("<u2").tobytes())


def _nbytes(tensors: dict[str, tuple[int, ...]]) -> int:
    return sum(2 * int(np.prod(dims)) for dims in tensors.values())
