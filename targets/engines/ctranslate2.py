"""CTranslate2, through its converter of transformers models."""

import json
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from austeer.compiler.tokens import Tokens
from austeer.targets.engines.engine import Answer, Engine, Request, Scores, answer, log_softmax


def run(request: Request) -> Answer:
    """Converts to CTranslate2's own format in float32, and asks its generator."""
    import numpy as np

    ctranslate2: Any = import_module("ctranslate2")
    import_module("ctranslate2.converters")
    with TemporaryDirectory() as folder:
        converted = str(Path(folder) / "model")
        ctranslate2.converters.TransformersConverter(str(request.folder)).convert(converted, quantization="float32")
        generator: Any = ctranslate2.Generator(converted, compute_type="float32", intra_threads=1)
        vocabulary = json.loads((Path(converted) / "vocabulary.json").read_text("utf-8"))

    def score(text: Tokens) -> Scores:
        return log_softmax(np.array(generator.forward_batch([list(text)]))[0])

    def follow(text: Tokens, count: int) -> Tokens:
        prompt = [vocabulary[token] for token in text]
        options: Any = {"max_length": count, "min_length": count, "sampling_topk": 1, "end_token": []}
        found = generator.generate_batch([prompt], include_prompt_in_result=False, **options)
        return tuple(found[0].sequences_ids[0])

    return answer(request, score, follow)


ENGINE = Engine("ctranslate2", ("ctranslate2",), "pip install ctranslate2", run)
