"""Finding a program on a live model: rank its components, choose how many and how strongly on held-out prompts."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import zip_longest
from typing import TYPE_CHECKING

from austeer.compiler.errors import CheckFailed
from austeer.compiler.fidelity import fidelities
from austeer.compiler.forward import longest_text
from austeer.compiler.live import live_facts, load_model, load_tokenizer
from austeer.compiler.measure import Effect, drifts, effects
from austeer.compiler.neutral import sample_neutral
from austeer.compiler.pairs import Pair, split_by_prompt
from austeer.compiler.program import Program
from austeer.compiler.tokens import Encoded, PairTokens, Tokens, encode_pairs, encode_texts, take_tokens
from austeer.compiler.verbs.adaptive import Contexts, Gating, fit_gating, read_sides, sides_of, with_neurons
from austeer.compiler.verbs.bases import Base
from austeer.compiler.verbs.common import Settings, chat_notice, working_dtype
from austeer.compiler.verbs.goal import Goal
from austeer.passes.components import Components
from austeer.passes.fusion import fusion
from austeer.passes.in_gates import GATE, InGates
from austeer.passes.search import Search, Space, Terms, digest, search
from austeer.passes.steer2edit import Alignment
from austeer.passes.study import Point

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NEUTRAL_TEXTS, NEUTRAL_TOKENS = 32, 64
DRIFT_TOKENS = 8192
CERTIFIED_TOKENS = 4096
TRIALS, TRIALS_PER_PLACE = 16, 8


@dataclass(frozen=True)
class Choice:
    """Where and how many components, how strongly, the drift that this costs, and the search that chose them.

    For Steer2Edit also the elastic net that says the same; `gate` names the gates, if there are any.
    """

    site: str
    k: int
    alpha: float
    drift: float
    search: Search | None = None
    rho: float | None = None
    l1_ratio: float | None = None
    gate: str = ""


@dataclass(frozen=True)
class Finding:
    """What a live model said: the program, how it was chosen, and texts that were not used to fit it."""

    program: Program
    choice: Choice
    fitted: int
    held_out: int
    texts: list[Tokens]
    notes: tuple[str, ...]
    gating: Gating | None = None


def find(base: Base, goal: Goal, samples: Sequence[Pair], neutral: Sequence[str] | None, settings: Settings) -> Finding:
    """Runs the base on the samples and finds the program that meets the goal; CheckFailed where none helps.

    Drift is measured on `neutral` texts, or, without them, on text sampled from the base.
    """
    model = load_model(base.path, dtype=working_dtype(base, settings), device=settings.device)
    tokenizer = load_tokenizer(base.path)
    length = min(settings.length_for(base.checkpoint.config), longest_text(model))
    fit, held = (samples, ()) if goal.complete else split_by_prompt(samples, settings.seed)
    fitted, held_out = (encode_pairs(tokenizer, side, length, settings.chat) for side in (fit, held))
    plain, cut = _neutral_tokens(model, tokenizer, neutral, length, settings.seed)
    gating = None
    if goal.adaptive:
        sides = read_sides(tokenizer, goal.adaptive, length, settings.chat) or sides_of(fit, fitted.pairs)
        gating = _gating(model, sides, fitted.pairs, goal, settings)
    space = _space(model, fitted.pairs, goal, gating, settings.batch_tokens)
    identity = {"model": digest(base.describe()), "pairs": digest(_ids(fitted, held_out)), **_identity(gating)}
    terms = _terms(goal, settings.seed, identity)
    program, choice = _choose(model, space, held_out.pairs, plain, goal, terms, settings.batch_tokens)
    if gating and goal.adaptive and goal.adaptive.in_weights:
        program, gating = with_neurons(model, program, gating, goal.adaptive, plain, settings.seed)
    texts = take_tokens(_interleaved(*_unseen(held_out.pairs, gating), plain), CERTIFIED_TOKENS)
    notes = (
        *chat_notice(tokenizer, settings),
        *fitted.notes,
        *held_out.notes,
        *space.notes,
        *cut,
        *(gating.notes if gating else ()),
        *_doubts(choice, goal, len(held_out.pairs)),
    )
    return Finding(program, choice, len(fitted.pairs), len(held_out.pairs), texts, notes, gating)


def _gating(
    model: "PreTrainedModel",
    sides: Mapping[str, Contexts],
    used: Sequence[PairTokens],
    goal: Goal,
    settings: Settings,
) -> Gating:
    in_weights = goal.adaptive is not None and goal.adaptive.in_weights
    seed, batch_tokens = settings.seed, settings.batch_tokens
    return fit_gating(model, sides, used, in_weights=in_weights, seed=seed, batch_tokens=batch_tokens)


def _identity(gating: Gating | None) -> dict[str, str]:
    return {f"{name} texts": sha256 for name, sha256 in gating.sha256.items()} if gating else {}


def _unseen(pairs: Sequence[PairTokens], gating: Gating | None) -> list[Sequence[Tokens]]:
    """Texts that nothing was fitted to."""
    sides = gating.sides.values() if gating else ()
    return [[pair.prefix + pair.positive for pair in pairs], *(side.texts for side in sides)]


def _space(
    model: "PreTrainedModel", pairs: Sequence[PairTokens], goal: Goal, gating: Gating | None, batch_tokens: int
) -> Space:
    space = _plain_space(model, pairs, goal, gating, batch_tokens)
    if gating is None:
        return space
    return InGates(space, dict(list(gating.variants.items())[: 1 if goal.complete else None]))


def _plain_space(
    model: "PreTrainedModel", pairs: Sequence[PairTokens], goal: Goal, gating: Gating | None, batch_tokens: int
) -> Space:
    rank = goal.method.rank
    if rank is None:
        return fusion(model, pairs, goal.segments or 1, batch_tokens=batch_tokens)
    rankings = {name: rank(model, pairs, sites, batch_tokens) for name, sites in goal.places.items()}
    if gating is not None:
        rankings = {name: ranking.within(gating.gates) for name, ranking in rankings.items()}
    return Components(rankings, live_facts(model).geometry, goal.top_k)


def _terms(goal: Goal, seed: int, identity: Mapping[str, str]) -> Terms:
    trials = goal.trials or TRIALS + TRIALS_PER_PLACE * len(goal.places)
    return Terms(goal.max_drift, goal.alpha, trials, seed, goal.study, {"method": goal.method.name, **identity})


def _choose(
    model: "PreTrainedModel",
    space: Space,
    held_out: Sequence[PairTokens],
    plain: Sequence[Tokens],
    goal: Goal,
    terms: Terms,
    batch_tokens: int,
) -> tuple[Program, Choice]:
    """What the user gave, with its drift, or the winner of a search; CheckFailed where nothing helps."""
    if goal.complete:
        program, point, alpha = _given(space, goal)
        (drift,) = drifts(model, plain, [program], batch_tokens)
        choice = Choice(point.get("site", goal.place), space.size(point), alpha, drift, gate=point.get(GATE, ""))
    else:
        judge = partial(effects if goal.method.rank else fidelities, model, held_out, batch_tokens=batch_tokens)
        found = search(model, space, judge, plain, terms, batch_tokens=batch_tokens)
        if found.best is None:
            raise CheckFailed(_no_help(found, goal))
        point, alpha = found.best.point, found.best.alpha
        site, gate = point.get("site", goal.place), point.get(GATE, "")
        choice = Choice(site, space.size(point), alpha, found.best.drift, found, gate=gate)
        program = space.program(point, alpha)
    return program, _with_penalty(choice, space, goal)


def _given(space: Space, goal: Goal) -> tuple[Program, Point, float]:
    """The program of a complete goal, its point of the space, and how strong it is."""
    point, alignment = space.starts[0], _alignment(space)
    if alignment and goal.rho is not None and goal.l1_ratio is not None:
        k, alpha = alignment.choice(goal.rho, goal.l1_ratio)
        if k == 0:
            raise CheckFailed("the elastic net leaves no head or neuron to edit: use a smaller --rho or --l1-ratio")
        program = alignment.program(goal.rho, goal.l1_ratio, space.model)
        if isinstance(space, InGates):
            program = space.gates[point[GATE]](program)
        return program, {**point, "k": k}, alpha
    assert goal.alpha is not None
    return space.program(point, goal.alpha), point, goal.alpha


def _alignment(space: Space) -> Alignment | None:
    """What Steer2Edit ranks by."""
    space = space.inner if isinstance(space, InGates) else space
    rankings = space.rankings.values() if isinstance(space, Components) else ()
    return next((ranking for ranking in rankings if isinstance(ranking, Alignment)), None)


def _with_penalty(choice: Choice, space: Space, goal: Goal) -> Choice:
    alignment = _alignment(space)
    if alignment is None:
        return choice
    given = goal.rho, goal.l1_ratio
    rho, l1_ratio = alignment.penalty(choice.k, choice.alpha) if goal.rho is None else given
    return replace(choice, rho=rho, l1_ratio=l1_ratio)


def _doubts(choice: Choice, goal: Goal, pairs: int) -> tuple[str, ...]:
    """Notices: the drift is beyond the limit, or the gain is within two standard errors of the base's accuracy."""
    doubts: list[str] = []
    if choice.drift > goal.max_drift:
        doubts.append(f"the drift, {choice.drift:.3f} nats per token, is beyond --max-drift {goal.max_drift}")
    best = choice.search.best if choice.search else None
    base = choice.search.base if choice.search else None
    if isinstance(base, Effect) and best and isinstance(best.effect, Effect):
        before, after = base.accuracy, best.effect.accuracy
        if after - before <= 2 * math.sqrt(before * (1 - before) / pairs):
            gain = f"the gain in accuracy, {before:.3f} to {after:.3f} on {pairs} held-out pairs, is small enough to be"
            doubts.append(f"{gain} luck; measure the effect on other pairs, or give more")
    return tuple(doubts)


def _neutral_tokens(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    given: Sequence[str] | None,
    length: int,
    seed: int,
) -> tuple[Sequence[Tokens], tuple[str, ...]]:
    """Plain text on which drift is measured: the user's, else sampled from the base."""
    if given is not None:
        tokens, notes = encode_texts(tokenizer, given, length)
        taken = take_tokens(tokens, DRIFT_TOKENS)
        left = (f"drift is measured on the first {len(taken)} of {len(tokens)} neutral texts ({DRIFT_TOKENS} tokens)",)
        return taken, notes + left * (len(taken) < len(tokens))
    return sample_neutral(model, tokenizer, NEUTRAL_TEXTS, min(NEUTRAL_TOKENS, length), seed), ()


def _interleaved(*sources: Sequence[Tokens]) -> list[Tokens]:
    """One of each in turn, so that a budget takes some of all."""
    return [text for row in zip_longest(*sources) for text in row if text is not None]


def _ids(*encoded: Encoded) -> list[list[tuple[Tokens, Tokens, Tokens]]]:
    return [[(pair.prefix, pair.positive, pair.negative) for pair in part.pairs] for part in encoded]


def _no_help(found: Search, goal: Goal) -> str:
    figure, value = next(iter(asdict(found.base).items()))
    return (
        f"steering at site {goal.place} does not help within a drift of {goal.max_drift} nats per token: none of "
        f"{len(found.table)} trials beats the base's held-out {figure} of {value:.3f}. "
        "Nothing was written. Try another --site, a larger --max-drift, or more pairs"
    )
