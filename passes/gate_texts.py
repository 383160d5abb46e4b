"""The texts that gates are fitted to and judged by, and from where on each shows which kind it is."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from austeer.compiler.errors import PairsError
from austeer.compiler.tokens import Tokens

PARTS = 5  # a gate is judged by the texts of part 0 and fitted to the others, which validate each other
FEWEST_TEXTS = PARTS  # of a side


@dataclass(frozen=True)
class GateText:
    """A text of one side (wanted: gates open in it) and one of PARTS parts.

    `own` is the place of its first token that, with all before it, no text of the other side begins with. Up to
    there nothing in it can tell the sides apart: BOS, a chat template, a prompt that both sides share.
    """

    tokens: Tokens
    wanted: bool
    part: int
    own: int


def split_texts(
    when: Sequence[Tokens], unless: Sequence[Tokens], seed: int
) -> tuple[tuple[GateText, ...], tuple[str, ...]]:
    """(the texts of both sides, each side dealt out to the parts at random by `seed`; notes on what is left out).

    Raises PairsError for texts on both sides, and for a side of fewer than FEWEST_TEXTS texts.
    """
    _require_apart(when, unless)
    sides = [*dict.fromkeys(when)], [*dict.fromkeys(unless)]
    texts, wanted = [*sides[0], *sides[1]], [True] * len(sides[0]) + [False] * len(sides[1])
    own = _own_places(texts, wanted)
    kept = [number for number, text in enumerate(texts) if own[number] < len(text)]
    parts: list[int] = []
    generator = np.random.default_rng(seed)
    for name, side in (("when", True), ("unless", False)):
        count = sum(wanted[number] is side for number in kept)
        if count < FEWEST_TEXTS:
            raise PairsError(
                f"a gate needs at least {FEWEST_TEXTS} different texts a side, to be fitted to some and judged by "
                f"others; of the {name} texts {count} can be used: give more"
            )
        parts += (generator.permutation(count) % PARTS).tolist()
    left = len(when) + len(unless) - len(kept)
    note = f"{left} of the when and unless texts are left out: repeated, or the beginning of a text of the other side"
    made = (GateText(texts[i], wanted[i], part, own[i]) for i, part in zip(kept, parts, strict=True))
    return tuple(made), (note,) * (left > 0)


def _require_apart(when: Sequence[Tokens], unless: Sequence[Tokens]) -> None:
    first = {text: number for number, text in reversed(list(enumerate(unless, 1)))}
    both = [(number, first[text]) for number, text in enumerate(when, 1) if text in first]
    if both:
        raise PairsError(
            f"{len(both)} of the when texts are unless texts too, the first is number {both[0][0]} there and number "
            f"{both[0][1]} here: a gate cannot be both open and closed in it; take it out of one"
        )


def _own_places(texts: Sequence[Tokens], wanted: Sequence[bool]) -> list[int]:
    """In sorted order a text's nearest neighbours of the other side are those that it shares most with."""
    own = [0] * len(texts)
    order = sorted(range(len(texts)), key=lambda number: texts[number])
    for direction in (order, order[::-1]):
        passed: dict[bool, Tokens] = {}
        for number in direction:
            passed[wanted[number]] = texts[number]
            own[number] = max(own[number], _shared(texts[number], passed.get(not wanted[number], ())))
    return own


def _shared(one: Tokens, other: Tokens) -> int:
    """How many tokens both begin with."""
    shortest = min(len(one), len(other))
    return next((place for place in range(shortest) if one[place] != other[place]), shortest)
