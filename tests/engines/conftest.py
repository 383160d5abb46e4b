"""Where the engines are: llama.cpp's converter in .engines, vLLM in .venv-vllm, as make puts them."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engines.llama_cpp import use_converter

ROOT = Path(__file__).resolve().parents[2]
CONVERTER, VLLM = ROOT / ".engines/llama.cpp", ROOT / ".venv-vllm/bin/python"

# The converter knows byte-level tokenizers by the hash of what they make of a text, so no tiny one. Here the
# architectures that have such tokenizers take the sentencepiece file that lies beside, and a tokenizer without such a
# file passes for that of gpt2: the tests give tokens, not text. All else is the converter.
SHIM = """
import runpy, sys
sys.path.insert(0, {folder!r})
from conversion.base import TextModel
byte_level = TextModel._set_vocab_gpt2
def set_vocab(self):
    beside = (self.dir_model / "tokenizer.model").exists()
    TextModel._set_vocab_sentencepiece(self) if beside else byte_level(self)
TextModel._set_vocab_gpt2 = set_vocab
TextModel.get_vocab_base_pre = lambda *_: "gpt-2"
runpy.run_path({folder!r} + "/convert_hf_to_gguf.py", run_name="__main__")
"""


@pytest.fixture(scope="module", autouse=True)
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        if CONVERTER.exists():
            folder = tmp_path_factory.mktemp("llama.cpp")
            (folder / "convert_hf_to_gguf.py").write_text(SHIM.format(folder=str(CONVERTER)))
            patch.setenv("AUSTEER_LLAMA_CPP", str(folder))
        if VLLM.exists() and "AUSTEER_VLLM_PYTHON" not in os.environ:
            patch.setenv("AUSTEER_VLLM_PYTHON", str(VLLM))
        yield


@pytest.fixture
def converter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """llama.cpp's converter as it is, for models with a tokenizer, or a skip."""
    use_converter(monkeypatch, tmp_path, tokenizer=True)
