"""MLX-LM, on the CPU: it reads the Hugging Face folder as it is."""

from importlib import import_module
from typing import Any

from austeer.compiler.tokens import Tokens
from austeer.targets.engines.engine import Answer, Engine, Request, Scores, answer, log_softmax


def run(request: Request) -> Answer:
    """Loads the folder, its weights cast to float32."""
    import numpy as np

    mx: Any = import_module("mlx.core")
    mx.set_default_device(mx.cpu)
    model: Any = import_module("mlx_lm.utils").load_model(request.folder)[0]
    model.set_dtype(mx.float32)

    def score(text: Tokens) -> Scores:
        return log_softmax(np.array(model(mx.array([text]))[0]))

    def follow(text: Tokens, count: int) -> Tokens:
        cache, made = import_module("mlx_lm.models.cache").make_prompt_cache(model), [*text]
        for number in range(count):
            new = made[-1:] if number else made
            made.append(int(mx.argmax(model(mx.array([new]), cache=cache)[0, -1])))
        return tuple(made[len(text) :])

    return answer(request, score, follow)


ENGINE = Engine("mlx-lm", ("mlx-lm", "mlx"), "pip install 'mlx[cpu]' mlx-lm (on a Mac: mlx-lm)", run)
