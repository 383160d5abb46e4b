"""distill: gated edits that no weight does exactly → neurons fitted to what the edit adds.

What a gated scale or rank1 adds, g(h) times its contribution, is a function of the input h of its FFN at site ffn,
and depends on more than h elsewhere, so that there no number of neurons fits it whole. R² on held-out texts says
how nearly they do.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from austeer.compiler.edits import Scale, Shift
from austeer.compiler.errors import PairsError, Refused, UsageError
from austeer.compiler.facts import ModelFacts
from austeer.compiler.forward import run_texts
from austeer.compiler.gates import Gated
from austeer.compiler.gating import watch_gated
from austeer.compiler.interpreter import interpret
from austeer.compiler.live import activation_of, ffn_input, live_facts
from austeer.compiler.program import Program
from austeer.compiler.progress import track
from austeer.compiler.sites import SiteName
from austeer.compiler.tokens import Tokens, take_tokens
from austeer.compiler.watch import watching
from austeer.passes.fit_neurons import Parts, Samples, Start, as_fitted, fit_neurons, own_neurons, r2

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

FEWEST = 32  # neurons of the first try; every other has twice as many as the one before
HELD_OUT = 0.2  # of the texts
MOST_VALUES = 1 << 27  # of the FFN's inputs at a time (512 MB); of texts beyond that the rest is not used


@dataclass(frozen=True)
class Distilled:
    """How the neurons of one edit came out.

    `edit` is its number in the program. R² = 1 - Σ|y - ŷ|² / Σ|y - mean y|², over all tokens and all units of the
    residual stream that the edit writes to, and `curve` has it on held-out texts for every number of neurons that
    was tried.
    """

    edit: int
    layer: int
    site: SiteName
    neurons: int
    held_out_r2: float
    fit_r2: float
    curve: tuple[tuple[int, float], ...]


def distill(
    model: "PreTrainedModel",
    program: Program,
    texts: Sequence[Tokens],
    *,
    neurons: int,
    target_r2: float,
    seed: int,
) -> tuple[Program, tuple[Distilled, ...]]:
    """The program with neurons in every gated edit that is not a shift, and how each of them came out.

    Fitted in float32 on the model's device to what the interpreter adds, the edits before it in place. More neurons
    are tried until R² on held-out texts (a seeded fifth) reaches `target_r2`, or until the gated edits of the layer
    have `neurons` in all, the two of each shift included. They have biases where the model's own FFN has them.
    Deterministic by seed on one machine. Raises UsageError where an edit has no neuron left to it, PairsError for
    fewer than two texts, Refused for mixtures of experts and post-norm models.
    """
    facts = live_facts(model)
    program.require_fit(facts.geometry)
    shares = {number: _share(program, edit, facts, neurons) for number, edit in _wanting(program).items()}
    fit, held_out = _split(texts, MOST_VALUES // facts.geometry.residual, seed) if shares else ((), ())
    edits, records = list(program.edits), list[Distilled]()
    for number, edit in track(_wanting(program).items(), "Distilling gated edits", len(shares)):
        case = _case(model, program, edit, fit, held_out)
        parts, curve = _best(case, shares[number], target_r2, seed)
        edits[number] = replace(edit, neurons=as_fitted(parts, facts.geometry.residual, case.columns))
        held, known = (r2(samples, parts, case.start.act) for samples in (case.held_out, case.fit))
        records.append(Distilled(number, edit.layer, edit.site, len(parts["gate"]), held, known, curve))
    return Program(program.model, tuple(edits)), tuple(records)


@dataclass(frozen=True, eq=False)
class _Case:
    """One edit: what its neurons are fitted to, and what they are held against."""

    fit: Samples
    held_out: Samples
    start: Start
    columns: "Tensor"  # of the residual stream: where the edit writes


def _wanting(program: Program) -> dict[int, Gated]:
    """The gated edits that two neurons do not do exactly, by number."""
    return {number: edit for number, edit in program.gated.items() if not isinstance(edit.edit, Shift)}


def _share(program: Program, edit: Gated, facts: ModelFacts, neurons: int) -> int:
    """How many neurons an edit may have. Raises Refused where no neuron can carry it, UsageError for none."""
    if facts.post_norm:
        raise Refused(f"{edit.where}: a norm stands after the FFN, so no neuron adds a given vector; use model-code")
    if facts.has_experts(edit.layer):
        raise Refused(f"{edit.where}: the layer is a mixture of experts, which has no one FFN for its neurons")
    here = [other for other in program.gated.values() if other.layer == edit.layer]
    shifts = sum(isinstance(other.edit, Shift) for other in here)
    share = (neurons - 2 * shifts) // (len(here) - shifts)
    if share < 1:
        raise UsageError(f"{edit.where}: {neurons} neurons are too few for the {len(here)} gated edits of the layer")
    return share


def _split(texts: Sequence[Tokens], most: int, seed: int) -> tuple[list[Tokens], list[Tokens]]:
    """(texts to fit to, held-out ones), of `most` tokens together."""
    if len(texts) < 2:
        raise PairsError(f"fitting neurons needs at least two texts, one of them held out; got {len(texts)}")
    generator = random.Random(seed)  # noqa: S311 - a seeded choice, no secret
    drawn = take_tokens(sorted(texts, key=lambda _: generator.random()), most)
    held = max(1, round(HELD_OUT * len(drawn)))
    return drawn[held:], drawn[:held]


def _case(
    model: "PreTrainedModel", program: Program, edit: Gated, fit: Sequence[Tokens], held_out: Sequence[Tokens]
) -> _Case:
    import torch

    facts = live_facts(model)
    inner = edit.edit
    every = tuple(range(facts.geometry.residual))
    columns = torch.tensor(inner.units if isinstance(inner, Scale) and inner.space == "residual" else every)
    known, unknown = (_samples(model, program, edit, texts, columns) for texts in (fit, held_out))
    w = torch.tensor(edit.gate.w, device=known.h.device)
    start = Start(own_neurons(model, facts, edit.layer), w, edit.gate.b, activation_of(facts))
    return _Case(known, unknown, start, columns)


def _samples(
    model: "PreTrainedModel", program: Program, edit: Gated, texts: Sequence[Tokens], columns: "Tensor"
) -> Samples:
    """What the FFN reads, and what the edit adds to the columns, as the edits before it leave them."""
    import torch

    facts, h, y = live_facts(model), list["Tensor"](), list["Tensor"]()

    def see(added: "Tensor") -> None:
        y.append(added.flatten(0, -2)[:, columns.to(added.device)])

    reads = ffn_input(model, facts, edit.layer)
    with interpret(model, _before(program, edit)), watching([(reads, h.append)]), watch_gated(model, facts, edit, see):
        for text in texts:
            run_texts(model, [text])
    inputs = torch.cat([part.flatten(0, -2) for part in h]).float()
    samples = Samples(inputs, torch.cat(y).float().to(inputs.device))
    if not samples.spread:
        raise Refused(f"{edit.where}: it adds nothing in some texts; give more, in which its gate is open")
    return samples


def _before(program: Program, edit: Gated) -> Program:
    """What has changed the activations that a gated edit reads."""
    layers = (other.layer + isinstance(other, Gated) for other in program.edits)
    edits = (other for other, end in zip(program.edits, layers, strict=True) if end <= edit.layer)
    return Program(program.model, tuple(edits))


def _best(case: _Case, most: int, target_r2: float, seed: int) -> tuple[Parts, tuple[tuple[int, float], ...]]:
    """The best neurons on held-out texts of all sizes up to the first that reaches the target, and R² of each."""
    tries = dict[int, tuple[float, Parts]]()
    for count in _sizes(most):
        parts = fit_neurons(case.fit, case.start, count, seed)
        tries[count] = r2(case.held_out, parts, case.start.act), parts
        if tries[count][0] >= target_r2:
            break
    _, best = max(tries.values(), key=lambda tried: tried[0])
    return best, tuple((count, found) for count, (found, _) in tries.items())


def _sizes(most: int) -> Iterator[int]:
    """32, 64, 128 and so on, and last the most that there may be."""
    size = FEWEST
    while size < most:
        yield size
        size *= 2
    yield most
