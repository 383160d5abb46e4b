"""Tiny random models as engines want them: sizes their kernels take, a tokenizer, a config.json as on the Hub."""

import json
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from tests.tiny import Tiny, scratch

SPECIAL = ("<unk>", "<s>", "</s>")
CHARACTERS = "▁abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,!?'-"

# transformers 5 moves or leaves out keys that converters of engines ask for; a config.json of the Hub has them.
# The published pattern of gemma3, which llama.cpp has built in.
SIXTH_FULL = {"sliding_window_pattern": 6, "layer_types": [*["sliding_attention"] * 5, "full_attention"]}
GEMMA = {"query_pre_attn_scalar": 32, "sliding_window": 64}
HUB_KEYS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_ctx": 64},
    "gpt_neox": {"rotary_pct": 0.25, "rotary_emb_base": 10000},
    "qwen3_moe": {"num_experts": 3},
    "gemma2": GEMMA,
    "gemma3_text": {**GEMMA, "rope_theta": 1e6, "rope_local_base_freq": 1e4, **SIXTH_FULL},
    "phi3": {"original_max_position_embeddings": 64},
}


def sized(architecture: str, **more: Any) -> Tiny:
    """A model that every engine takes: heads of 32, neurons four times the width, a vocabulary in eights.

    The vocabulary is no other width, for ONNX Runtime GenAI finds the LM head by its size. Logits stay
    small, so that an absolute limit means something in float32.
    """
    sizes: dict[str, Any] = {"heads": 4, "kv_heads": 2, "head_dim": 32, "residual": 128, "neurons": 512}
    if architecture.startswith("gemma"):  # tied in most engines; some round the root of the width to bfloat16
        sizes |= {"residual": 256, "tied": True, "embedding": 0.2, "layers": 6 if architecture == "gemma3_text" else 2}
    return Tiny(architecture, **sizes, vocabulary=len(SPECIAL) + len(CHARACTERS), **{"spread": 0.1, **more})


@cache
def on_disk(tiny: Tiny) -> Path:
    """The folder of a model with its tokenizer. Shared by all tests of a session: do not change it."""
    folder = scratch() / "model"
    tiny.save(folder)
    config = json.loads((folder / "config.json").read_text())
    rope = config.get("rope_parameters", {})
    hub = {key: rope[key] for key in ("rope_theta",) if key in rope} | HUB_KEYS.get(tiny.architecture, {})
    (folder / "config.json").write_text(json.dumps({**config, **hub}))
    save_tokenizer(folder)
    return folder


def save_tokenizer(folder: Path) -> None:
    """A token a character, no merges: in the format of `tokenizers`, and in that of sentencepiece."""
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *CHARACTERS])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    tokenizer.add_special_tokens(list(SPECIAL))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    ).save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes(_sentencepiece())


def _sentencepiece() -> bytes:
    """The same vocabulary as sentencepiece writes it, which some of llama.cpp's architectures insist on.

    A protocol buffer by hand: a piece is field 1 of the model, with its text, score and type (2 unknown, 3 control).
    """

    def field(number: int, data: bytes) -> bytes:
        return bytes([number << 3 | 2, len(data)]) + data

    kinds = {"<unk>": 2, "<s>": 3, "</s>": 3}
    pieces = [field(1, piece.encode()) + bytes([3 << 3, kinds.get(piece, 1)]) for piece in [*SPECIAL, *CHARACTERS]]
    trainer = bytes([3 << 3, 2])  # model type BPE
    return b"".join(field(1, piece) for piece in pieces) + field(2, trainer)
