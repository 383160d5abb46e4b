"""What gates are fitted to and judged by: a split of texts, and what the FFNs read at their tokens."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from austeer.compiler.errors import PairsError
from austeer.compiler.forward import run_texts
from austeer.compiler.live import ffn_input, live_facts
from austeer.compiler.progress import track
from austeer.compiler.tokens import Tokens, batches
from austeer.compiler.watch import watching

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

PARTS = 5  # a gate is judged by the texts of part 0 and fitted to the others, which validate each other
FEWEST_TEXTS = PARTS  # of a side
MOST_TOKENS = 1 << 15
MOST_VALUES = 1 << 29  # of all layers together: 2 GB in float32

Matrix: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"


@dataclass(frozen=True)
class Split:
    """How many texts and tokens of one side a gate is fitted to, and how many it is judged by."""

    texts: int
    tokens: int
    held_out_texts: int
    held_out_tokens: int


@dataclass(frozen=True)
class SplitTexts:
    """Texts of both sides, none twice: `wanted[i]` is whether text i is of `when`, `parts[i]` from 0 to PARTS - 1.

    `common` is the number of tokens that all texts begin with.
    """

    texts: tuple[Tokens, ...]
    wanted: tuple[bool, ...]
    parts: tuple[int, ...]
    common: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class TokenSample:
    """Tokens of a split, ordered by text and place: of each, by [tokens], its side, its part, and whether it is common.

    A common token stands in what all texts begin with, and counts as unwanted.
    """

    wanted: Matrix
    parts: Matrix
    common: Matrix
    sides: tuple[Split, Split]

    @property
    def fitted(self) -> Matrix:
        """The tokens that gates are fitted to."""
        return self.parts > 0

    @property
    def judged(self) -> Matrix:
        """The tokens that gates are judged by."""
        return (self.parts == 0) & ~self.common


def split_texts(when: Sequence[Tokens], unless: Sequence[Tokens], seed: int) -> SplitTexts:
    """Deals the texts of either side out to PARTS parts, seeded, after dropping repeated ones and empty ones.

    Raises PairsError for a side of fewer than FEWEST_TEXTS texts, and for texts on both sides.
    """
    common = _common((*when, *unless))
    given = {"when": when, "unless": unless}
    sides = {name: list(dict.fromkeys(text for text in texts if len(text) > common)) for name, texts in given.items()}
    for name, texts in sides.items():
        if len(texts) < FEWEST_TEXTS:
            raise PairsError(
                f"the {name} texts are {len(texts)}, and a gate needs at least {FEWEST_TEXTS} different ones a side, "
                "to be fitted to some and judged by others: give more"
            )
    _require_apart(when, unless)
    generator = np.random.default_rng(seed)
    parts = [part for texts in sides.values() for part in (generator.permutation(len(texts)) % PARTS).tolist()]
    wanted = (True,) * len(sides["when"]) + (False,) * len(sides["unless"])
    idle = len(when) + len(unless) - len(wanted)
    note = f"{idle} texts of --when and --unless are left out: they stand there more than once, or hold nothing"
    return SplitTexts((*sides["when"], *sides["unless"]), wanted, tuple(parts), common, (note,) * (idle > 0))


def sample_tokens(
    model: "PreTrainedModel", layers: Sequence[int], split: SplitTexts, *, seed: int, batch_tokens: int
) -> tuple[TokenSample, dict[int, Matrix]]:
    """(a sample of the texts' tokens, the FFN input of each layer there, float32 [tokens, residual]).

    Of either side at most MOST_TOKENS / 2 tokens, fewer where the layers would then hold more than MOST_VALUES.
    """
    most = min(MOST_TOKENS, MOST_VALUES // (len(layers) * live_facts(model).geometry.residual))
    places = _places(split, max(most // 2, 1), np.random.default_rng(seed))
    wanted, parts = (np.array(values)[places[:, 0]] for values in (split.wanted, split.parts))
    when, unless = (_count(split, parts[wanted == side], side=side) for side in (True, False))
    sample = TokenSample(wanted, parts, places[:, 1] < split.common, (when, unless))
    return sample, _ffn_inputs(model, layers, split.texts, places, batch_tokens)


def _common(texts: Sequence[Tokens]) -> int:
    """How many tokens all texts begin with."""
    if not texts:
        return 0
    first, last = min(texts), max(texts)
    return next((place for place, token in enumerate(first) if token != last[place]), len(first))


def _require_apart(when: Sequence[Tokens], unless: Sequence[Tokens]) -> None:
    first = {text: number for number, text in reversed(list(enumerate(unless, 1)))}
    both = [(number, first[text]) for number, text in enumerate(when, 1) if text in first]
    if both:
        raise PairsError(
            f"{len(both)} texts stand in both --when and --unless, the first is number {both[0][0]} of the when texts "
            f"and number {both[0][1]} of the unless texts: a gate cannot be open and closed there; take them out of one"
        )


def _places(split: SplitTexts, most: int, generator: np.random.Generator) -> Matrix:
    """int64 [tokens, 2]: (text, place), in order; of a wanted text only what is its own."""
    chosen: list[Matrix] = []
    for side in (True, False):
        texts = [number for number, wanted in enumerate(split.wanted) if wanted is side]
        begin = split.common if side else 0
        within = [np.arange(begin, len(split.texts[text])) for text in texts]
        found = np.stack([np.repeat(texts, list(map(len, within))), np.concatenate(within)], axis=1)
        chosen.append(found[np.sort(generator.permutation(len(found))[:most])])
    return np.concatenate(chosen)


def _count(split: SplitTexts, tokens: Matrix, *, side: bool) -> Split:
    """`tokens` are the parts of the side's tokens."""
    texts = [part > 0 for part, wanted in zip(split.parts, split.wanted, strict=True) if wanted is side]
    return Split(texts.count(True), int((tokens > 0).sum()), texts.count(False), int((tokens == 0).sum()))


def _ffn_inputs(
    model: "PreTrainedModel", layers: Sequence[int], texts: Sequence[Tokens], places: Matrix, batch_tokens: int
) -> dict[int, Matrix]:
    facts = live_facts(model)
    ports = {layer: ffn_input(model, facts, layer) for layer in layers}
    kept = {layer: np.empty((len(places), facts.geometry.residual), np.float32) for layer in layers}
    number = {text: index for index, text in enumerate(texts)}
    starts = np.searchsorted(places[:, 0], np.arange(len(texts) + 1))
    packed = list(batches(texts, batch_tokens))
    for batch in track(packed, "Reading FFN inputs", len(packed)):
        owners = [number[text] for text in batch]
        rows = np.concatenate([np.arange(starts[text], starts[text + 1]) for text in owners])
        offsets = np.repeat(np.arange(len(batch)), [starts[text + 1] - starts[text] for text in owners])
        flat = offsets * max(map(len, batch)) + places[rows, 1]
        with watching((ports[layer], _keeper(kept[layer], rows, flat)) for layer in layers):
            run_texts(model, batch)
    return kept


def _keeper(kept: Matrix, rows: Matrix, flat: Matrix) -> "Callable[[Tensor], None]":
    """Keeps the tokens at the places `flat` of a batch as the rows `rows`."""

    def see(activation: "Tensor") -> None:
        import torch

        tokens = activation.flatten(0, -2)
        kept[rows] = tokens.index_select(0, torch.from_numpy(flat).to(tokens.device)).float().cpu().numpy()

    return see
