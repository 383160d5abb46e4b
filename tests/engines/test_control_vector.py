"""A control vector in llama.cpp, by its own --control-vector, against the interpreter of what import makes of it."""

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from austeer.compiler import Program, interpret
from austeer.compiler.verbs.build import build
from austeer.compiler.verbs.importing import import_artefact
from tests.engines.llama_cpp import converted, log_probabilities, served
from tests.engines.test_stories import CLOSE, TEXT
from tests.shared import shared
from tests.tiny import load

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.usefixtures("converter")]

PARSE = "_Z19common_params_parseiPPcR13common_params13llama_examplePFviS0_E"  # bool common_params_parse(...)
STRENGTH = 1.5


def control_vector(path: Path, layers: range, width: int) -> Path:
    """A file as repeng's ControlVector.export_gguf writes it."""
    gguf = pytest.importorskip("gguf", reason="gguf, which repeng writes its files with, is not installed")
    writer = gguf.GGUFWriter(path, "controlvector")
    writer.add_string("controlvector.model_hint", "llama")
    writer.add_uint32("controlvector.layer_count", len(layers))
    rng = np.random.default_rng(0)
    for layer in reversed(layers):
        writer.add_tensor(f"direction.{layer}", rng.normal(size=width).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def with_arguments(options: Any, *arguments: str) -> Any:
    """xllamacpp's options after llama.cpp's own command line parser has seen these arguments.

    The Python class has no name for control vectors. The C++ struct lies inside its object, n_predict and n_ctx first.
    """
    import xllamacpp

    options.n_predict, marks = 12345, (12345, options.n_ctx)
    places = (id(options) + offset for offset in range(16, 64, 8))
    place = next(place for place in places if tuple((ctypes.c_int32 * 2).from_address(place)) == marks)
    options.n_predict = -1
    words = [b"llama", *(argument.encode() for argument in arguments)]
    parse = getattr(ctypes.CDLL(xllamacpp.xllamacpp.__file__), PARSE)
    parse.restype = ctypes.c_bool
    argv = (ctypes.c_char_p * len(words))(*words)
    assert parse(len(words), argv, ctypes.c_void_p(place), 0, None)
    return options


def test_import_means_what_llama_cpp_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    xllamacpp = pytest.importorskip("xllamacpp", reason="xllamacpp, which is llama.cpp as a wheel, is not installed")
    base = shared("models/stories260K")
    vector = control_vector(tmp_path / "happy.gguf", range(1, 5), 64)
    import_artefact(vector, str(base), tmp_path / "p.safetensors", strength=STRENGTH)
    ids, model = AutoTokenizer.from_pretrained(base)(TEXT)["input_ids"], load(base)
    plain = log_probabilities(model, ids)
    with interpret(model, Program.load(tmp_path / "p.safetensors")):
        steered = log_probabilities(model, ids)
    build(str(base), [tmp_path / "p.safetensors"], tmp_path / "out", target="llama.cpp")
    gguf = converted(base, tmp_path)
    assert np.abs(served(gguf, ids, plain.shape[1], ids[-1]) - plain).max() < CLOSE  # the control: nothing is added

    server = xllamacpp.Server
    scaled = f"{vector}:{STRENGTH}"
    monkeypatch.setattr(xllamacpp, "Server", lambda o: server(with_arguments(o, "--control-vector-scaled", scaled)))
    found = served(gguf, ids, plain.shape[1], ids[-1])
    assert np.abs(found - steered).max() < CLOSE
    assert np.abs(plain - steered).max() > 1000 * CLOSE
    monkeypatch.setattr(xllamacpp, "Server", server)
    compiled = served(converted(tmp_path / "out", tmp_path), ids, plain.shape[1], ids[-1])
    assert np.abs(found - compiled).max() < CLOSE  # llama.cpp's own run of the vector, and the weights it became
