"""Prompts with the responses that are wanted: read from a file, split, and turned into tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from austeer.compiler.errors import PairsError
from austeer.compiler.pairs import lines_of, names_of, row_of, shuffled, string_of
from austeer.compiler.tokens import Chat, Tokens, encode_whole, prompts_for

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


HELD_OUT = 0.1  # of the prompts, to stop by, and as many to report on


@dataclass(frozen=True)
class Sample:
    """A response that is wanted after a prompt; a plain text is a response to nothing. `where` is its file:line."""

    prompt: str
    response: str
    where: str


@dataclass(frozen=True)
class Response:
    """A sample as token ids: the text is `prefix` and then `own`, of which a loss is taken."""

    prefix: Tokens
    own: Tokens
    where: str

    @property
    def text(self) -> Tokens:
        """The whole."""
        return self.prefix + self.own

    @property
    def scored(self) -> int:
        """How many of its own tokens have a token before them to be predicted from."""
        return len(self.own) - (not self.prefix)


def read_samples(path: str | Path) -> tuple[Sample, ...]:
    """The samples of a JSON Lines file: `prompt` and `response`, or `text`; other keys are ignored.

    Raises PairsError, with file and line, for a row that has neither, and for a file without rows.
    """
    samples: list[Sample] = []
    for where, line in lines_of(path):
        row = row_of(where, line)
        if "response" in row:
            samples.append(
                Sample(
                    string_of(where, "prompt", row.get("prompt", "")),
                    string_of(where, "response", row["response"]),
                    where,
                )
            )
        elif "text" in row:
            samples.append(Sample("", string_of(where, "text", row["text"]), where))
        else:
            raise PairsError(
                f"{where}: no 'response': a row needs prompt and response, or text, for the loss is taken on what the "
                f"model is to say; it has {names_of(row)}"
            )
    if not samples:
        raise PairsError(f'{path}: holds no samples; write one {{"prompt", "response"}} object a line')
    return tuple(samples)


def split_samples(samples: Sequence[Sample], seed: int) -> tuple[tuple[Sample, ...], ...]:
    """(to fit to, to stop by, to report on): a seeded tenth of the prompts, at least one, for each of the last two.

    Samples with the same prompt stay together, plain texts with their like. The same on every platform, whatever
    the order of the samples. Raises PairsError for fewer than three prompts.
    """
    groups = {_group(sample) for sample in samples}
    if len(groups) < 3:
        raise PairsError(
            f"{samples[0].where.rpartition(':')[0]}: {len(groups)} different prompts are too few: some are to fit to, "
            "some to stop by and some to report on; give at least three, better hundreds"
        )
    drawn = shuffled(groups, seed)
    count = max(1, round(HELD_OUT * len(groups)))
    part = {group: 2 if place < count else 1 if place < 2 * count else 0 for place, group in enumerate(drawn)}
    return tuple(tuple(sample for sample in samples if part[_group(sample)] == side) for side in range(3))


def encode_responses(
    tokenizer: "PreTrainedTokenizerBase", samples: Sequence[Sample], max_length: int, chat: Chat | None = None
) -> tuple[tuple[Response, ...], tuple[str, ...]]:
    """(samples as tokens, notes): each text is tokenized whole and cut at the right to `max_length`.

    A response begins where its text parts from its prompt's own tokens. Samples of whose response nothing can be
    predicted within the limit are left out.
    """
    prompts = prompts_for(tokenizer, [sample.prompt for sample in samples], chat)
    texts = [prompt + sample.response for prompt, sample in zip(prompts, samples, strict=True)]
    alone, whole = (encode_whole(tokenizer, side, special=chat is None) for side in (prompts, texts))
    made: list[Response] = []
    for prompt, text, sample in zip(alone, whole, samples, strict=True):
        shared = next((i for i, (a, b) in enumerate(zip(prompt, text, strict=False)) if a != b), len(prompt))
        response = Response(text[:shared][:max_length], text[shared:max_length], sample.where)
        if sample.response and response.scored > 0:
            made.append(response)
    cut, left = sum(len(text) > max_length for text in whole), len(samples) - len(made)
    return tuple(made), (
        *(f"{cut} samples were cut to their first {max_length} tokens",) * (cut > 0),
        *(f"{left} samples were left out: nothing of their response is within the limit",) * (left > 0),
    )


def _group(sample: Sample) -> str:
    return sample.prompt or sample.response
