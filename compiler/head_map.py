"""Which heads of the dense model those of a pruned model are."""

from collections import Counter
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from austeer.compiler.checkpoint import parse_json
from austeer.compiler.errors import CheckpointError, InputError, Refused
from austeer.compiler.facts import ModelFacts
from austeer.compiler.layout import Layout
from austeer.compiler.tensors import storage_dtype, to_float32

HeadMap: TypeAlias = tuple[tuple[int, ...], ...]
"""For each layer the dense model's head of each (query) head of the pruned model."""

GIVE_MAP = (
    "give --head-map FILE: JSON, for each layer a list of the dense model's heads (from 0) that are left, in the "
    "pruned model's order, or one such list for all layers"
)


def head_counts(facts: ModelFacts) -> tuple[int, int]:
    """(query heads, key-value heads) of a layer; CheckpointError unless as many of the one share each of the other."""
    heads, kv_heads = facts.geometry.heads // facts.head_dim, facts.kv // facts.head_dim
    if heads % kv_heads:
        raise CheckpointError(
            f"{facts.geometry.name}: config.json has {heads} heads on {kv_heads} key-value heads, which cannot be "
            "shared evenly; no engine runs such a model"
        )
    return heads, kv_heads


def map_heads(dense: Layout, pruned: Layout, file: Path | None = None) -> HeadMap:
    """The map in a file; without one the identity where both have as many heads, else what their weights say.

    A head is known by its rows of v_proj and, where queries share values in either model, its rows of q_proj, which
    must be equal in every value. Raises InputError for a bad file, Refused for a head that no dense one equals.
    """
    if file is not None:
        return read_head_map(file, dense.facts, pruned.facts)
    if head_counts(dense.facts) == head_counts(pruned.facts):
        return (tuple(range(head_counts(dense.facts)[0])),) * dense.facts.geometry.layers
    return tuple(_match(dense, pruned, layer) for layer in range(dense.facts.geometry.layers))


def read_head_map(file: Path, dense: ModelFacts, pruned: ModelFacts) -> HeadMap:
    """The map in a JSON file. Raises InputError, which says in which layer, unless it fits both models."""
    lists = parse_json(file, InputError, GIVE_MAP)
    layers = dense.geometry.layers
    if isinstance(lists, list) and lists and not any(isinstance(item, list) for item in cast("list[Any]", lists)):
        lists = [lists] * layers
    if not isinstance(lists, list) or len(cast("list[Any]", lists)) != layers:
        raise InputError(f"{file}: holds no list for each of the {layers} layers; {GIVE_MAP}")
    ranges = head_counts(dense)[0], head_counts(pruned)[0]
    return tuple(_heads(f"{file}: layer {layer}", heads, *ranges) for layer, heads in enumerate(lists))


def _heads(where: str, heads: Any, dense: int, pruned: int) -> tuple[int, ...]:
    if not isinstance(heads, list):
        raise InputError(f"{where}: {heads!r} is no list; {GIVE_MAP}")
    numbers = cast("list[Any]", heads)
    for head in numbers:
        if type(head) is not int or not 0 <= head < dense:
            raise InputError(f"{where}: {head!r} is no head of the dense model, which has 0 to {dense - 1}; {GIVE_MAP}")
    twice = next((head for head, times in Counter(numbers).items() if times > 1), None)
    if twice is not None:
        raise InputError(f"{where}: head {twice} is there twice; {GIVE_MAP}")
    if len(numbers) != pruned:
        raise InputError(f"{where}: {len(numbers)} heads for the {pruned} of the pruned model; {GIVE_MAP}")
    return tuple(numbers)


def _match(dense: Layout, pruned: Layout, layer: int) -> tuple[int, ...]:
    shared = any(heads != kv_heads for heads, kv_heads in map(head_counts, (dense.facts, pruned.facts)))
    theirs, ours = (_signatures(layout, layer, with_queries=shared) for layout in (dense, pruned))
    # What two dense heads have in common tells neither from the other.
    unique = {key for key, times in Counter(theirs).items() if key and times == 1}
    places = {key: head for head, key in enumerate(theirs) if key in unique}
    for head, key in enumerate(ours):
        if key not in places:
            rows = "q_proj and v_proj" if shared else "v_proj"
            raise Refused(
                f"{pruned.checkpoint.path}: head {head} of layer {layer} has rows of {rows} that no one head of the "
                f"dense model has, so which one it was is unknown; {GIVE_MAP}"
            )
    return tuple(places[key] for key in ours)


def _signatures(layout: Layout, layer: int, *, with_queries: bool) -> list[bytes]:
    """What each query head is known by; empty where rows are all zero."""
    heads, kv_heads = head_counts(layout.facts)
    values = [key for key in _digests(layout, layer, "values", kv_heads) for _ in range(heads // kv_heads)]
    if not with_queries:
        return values
    queries = _digests(layout, layer, "queries", heads)
    return [query + value if query and value else b"" for query, value in zip(queries, values, strict=True)]


def _digests(layout: Layout, layer: int, of: Literal["queries", "values"], heads: int) -> list[bytes]:
    """A hash of each head's rows, as float32; empty for rows that are all zero."""
    rows, dtype = _rows(layout, layer, of)
    parts = (to_float32(np.ascontiguousarray(part), dtype) for part in np.split(rows, heads))
    return [sha256(part.data).digest() if part.any() else b"" for part in parts]


def _rows(layout: Layout, layer: int, of: Literal["queries", "values"]) -> "tuple[NDArray[Any], str]":
    """The rows of all heads [heads x head_dim, residual], mapped from the file, and their stored dtype."""
    facts = layout.facts
    maps = [(linear, number) for linear in facts.architecture.inputs for number in range(len(linear.outputs))]
    queries, _, values = (place for place in maps if place[0].of_attention)
    linear, number = queries if of == "queries" else values
    name = layout.name(layer, linear)
    if linear.by_head:
        raise Refused(f"{name} mixes queries and values of its heads, so heads cannot be told by them; {GIVE_MAP}")
    tensor = layout.checkpoint.tensors[f"{name}.weight"]
    stored = np.memmap(tensor.file, storage_dtype(tensor.dtype), "r", tensor.offset, tensor.shape)
    start = sum(map(facts.axis, linear.outputs[:number]))
    rows = stored.T if facts.architecture.transposed else stored
    return rows[start : start + facts.axis(linear.outputs[number])], tensor.dtype
