"""Contrastive pairs from prompts and responses alone: against each response stands the hardest other answer.

That is the one, to another prompt, which the model's own representation puts nearest. An answer is represented by the
mean of the final hidden states of its own tokens, run alone: after its prompt the states would tell prompts apart too,
and a near one could be any answer to a like question. The mean of all answers, which every answer has a large part of,
is subtracted.
"""

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from austeer.compiler.edits import Floats
from austeer.compiler.errors import PairsError
from austeer.compiler.forward import run_texts
from austeer.compiler.pairs import Pair
from austeer.compiler.progress import track
from austeer.compiler.tokens import Tokens, batches, encode_texts

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SIMILARITIES = 1 << 24  # of one block (64 MB)


def hardest_answers(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    samples: Sequence[tuple[str, str]],
    *,
    batch_tokens: int,
    max_length: int,
) -> tuple[Pair, ...]:
    """A pair for each (prompt, response): the response, and of the answers to other prompts the nearest by cosine.

    A sample without a prompt is cut near its middle, between two words; one without two words is left out, as is one
    with a blank response. Answers whose first `max_length` tokens are equal are one. One forward pass without the LM
    head; in memory are the representations, float32 [answers, residual], and one block of similarities. Raises
    PairsError where a sample has no other answer.
    """
    whole = [cut for sample in samples if (cut := _cut(*sample))]
    tokens = _encode(tokenizer, [response for _, response in whole], max_length)
    number = {text: index for index, text in enumerate(dict.fromkeys(tokens))}
    own = [number[text] for text in tokens]
    right: dict[str, list[int]] = {}
    for (prompt, _), answer in zip(whole, own, strict=True):
        right.setdefault(prompt, []).append(answer)
    states = _represent(model, tokenizer, list(number), batch_tokens)
    nearest = _nearest(states, own, [right[prompt] for prompt, _ in whole])
    texts = {answer: response for answer, (_, response) in zip(own[::-1], whole[::-1], strict=True)}
    return tuple(Pair(*sample, texts[other]) for sample, other in zip(whole, nearest, strict=True))


def _cut(prompt: str, response: str) -> tuple[str, str] | None:
    """The sample; where it has no prompt, one is cut off the response. None where nothing is left to answer."""
    if prompt:
        return (prompt, response) if response.strip() else None
    gaps = [gap.start() for gap in re.finditer(r"(?<=\S)\s+(?=\S)", response)]
    if not gaps:
        return None
    at = min(gaps, key=lambda gap: abs(2 * gap - len(response)))
    return response[:at], response[at:]


def _encode(tokenizer: "PreTrainedTokenizerBase", answers: Sequence[str], max_length: int) -> tuple[Tokens, ...]:
    """Each answer alone, without the space before it, which says nothing of it."""
    tokens, _ = encode_texts(tokenizer, [answer.strip() for answer in answers], max_length)
    if len(tokens) < len(answers):
        raise PairsError(f"{len(answers) - len(tokens)} responses have no tokens in this model's vocabulary: drop them")
    if len(set(tokens)) < 2:
        raise PairsError(_NO_OTHER)
    return tokens


_NO_OTHER = (
    "no other answer can be set against the right one: every response is the same, or answers the same prompt. Give "
    "data with different prompts and responses, or contrastive pairs with --pairs"
)


def _represent(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", answers: Sequence[Tokens], batch_tokens: int
) -> Floats:
    """The unit vector of each answer, float32 [answers, width]; 0 for one that is like the mean of all."""
    special = frozenset(tokenizer.all_special_ids)
    means: dict[Tokens, Floats] = {}
    packed = list(batches(answers, batch_tokens))
    for batch in track(packed, "Comparing answers", len(packed)):
        states, _ = run_texts(model, batch)
        for text, row in zip(batch, states, strict=True):
            own = [place for place, token in enumerate(text) if token not in special]
            means[text] = row[own or slice(len(text))].float().mean(0).cpu().numpy()
    vectors = np.stack([means.pop(answer) for answer in answers])
    vectors -= vectors.mean(0)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.divide(vectors, lengths, out=vectors, where=lengths > 0)


def _nearest(vectors: Floats, own: Sequence[int], right: Sequence[Sequence[int]]) -> Iterator[int]:
    """Of each sample, whose answer is `own`, the nearest answer that is not one of `right`."""
    block = max(1, SIMILARITIES // len(vectors))
    for start in range(0, len(own), block):
        similar = vectors[list(own[start : start + block])] @ vectors.T
        for row, never in zip(similar, right[start : start + block], strict=True):
            row[list(never)] = -np.inf
            nearest = int(row.argmax())
            if row[nearest] == -np.inf:
                raise PairsError(_NO_OTHER)
            yield nearest
