"""What the FFNs read at tokens of the texts that gates are fitted to and judged by."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from austeer.compiler.forward import run_texts
from austeer.compiler.live import ffn_input, live_facts
from austeer.compiler.progress import track
from austeer.compiler.tokens import batches
from austeer.compiler.watch import watching
from austeer.passes.gate_texts import GateText

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

MOST_TOKENS = 1 << 15
MOST_VALUES = 1 << 29  # of all layers together: 2 GB in float32

Matrix: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"


@dataclass(frozen=True)
class Counts:
    """How many texts and tokens of one side a gate is fitted to, and how many it is judged by."""

    texts: int
    tokens: int
    held_out_texts: int
    held_out_tokens: int


@dataclass(frozen=True, eq=False)
class TokenSample:
    """Tokens of both sides, [tokens] each, in the order of texts and places.

    What texts share with the other side (`shared`) is there only of unless texts, and not wanted: a gate that is
    fitted without it is as likely open there as not.
    """

    wanted: Matrix
    parts: Matrix
    shared: Matrix
    when: Counts
    unless: Counts

    @property
    def fitted(self) -> Matrix:
        """The tokens that gates are fitted to."""
        return self.parts > 0

    @property
    def judged(self) -> Matrix:
        """The tokens that gates are judged by."""
        return (self.parts == 0) & ~self.shared


def sample_tokens(
    model: "PreTrainedModel", layers: Sequence[int], texts: Sequence[GateText], *, seed: int, batch_tokens: int
) -> tuple[TokenSample, dict[int, Matrix]]:
    """(a sample of the texts' tokens, the FFN input of each layer there, float32 [tokens, residual]).

    Of either side at most MOST_TOKENS / 2 tokens, fewer where all layers would then hold more than MOST_VALUES.
    """
    most = min(MOST_TOKENS, MOST_VALUES // (len(layers) * live_facts(model).geometry.residual))
    places = _places(texts, max(most // 2, 1), np.random.default_rng(seed))
    of_texts = np.array([(text.wanted, text.part, text.own) for text in texts])
    side, parts, own = of_texts[places[:, 0]].T
    wanted = side == 1
    when, unless = (_count([t.part for t in texts if t.wanted is on], parts[wanted == on]) for on in (True, False))
    sample = TokenSample(wanted, parts, places[:, 1] < own, when, unless)
    return sample, _ffn_inputs(model, layers, texts, places, batch_tokens)


def _places(texts: Sequence[GateText], most: int, generator: np.random.Generator) -> Matrix:
    """int64 [tokens, 2]: (text, place), in order; of a wanted text only from its own tokens on."""
    chosen: list[Matrix] = []
    for side in (True, False):
        numbers = [number for number, text in enumerate(texts) if text.wanted is side]
        within = [np.arange(texts[i].own if side else 0, len(texts[i].tokens)) for i in numbers]
        found = np.stack([np.repeat(numbers, [len(places) for places in within]), np.concatenate(within)], axis=1)
        chosen.append(found[np.sort(generator.permutation(len(found))[:most])])
    return np.concatenate(chosen)


def _count(texts: Sequence[int], tokens: Matrix) -> Counts:
    """From the parts of a side's texts and of its tokens."""
    held = texts.count(0)
    return Counts(len(texts) - held, int((tokens > 0).sum()), held, int((tokens == 0).sum()))


def _ffn_inputs(
    model: "PreTrainedModel", layers: Sequence[int], texts: Sequence[GateText], places: Matrix, batch_tokens: int
) -> dict[int, Matrix]:
    facts = live_facts(model)
    ports = {layer: ffn_input(model, facts, layer) for layer in layers}
    kept = {layer: np.empty((len(places), facts.geometry.residual), np.float32) for layer in layers}
    number = {text.tokens: index for index, text in enumerate(texts)}
    starts = np.searchsorted(places[:, 0], np.arange(len(texts) + 1))
    packed = list(batches([text.tokens for text in texts], batch_tokens))
    for batch in track(packed, "Reading FFN inputs", len(packed)):
        rows = [np.arange(*starts[number[tokens] : number[tokens] + 2]) for tokens in batch]
        longest = max(map(len, batch))
        flat = [row * longest + places[of, 1] for row, of in enumerate(rows)]
        see = (np.concatenate(rows), np.concatenate(flat))
        with watching((ports[layer], _keeper(kept[layer], *see)) for layer in layers):
            run_texts(model, batch)
    return kept


def _keeper(kept: Matrix, rows: Matrix, flat: Matrix) -> "Callable[[Tensor], None]":
    """Keeps the tokens at the places `flat` of a batch as the rows `rows`."""

    def see(activation: "Tensor") -> None:
        import torch

        tokens = activation.flatten(0, -2)
        kept[rows] = tokens.index_select(0, torch.from_numpy(flat).to(tokens.device)).float().cpu().numpy()

    return see
