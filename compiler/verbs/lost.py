"""What pruning cost, told by the dense model and then by the pruned one: loss, accuracy, and components of heads."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from austeer.compiler.edits import Floats
from austeer.compiler.errors import PairsError, Refused
from austeer.compiler.head_outputs import HeadOutputs, record, record_sides
from austeer.compiler.live import live_facts, port, weight_of
from austeer.compiler.measure import effects
from austeer.compiler.pairs import Pair, split_by_prompt
from austeer.compiler.program import Program
from austeer.compiler.pruning import Pruning
from austeer.compiler.response_loss import mean_loss
from austeer.compiler.responses import Response, Sample
from austeer.compiler.tokens import PairTokens, Tokens, encode_pairs, encode_prompts
from austeer.compiler.verbs.common import Settings
from austeer.compiler.verbs.task import Task
from austeer.passes.hardest_answers import hardest_answers
from austeer.passes.head_importance import importances
from austeer.passes.head_shifts import HeadShifts
from austeer.passes.lost_components import lost_components

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PROBED = 1000  # contrasts that heads are probed with, at most
JUDGED = 500  # contrasts that accuracy is taken on, at most


@dataclass(frozen=True)
class Contrasts:
    """Pairs to probe the heads with, the prompts of each as text and as tokens, and others to judge by."""

    probed: tuple[PairTokens, ...]
    prompts: tuple[str, ...]
    texts: tuple[Tokens, ...]
    judged: tuple[PairTokens, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class DenseView:
    """What the dense model says: the loss on the test samples, accuracy, and what its heads put out."""

    loss: float
    accuracy: float | None
    contrasts: Contrasts
    at_prompts: HeadOutputs
    at_sides: tuple[HeadOutputs, HeadOutputs]


@dataclass(frozen=True, eq=False)
class Lost:
    """The shifts to begin with, and every head's importance [layers, heads]; None, with a note, where it is unknown."""

    shifts: HeadShifts
    importance: Floats | None
    notes: tuple[str, ...]


def ask_dense(
    model: "PreTrainedModel",
    contrasts: Contrasts,
    test: Sequence[Response],
    pruning: Pruning,
    scratch: Path,
    batch_tokens: int,
) -> DenseView:
    """Runs the dense model; what its heads put out is kept in `scratch`, in the order of the pruned model's heads."""
    files = [scratch / f"dense-{name}.safetensors" for name in ("prompts", "positive", "negative")]
    prompts = record(model, contrasts.texts, files[0], batch_tokens=batch_tokens)
    sides = record_sides(model, contrasts.probed, *files[1:], batch_tokens=batch_tokens)
    first, second = (side.in_order(pruning.head_map) for side in sides)
    return DenseView(
        mean_loss(model, test, batch_tokens),
        accuracy(model, contrasts.judged, None, batch_tokens),
        contrasts,
        prompts.in_order(pruning.head_map),
        (first, second),
    )


def ask_pruned(model: "PreTrainedModel", view: DenseView, task: Task, scratch: Path, settings: Settings) -> Lost:
    """Runs the pruned model on the same prompts: what its heads lost, and which of them matter."""
    at_prompts = record(model, view.contrasts.texts, scratch / "pruned.safetensors", batch_tokens=settings.batch_tokens)
    importance, notes = None, list[str]()
    try:
        importance = importances(at_prompts, *view.at_sides, view.contrasts.prompts, settings.seed)
    except PairsError as error:
        if task.top_heads != "all":
            raise
        notes.append(f"the importance of heads is unknown, and no picture shows it: {error}")
    else:
        notes.extend(_doubts(importance, len(view.contrasts.probed), task))
    chosen = _chosen(importance, task, _read_heads(model))
    return Lost(_shifts(view.at_prompts, at_prompts, chosen, task.components), importance, tuple(notes))


def accuracy(
    model: "PreTrainedModel", pairs: Sequence[PairTokens], program: Program | None, batch_tokens: int
) -> float | None:
    """How often the positive side is the likelier one; None without pairs."""
    return effects(model, pairs, [program], batch_tokens)[0].accuracy if pairs else None


def contrasts_of(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    pairs: Sequence[Pair] | None,
    fit: Sequence[Sample],
    test: Sequence[Sample],
    length: int,
    settings: Settings,
) -> Contrasts:
    """The user's pairs, a part of them held out; or, for each sample, its response and the hardest other answer."""
    notes: list[str] = []
    if pairs is not None:
        probed, judged = split_by_prompt(pairs, settings.seed)
    else:

        def hardest(samples: Sequence[Sample]) -> tuple[Pair, ...]:
            texts = [(sample.prompt, sample.response) for sample in samples]
            return hardest_answers(model, tokenizer, texts, batch_tokens=settings.batch_tokens, max_length=length)

        probed = hardest(fit[:PROBED])
        try:
            judged = hardest(test[:JUDGED])
        except PairsError:
            judged = ()
            notes.append("no accuracy: the held-out samples have no two different answers")
    encoded = [(pair, encode_pairs(tokenizer, [pair], length, settings.chat)) for pair in probed[:PROBED]]
    kept = [(pair, found.pairs[0]) for pair, found in encoded if found.pairs]
    if not kept:
        raise PairsError("no pair can be used: both sides have the same tokens, or none within the limit")
    prompts = tuple(pair.prompt or pair.positive for pair, _ in kept)
    held = encode_pairs(tokenizer, judged[:JUDGED], length, settings.chat)
    texts = encode_prompts(tokenizer, prompts, length, settings.chat)
    return Contrasts(tuple(tokens for _, tokens in kept), prompts, texts, held.pairs, (*notes, *held.notes))


def _doubts(importance: Floats, pairs: int, task: Task) -> tuple[str, ...]:
    """A notice where the best of all heads is within two standard errors of chance."""
    best = float(importance.max())
    if task.top_heads == "all" or best > 0.5 + 2 * (0.25 / (2 * pairs)) ** 0.5:
        return ()
    found = f"no head tells the contrasts apart better than luck may: the best is right in {best:.1%}"
    return (f"{found}. Give contrasts of what matters with --pairs, or restore all heads with --top-heads all",)


def _read_heads(model: "PreTrainedModel") -> NDArray[np.bool_]:
    """Whether anything reads what a head puts out, [layers, heads]: not where pruning left its columns of W_o zero."""
    facts = live_facts(model)
    layers, dim = range(facts.geometry.layers), facts.head_dim
    weights = (
        weight_of(port(model, facts, layer, "heads").module, transposed=facts.architecture.transposed)
        for layer in layers
    )
    return np.stack([weight.any(0).view(-1, dim).any(1).cpu().numpy() for weight in weights])


def _chosen(importance: Floats | None, task: Task, read: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The most important heads of all layers that are `read` (ties: lower layer, then lower head)."""
    ranked = np.arange(read.size) if importance is None else np.argsort(-importance, axis=None, kind="stable")
    ranked = ranked[read.flat[ranked]]
    if not len(ranked):
        raise Refused("all output projections of the pruned model are zero, so nothing that a head adds counts")
    chosen = np.zeros(read.size, bool)
    chosen[ranked[: task.count(read.size)]] = True
    return chosen.reshape(read.shape)


def _shifts(dense: HeadOutputs, pruned: HeadOutputs, chosen: NDArray[np.bool_], components: int) -> HeadShifts:
    """The lost components of the chosen heads; one layer's outputs are in memory at a time."""
    heads, directions, magnitudes, sizes = [], [], [], []
    for layer in np.flatnonzero(chosen.any(1)).tolist():
        ours = np.flatnonzero(chosen[layer])
        whole = dense.layer(layer)[:, ours]
        lost = lost_components(whole - pruned.layer(layer)[:, ours])
        heads.append(np.stack([np.full_like(ours, layer), ours], axis=1))
        directions.append(lost.directions[:, :, :components])
        magnitudes.append(lost.magnitudes[:, :components])
        sizes.append(_sizes(whole))
    return HeadShifts(*(np.ascontiguousarray(np.concatenate(part)) for part in (heads, directions, magnitudes, sizes)))


def _sizes(outputs: Floats) -> Floats:
    """The RMS of each head's outputs [count, heads, dim]; 1 for a head that is silent."""
    rms = np.sqrt(np.square(outputs, dtype=np.float64).mean((0, 2))).astype(np.float32)
    return np.where(rms > 0, rms, np.float32(1))
