"""Contrastive pairs and plain texts, read from files."""

import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from austeer.compiler.errors import PairsError

Group = TypeVar("Group", str, tuple[str, ...])

PAIR_KEYS = ("prompt", "positive", "negative")

# What a row of JSON Lines may hold where texts are wanted: the first group whose values are all strings is joined.
TEXT_KEYS: tuple[tuple[str, ...], ...] = (
    ("text",),
    ("prompt", "positive"),
    ("prompt", "response"),
    ("prompt", "continuation"),
    ("prompt",),
    ("story",),
)


@dataclass(frozen=True)
class Pair:
    """One contrastive sample: `prompt + positive` is wanted, `prompt + negative` is not."""

    prompt: str
    positive: str
    negative: str


def read_pairs(path: str | Path) -> tuple[Pair, ...]:
    """The pairs of a JSON Lines file; keys other than prompt, positive, negative are ignored.

    Blank lines and a byte order mark are skipped. Raises PairsError, with file and line, for what is no pair.
    """
    pairs: list[Pair] = []
    for where, line in lines_of(path):
        row = row_of(where, line)
        for key in PAIR_KEYS:
            if key not in row:
                raise PairsError(
                    f"{where}: no {key!r}: a pair needs prompt, positive and negative; it has {names_of(row)}"
                )
        pairs.append(Pair(*(string_of(where, key, row[key]) for key in PAIR_KEYS)))
    if not pairs:
        raise PairsError(f'{path}: holds no pairs; write one {{"prompt", "positive", "negative"}} object a line')
    return tuple(pairs)


def read_texts(path: str | Path) -> tuple[str, ...]:
    """The texts of a file: one a line, or JSON Lines (told by a first line that opens with `{"`) as in TEXT_KEYS.

    Raises PairsError, with file and line, for a row without a text and for a file without texts.
    """
    lines = list(lines_of(path))
    if not lines:
        raise PairsError(f'{path}: holds no texts; write one a line, or JSON Lines with "text"')
    if not lines[0][1].replace(" ", "").startswith('{"'):
        return tuple(line for _, line in lines)
    return tuple(_text(where, row_of(where, line)) for where, line in lines)


def holds_pairs(path: str | Path) -> bool:
    """Whether a file of samples starts with a pair. Raises PairsError for one that cannot be read."""
    first = next(lines_of(path), None)
    if first is None or not first[1].replace(" ", "").startswith('{"'):
        return False
    return set(PAIR_KEYS) <= row_of(*first).keys()


def split_by_prompt(
    pairs: Sequence[Pair], seed: int, fraction: float = 0.2
) -> tuple[tuple[Pair, ...], tuple[Pair, ...]]:
    """(rest, held_out): a seeded `fraction` of the prompts, at least one, held out with all their pairs.

    Pairs with an empty prompt share nothing and are split one by one. The same on every platform, whatever
    the order of the pairs. Raises PairsError where there is only one prompt.
    """
    groups = {_group(pair) for pair in pairs}
    if len(groups) < 2:
        raise PairsError(
            "all pairs have the same prompt, so none can be held out: give more prompts, or both the number of "
            "units and alpha, which leaves nothing to choose on held-out pairs"
        )
    held = set(shuffled(groups, seed)[: min(max(1, round(fraction * len(groups))), len(groups) - 1)])
    sides = [[pair for pair in pairs if (_group(pair) in held) is side] for side in (False, True)]
    return tuple(sides[0]), tuple(sides[1])


def shuffled(groups: Iterable[Group], seed: int) -> list[Group]:
    """The groups in a seeded order: the same on every platform, whatever order they came in."""
    generator = random.Random(seed)  # noqa: S311 - a seeded choice, no secret
    # random() is the one method whose sequence Python promises to keep.
    return sorted(sorted(groups), key=lambda _: generator.random())


def _group(pair: Pair) -> tuple[str, ...]:
    return (pair.prompt,) if pair.prompt else (pair.positive, pair.negative)


def lines_of(path: str | Path) -> Iterator[tuple[str, str]]:
    """(file:line, text) of each line that is not blank."""
    try:
        data = Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise PairsError(f"{path}: cannot be read ({error.strerror}); give a text file, one sample a line") from None
    # Split as bytes: str.splitlines would cut at U+2028, which JSON allows inside a string.
    for number, line in enumerate(data.split(b"\n"), 1):
        where = f"{path}:{number}"
        try:
            text = line.removesuffix(b"\r").decode()
        except UnicodeDecodeError as error:
            raise PairsError(f"{where}: not UTF-8 at byte {error.start} of the line; save the file as UTF-8") from None
        if text.strip():
            yield where, text


def row_of(where: str, line: str) -> dict[str, Any]:
    """The JSON object of a line; PairsError for anything else."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise PairsError(f"{where}: not JSON ({error}); JSON Lines holds one object a line") from None
    if not isinstance(row, dict):
        raise PairsError(f"{where}: expected a JSON object, got {line.strip()[:40]}")
    return row


def string_of(where: str, key: str, value: Any) -> str:
    """A value that must be a string which a tokenizer takes; PairsError otherwise."""
    if not isinstance(value, str):
        raise PairsError(f"{where}: {key!r} must be a string, got {json.dumps(value)[:40]}")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise PairsError(f"{where}: {key!r} holds half a surrogate pair, which no tokenizer takes; write the character")
    return value


def _text(where: str, row: dict[str, Any]) -> str:
    for keys in TEXT_KEYS:
        if all(isinstance(row.get(key), str) for key in keys):
            return "".join(string_of(where, key, row[key]) for key in keys)
    raise PairsError(
        f"{where}: no text; expected a string under 'text', or 'prompt' and 'positive'; it has {names_of(row)}"
    )


def names_of(row: Iterable[str]) -> str:
    """The keys of a row, for messages."""
    return ", ".join(map(repr, row)) or "no keys"
