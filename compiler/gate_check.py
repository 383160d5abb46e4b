"""The certificate of gates: what a compiled model does on held-out texts where it is to act, and where it is not."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from austeer.compiler.certificate import Comparison, text_logits
from austeer.compiler.live import load_model
from austeer.compiler.measure import Effect, effects
from austeer.compiler.openness import Openness, open_rates
from austeer.compiler.program import Program
from austeer.compiler.progress import track
from austeer.compiler.tokens import PairTokens, Tokens

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Side:
    """Held-out texts of one side, and the pairs that they come from; no pairs where they were given as texts."""

    texts: tuple[Tokens, ...]
    pairs: tuple[PairTokens, ...] = ()


@dataclass(frozen=True)
class SideCheck:
    """Of the compiled model on the texts of a side: its KL from the base, its effect on the pairs, its gates.

    `mean_kl` is D(base ‖ compiled) in nats per token, `base_effect` what the base does with the pairs; both effects
    are None where there are no pairs. `gates` has the openness of each gated edit, by its number in the program.
    """

    texts: int
    tokens: int
    mean_kl: float
    top1_agreement: float
    effect: Effect | None
    base_effect: Effect | None
    gates: Mapping[int, Openness]

    @property
    def open_range(self) -> tuple[float, float]:
        """The least and the largest share of tokens at which a gate is open."""
        shares = [gate.open for gate in self.gates.values()]
        return min(shares), max(shares)

    def plain(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


def check_gates(
    base: Path,
    program: Program,
    sides: Mapping[str, Side],
    load_compiled: "Callable[[], PreTrainedModel]",
    *,
    dtype: str,
    device: str,
    batch_tokens: int,
) -> dict[str, SideCheck]:
    """Each side by its name; one model in memory at a time, and the base's logits of all texts."""
    model = load_model(base, dtype=dtype, device=device)
    before = {name: _Before.of(model, program, side, batch_tokens) for name, side in sides.items()}
    del model
    model = load_compiled()
    return {name: _check(model, side, before[name], batch_tokens) for name, side in sides.items()}


@dataclass(frozen=True)
class _Before:
    logits: tuple["Tensor", ...]
    effect: Effect | None
    gates: Mapping[int, Openness]

    @staticmethod
    def of(model: "PreTrainedModel", program: Program, side: Side, batch_tokens: int) -> "_Before":
        logits = tuple(text_logits(model, text) for text in track(side.texts, "base"))
        return _Before(
            logits, _effect(model, side.pairs, batch_tokens), open_rates(model, program, side.texts, batch_tokens)
        )


def _check(model: "PreTrainedModel", side: Side, before: _Before, batch_tokens: int) -> SideCheck:
    found = Comparison()
    for text, expected in zip(track(side.texts, "compiled"), before.logits, strict=True):
        found.add(expected, text_logits(model, text))
    return SideCheck(
        len(side.texts),
        found.tokens,
        found.kl / found.tokens,
        found.agreeing / found.tokens,
        _effect(model, side.pairs, batch_tokens),
        before.effect,
        before.gates,
    )


def _effect(model: "PreTrainedModel", pairs: Sequence[PairTokens], batch_tokens: int) -> Effect | None:
    return effects(model, pairs, [None], batch_tokens)[0] if pairs else None
