"""llama.cpp as it comes, on one thread: a tokenizer that its converter takes, and a server that is asked for tokens."""

import json
from importlib import import_module
from io import BytesIO
from pathlib import Path
from typing import Any

CONTEXT = 512


def write_tokenizer(folder: Path) -> None:
    """A sentencepiece model of hardly more than the 256 bytes."""
    trainer: Any = import_module("sentencepiece").SentencePieceTrainer
    made = BytesIO()
    text = iter(["no text is read"])
    trainer.train(
        sentence_iterator=text, model_writer=made, model_type="bpe", vocab_size=300, byte_fallback=True,
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(made.getvalue())


def server(gguf: Path) -> Any:
    """Serves a file that is read into memory; the cache and the attention are llama.cpp's own choice."""
    xllamacpp: Any = import_module("xllamacpp")
    options: Any = xllamacpp.CommonParams()
    options.model.path = str(gguf)
    options.n_ctx, options.n_parallel, options.verbosity = CONTEXT, 1, -1
    options.cpuparams.n_threads = options.cpuparams_batch.n_threads = 1
    options.load_mode = xllamacpp.llama_load_mode.LLAMA_LOAD_MODE_NONE  # no mmap
    return xllamacpp.Server(options)


def complete(served: Any, *, prompt: int, new_tokens: int) -> None:
    """Reads `prompt` tokens and makes `new_tokens`, greedily; RuntimeError if it made another number."""
    request = {
        "prompt": list(range(3, 3 + prompt)),
        "max_tokens": new_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "cache_prompt": False,
    }
    reply = served.handle_completions(request)
    reply = reply if isinstance(reply, dict) else json.loads(reply)
    if reply.get("usage", {}).get("completion_tokens") != new_tokens:
        raise RuntimeError(f"llama.cpp was asked for {new_tokens} tokens: {reply}")
