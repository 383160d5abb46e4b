"""Neutral text for measuring drift, sampled from the base model where the user gives none."""

from typing import TYPE_CHECKING, Any

from austeer.compiler.forward import input_device, logits, longest_text
from austeer.compiler.progress import track
from austeer.compiler.tokens import Tokens

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def sample_neutral(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", count: int, length: int, seed: int
) -> tuple[Tokens, ...]:
    """`count` texts of at most `length` tokens, drawn from the model at temperature 1, first token included.

    They start with BOS, or EOS where there is none, and end before the next BOS or EOS. Seeded on the CPU.
    """
    import torch
    from transformers import DynamicCache

    start, ends = _start_and_ends(model, tokenizer)
    generator = torch.Generator().manual_seed(seed)
    cache = DynamicCache()
    drawn = [torch.full((count, 1), start)]
    for _ in track(range(min(length, longest_text(model)) - 1), "Sampling neutral text"):
        drawn.append(_next(model, drawn[-1], cache, generator))
    rows: Any = torch.cat(drawn, dim=1).tolist()
    return tuple(_until(tuple(row), ends) for row in rows)


def _next(model: "PreTrainedModel", last: "Tensor", cache: Any, generator: "torch.Generator") -> "Tensor":
    """One more token for every row: int64 [rows, 1] on the CPU."""
    import torch

    base: Any = model.base_model
    with torch.no_grad():
        states = base(input_ids=last.to(input_device(model)), past_key_values=cache, use_cache=True).last_hidden_state
    return torch.multinomial(logits(model, states[:, -1]).softmax(-1).cpu(), 1, generator=generator)


def _start_and_ends(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> tuple[int, frozenset[int]]:
    config: Any = model.config.get_text_config()
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, config.bos_token_id, config.eos_token_id]
    flat = [token for entry in special for token in (entry if isinstance(entry, list) else [entry])]
    known: list[int] = [token for token in flat if isinstance(token, int)]
    return (known[0] if known else 0), frozenset(known)


def _until(text: Tokens, ends: frozenset[int]) -> Tokens:
    """The text before its second special token: the first is its start."""
    end = next((place for place, token in enumerate(text) if place and token in ends), len(text))
    return text[:end]
