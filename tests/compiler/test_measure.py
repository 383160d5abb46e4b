"""Effect and drift against their definitions, one text at a time."""

import random
from typing import Any

import pytest
import torch

from austeer.compiler import PairsError, Program, Scale, Shift, interpret, measure
from austeer.compiler.live import live_facts, load_model, load_tokenizer
from austeer.compiler.measure import Effect, drifts, effects
from austeer.compiler.neutral import sample_neutral
from austeer.compiler.tokens import PairTokens, Tokens
from tests.shared import shared, tiny

NAMES = ["llama", "gemma2", "opt", "gpt2", "mixtral"]


def some_texts(count: int, low: int, high: int, seed: int) -> list[Tokens]:
    generator = random.Random(seed)
    return [tuple(generator.randrange(64) for _ in range(generator.randint(low, high))) for _ in range(count)]


def some_pairs(prefix: int = 1) -> list[PairTokens]:
    prefixes, positives, negatives = (
        some_texts(9, prefix, 9 * prefix, 1),
        some_texts(9, 2, 5, 2),
        some_texts(9, 2, 5, 3),
    )
    return [PairTokens(*parts) for parts in zip(prefixes, positives, negatives, strict=True)]


def programs(model: Any) -> list[Program | None]:
    geometry = live_facts(model).geometry
    edits = [Scale(0, "ffn", (2, 7), [1.5, -0.8]), Shift(1, "attn", torch.linspace(-1, 1, geometry.residual))]
    return [Program.of(edits, model=geometry), None, Program.of(edits[:1], model=geometry)]


def distributions(model: Any, program: Program | None, text: Tokens) -> torch.Tensor:
    with torch.no_grad(), interpret(model, program or Program.of((), model=live_facts(model).geometry)):
        return model(input_ids=torch.tensor([text]), use_cache=False).logits[0].double().log_softmax(-1)


def naive_effect(model: Any, pairs: list[PairTokens], program: Program | None) -> Effect:
    def score(prefix: Tokens, side: Tokens) -> float:
        rows = distributions(model, program, prefix + side)
        places = range(max(len(prefix), 1), len(prefix + side))
        return sum(float(rows[place - 1, (prefix + side)[place]]) for place in places)

    margins = [score(pair.prefix, pair.positive) - score(pair.prefix, pair.negative) for pair in pairs]
    return Effect(sum(margin > 0 for margin in margins) / len(pairs), sum(margins) / len(pairs))


@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize("name", NAMES)
def test_effect_is_the_summed_log_probability_of_the_sides(name: str, prefix: int) -> None:
    model, pairs = tiny(name), some_pairs(prefix)
    found = effects(model, pairs, programs(model), batch_tokens=60)
    for program, effect in zip(programs(model), found, strict=True):
        expected = naive_effect(model, pairs, program)
        assert effect.accuracy == expected.accuracy
        assert effect.margin == pytest.approx(expected.margin, rel=1e-4, abs=1e-4)
    assert len({effect.margin for effect in found}) == 3


@pytest.mark.parametrize("name", NAMES)
def test_drift_is_the_mean_divergence_over_all_tokens(name: str) -> None:
    model, texts = tiny(name), some_texts(6, 1, 12, 4)
    found = drifts(model, texts, programs(model), batch_tokens=25)
    for program, drift in zip(programs(model), found, strict=True):
        rows = [(distributions(model, None, text), distributions(model, program, text)) for text in texts]
        total = sum(float((base.exp() * (base - steered)).sum()) for base, steered in rows)
        assert drift == pytest.approx(total / sum(map(len, texts)), rel=1e-4, abs=1e-6)
    assert found[1] == 0
    assert min(found[0], found[2]) > 1e-3


def test_batches_and_blocks_of_the_head_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, pairs, texts = tiny("llama"), some_pairs(), some_texts(6, 1, 12, 4)
    effect, drift = effects(model, pairs, programs(model), 10**6), drifts(model, texts, programs(model), 10**6)
    monkeypatch.setattr(measure, "LOGIT_VALUES", 64 * 3)
    for mine, other in zip(effects(model, pairs[::-1], programs(model), 1), effect, strict=True):
        assert mine.accuracy == other.accuracy
        assert mine.margin == pytest.approx(other.margin, abs=1e-5)
    assert drifts(model, texts[::-1], programs(model), 1) == pytest.approx(drift, abs=1e-6)


def test_equal_sums_count_as_wrong() -> None:
    pair = PairTokens((5,), (6, 7), (6, 7))
    assert effects(tiny("llama"), [pair], [None], 100) == [Effect(0.0, 0.0)]


def test_pairs_without_a_scored_token_are_left_out() -> None:
    model, pairs = tiny("llama"), some_pairs()
    unscored = PairTokens((), (3,), (4, 5))
    assert effects(model, [*pairs, unscored], [None], 100)[0].accuracy == effects(model, pairs, [None], 100)[0].accuracy
    with pytest.raises(PairsError, match="no pair can be scored"):
        effects(model, [unscored], [None], 100)
    with pytest.raises(PairsError, match="at least one text"):
        drifts(model, [], [None], 100)


def test_neutral_text_is_the_models_own_and_seeded() -> None:
    folder = shared("models/stories260K")
    model, tokenizer = load_model(folder, dtype="float32", device="cpu"), load_tokenizer(folder)
    texts = sample_neutral(model, tokenizer, 8, 24, seed=1)
    assert texts == sample_neutral(model, tokenizer, 8, 24, seed=1)
    assert texts != sample_neutral(model, tokenizer, 8, 24, seed=2)
    assert {text[0] for text in texts} == {tokenizer.bos_token_id}
    assert max(map(len, texts)) == 24
    rows = [distributions(model, None, text) for text in texts]
    chosen = torch.cat(
        [row[:-1].gather(1, torch.tensor(text[1:])[:, None]) for row, text in zip(rows, texts, strict=True)]
    )
    entropy = torch.cat([-(row.exp() * row).sum(1)[:-1] for row in rows])
    assert -float(chosen.mean()) == pytest.approx(float(entropy.mean()), rel=0.3)


def test_neutral_text_without_bos_starts_with_eos() -> None:
    class Tokenizer:
        bos_token_id, eos_token_id = None, 9

    model: Any = tiny("qwen2")
    texts = sample_neutral(model, Tokenizer(), 40, 30, seed=0)  # pyright: ignore[reportArgumentType]
    assert {text[0] for text in texts} == {9}
    assert not any(9 in text[1:] for text in texts)
    assert 1 < min(map(len, texts)) < max(map(len, texts)) == 30
