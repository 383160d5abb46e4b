"""PEFT: an adapter folder put on its base, unmerged."""

from importlib import import_module

from austeer.targets.engines.engine import Answer, Engine, Request
from austeer.targets.engines.transformers import answer_of, load


def run(request: Request) -> Answer:
    """Loads the base in float32 and the adapter on it; without an adapter, the base alone."""
    model = load(request.folder)
    if request.adapter:
        model = import_module("peft").PeftModel.from_pretrained(model, str(request.adapter)).eval()
    return answer_of(model, request)


ENGINE = Engine("peft", ("peft",), "pip install peft", run, adapters=True)
