"""llama.cpp: a GGUF in float32 by its own converter, served by xllamacpp, which is llama.cpp as a wheel."""

import json
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from austeer.compiler.checkpoint import CONFIG, read_json
from austeer.compiler.errors import AusteerError
from austeer.compiler.tokens import Tokens
from austeer.targets.engines.engine import Answer, Engine, Request, Scores, answer
from austeer.targets.llama_cpp import convert, find_converter


def run(request: Request) -> Answer:
    """Converts and serves; the vocabulary's size is that of config.json."""
    vocabulary = int(read_json(request.folder / CONFIG)["vocab_size"])
    with TemporaryDirectory() as folder:
        gguf = request.gguf or Path(folder) / "model.gguf"
        if not request.gguf:
            convert(request.folder, gguf)
        longest = max(map(len, request.texts)) + request.count + 1
        server = _server(gguf, longest)
        forced = _plain_token(request.folder, vocabulary)

        def score(text: Tokens) -> Scores:
            import numpy as np

            rows = [_next(server, text[:end], vocabulary, forced) for end in range(1, len(text) + 1)]
            return np.array(rows, dtype=np.float32)

        def follow(text: Tokens, count: int) -> Tokens:
            made = text
            for _ in range(count):
                made = (*made, int(_next(server, made, vocabulary, forced).argmax()))
            return made[len(text) :]

        return answer(request, score, follow)


def _server(gguf: Path, longest: int) -> Any:
    """In float32 throughout: by default the cache is float16, and flash attention rounds."""
    xllamacpp: Any = import_module("xllamacpp")
    options: Any = xllamacpp.CommonParams()
    options.model.path = str(gguf)
    options.n_ctx, options.n_parallel, options.verbosity = longest, 1, -1
    options.cpuparams.n_threads = options.cpuparams_batch.n_threads = 1
    options.cache_type_k = options.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    options.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return xllamacpp.Server(options)


def _next(server: Any, text: Tokens, vocabulary: int, forced: int) -> Scores:
    """The log-probabilities of the token after `text`, [vocabulary].

    What is sampled is forced to be plain text: of a part of a character the server would report nothing. The
    bias that forces it does not enter the reported probabilities.
    """
    import numpy as np

    request = {
        "prompt": list(text),
        "max_tokens": 1,
        "temperature": 0,
        "logprobs": vocabulary,
        "logit_bias": [[forced, 1000.0]],
        "cache_prompt": False,  # with sliding windows, what it keeps of another text spoils the next
    }
    reply = server.handle_completions(request)
    reply = reply if isinstance(reply, dict) else json.loads(reply)
    if "choices" not in reply:
        raise RuntimeError(str(reply.get("error", reply)))
    row = np.full(vocabulary, np.nan, dtype=np.float32)
    for entry in reply["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
        row[entry["id"]] = entry["logprob"]
    if np.isnan(row).any():
        raise RuntimeError(f"it reports {int(np.isfinite(row).sum())} of {vocabulary} tokens, or probabilities of nan")
    return row


def _plain_token(folder: Path, vocabulary: int) -> int:
    """A token that is a character of its own in any encoding."""
    from austeer.compiler.live import load_tokenizer

    tokenizer: Any = load_tokenizer(folder)
    pieces = (tokenizer.decode([token]).strip() for token in range(vocabulary))
    return next((number for number, piece in enumerate(pieces) if piece.isascii() and piece.isalpha()), 0)


def _no_converter() -> str | None:
    try:
        find_converter()
    except AusteerError as error:
        return str(error)
    return None


ENGINE = Engine(
    "llama.cpp",
    ("xllamacpp", "gguf", "sentencepiece"),
    "pip install xllamacpp gguf sentencepiece",
    run,
    more=_no_converter,
    gguf=True,
)
