"""Batched forward passes without the LM head, for texts and for pairs that share a prefix."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from austeer.compiler.errors import UsageError
from austeer.compiler.tokens import PairTokens, Tokens

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import DynamicCache, PreTrainedModel

# Rotary embeddings whose frequencies change once the longest row of a batch passes the original length: beyond it
# a text's activations would depend on its neighbours and on how the text is cut into prefix and side.
LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")


def longest_text(model: "PreTrainedModel") -> int:
    """The number of tokens up to which the model's positions are defined and independent of the batch."""
    config: Any = model.config.get_text_config()
    longest = int(config.max_position_embeddings)
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") in LENGTH_DEPENDENT_ROPE:
        longest = min(longest, int(rope.get("original_max_position_embeddings") or longest))
    return longest


@dataclass(frozen=True)
class Sides:
    """The two sides of B pairs, ready to run: rows 0..B-1 are the positives, B..2B-1 the negatives.

    `ids`, `own` (True at a side's own tokens) and `positions` are [2B, T], right-padded; `mask` is
    [2B, P + T] and `cache` holds the P prefix tokens (left-padded), None where no pair has a prefix.
    `before` is the last hidden state of each row's prefix, [2B, width], meaningless in rows without one.
    """

    ids: "Tensor"
    own: "Tensor"
    positions: "Tensor"
    mask: "Tensor"
    cache: "DynamicCache | None"
    before: "Tensor | None"

    @property
    def last(self) -> "Tensor":
        """int64 [2B]: the place of each row's last token in activations flattened to [2B·T, width]."""
        import torch

        rows, width = self.ids.shape
        return torch.arange(rows, device=self.ids.device) * width + self.own.sum(1) - 1

    def run(self, model: "PreTrainedModel") -> "Tensor":
        """The final hidden states of the sides' tokens, [2B, T, width]. Once only: it extends the cache."""
        return _run(model, self.ids, self.mask, self.positions, self.cache)


def begin(model: "PreTrainedModel", pairs: Sequence[PairTokens]) -> Sides:
    """Runs the prefixes once, and prepares both sides of every pair to go on from there.

    Equal to running each whole text alone, up to the model's rounding. The cache is a plain one, which
    keeps sliding layers whole, and prefixes are padded on the left, so that windows count true distances.
    Raises UsageError for a text beyond `longest_text`.
    """
    import torch

    device = input_device(model)
    ids, own = _padded([pair.positive for pair in pairs] + [pair.negative for pair in pairs], device)
    prefixes, real = _padded([pair.prefix for pair in pairs], device, left=True)
    _require_length(model, max(sum(pair.shape) for pair in pairs))
    twice = torch.arange(2 * len(pairs), device=device) % len(pairs)
    mask = torch.cat([real[twice], own], dim=1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, prefixes.shape[1] :]
    if prefixes.shape[1] == 0:
        return Sides(ids, own, positions, mask, None, None)
    cache = _new_cache()
    states = _run(model, prefixes, real, (real.cumsum(1) - 1).clamp(min=0), cache)
    _select_rows(cache, twice)
    return Sides(ids, own, positions, mask, cache, states[:, -1][twice.to(states.device)])


def run_texts(
    model: "PreTrainedModel", texts: Sequence[Tokens], *, learning: bool = False
) -> tuple["Tensor", "Tensor"]:
    """(final hidden states [B, T, width], bool [B, T] true at real tokens) of texts padded on the right.

    Gradients pass through it where something is `learning`. Raises UsageError for a text beyond `longest_text`.
    """
    _require_length(model, max(len(text) for text in texts))
    ids, real = _padded(texts, input_device(model))
    return _run(model, ids, real, (real.cumsum(1) - 1).clamp(min=0), None, learning=learning), real


def logits(model: "PreTrainedModel", states: "Tensor") -> "Tensor":
    """The LM head on final hidden states [..., width]: float32 [..., vocabulary], soft-capped as the model does.

    Gradients pass where the states have any.
    """
    import torch

    head: Any = model.get_output_embeddings()
    cap = getattr(model.config, "final_logit_softcapping", None)
    with torch.set_grad_enabled(states.requires_grad):
        values = head(states).float()
    return values if cap is None else (values / cap).tanh() * cap


def input_device(model: "PreTrainedModel") -> "torch.device":
    """Where token ids go: the device of the input embedding (the CPU where accelerate holds it offloaded)."""
    import torch

    embedding: Any = model.get_input_embeddings()
    return torch.device("cpu") if embedding.weight.is_meta else embedding.weight.device


def computing_dtype(model: "PreTrainedModel") -> "torch.dtype":
    """That of the activations, which is not always that of the weights."""
    import torch

    embedding: Any = model.get_input_embeddings()
    return embedding(torch.zeros(1, dtype=torch.int64, device=input_device(model))).dtype


def _run(
    model: "PreTrainedModel",
    ids: "Tensor",
    mask: "Tensor",
    positions: "Tensor",
    cache: "DynamicCache | None",
    *,
    learning: bool = False,
) -> "Tensor":
    import torch

    base: Any = model.base_model
    with torch.set_grad_enabled(learning):
        return base(
            input_ids=ids,
            attention_mask=mask.long(),
            position_ids=positions,
            past_key_values=cache,
            use_cache=cache is not None,
        ).last_hidden_state


def _padded(rows: Sequence[Tokens], device: "torch.device", *, left: bool = False) -> tuple["Tensor", "Tensor"]:
    """(int64 ids, padded with 0; bool, true at real tokens), each [rows, longest]."""
    import torch

    lengths = np.array([len(row) for row in rows])
    places = np.arange(lengths.max())
    real = places >= lengths.max() - lengths[:, None] if left else places < lengths[:, None]
    ids = np.zeros(real.shape, dtype=np.int64)
    ids[real] = [token for row in rows for token in row]
    return torch.from_numpy(ids).to(device), torch.from_numpy(real).to(device)


def _new_cache() -> "DynamicCache":
    from transformers import DynamicCache

    return DynamicCache()  # without a config: no layer forgets what left its sliding window


def _select_rows(cache: "DynamicCache", rows: "Tensor") -> None:
    """Cache rows, repeated; each layer's lie on its own device."""
    layers: Any = cache.layers
    for layer in layers:
        layer.batch_select_indices(rows.to(layer.keys.device))


def _require_length(model: "PreTrainedModel", length: int) -> None:
    if length > longest_text(model):
        raise UsageError(
            f"a text of {length} tokens is longer than the {longest_text(model)} this model takes: "
            "use a smaller --max-length"
        )
