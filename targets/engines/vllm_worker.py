"""Run by the Python of vLLM's own environment, where nothing of this project is: request.json in, answer.npz out."""

import json
import os
import sys
from importlib import import_module
from typing import Any

os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",  # the model in this process
    VLLM_NO_USAGE_STATS="1",
    DO_NOT_TRACK="1",
    HF_HUB_OFFLINE="1",
)
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")


def main(request: str, out: str) -> None:
    """Writes `scores0`, `scores1`, ... float32 [tokens, vocabulary], and `continuations` int64 [texts, count]."""
    import numpy as np

    vllm: Any = import_module("vllm")
    with open(request, encoding="utf-8") as file:  # noqa: PTH123 (no more than it needs)
        asked = json.load(file)
    texts, count = asked["texts"], max(1, asked["count"])  # the last row of a text is that of the first token made
    options = vllm.SamplingParams(max_tokens=count, temperature=0, ignore_eos=True, prompt_logprobs=-1, logprobs=-1)
    sizes = {"max_model_len": max(map(len, texts)) + count, "max_num_seqs": 4}
    forms = {"trust_remote_code": asked["code"], **asked.get("room", {})}
    model: Any = vllm.LLM(asked["folder"], dtype="float32", enforce_eager=True, max_logprobs=-1, **sizes, **forms)
    prompts = [{"prompt_token_ids": text} for text in texts]
    outputs = model.generate(prompts, options, lora_request=adapter(asked))
    found = {f"scores{number}": scores(output) for number, output in enumerate(outputs)}
    made = np.array([output.outputs[0].token_ids[: asked["count"]] for output in outputs], dtype=np.int64)
    np.savez(out, continuations=made, **found)


def adapter(asked: dict[str, Any]) -> Any:
    """What a prompt says that is to be answered with the adapter."""
    if not asked["adapter"]:
        return None
    return import_module("vllm.lora.request").LoRARequest("steered", 1, asked["adapter"])


def scores(output: Any) -> Any:
    """The rows of a text: those of its tokens but the first, and that of the token after it."""
    import numpy as np

    rows = [*output.prompt_logprobs[1:], output.outputs[0].logprobs[0]]
    made = np.full((len(rows), max(map(len, rows))), np.nan, dtype=np.float32)
    for row, tokens in zip(made, rows, strict=True):
        for token, entry in tokens.items():
            row[token] = entry.logprob
    return made


if __name__ == "__main__":
    main(*sys.argv[1:])
