"""Fidelity to references against what the model says, text by text."""

import math
from collections import Counter

import pytest
import torch

from austeer.compiler import PairsError, Program, Shift, interpret
from austeer.compiler.certificate import greedy
from austeer.compiler.fidelity import WRITTEN, Fidelity, fidelities
from austeer.compiler.live import live_facts
from austeer.compiler.tokens import PairTokens
from tests.shared import tiny

PAIRS = [PairTokens((1, n, n + 3), tuple(range(n, 3 * n + 2)), (5,)) for n in (4, 9, 12)]


def by_hand(pairs: list[PairTokens]) -> tuple[float, float]:
    """Overlap and perplexity, one pair at a time."""
    model, overlaps, surprise = tiny("llama"), [], 0.0
    for pair in pairs:
        reference = pair.positive[:WRITTEN]
        written = greedy(model, pair.prefix, len(reference))
        overlaps.append(sum((Counter(written) & Counter(reference)).values()) / len(reference))
        logits = model(torch.tensor([pair.prefix + pair.positive])).logits[0].log_softmax(-1)
        first = len(pair.prefix) - 1
        surprise -= sum(float(logits[first + at, token]) for at, token in enumerate(pair.positive))
    return sum(overlaps) / len(pairs), math.exp(surprise / sum(len(pair.positive) for pair in pairs))


def test_overlap_and_perplexity_are_those_of_each_text_alone() -> None:
    model = tiny("llama")
    shift = Program.of([Shift(1, "residual", [3.0] * 24)], model=live_facts(model).geometry)
    base, steered = fidelities(model, PAIRS, [None, shift], 60)
    assert (base.overlap, base.perplexity) == pytest.approx(by_hand(PAIRS), rel=1e-4)
    with interpret(model, shift):
        assert (steered.overlap, steered.perplexity) == pytest.approx(by_hand(PAIRS), rel=1e-4)
    assert base != steered
    assert base.score == pytest.approx((base.overlap + 1 / base.perplexity) / 2)
    assert base.rank == (base.score, base.overlap)


def test_what_the_model_writes_itself_overlaps_wholly() -> None:
    model = tiny("llama")
    own = [PairTokens(pair.prefix, greedy(model, pair.prefix, 20), (5,)) for pair in PAIRS]
    (found,) = fidelities(model, own, [None], 200)
    assert found.overlap == 1.0
    assert isinstance(found, Fidelity)


def test_pairs_without_a_prompt_cannot_be_continued() -> None:
    with pytest.raises(PairsError, match="no pair has a prompt"):
        fidelities(tiny("llama"), [PairTokens((), (4, 5), (6, 7))], [None], 100)
