"""Tokenization of pairs: the shared prefix, truncation, chat templates; and packing."""

import functools
import operator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from austeer.compiler.errors import UsageError
from austeer.compiler.pairs import Pair
from austeer.compiler.tokens import Chat, PairTokens, batches, encode_pairs, encode_texts
from tests.shared import shared

WORDS = ["<s>", "</s>", "<unk>", *"abcdefgh", "user", "bot", "sys"]
ID = {word: number for number, word in enumerate(WORDS)}
TEMPLATE = "<s>{% for m in messages %}{{ m.role[:3].replace('use', 'user') }} {{ m.content }} {% endfor %}bot "


def tokenizer(*, bos: bool = True, template: str | None = None) -> Any:
    """One token a word."""
    raw = Tokenizer(models.WordLevel(ID, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>", model_max_length=8
    )
    fast.chat_template = template
    return fast


def ids(words: str) -> tuple[int, ...]:
    return tuple(ID[word] for word in words.split())


def encoded(prompt: str, positive: str, negative: str, max_length: int = 100, bos: bool = True) -> PairTokens | None:
    found = encode_pairs(tokenizer(bos=bos), [Pair(prompt, positive, negative)], max_length).pairs
    return found[0] if found else None


@pytest.mark.parametrize(
    ("pair", "split"),
    [
        (("a b", " c d", " e"), ("<s> a b", "c d", "e")),
        (("a b", " c d", " c e"), ("<s> a b c", "d", "e")),  # the prefix is common tokens, not the prompt
        (("a b", " c", " c d"), ("<s> a b", "c", "c d")),  # each side keeps a token
        (("a b", "", " c"), ("<s> a", "b", "b c")),
        (("", "a b", "c"), ("<s>", "a b", "c")),
        (("", "", "a"), ("", "<s>", "<s> a")),
    ],
)
def test_the_longest_common_token_prefix_is_split_off(pair: tuple[str, str, str], split: tuple[str, str, str]) -> None:
    assert encoded(*pair) == PairTokens(*map(ids, split))


def test_without_bos_an_empty_prompt_leaves_no_prefix() -> None:
    assert encoded("", "a b", "c", bos=False) == PairTokens((), ids("a b"), ids("c"))


def test_equal_and_empty_sides_are_skipped_and_told() -> None:
    pairs = [Pair("a", " b", " b"), Pair("a", " b", " c"), Pair("a", " z", " y")]
    found = encode_pairs(tokenizer(), pairs, 100)
    assert (len(found.pairs), found.skipped, found.truncated) == (1, 2, 0)
    assert found.notes == (
        "2 pairs were left out: both sides have the same tokens, or a side has none within the limit",
    )
    assert encoded("", "", "a", bos=False) is None


def test_truncation_drops_as_many_tokens_on_both_sides_after_bos() -> None:
    assert encoded("a b c d", " e f", " g", max_length=5) == PairTokens(ids("<s> c d"), ids("e f"), ids("g"))
    assert encoded("a b c d", " e f", " g", max_length=5, bos=False) == PairTokens(ids("b c d"), ids("e f"), ids("g"))


def test_truncation_is_told_and_cuts_into_a_long_side() -> None:
    found = encode_pairs(tokenizer(), [Pair("a", " b c d e", " f g h h"), Pair("a", " b c d e", " f")], 3)
    assert found.pairs == (PairTokens(ids("<s>"), ids("d e"), ids("h h")),)
    assert (found.truncated, found.skipped) == (1, 1)
    assert "1 pairs were longer" in found.notes[0]


def test_chat_wraps_the_prompt_and_adds_no_second_bos() -> None:
    chatty = tokenizer(template=TEMPLATE.replace("<s>", "<s> "))
    pair = Pair("a b", "c", "d")
    assert encode_pairs(chatty, [pair], 100, Chat()).pairs[0].prefix == ids("<s> user a b bot")
    assert encode_pairs(chatty, [pair], 100, Chat("h")).pairs[0].prefix == ids("<s> sys h user a b bot")


def test_chat_without_a_template_or_against_it_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="no chat template"):
        encode_pairs(tokenizer(), [Pair("a", "b", "c")], 100, Chat())
    refusing = tokenizer(template="{{ raise_exception('no system role') }}")
    with pytest.raises(UsageError, match="no system role"):
        encode_pairs(refusing, [Pair("a", "b", "c")], 100, Chat("d"))


def test_texts_are_cut_at_the_right_and_told() -> None:
    texts, notes = encode_texts(tokenizer(), ["a b c", "d"], 3)
    assert texts == (ids("<s> a b"), ids("<s> d"))
    assert notes == ("1 texts were cut to their first 3 tokens",)
    assert encode_texts(tokenizer(bos=False), ["a", " "], 3) == ((ids("a"),), ())


def test_a_real_tokenizer_keeps_bos_and_rebuilds_both_texts() -> None:
    from austeer.compiler.live import load_tokenizer

    real = load_tokenizer(shared("models/stories260K"))
    pair = encode_pairs(real, [Pair("The dog was", " happy", " sad")], 512).pairs[0]
    assert pair.prefix[0] == real.bos_token_id
    assert pair.prefix + pair.positive == tuple(real("The dog was happy")["input_ids"])
    assert pair.prefix + pair.negative == tuple(real("The dog was sad")["input_ids"])


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9), st.integers(1, 9))), st.integers(1, 60))
def test_batches_hold_every_pair_once_within_the_budget(sizes: list[tuple[int, int, int]], budget: int) -> None:
    pairs = [PairTokens((i,) * p, (1,) * q, (2,) * r) for i, (p, q, r) in enumerate(sizes)]
    packed = list(batches(pairs, budget))
    assert sorted(map(repr, functools.reduce(operator.iadd, packed, []))) == sorted(map(repr, pairs))
    for batch in packed:
        padded = max(pair.shape[0] for pair in batch) + max(pair.shape[1] for pair in batch)
        assert len(batch) == 1 or len(batch) * padded <= budget
    assert packed == list(batches(pairs, budget))


def test_batches_of_texts_put_like_lengths_together() -> None:
    texts = [(1,) * length for length in (3, 9, 4, 8, 1)]
    assert [[len(text) for text in batch] for batch in batches(texts, 18)] == [[9, 8], [4, 3, 1]]
