"""Texts and pairs as token ids, and their packing into batches."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from austeer.compiler.errors import UsageError
from austeer.compiler.pairs import Pair

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tokens: TypeAlias = tuple[int, ...]


@dataclass(frozen=True)
class PairTokens:
    """A pair as token ids: the text of a side is `prefix` and then the side, which is never empty."""

    prefix: Tokens
    positive: Tokens
    negative: Tokens

    @property
    def shape(self) -> tuple[int, int]:
        """Tokens of the prefix, and of the longer side."""
        return len(self.prefix), max(len(self.positive), len(self.negative))


@dataclass(frozen=True)
class Chat:
    """The prompt becomes a user's message in the model's chat template, and the sides are the answers."""

    system: str | None = None


@dataclass(frozen=True)
class Encoded:
    """Tokenized pairs, how many were cut or left out, and the notes that say so."""

    pairs: tuple[PairTokens, ...]
    truncated: int
    skipped: int

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know, one sentence each."""
        cut = f"{self.truncated} pairs were longer than the limit and lost tokens from the left, after the first"
        out = (
            f"{self.skipped} pairs were left out: both sides have the same tokens, or a side has none within the limit"
        )
        return (cut,) * (self.truncated > 0) + (out,) * (self.skipped > 0)


def encode_pairs(
    tokenizer: "PreTrainedTokenizerBase", pairs: Sequence[Pair], max_length: int, chat: Chat | None = None
) -> Encoded:
    """Tokenizes `prompt + positive` and `prompt + negative` whole and splits off their common token prefix.

    Special tokens are the tokenizer's own choice or, with `chat`, the template's. A text of more than
    `max_length` tokens loses tokens from the left (a special first token stays), as many on both sides.
    Raises UsageError where `chat` is asked of a tokenizer without a template.
    """
    prompts = prompts_for(tokenizer, [pair.prompt for pair in pairs], chat)
    texts = [
        prompt + side for prompt, pair in zip(prompts, pairs, strict=True) for side in (pair.positive, pair.negative)
    ]
    ids = encode_whole(tokenizer, texts, special=chat is None)
    special = frozenset(tokenizer.all_special_ids)
    made: list[PairTokens] = []
    truncated = 0
    for positive, negative in zip(ids[::2], ids[1::2], strict=True):
        excess = max(len(positive), len(negative)) - max_length
        split = _split(_cut(positive, excess, special), _cut(negative, excess, special))
        if split:
            made.append(split)
            truncated += excess > 0
    return Encoded(tuple(made), truncated, len(pairs) - len(made))


def encode_texts(
    tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str], max_length: int
) -> tuple[tuple[Tokens, ...], tuple[str, ...]]:
    """(token ids of each text, notes): the tokenizer's own special tokens, cut at the right to `max_length`.

    Texts without a token are left out.
    """
    ids = [text for text in encode_whole(tokenizer, texts, special=True) if text]
    long = sum(len(text) > max_length for text in ids)
    notes = (f"{long} texts were cut to their first {max_length} tokens",) * (long > 0)
    return tuple(text[:max_length] for text in ids), notes


def encode_prompts(
    tokenizer: "PreTrainedTokenizerBase", prompts: Sequence[str], max_length: int, chat: Chat | None = None
) -> tuple[Tokens, ...]:
    """Token ids of prompts alone; a long one loses tokens from the left, as in `encode_pairs`."""
    special = frozenset(tokenizer.all_special_ids)
    ids = encode_whole(tokenizer, prompts_for(tokenizer, prompts, chat), special=chat is None)
    return tuple(_cut(text, len(text) - max_length, special) for text in ids)


def take_tokens(texts: Sequence[Tokens], count: int) -> list[Tokens]:
    """Texts from the first on, until they hold `count` tokens in all; the last one is cut."""
    taken: list[Tokens] = []
    for text in texts:
        if count <= 0:
            break
        taken.append(text[:count])
        count -= len(text)
    return taken


Item = TypeVar("Item", PairTokens, Tokens)


def batches(items: Sequence[Item], batch_tokens: int) -> Iterator[list[Item]]:
    """Packs items of similar length, the longest first: rows times padded length is at most `batch_tokens`.

    A batch has at least one row. A pair is one row, as long as its prefix and its longer side. The order
    depends on nothing but the items.
    """
    batch: list[Item] = []
    widest = (0, 0)
    for item in sorted(items, key=lambda item: sum(_shape(item)), reverse=True):
        first, second = _shape(item)
        wider = max(widest[0], first), max(widest[1], second)
        if batch and (len(batch) + 1) * sum(wider) > batch_tokens:
            yield batch
            batch, wider = [], (first, second)
        batch.append(item)
        widest = wider
    if batch:
        yield batch


def _shape(item: PairTokens | Tokens) -> tuple[int, int]:
    return item.shape if isinstance(item, PairTokens) else (len(item), 0)


def prompts_for(tokenizer: "PreTrainedTokenizerBase", prompts: Sequence[str], chat: Chat | None) -> Sequence[str]:
    """The prompts as they are, or each as a user's message in the chat template; UsageError where that cannot be."""
    return [_templated(tokenizer, prompt, chat) for prompt in prompts] if chat else prompts


def encode_whole(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str], *, special: bool) -> list[Tokens]:
    """The token ids of each text, of any length; `special` adds what the tokenizer puts around a text."""
    if not texts:
        return []
    # verbose=False: texts beyond the model's length are cut here, so the tokenizer need not warn.
    ids: Any = tokenizer(list(texts), add_special_tokens=special, verbose=False)["input_ids"]
    return [tuple(text) for text in ids]


def _cut(text: Tokens, excess: int, special: frozenset[int]) -> Tokens:
    """The text without `excess` tokens after its special first one; empty if no other token is left."""
    if excess <= 0:
        return text
    kept = text[:1] if text and text[0] in special else ()
    rest = text[len(kept) + excess :]
    return kept + rest if rest else ()


def _split(positive: Tokens, negative: Tokens) -> PairTokens | None:
    """The two sides without their longest common prefix, which leaves a token to each; None if that cannot be."""
    if positive == negative or not positive or not negative:
        return None
    shortest = min(len(positive), len(negative)) - 1
    common = next((i for i in range(shortest) if positive[i] != negative[i]), shortest)
    return PairTokens(positive[:common], positive[common:], negative[common:])


def _templated(tokenizer: "PreTrainedTokenizerBase", prompt: str, chat: Chat) -> str:
    if not tokenizer.chat_template:
        raise UsageError("this model's tokenizer has no chat template: leave out --chat, or use an instruct model")
    system = [{"role": "system", "content": chat.system}] if chat.system is not None else []
    messages = [*system, {"role": "user", "content": prompt}]
    from jinja2 import TemplateError  # what transformers renders templates with

    try:
        return str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
    except TemplateError as error:
        raise UsageError(f"this model's chat template refuses the conversation: {error}; leave out --system?") from None
