"""transformers itself, as any user loads a model: what it does not know it leaves out with no more than a warning."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from austeer.compiler.certificate import greedy
from austeer.compiler.live import without_bars
from austeer.compiler.tokens import Tokens
from austeer.targets.engines.engine import Answer, Engine, Request, Scores, answer, log_softmax

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def run(request: Request) -> Answer:
    """Loads the folder in float32."""
    return answer_of(load(request.folder, code=request.code), request)


def load(folder: Path, *, code: bool = False) -> "PreTrainedModel":
    """The model in float32 on the CPU; weights that the configuration does not ask for are ignored.

    `code` lets the folder's own code run.
    """
    import torch
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"dtype": torch.float32, "local_files_only": True, "trust_remote_code": code}
    with without_bars():
        model: Any = AutoModelForCausalLM.from_pretrained(folder, **options)
    return model.eval()


def answer_of(model: "PreTrainedModel", request: Request) -> Answer:
    """What a live model says; its own cache serves the continuations."""
    import torch

    def score(text: Tokens) -> Scores:
        with torch.inference_mode():
            return log_softmax(model(input_ids=torch.tensor([text]), use_cache=False).logits[0])

    return answer(request, score, lambda text, count: greedy(model, text, count))


ENGINE = Engine("transformers", ("transformers",), "pip install transformers", run, code=True)
