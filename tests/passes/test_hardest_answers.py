"""Pairs made of prompts and responses, on a small model with a tokenizer."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from austeer.compiler import PairsError
from austeer.compiler.live import load_model, load_tokenizer
from austeer.compiler.pairs import Pair
from austeer.passes import hardest_answers as module
from tests.shared import shared

SAMPLES = (
    ("What did Tim see?", " Tim saw a big dog."),
    ("What did Sue eat?", " Sue ate a red apple."),
    ("What did Tom see?", " Tom saw a big cat."),
    ("What did Ann eat?", " Ann ate a green apple."),
    ("Where is the ball?", " It was in the box under the bed."),
)


@cache
def stories() -> tuple[Any, Any]:
    folder = shared("models/stories260K")
    return load_model(folder, dtype="float32", device="cpu"), load_tokenizer(folder)


def hardest(samples: Sequence[tuple[str, str]], batch_tokens: int = 64, max_length: int = 64) -> tuple[Pair, ...]:
    return module.hardest_answers(*stories(), samples, batch_tokens=batch_tokens, max_length=max_length)


def by_definition(samples: Sequence[tuple[str, str]]) -> list[str]:
    """One answer at a time, after BOS."""
    model, tokenizer = stories()
    vectors: list[Any] = []
    for _, response in samples:
        ids = tokenizer(response.strip(), return_tensors="pt")["input_ids"]
        with torch.no_grad():
            vectors.append(model.model(input_ids=ids).last_hidden_state[0, 1:].mean(0).numpy())
    centred = np.stack(vectors) - np.mean(vectors, axis=0)
    unit = centred / np.linalg.norm(centred, axis=1, keepdims=True)
    similar = unit @ unit.T - 9 * np.eye(len(unit))
    return [samples[index][1] for index in similar.argmax(1)]


def test_the_nearest_other_answer() -> None:
    pairs = hardest(SAMPLES)
    assert [(pair.prompt, pair.positive) for pair in pairs] == list(SAMPLES)
    assert [pair.negative for pair in pairs] == by_definition(SAMPLES)
    assert pairs[0].negative == SAMPLES[2][1]
    assert pairs[3].negative == SAMPLES[1][1]


@pytest.mark.parametrize("similarities", [1, 11, 1 << 24])
@pytest.mark.parametrize("batch_tokens", [1, 1000])
def test_blocks_and_batches_do_not_matter(
    similarities: int, batch_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SIMILARITIES", similarities)
    assert [pair.negative for pair in hardest(SAMPLES, batch_tokens)] == by_definition(SAMPLES)


def test_an_equal_answer_is_no_other_one() -> None:
    again = ("And Bob?", "Tim saw a big dog. ")
    pairs = hardest([*SAMPLES, again])
    assert {pairs[0].negative, pairs[-1].negative} == {SAMPLES[2][1]}
    assert pairs[2].negative == SAMPLES[0][1]  # as it first stands


def test_another_answer_to_the_same_prompt_is_right_too() -> None:
    pairs = hardest([*SAMPLES, (SAMPLES[0][0], SAMPLES[2][1])])
    assert pairs[0].negative not in (SAMPLES[0][1], SAMPLES[2][1])
    assert pairs[-1].negative not in (SAMPLES[0][1], SAMPLES[2][1])


def test_a_text_without_a_prompt_is_cut_between_words() -> None:
    texts = ["Tim saw a big dog and ran home.", "Sue had  it all.", "hello world", "word", "  ", " one"]
    pairs = hardest([("", text) for text in texts])
    assert [(pair.prompt, pair.positive) for pair in pairs] == [
        ("Tim saw a big dog", " and ran home."),
        ("Sue had", "  it all."),
        ("hello", " world"),
    ]


def test_blank_responses_are_left_out() -> None:
    assert hardest([SAMPLES[0], ("What?", " \n"), *SAMPLES[1:]]) == hardest(SAMPLES)


@pytest.mark.parametrize(
    "samples",
    [
        [],
        SAMPLES[:1],
        [("One?", " Yes."), ("Two?", " Yes.")],
        [("One?", " Yes."), ("One?", " No.")],
        [("", "word"), ("", "another")],
    ],
)
def test_no_other_answer(samples: Sequence[tuple[str, str]]) -> None:
    with pytest.raises(PairsError, match=r"no other answer.*or contrastive pairs with --pairs"):
        hardest(samples)


def test_only_the_first_tokens_count() -> None:
    long = [(prompt, " Once upon a time" + response) for prompt, response in SAMPLES]
    with pytest.raises(PairsError, match="no other answer"):
        hardest(long, max_length=4)
