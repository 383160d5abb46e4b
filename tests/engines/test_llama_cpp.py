"""A compiled checkpoint in llama.cpp, by its own converter, against the interpreter; the base must not agree."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from austeer.compiler import Edit, Program, Rank1, Scale, interpret
from austeer.compiler.facts import Geometry
from austeer.compiler.verbs.build import build
from tests.shared import shared
from tests.tiny import load

pytestmark = [pytest.mark.engine, pytest.mark.slow]

CONVERTER = Path(__file__).resolve().parents[2] / ".engines/llama.cpp/convert_hf_to_gguf.py"
TEXT = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."
CLOSE = 1e-3


class Story(NamedTuple):
    """The models and what transformers says about them: log-probabilities [positions, vocabulary]."""

    base: Path
    out: Path
    ids: list[int]
    plain: "np.ndarray[Any, Any]"
    steered: "np.ndarray[Any, Any]"


def edits(model: Geometry) -> list[Edit]:
    """What folds into a llama without biases: every kind and site but Shift."""
    rng = np.random.default_rng(0)
    widths = {"heads": model.heads, "attn": model.residual, "neurons": model.neurons, "ffn": model.residual}
    made: list[Edit] = []
    for layer in range(model.layers):
        for site, width in widths.items():
            made.append(Scale(layer, site, rng.permutation(width)[:8].tolist(), rng.normal(size=8)))
            if site in ("heads", "neurons"):
                made.append(Rank1(layer, site, rng.normal(size=width), rng.normal(size=model.residual), 0.02))
    return made


@torch.inference_mode()
def log_probabilities(model: Any, ids: Sequence[int]) -> "np.ndarray[Any, Any]":
    return model(input_ids=torch.tensor([list(ids)])).logits[0].double().log_softmax(-1).numpy()


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    base, folder = shared("models/stories260K"), tmp_path_factory.mktemp("story")
    program = Program.of(edits(Program.of([], model=base).model), model=base)
    program.save(folder / "p.safetensors")
    build(str(base), [folder / "p.safetensors"], folder / "out")
    ids = AutoTokenizer.from_pretrained(base)(TEXT)["input_ids"]
    model = load(base)
    plain = log_probabilities(model, ids)
    with interpret(model, program):
        steered = log_probabilities(model, ids)
    assert np.abs(plain - steered).max() > 1
    return Story(base, folder / "out", ids, plain, steered)


def converted(model: Path, folder: Path) -> Path:
    """The GGUF in float32 that llama.cpp's own converter makes of a checkpoint."""
    if not CONVERTER.exists():
        pytest.skip("llama.cpp's converter is not in .engines: `make test` fetches it")
    for package in ("gguf", "sentencepiece"):
        pytest.importorskip(package, reason=f"llama.cpp's converter needs {package}")
    target = folder / "model.gguf"
    command = [sys.executable, str(CONVERTER), str(model), "--outtype", "f32", "--outfile", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return target


def served(
    gguf: Path, ids: Sequence[int], vocabulary: int, ascii_token: int, lora: Path | None = None
) -> "np.ndarray[Any, Any]":
    """The log-probabilities of llama.cpp after each prefix of the prompt, with a LoRA adapter in GGUF if given.

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


def test_the_compiled_model_says_in_llama_cpp_what_the_interpreter_says(story: Story, tmp_path: Path) -> None:
    found = served(converted(story.out, tmp_path), story.ids, story.plain.shape[1], story.ids[-1])
    assert np.abs(found - story.steered).max() < CLOSE


def test_the_base_does_not(story: Story, tmp_path: Path) -> None:
    found = served(converted(story.base, tmp_path), story.ids, story.plain.shape[1], story.ids[-1])
    assert np.abs(found - story.plain).max() < CLOSE
    assert np.abs(found - story.steered).max() > 1000 * CLOSE
