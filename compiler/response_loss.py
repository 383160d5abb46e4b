"""How unlikely a model finds responses, in nats: what training lowers and reports compare."""

import math
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from austeer.compiler.errors import CheckFailed
from austeer.compiler.forward import logits, run_texts
from austeer.compiler.live import block_of, live_facts
from austeer.compiler.progress import track
from austeer.compiler.responses import Response
from austeer.compiler.tokens import batches

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

LOGIT_VALUES = 1 << 23  # of one block of logits, which gradients hold several times over


def mean_loss(
    model: "PreTrainedModel", responses: Sequence[Response], batch_tokens: int, title: str = "Measuring"
) -> float:
    """-log p of the responses' own tokens, mean over them all. CheckFailed, with file:line, where it is no number."""
    total, tokens = 0.0, 0
    packed = list(packs(responses, batch_tokens))
    for batch in track(packed, title, len(packed)):
        total += float(summed_loss(model, batch))
        tokens += sum(response.scored for response in batch)
        if not math.isfinite(total):
            raise CheckFailed(f"the loss is {total} on the samples at {places(batch)}: the model computes no numbers")
    return total / tokens


def summed_loss(model: "PreTrainedModel", batch: Sequence[Response], *, learning: bool = False) -> "Tensor":
    """-Σ log p of the own tokens of a batch, float32; gradients pass through it where something is `learning`.

    The LM head runs on the predicting positions alone, in blocks that gradients compute again.
    """
    import torch
    from torch.utils.checkpoint import checkpoint

    states, _ = run_texts(model, [response.text for response in batch], learning=learning)
    found = [(row, at) for row, one in enumerate(batch) for at in range(max(1, len(one.prefix)), len(one.text))]
    rows, columns = torch.tensor(found, device=states.device).T
    targets = torch.tensor([token for one in batch for token in one.own[-one.scored :]], device=states.device)
    predictors = states[rows, columns - 1]
    surprise: Any = partial(_surprise, model)
    if learning:
        surprise = partial(checkpoint, surprise, use_reentrant=False, preserve_rng_state=False)
    rows_at_once = max(1, LOGIT_VALUES // model.config.get_text_config().vocab_size)
    total = torch.zeros((), device=states.device)
    for block in zip(predictors.split(rows_at_once), targets.split(rows_at_once), strict=True):
        total = total + surprise(*block).to(total.device)
    return total


@contextmanager
def recomputing(model: "PreTrainedModel") -> Generator[None]:
    """Within the context gradients hold the input of each block alone, and run the block again when they pass."""
    from torch.utils.checkpoint import checkpoint

    facts = live_facts(model)
    blocks: list[Any] = [block_of(model, facts, layer) for layer in range(facts.geometry.layers)]
    own = [vars(block).get("forward") for block in blocks]
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
    try:
        yield
    finally:
        for block, forward in zip(blocks, own, strict=True):
            del block.forward
            if forward is not None:
                block.forward = forward


def packs(responses: Sequence[Response], batch_tokens: int) -> list[list[Response]]:
    """Responses of similar length together, as `batches` does with their texts."""
    by_text: dict[tuple[int, ...], list[Response]] = {}
    for response in responses:
        by_text.setdefault(response.text, []).append(response)
    return [[by_text[text].pop() for text in batch] for batch in batches([r.text for r in responses], batch_tokens)]


def places(batch: Sequence[Response]) -> str:
    """Where the samples of a batch come from, for messages."""
    return ", ".join(response.where for response in batch[:3]) + ", …" * (len(batch) > 3)


def _surprise(model: "PreTrainedModel", predictors: "Tensor", targets: "Tensor") -> "Tensor":
    from torch.nn.functional import cross_entropy

    distribution = logits(model, predictors)
    return cross_entropy(distribution, targets.to(distribution.device), reduction="sum")
