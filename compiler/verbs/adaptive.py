"""The adaptive part of steering: gates fitted to texts, and neurons that let a gated edit through."""

import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from austeer.compiler.errors import UsageError
from austeer.compiler.gate_check import Side
from austeer.compiler.gates import Gate, Gated, Origin
from austeer.compiler.live import live_facts
from austeer.compiler.pairs import Pair, holds_pairs, read_pairs, read_texts
from austeer.compiler.program import Program
from austeer.compiler.tokens import Chat, PairTokens, Tokens, encode_pairs, encode_texts, take_tokens
from austeer.passes.distill import Distilled, distill
from austeer.passes.gate import CLOSED, FittedGate, GateFit, fit_gates
from austeer.passes.least_neurons import least_neurons

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NEURONS = 256  # of a layer, for its gated edits
TARGET_R2 = 0.98  # with which fitted neurons are good enough: no more of them are tried
SIDES = ("when", "unless")
CHECKED_TOKENS = 4096  # of each side
SHARES = (CLOSED, 0.99, 0.9)  # of the tokens to leave alone that a gate leaves closed: what a search chooses from


@dataclass(frozen=True)
class Adaptive:
    """When to act: files of texts or pairs for which gates are to be open, and closed.

    Without them, gates open on the negative sides of the pairs that the edits are found with, and close on the
    positive ones. `neurons`: the most of a layer. `reuse`: they take the place of those that contribute least.
    """

    when: Path | None = None
    unless: Path | None = None
    neurons: int = NEURONS
    reuse: bool = False
    in_weights: bool = True  # whether gates become neurons: model-code has them as they are

    def __post_init__(self) -> None:
        if (self.when is None) != (self.unless is None):
            raise UsageError("--when and --unless need each other; without both, the pairs' sides take their place")
        if self.neurons < 2:
            raise UsageError(f"--gate-neurons must be at least 2, got {self.neurons}")


@dataclass(frozen=True)
class Contexts:
    """The texts of one side, as tokens, with the pair that each comes from where they were given as pairs."""

    texts: tuple[Tokens, ...]
    pairs: Mapping[Tokens, PairTokens]
    sha256: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Gating:
    """Gates fitted to two sides of texts, and what they are held against and lived with.

    `gates[layer]` has one for each of SHARES. `sides` are the held-out texts, `calibration` the others.
    """

    gates: Mapping[int, Sequence[FittedGate]]
    sha256: Mapping[str, str]
    sides: Mapping[str, Side]
    calibration: tuple[Tokens, ...]
    record: dict[str, Any]
    notes: tuple[str, ...]

    @property
    def variants(self) -> dict[str, Callable[[Program], Program]]:
        """A program with its edits gated, by what a search calls the gates."""
        return {_name(share): partial(self.gated, variant=n) for n, share in enumerate(SHARES)}

    def gated(self, program: Program, variant: int) -> Program:
        """The program's edits in the gates of their layers; one in a layer without a gate is left out."""
        edits = (Gated(edit, self._gate(edit.layer, variant)) for edit in program.edits if edit.layer in self.gates)
        return replace(program, edits=tuple(edits))

    def _gate(self, layer: int, variant: int) -> Gate:
        fitted = self.gates[layer][variant]
        origin = Origin(**self.sha256, auc=fitted.auc, open_when=fitted.when.open, open_unless=fitted.unless.open)
        return replace(fitted.gate, origin=origin)


def fit_gating(
    model: "PreTrainedModel",
    sides: Mapping[str, Contexts],
    used: Collection[PairTokens],
    *,
    in_weights: bool,
    seed: int,
    batch_tokens: int,
) -> Gating:
    """Gates for the layers that tell the sides `when` and `unless` apart, and what is held out of these texts.

    Pairs that were `used` to find the edits are not held out. Raises as `fit_gates` does.
    """
    layers = range(live_facts(model).geometry.layers)
    texts = [sides[name].texts for name in SIDES]
    fit = fit_gates(
        model, layers, *texts, seed=seed, batch_tokens=batch_tokens, closed=SHARES, in_weights=in_weights
    )  # fmt: skip
    held = {name: _held_out(fit, side, used, wanted=name == "when") for name, side in sides.items()}
    calibration = tuple(text.tokens for text in fit.texts if text.part)
    notes = (*(note for side in sides.values() for note in side.notes), *_left_out(fit))
    hashes = {name: side.sha256 for name, side in sides.items()}
    return Gating(fit.gates, hashes, held, calibration, _record(fit), (*notes, *fit.notes))


def with_neurons(
    model: "PreTrainedModel", program: Program, gating: Gating, asked: Adaptive, plain: Sequence[Tokens], seed: int
) -> tuple[Program, Gating]:
    """The gated program with the neurons that carry it, fitted and, where that is asked for, in places; and a report.

    They are fitted to the texts that the gates were fitted to, and to plain ones. Raises as `distill` and
    `least_neurons` do.
    """
    texts = (*gating.calibration, *plain)
    program, found = distill(model, program, texts, neurons=asked.neurons, target_r2=TARGET_R2, seed=seed)
    record: dict[str, Any] = {"distilled": [asdict(one) for one in found]}
    notes = tuple(map(_fit_note, found))
    if asked.reuse:
        reuse = least_neurons(model, program, texts)
        program, record["lost"] = reuse.program, dict(reuse.lost)
        shares = ", ".join(f"layer {layer} {share:.2%}" for layer, share in reuse.lost.items())
        notes = (*notes, f"the replaced neurons wrote these shares of what their FFNs write: {shares}")
    return program, replace(gating, record={**gating.record, **record}, notes=(*gating.notes, *notes))


def read_sides(
    tokenizer: "PreTrainedTokenizerBase", asked: Adaptive, length: int, chat: Chat | None
) -> dict[str, Contexts]:
    """The texts of both files; none where there are no files. Raises PairsError for what cannot be read."""
    files = {"when": asked.when, "unless": asked.unless}
    return {name: _read(tokenizer, path, length, chat) for name, path in files.items() if path is not None}


def _read(tokenizer: "PreTrainedTokenizerBase", path: Path, length: int, chat: Chat | None) -> Contexts:
    """The texts of a file; of pairs, prompt and positive side."""
    if not holds_pairs(path):
        texts = read_texts(path)
        tokens, notes = encode_texts(tokenizer, texts, length)
        return Contexts(tokens, {}, texts_sha256(texts), notes)
    pairs = read_pairs(path)
    encoded = encode_pairs(tokenizer, pairs, length, chat)
    whole = {pair.prefix + pair.positive: pair for pair in encoded.pairs}
    return Contexts(tuple(whole), whole, texts_sha256(p.prompt + p.positive for p in pairs), encoded.notes)


def sides_of(pairs: Sequence[Pair], tokens: Sequence[PairTokens]) -> dict[str, Contexts]:
    """Both sides of pairs: gates open on the negative ones."""
    when = Contexts(
        tuple(pair.prefix + pair.negative for pair in tokens), {}, texts_sha256(p.prompt + p.negative for p in pairs)
    )
    unless = Contexts(
        tuple(pair.prefix + pair.positive for pair in tokens), {}, texts_sha256(p.prompt + p.positive for p in pairs)
    )
    return {"when": when, "unless": unless}


def texts_sha256(texts: Iterable[str]) -> str:
    """SHA-256 of texts in UTF-8, each with a newline after it: for a file of lines that of the file."""
    return hashlib.sha256("".join(f"{text}\n" for text in texts).encode()).hexdigest()


def _held_out(fit: GateFit, side: Contexts, used: Collection[PairTokens], *, wanted: bool) -> Side:
    texts = [text.tokens for text in fit.texts if text.wanted is wanted and not text.part]
    pairs = (side.pairs[text] for text in texts if text in side.pairs)
    return Side(tuple(take_tokens(texts, CHECKED_TOKENS)), tuple(pair for pair in pairs if pair not in used))


def _left_out(fit: GateFit) -> Iterator[str]:
    without = ", ".join(f"{layer} ({auc:.2f})" for layer, auc in fit.auc.items() if layer not in fit.gates)
    if without:
        yield f"nothing is edited in layers that do not tell the texts apart: {without}, held-out AUC by token"


def _record(fit: GateFit) -> dict[str, Any]:
    """For report and manifest: how the gates were fitted; of each layer one for each share of closed tokens."""
    gates = [
        {"layer": layer, "gate": _name(share), **_figures(fitted)}
        for layer, variants in fit.gates.items()
        for share, fitted in zip(SHARES, variants, strict=True)
    ]
    return {"auc": dict(fit.auc), "when": asdict(fit.when), "unless": asdict(fit.unless), "gates": gates}


def _name(share: float) -> str:
    return f"{share:.0%} closed"


def _figures(fitted: FittedGate) -> dict[str, Any]:
    """All but the gate itself."""
    return {
        "threshold": fitted.threshold,
        "open_when": asdict(fitted.when),
        "open_unless": asdict(fitted.unless),
        "reach": fitted.reach,
        "rounding": {dtype: asdict(error) for dtype, error in fitted.rounding.items()},
        "constant_residual": fitted.constant_residual,
    }


def _fit_note(found: Distilled) -> str:
    return (
        f"layer {found.layer}: {found.neurons} neurons carry the gated edit at {found.site}, with R2 "
        f"{found.held_out_r2:.3f} on held-out texts"
    )
