"""The engines by name."""

from collections.abc import Mapping

from austeer.compiler.errors import UsageError
from austeer.targets.engines import (
    ctranslate2,
    llama_cpp,
    mlx_lm,
    onnxruntime_genai,
    openvino,
    peft,
    transformers,
    vllm,
)
from austeer.targets.engines.engine import Engine

ENGINES: Mapping[str, Engine] = {
    module.ENGINE.name: module.ENGINE
    for module in (transformers, vllm, llama_cpp, mlx_lm, ctranslate2, onnxruntime_genai, openvino, peft)
}


def engine_named(name: str) -> Engine:
    """The engine, ready to run; UsageError if there is none of that name, or if it is not installed."""
    engine = ENGINES.get(name)
    if engine is None:
        raise UsageError(f"no engine is called {name!r}; known are {', '.join(ENGINES)}")
    reason = engine.missing()
    if reason:
        raise UsageError(f"engine {name} cannot run here: {reason}")
    return engine
