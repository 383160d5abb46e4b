"""What pruning did to a model, told from the files of the dense and of the pruned one."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from austeer.compiler.errors import Refused
from austeer.compiler.facts import ModelFacts
from austeer.compiler.head_map import HeadMap, head_counts, map_heads
from austeer.compiler.layout import Layout
from austeer.compiler.sparsity import Pattern, TensorSparsity, sparsity

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Kind = Literal["unstructured", "2:4", "structured"]

CLEAR = 1e-3  # of a matrix's values: more zeros than rounding makes
PROBES = ("Once upon a time, 3 cats\n\tsaw   42 dogs.", "Où est-il? Ἀθήνα, 東京, 🙂", " def f(x):  return x**2 ")
GIVE_DENSE = "Give as --dense the model that the pruned one was made from"


@dataclass(frozen=True)
class Pruning:
    """What pruning did: `head_map[layer][head]` is the dense model's head that a head of the pruned model was.

    `kind`: "structured" if heads or neurons are gone, or are zero as whole rows and columns; "2:4" if all pruned
    matrices have that pattern; else "unstructured". `dense`, `pruned`: the zeros of all their weight matrices.
    """

    kind: Kind
    head_map: HeadMap
    dense: tuple[TensorSparsity, ...]
    pruned: tuple[TensorSparsity, ...]

    def plain(self) -> dict[str, Any]:
        """As JSON values, of the pruned model's matrices alone."""
        heads = [list(heads) for heads in self.head_map]
        return {"kind": self.kind, "head_map": heads, "tensors": [tensor.plain() for tensor in self.pruned]}


def examine(dense: Layout, pruned: Layout, head_map: Path | None = None) -> Pruning:
    """What made the one model out of the other. Reads all weights of both once, in bounded memory.

    Raises Refused for models that are not the same one, for the two in the wrong order, for one that is not pruned,
    and for heads that cannot be told; InputError for a bad `head_map`.
    """
    _require_same_model(dense, pruned)
    _require_smaller(dense, pruned)
    heads = map_heads(dense, pruned, head_map)
    before, after = sparsity(dense), sparsity(pruned)
    if _sizes(dense.facts) != _sizes(pruned.facts):
        return Pruning("structured", heads, before, after)
    gains = dict(_gains(before, after, dense.prefix, pruned.prefix))
    _require_more_zeros(dense, pruned, gains.values())
    return Pruning(_kind({tensor.pattern for tensor, gain in gains.items() if gain >= CLEAR}), heads, before, after)


def require_same_tokenizer(dense: "PreTrainedTokenizerBase", pruned: "PreTrainedTokenizerBase") -> None:
    """Refused, with what differs, unless both have one vocabulary and make the same tokens of a few texts."""
    theirs, ours = dense.get_vocab(), pruned.get_vocab()
    differences = {
        "only the dense one has": theirs.keys() - ours.keys(),
        "only the pruned one has": ours.keys() - theirs.keys(),
        "under other ids they have": {token for token in theirs.keys() & ours.keys() if theirs[token] != ours[token]},
        "they split into other tokens": {text for text in PROBES if _ids(dense, text) != _ids(pruned, text)},
    }
    found = [f"{what} {min(items)!r} ({len(items)} in all)" for what, items in differences.items() if items]
    if found:
        raise Refused(f"the tokenizers of the dense and the pruned model differ: {', '.join(found)}. {GIVE_DENSE}")


def _require_same_model(dense: Layout, pruned: Layout) -> None:
    theirs, ours = _identity(dense.facts), _identity(pruned.facts)
    differences = [f"{what} ({theirs[what]} and {ours[what]})" for what in theirs if theirs[what] != ours[what]]
    if differences:
        raise Refused(
            f"{dense.checkpoint.path} is not the model that {pruned.checkpoint.path} was pruned from: they differ in "
            f"{', '.join(differences)}. {GIVE_DENSE}"
        )


def _identity(facts: ModelFacts) -> dict[str, Any]:
    """What pruning leaves as it is."""
    return {
        "architecture": facts.geometry.architecture,
        "layers": facts.geometry.layers,
        "d_model": facts.geometry.residual,
        "vocab_size": facts.config.get("vocab_size"),
        "head_dim": facts.head_dim,
        "experts": facts.expert_count,
    }


def _sizes(facts: ModelFacts) -> dict[str, int]:
    """What pruning may make smaller."""
    heads, kv_heads = head_counts(facts)
    return {
        "heads": heads,
        "key-value heads": kv_heads,
        "neurons": facts.geometry.neurons,
        "neurons an expert": facts.expert_neurons,
    }


def _require_smaller(dense: Layout, pruned: Layout) -> None:
    theirs = _sizes(dense.facts)
    more = [f"{what} ({size})" for what, size in _sizes(pruned.facts).items() if size > theirs[what]]
    if more:
        raise _swapped(dense, pruned, f"more {', '.join(more)}")


def _gains(
    before: tuple[TensorSparsity, ...], after: tuple[TensorSparsity, ...], *prefixes: str
) -> Iterator[tuple[TensorSparsity, float]]:
    """The matrices of the pruned model that both have, with the share of their values that became zero."""
    theirs, ours = (
        {tensor.name.removeprefix(prefix): tensor for tensor in tensors}
        for tensors, prefix in zip((before, after), prefixes, strict=True)
    )
    return ((tensor, tensor.share - theirs[name].share) for name, tensor in ours.items() if name in theirs)


def _require_more_zeros(dense: Layout, pruned: Layout, gains: Collection[float]) -> None:
    if min(gains, default=0.0) <= -CLEAR and sum(gains) < 0:
        raise _swapped(dense, pruned, "fewer zeros")
    if max(gains, default=0.0) < CLEAR:
        raise Refused(
            f"{pruned.checkpoint.path} is not pruned: it has the shapes of {dense.checkpoint.path} and no more zeros, "
            f"so there is nothing to restore. Give a pruned model. {GIVE_DENSE}"
        )


def _swapped(dense: Layout, pruned: Layout, what: str) -> Refused:
    return Refused(
        f"the dense and the pruned model are swapped: {pruned.checkpoint.path}, given as the pruned one, has {what} "
        f"than {dense.checkpoint.path}. Give the pruned model first and the other as --dense"
    )


def _kind(patterns: set[Pattern]) -> Kind:
    """That of pruning which left these patterns; a matrix that is zero altogether has 2:4 as well."""
    if patterns == {"2:4"}:
        return "2:4"
    return "unstructured" if "" in patterns else "structured"


def _ids(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    return list(tokenizer(text)["input_ids"])
