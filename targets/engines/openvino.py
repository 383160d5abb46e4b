"""OpenVINO: transformers' own graph, traced and run by OpenVINO's kernels.

Without a cache: the export with one, which OpenVINO GenAI wants, is made by optimum-intel, and that pins
another transformers.
"""

from importlib import import_module
from typing import Any

from austeer.compiler.tokens import Tokens
from austeer.targets.engines.engine import Answer, Engine, Request, Scores, answer, log_softmax
from austeer.targets.engines.transformers import load


def run(request: Request) -> Answer:
    """Converts the loaded model in float32, and asks the CPU plugin."""
    import numpy as np

    ov: Any = import_module("openvino")
    compiled: Any = ov.compile_model(_traced(request), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def score(text: Tokens) -> Scores:
        return log_softmax(compiled(np.array([text], dtype=np.int64))[0][0])

    return answer(request, score)


def _traced(request: Request) -> Any:
    """An OpenVINO model: token ids int64 [1, tokens] to logits [1, tokens, vocabulary], for any number of tokens."""
    import torch

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = load(request.folder)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            # An explicit mask, for without one transformers looks for packed texts, which does not convert.
            return self.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits

    model = Logits()
    if hasattr(model.model, "set_experts_implementation"):
        model.model.set_experts_implementation("batched_mm")  # no loop over the experts in use
    return import_module("openvino").convert_model(model, example_input=torch.tensor([[0, 1, 2, 3, 4]]))


ENGINE = Engine("openvino", ("openvino",), "pip install openvino", run)
