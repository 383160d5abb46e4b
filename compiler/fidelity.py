"""How near a model comes to reference completions: by what it writes, and by how likely it finds them."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from austeer.compiler.errors import PairsError
from austeer.compiler.forward import logits, run_texts
from austeer.compiler.measure import Score, applied, log_probabilities
from austeer.compiler.program import Program
from austeer.compiler.progress import track
from austeer.compiler.tokens import PairTokens, Tokens, batches

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WRITTEN = 16  # tokens of a completion that are compared, at most


@dataclass(frozen=True)
class Fidelity(Score):
    """On references: `score`, the mean of `overlap` and 1 / `perplexity`.

    `overlap` is the unigram F1 of the model's greedy continuation and the reference, cut to as many tokens; the
    perplexity of the references is over all their tokens, so that 1 / perplexity is the geometric mean of their
    probabilities: both parts of the score lie between 0 and 1.
    """

    score: float
    overlap: float
    perplexity: float

    @property
    def rank(self) -> tuple[float, float]:
        """The score, then the overlap."""
        return self.score, self.overlap


def fidelities(
    model: "PreTrainedModel", pairs: Sequence[PairTokens], programs: Sequence[Program | None], batch_tokens: int
) -> list[Fidelity]:
    """The fidelity of each program (None: the model as it is) to the pairs' positive sides after their prefixes.

    Raises PairsError where no pair has a prefix to continue.
    """
    usable = [pair for pair in pairs if pair.prefix]
    if not usable:
        raise PairsError("no pair has a prompt to continue: references need one, or a tokenizer that begins with BOS")
    return [_fidelity(model, usable, program, batch_tokens) for program in track(programs, "Measuring", len(programs))]


def _fidelity(
    model: "PreTrainedModel", pairs: Sequence[PairTokens], program: Program | None, batch_tokens: int
) -> Fidelity:
    overlap, likelihood = 0.0, 0.0
    with applied(model, program):
        for batch in batches(pairs, batch_tokens):
            overlap += sum(map(_overlap, _continuations(model, batch), [pair.positive for pair in batch]))
            likelihood += _likelihood(model, batch)
    overlap /= len(pairs)
    surprise = -likelihood / sum(len(pair.positive) for pair in pairs)
    return Fidelity((overlap + math.exp(-surprise)) / 2, overlap, math.exp(min(surprise, 700.0)))


def _overlap(written: Tokens, reference: Tokens) -> float:
    """Unigram F1; of equally many tokens, so the part that both hold."""
    common = Counter(written) & Counter(reference[: len(written)])
    return sum(common.values()) / len(written)


def _continuations(model: "PreTrainedModel", pairs: Sequence[PairTokens]) -> list[Tokens]:
    """The most likely tokens after each prefix, as many as the positive side has, at most WRITTEN."""
    import torch

    texts = [pair.prefix for pair in pairs]
    for _ in range(min(WRITTEN, max(len(pair.positive) for pair in pairs))):
        states, _real = run_texts(model, texts)
        last = torch.tensor([len(text) - 1 for text in texts], device=states.device)
        found = logits(model, states[torch.arange(len(texts), device=states.device), last]).argmax(-1).tolist()
        texts = [(*text, token) for text, token in zip(texts, found, strict=True)]
    ends = (len(pair.prefix) + min(WRITTEN, len(pair.positive)) for pair in pairs)
    return [text[len(pair.prefix) : end] for text, pair, end in zip(texts, pairs, ends, strict=True)]


def _likelihood(model: "PreTrainedModel", pairs: Sequence[PairTokens]) -> float:
    """Σ log p of the positive sides' tokens."""
    import torch

    states, _ = run_texts(model, [pair.prefix + pair.positive for pair in pairs])
    places = [(row, at) for row, p in enumerate(pairs) for at in range(len(p.prefix), len(p.prefix + p.positive))]
    rows, columns = torch.tensor(places, device=states.device).T
    targets = torch.tensor([token for pair in pairs for token in pair.positive], device=states.device)
    return float(log_probabilities(model, states[rows, columns - 1], targets).double().sum())
