"""PEFT: an adapter folder put on its base, unmerged."""

from austeer.targets.engines.engine import Answer, Engine, Request
from austeer.targets.engines.transformers import answer_of, load


def run(request: Request) -> Answer:
    """Loads the base in float32 and the adapter on it; without an adapter, the base alone."""
    from peft import PeftModel

    model = load(request.folder)
    return answer_of(
        PeftModel.from_pretrained(model, str(request.adapter)).eval() if request.adapter else model,  # type: ignore[arg-type]
        request,
    )


ENGINE = Engine("peft", ("peft",), "pip install peft", run, adapters=True)
