"""ONNX Runtime GenAI, through its own model builder."""

from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from austeer.compiler.checkpoint import CONFIG, read_json
from austeer.compiler.tokens import Tokens
from austeer.targets.engines.engine import Answer, Engine, Request, Scores, answer, log_softmax


def run(request: Request) -> Answer:
    """Builds the ONNX model in float32 for the CPU, and asks GenAI's generator."""
    import numpy as np

    genai: Any = import_module("onnxruntime_genai")
    window = int(read_json(request.folder / CONFIG).get("sliding_window") or 0)  # the cache must not be smaller
    with TemporaryDirectory() as folder:
        model: Any = genai.Model(_built(request.folder, Path(folder)))

        def start(text: Tokens, room: int) -> Any:
            parameters = genai.GeneratorParams(model)
            parameters.set_search_options(max_length=max(len(text) + room, window), do_sample=False)
            generator = genai.Generator(model, parameters)
            generator.append_tokens(np.array([text], dtype=np.int32))
            return generator

        def score(text: Tokens) -> Scores:
            return log_softmax(start(text, 1).get_output("logits")[0])

        def follow(text: Tokens, count: int) -> Tokens:
            generator, made = start(text, count), list[int]()
            while len(made) < count:
                made.append(int(generator.get_output("logits")[0, -1].argmax()))
                generator.append_tokens(np.array([made[-1:]], dtype=np.int32))
            return tuple(made)

        return answer(request, score, follow)


def _built(source: Path, folder: Path) -> str:
    builder: Any = import_module("onnxruntime_genai.models.builder")
    built = str(folder / "model")
    chosen = ("", str(source), built, "fp32", "cpu", str(folder / "cache"))
    builder.create_model(*chosen, **builder.parse_extra_options(*chosen, []))
    return built


ENGINE = Engine(
    "onnxruntime-genai",
    ("onnxruntime-genai", "onnxruntime", "onnx", "onnx-ir"),
    "pip install onnxruntime onnxruntime-genai onnx onnx-ir",
    run,
)
