"""What programs do to a model: the effect on pairs, and the drift on neutral text."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

from austeer.compiler.errors import PairsError
from austeer.compiler.forward import begin, logits, run_texts
from austeer.compiler.interpreter import interpret
from austeer.compiler.program import Program
from austeer.compiler.progress import track
from austeer.compiler.tokens import PairTokens, Tokens, batches

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

# Values of one block of logits (256 MB in float32): the LM head runs on as many positions as this allows.
LOGIT_VALUES = 1 << 26


@dataclass(frozen=True)
class Score:
    """What a program does to samples, in figures."""

    @property
    def rank(self) -> tuple[float, float]:
        """What orders scores: the first figure, then the second, the higher the better."""
        raise NotImplementedError


@dataclass(frozen=True)
class Effect(Score):
    """On pairs: how often the positive side is likelier, and by how many nats on average.

    Both compare the summed log-probabilities of the two sides' own tokens; equal sums count as wrong.
    """

    accuracy: float
    margin: float

    @property
    def rank(self) -> tuple[float, float]:
        """Accuracy, then margin."""
        return self.accuracy, self.margin


def effects(
    model: "PreTrainedModel", pairs: Sequence[PairTokens], programs: Sequence[Program | None], batch_tokens: int
) -> list[Effect]:
    """The effect of each program (None: the model as it is).

    The first token of a side is predicted by the prefix's last position; without a prefix it is not scored,
    and a pair that then has a side without scored tokens is left out. Raises PairsError if none is left.
    """
    scored = [pair for pair in pairs if pair.prefix or min(len(pair.positive), len(pair.negative)) > 1]
    if not scored:
        raise PairsError("no pair can be scored: sides of one token need a prompt, or a tokenizer that begins with BOS")
    correct, total = [0] * len(programs), [0.0] * len(programs)
    packed = list(batches(scored, batch_tokens))
    for batch in track(packed, "Measuring the effect", len(packed)):
        for index, program in enumerate(programs):
            with applied(model, program):
                margins = _margins(model, batch)
            correct[index] += int((margins > 0).sum())
            total[index] += float(margins.double().sum())
    count = len(scored)
    return [Effect(right / count, margin / count) for right, margin in zip(correct, total, strict=True)]


def drifts(
    model: "PreTrainedModel", texts: Sequence[Tokens], programs: Sequence[Program | None], batch_tokens: int
) -> list[float]:
    """KL(base ‖ steered) of the next-token distributions for each program, in nats, mean over all tokens.

    The base's distributions are computed once for all programs, whose final hidden states of one batch
    (programs x batch_tokens x width) are held together. Raises PairsError for no texts.
    """
    if not texts:
        raise PairsError("drift needs at least one text")
    totals, tokens = [0.0] * len(programs), 0
    packed = list(batches(texts, batch_tokens))
    for batch in track(packed, "Measuring the drift", len(packed)):
        base = _states(model, batch, None)
        steered = [base if program is None else _states(model, batch, program) for program in programs]
        tokens += len(base)
        for block in _blocks(model, len(base)):
            expected = logits(model, base[block]).log_softmax(-1)
            for index, states in enumerate(steered):
                totals[index] += _divergence(expected, logits(model, states[block]).log_softmax(-1))
    return [total / tokens for total in totals]


def applied(model: "PreTrainedModel", program: Program | None) -> AbstractContextManager[object]:
    """Within the context, the model runs the program (None: it is as it is)."""
    return nullcontext() if program is None else interpret(model, program)


def log_probabilities(model: "PreTrainedModel", predictors: "Tensor", targets: "Tensor") -> "Tensor":
    """log p of each target token given the final hidden state before it: float32 [positions]."""
    import torch

    parts: list[Tensor] = []
    for block in _blocks(model, len(targets)):
        distribution = logits(model, predictors[block]).log_softmax(-1)
        parts.append(distribution.gather(-1, targets[block].to(distribution.device)[:, None])[:, 0])
    return torch.cat(parts)


def _states(model: "PreTrainedModel", batch: Sequence[Tokens], program: Program | None) -> "Tensor":
    """Final hidden states of all tokens of a batch, [tokens, width]."""
    with applied(model, program):
        states, real = run_texts(model, batch)
    return states[real.to(states.device)]


def _divergence(expected: "Tensor", found: "Tensor") -> float:
    """Σ p·(log p - log q) over everything; both are log-probabilities."""
    return float((expected.exp() * (expected - found)).sum(-1).double().sum())


def _margins(model: "PreTrainedModel", batch: Sequence[PairTokens]) -> "Tensor":
    """log p(positive) - log p(negative), summed over each side's own tokens: float32 [pairs]."""
    import torch

    sides = begin(model, batch)
    states = sides.run(model)
    first = states[:, 0] if sides.before is None else sides.before
    predictors = torch.cat([first[:, None], states[:, :-1]], dim=1)
    scored = sides.own.to(states.device)
    scored[:, 0] &= torch.tensor([bool(pair.prefix) for pair in batch] * 2, device=states.device)
    found = log_probabilities(model, predictors[scored], sides.ids.to(states.device)[scored])
    rows = scored.nonzero()[:, 0].to(found.device)
    sums = torch.zeros(len(scored), device=found.device).index_add_(0, rows, found)
    positive, negative = sums.chunk(2)
    return positive - negative


def _blocks(model: "PreTrainedModel", positions: int) -> Iterator[slice]:
    step = max(1, LOGIT_VALUES // model.config.get_text_config().vocab_size)
    return (slice(start, start + step) for start in range(0, positions, step))
