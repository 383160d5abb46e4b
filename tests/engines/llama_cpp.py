"""llama.cpp for tests: its converter, for tiny models without a tokenizer too, and its log-probabilities."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from austeer.targets.llama_cpp import convert

CONVERTER = Path(__file__).resolve().parents[2] / ".engines/llama.cpp"

# The tiny models have no tokenizer, so their tokens are made up; everything else is the converter's own.
_SCRIPT = """
import runpy, sys
sys.path.insert(0, {folder!r})
import conversion

def set_vocab(self):
    size = self.hparams["vocab_size"]
    tokens = ["<unk>", "<s>", "</s>"] + [chr(0x21 + number) for number in range(size - 3)]
    self.gguf_writer.add_tokenizer_model("llama")
    self.gguf_writer.add_tokenizer_pre("default")
    self.gguf_writer.add_token_list(tokens)
    self.gguf_writer.add_token_scores([0.0] * size)
    self.gguf_writer.add_token_types([2, 3, 3] + [1] * (size - 3))

found = conversion.get_model_class
def get_model_class(*arguments, **more):
    model = found(*arguments, **more)
    model.set_vocab, inner = set_vocab, model.set_gguf_parameters
    def set_gguf_parameters(self):
        self.hparams.setdefault("rotary_pct", 0.25)  # transformers 5 drops what the converter for gpt_neox reads
        inner(self)
    model.set_gguf_parameters = set_gguf_parameters
    return model

conversion.get_model_class = get_model_class
runpy.run_path({script!r}, run_name="__main__")
"""


def use_converter(monkeypatch: pytest.MonkeyPatch, folder: Path, *, tokenizer: bool = False) -> None:
    """Lets the product find llama.cpp's converter, one that asks for no tokenizer unless told; or skips the test."""
    if not CONVERTER.exists():
        pytest.skip("llama.cpp's converter is not in .engines: `make test` fetches it")
    for package in ("gguf", "sentencepiece"):
        pytest.importorskip(package, reason=f"llama.cpp's converter needs {package}")
    if not tokenizer:
        script = _SCRIPT.format(folder=str(CONVERTER), script=str(CONVERTER / "convert_hf_to_gguf.py"))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "convert_hf_to_gguf.py").write_text(script)
    monkeypatch.setenv("AUSTEER_LLAMA_CPP", str(CONVERTER if tokenizer else folder))


def served(
    gguf: Path, ids: Sequence[int], vocabulary: int, ascii_token: int, lora: Path | None = None
) -> "np.ndarray[Any, Any]":
    """The log-probabilities [positions, vocabulary] of llama.cpp after each prefix of the prompt.

    Cache in float32 and no flash attention: the defaults round to 16 bits. The sampled token is forced, by a
    bias that does not enter the reported probabilities: a part of a character would not be reported at all.
    """
    xllamacpp = pytest.importorskip("xllamacpp", reason="xllamacpp, which is llama.cpp as a wheel, is not installed")
    options = xllamacpp.CommonParams()
    options.model.path = str(gguf)
    options.n_ctx, options.n_parallel, options.verbosity = 256, 1, 0
    options.cpuparams.n_threads = options.cpuparams_batch.n_threads = 1
    options.cache_type_k = options.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    options.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if lora is not None:
        adapter = xllamacpp.CommonAdapterLoraInfo()
        adapter.path, adapter.scale = str(lora), 1.0
        options.lora_adapters = [adapter]
    server = xllamacpp.Server(options)
    found = np.full((len(ids), vocabulary), np.nan)
    for position in range(len(ids)):
        request = {
            "prompt": list(ids[: position + 1]),
            "max_tokens": 1,
            "temperature": 0,
            "logprobs": vocabulary,
            "logit_bias": [[ascii_token, 1000.0]],
            "cache_prompt": False,
        }
        answer = server.handle_completions(request)
        answer = answer if isinstance(answer, dict) else json.loads(answer)
        for entry in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
            found[position, entry["id"]] = entry["logprob"]
    assert np.isfinite(found).all(), "llama.cpp did not report the whole vocabulary"
    return found


def converted(model: Path, folder: Path) -> Path:
    """The GGUF in float32 that llama.cpp's own converter makes of a checkpoint."""
    convert(model, folder / "model.gguf", "f32")
    return folder / "model.gguf"


@torch.inference_mode()
def log_probabilities(model: Any, ids: Sequence[int]) -> "np.ndarray[Any, Any]":
    """What transformers says: log-probabilities [positions, vocabulary]."""
    return model(input_ids=torch.tensor([list(ids)])).logits[0].double().log_softmax(-1).numpy()
