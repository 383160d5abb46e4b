"""How often gates are open on texts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from austeer.compiler.forward import run_texts
from austeer.compiler.gating import gate_value
from austeer.compiler.interpreter import interpret
from austeer.compiler.live import activation_of, ffn_input, live_facts
from austeer.compiler.program import Program
from austeer.compiler.progress import track
from austeer.compiler.tokens import Tokens, batches
from austeer.compiler.watch import watching

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Openness:
    """Of a gate on a number of tokens: the share of them with g > 1/2, and the mean g."""

    tokens: int
    open: float
    mean: float

    @staticmethod
    def of(values: Any) -> "Openness":
        """That of the values of g at some tokens, [tokens]."""
        values = np.asarray(values)
        return Openness(len(values), float((values > 0.5).mean()), float(values.mean(dtype=np.float64)))


def open_rates(
    model: "PreTrainedModel", program: Program, texts: Sequence[Tokens], batch_tokens: int
) -> dict[int, Openness]:
    """The openness of each gated edit, by its number in the program, over all tokens of the texts (BOS too).

    Gates read what they read in the compiled model: activations that all the program's edits have changed.
    """
    facts = live_facts(model)
    act = activation_of(facts)
    seen = {number: _Seen(gate_value(edit.gate, act)) for number, edit in program.gated.items()}
    places = [(ffn_input(model, facts, edit.layer), seen[number].see) for number, edit in program.gated.items()]
    packed = list(batches(texts, batch_tokens))
    with interpret(model, program), watching(places):
        for batch in track(packed, "Counting open gates", len(packed)):
            _, real = run_texts(model, batch)
            for one in seen.values():
                one.keep(real)
    return {number: Openness.of(np.concatenate(one.kept)) for number, one in seen.items()}


@dataclass
class _Seen:
    """The values of one gate: of the batch that passes, padding and all, and of the real tokens until now."""

    value: "Callable[[Tensor], Tensor]"
    last: Any = None
    kept: list[Any] = field(default_factory=list)

    def see(self, h: "Tensor") -> None:
        """Takes in one batch of FFN inputs."""
        self.last = self.value(h).flatten()

    def keep(self, real: "Tensor") -> None:
        """Keeps the values at real tokens."""
        self.kept.append(self.last.cpu().numpy()[real.cpu().numpy().flatten()])
