"""What pruning did is found in the files, and models that are not each other's are refused with what differs."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from austeer.compiler.checkpoint import Checkpoint
from austeer.compiler.errors import AusteerError, CheckpointError, InputError, Refused
from austeer.compiler.facts import facts_of
from austeer.compiler.layout import Layout
from austeer.compiler.pruning import examine, require_same_tokenizer
from tests.shared import shared
from tests.test_layers import HEAVY, loaded
from tests.tiny import Tiny, load, on_disk, rewritten, scratch

Tensors = dict[str, Any]
Kept = Sequence[Sequence[int]]  # for each layer, heads
DIM = 6
# Key-value heads and query heads of each layer that stay. Two of four heads share each key-value head.
ONE_GROUP = ([[1], [0]], [[2, 3], [0, 1]])
ONE_OF_EACH = ([[0, 1], [0, 1]], [[1, 2], [0, 3]])
REORDERED = ([[1, 0], [0, 1]], [[3, 0], [1, 2]])
SEPARATE = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "smollm3")


def layout(folder: Path) -> Layout:
    checkpoint = Checkpoint.open(folder)
    return Layout.of(checkpoint, facts_of("m", checkpoint.config))


def edited(source: Path, change: Callable[[Tensors], Any] = lambda _: None, **config: Any) -> Path:
    """A copy with other tensors and other entries of config.json."""
    folder = scratch() / "edited"

    def both(tensors: Tensors) -> Tensors:
        change(tensors)
        return tensors

    rewritten(source, folder, both)
    entries = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**entries, **config}))
    return folder


def units(heads: Sequence[int], width: int = DIM) -> torch.Tensor:
    return torch.tensor([head * width + unit for head in heads for unit in range(width)])


def cut(tiny: Tiny, kv_heads: Kept, heads: Kept) -> Path:
    """The model without the other heads, uniformly smaller."""

    def change(tensors: Tensors) -> None:
        for layer in range(tiny.layers):
            keep = {"q": units(heads[layer]), "k": units(kv_heads[layer]), "v": units(kv_heads[layer])}
            at = f"model.layers.{layer}.self_attn."
            for name in [name for name in tensors if name.startswith(at)]:
                part = name.removeprefix(at)
                if part.startswith(("q_proj", "k_proj", "v_proj")):
                    tensors[name] = tensors[name][keep[part[0]]]
                if part == "o_proj.weight":
                    tensors[name] = tensors[name][:, keep["q"]]
                if part == "qkv_proj.weight":
                    start, wide = tiny.heads * DIM, tiny.kv_heads * DIM
                    rows = torch.cat([keep["q"], start + keep["k"], start + wide + keep["v"]])
                    tensors[name] = tensors[name][rows]

    sizes = {"num_attention_heads": len(heads[0]), "num_key_value_heads": len(kv_heads[0]), "head_dim": DIM}
    return edited(on_disk(tiny), change, **sizes)


def cut_gpt2(tiny: Tiny, heads: Kept) -> Path:
    """As `cut`, for weights that are stored [in, out]; head_dim is what transformers 5 does not read there."""

    def change(tensors: Tensors) -> None:
        for layer in range(tiny.layers):
            keep, width, at = units(heads[layer]), tiny.heads * DIM, f"transformer.h.{layer}.attn."
            columns = torch.cat([keep, width + keep, 2 * width + keep])
            for part in ("weight", "bias"):
                tensors[f"{at}c_attn.{part}"] = tensors[f"{at}c_attn.{part}"][..., columns]
            tensors[f"{at}c_proj.weight"] = tensors[f"{at}c_proj.weight"][keep]

    return edited(on_disk(tiny), change, n_head=len(heads[0]), head_dim=DIM)


def fewer_neurons(tiny: Tiny, neurons: Sequence[int]) -> Path:
    def change(tensors: Tensors) -> None:
        for name in tensors:
            if "down_proj.weight" in name:
                tensors[name] = tensors[name][:, neurons]
            elif "gate_proj" in name or "up_proj" in name:
                tensors[name] = tensors[name][neurons]

    return edited(on_disk(tiny), change, intermediate_size=len(neurons))


def zeroed(tiny: Tiny, share: float = 0.5, **more: Any) -> Path:
    """The smallest values of every linear map set to zero."""

    def change(tensors: Tensors) -> None:
        for name, tensor in tensors.items():
            if tensor.ndim == 2 and "layers" in name:
                tensor[tensor.abs() < tensor.abs().flatten().quantile(share)] = 0

    return edited(on_disk(tiny), change, **more)


def identity(tiny: Tiny) -> tuple[tuple[int, ...], ...]:
    return (tuple(range(tiny.heads)),) * tiny.layers


def as_tuples(lists: Kept) -> tuple[tuple[int, ...], ...]:
    return tuple(map(tuple, lists))


# ---- kinds -----------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "opt", "mixtral"])
def test_unstructured(architecture: str) -> None:
    tiny = Tiny(architecture)
    dense, pruned = layout(on_disk(tiny)), layout(zeroed(tiny))
    found = examine(dense, pruned)
    assert (found.kind, found.head_map) == ("unstructured", identity(tiny))
    assert not any(tensor.zeros for tensor in found.dense if "layers" in tensor.name)
    assert all(
        0.45 < tensor.share < 0.55 for tensor in found.pruned if "layers" in tensor.name and "proj" in tensor.name
    )
    plain = json.loads(json.dumps(found.plain()))
    assert plain["kind"] == "unstructured"
    assert plain["head_map"] == [[0, 1, 2, 3]] * 2
    assert plain["tensors"][-1].keys() == {"name", "shape", "zeros", "share", "pattern"}


def test_two_of_four() -> None:
    def change(tensors: Tensors) -> None:
        for name, tensor in tensors.items():
            if tensor.ndim == 2 and "layers" in name:
                tensor.unflatten(-1, (-1, 4))[..., 1:3] = 0

    tiny = Tiny("llama")
    pruned = edited(on_disk(tiny), change)
    assert examine(layout(on_disk(tiny)), layout(pruned)).kind == "2:4"

    def one_not(tensors: Tensors) -> None:
        tensors["model.layers.0.mlp.up_proj.weight"][0, :4] = torch.tensor([0, 0, 0, 1.0])
        tensors["model.layers.0.mlp.up_proj.weight"][1, :4] = torch.tensor([0, 1, 1, 1.0])

    assert examine(layout(on_disk(tiny)), layout(edited(pruned, one_not))).kind == "unstructured"


def test_heads_and_neurons_that_are_zero_in_their_shape() -> None:
    def change(tensors: Tensors) -> None:
        at = "model.layers.1."
        for name in ("self_attn.k_proj", "self_attn.v_proj"):
            tensors[f"{at}{name}.weight"][DIM:] = 0
        tensors[f"{at}self_attn.o_proj.weight"][:, 2 * DIM :] = 0
        tensors[f"{at}mlp.down_proj.weight"][:, 3] = 0

    tiny = Tiny("llama")
    found = examine(layout(on_disk(tiny)), layout(edited(on_disk(tiny), change)))
    assert (found.kind, found.head_map) == ("structured", identity(tiny))


def test_a_layer_whose_attention_is_zero() -> None:
    def change(tensors: Tensors) -> None:
        tensors["model.layers.1.self_attn.o_proj.weight"].zero_()
        tensors["model.layers.0.self_attn.v_proj.weight"][:DIM] = 0

    assert examine(layout(on_disk(Tiny("llama"))), layout(edited(on_disk(Tiny("llama")), change))).kind == "structured"


def test_one_head_of_many_counts_as_pruned() -> None:
    tiny = Tiny("llama", heads=4, kv_heads=4)
    pruned = edited(on_disk(tiny), lambda tensors: tensors["model.layers.0.self_attn.v_proj.weight"][:DIM].zero_())
    assert examine(layout(on_disk(tiny)), layout(pruned)).kind == "structured"


def test_fewer_neurons_need_no_map() -> None:
    tiny = Tiny("llama")
    folder = fewer_neurons(tiny, [0, 2, 3, 5, 8, 13, 20, 27])
    load(folder)
    found = examine(layout(on_disk(tiny)), layout(folder))
    assert (found.kind, found.head_map) == ("structured", identity(tiny))


def test_the_names_of_the_bare_model_are_those_of_the_whole() -> None:
    tiny = Tiny("llama")
    pruned = zeroed(tiny)
    folder = scratch() / "bare"
    rewritten(pruned, folder, lambda tensors: {name.removeprefix("model."): tensors[name] for name in tensors})
    assert examine(layout(on_disk(tiny)), layout(folder)).kind == "unstructured"


# ---- heads -----------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [ONE_GROUP, ONE_OF_EACH], ids=["a group", "one of each group"])
@pytest.mark.parametrize("architecture", SEPARATE)
def test_heads_are_found_by_their_rows(architecture: str, kept: tuple[Kept, Kept]) -> None:
    tiny = Tiny(architecture)
    folder = cut(tiny, *kept)
    load(folder)  # complete, as transformers sees it
    found = examine(layout(on_disk(tiny)), layout(folder))
    assert (found.kind, found.head_map) == ("structured", as_tuples(kept[1]))


@pytest.mark.parametrize("kept", [ONE_GROUP, ONE_OF_EACH, REORDERED])
def test_heads_of_fused_maps(kept: tuple[Kept, Kept]) -> None:
    assert examine(layout(on_disk(Tiny("phi3"))), layout(cut(Tiny("phi3"), *kept))).head_map == as_tuples(kept[1])


@pytest.mark.parametrize("heads", [[[0, 2, 3], [1, 3, 2]], [[3], [0]]])
def test_heads_of_transposed_maps(heads: Kept) -> None:
    tiny = replace(Tiny("gpt2"), kv_heads=4)
    assert examine(layout(on_disk(tiny)), layout(cut_gpt2(tiny, heads))).head_map == as_tuples(heads)


def test_without_groups_the_queries_may_have_changed() -> None:
    tiny = Tiny("llama", kv_heads=4)
    folder = edited(
        cut(tiny, [[0, 3], [2, 1]], [[0, 3], [2, 1]]),
        lambda tensors: tensors["model.layers.0.self_attn.q_proj.weight"].mul_(2),
    )
    assert examine(layout(on_disk(tiny)), layout(folder)).head_map == ((0, 3), (2, 1))


def test_the_same_values_in_a_wider_dtype_are_equal() -> None:
    tiny = Tiny("llama", dtype="bfloat16")

    def change(tensors: Tensors) -> None:
        tensors.update({name: tensor.float() for name, tensor in tensors.items()})

    folder = edited(cut(tiny, *ONE_OF_EACH), change)
    assert examine(layout(on_disk(tiny)), layout(folder)).head_map == as_tuples(ONE_OF_EACH[1])


def changed(part: str, value: float | None = None) -> Callable[[Tensors], None]:
    """Changes a value of the second head of layer 1, or zeroes its rows."""

    def change(tensors: Tensors) -> None:
        rows = tensors[f"model.layers.1.self_attn.{part}.weight"][DIM : 2 * DIM]
        if value is None:
            rows.zero_()
        else:
            rows[2, 3] += value

    return change


@pytest.mark.parametrize("part", ["q_proj", "v_proj"])
@pytest.mark.parametrize("value", [1e-3, None], ids=["another value", "all zero"])
def test_a_head_that_equals_none_is_refused(part: str, value: float | None) -> None:
    tiny = Tiny("llama")
    folder = edited(cut(tiny, *ONE_OF_EACH), changed(part, value))
    with pytest.raises(Refused, match=r"head 1 of layer 1 has rows of q_proj and v_proj that no one .*--head-map FILE"):
        examine(layout(on_disk(tiny)), layout(folder))


@pytest.mark.parametrize(("part", "kv_heads"), [("v_proj", 4), ("q_proj", 2)])
def test_heads_that_are_zero_in_both_models_match_nothing(part: str, kv_heads: int) -> None:
    tiny = Tiny("llama", kv_heads=kv_heads)
    dense = edited(on_disk(tiny), changed(part))
    few = [[0, 1], [0, 1]] if kv_heads == 4 else [[0], [0]]
    folder = edited(cut(tiny, few, [[0, 1], [0, 1]]), changed(part))
    with pytest.raises(Refused, match=r"head 1 of layer 1 has rows of .*v_proj that no one head"):
        examine(layout(dense), layout(folder))


def test_heads_that_two_dense_ones_equal_are_refused() -> None:
    def twins(tensors: Tensors) -> None:
        values = tensors["model.layers.0.self_attn.v_proj.weight"]
        values[:DIM] = values[DIM : 2 * DIM]

    tiny = Tiny("llama", kv_heads=4)
    dense = edited(on_disk(tiny), twins)
    folder = edited(cut(tiny, [[1, 2], [0, 1]], [[1, 2], [0, 1]]), lambda _: None)
    with pytest.raises(Refused, match="head 0 of layer 0 has rows of v_proj that no one head of the dense model has"):
        examine(layout(dense), layout(folder))


def test_heads_of_interleaved_maps_are_refused() -> None:
    tiny = Tiny("gpt_neox")

    def change(tensors: Tensors) -> None:
        for layer in range(2):
            at = f"gpt_neox.layers.{layer}.attention."
            for part in ("weight", "bias"):
                tensors[f"{at}query_key_value.{part}"] = tensors[f"{at}query_key_value.{part}"][: 3 * 2 * DIM]
            tensors[f"{at}dense.weight"] = tensors[f"{at}dense.weight"][:, : 2 * DIM]

    folder = edited(on_disk(tiny), change, num_attention_heads=2, head_dim=DIM)
    with pytest.raises(Refused, match=r"query_key_value mixes queries and values of its heads.*--head-map"):
        examine(layout(on_disk(tiny)), layout(folder))
    heads = folder / "heads.json"
    heads.write_text("[0, 1]")
    assert examine(layout(on_disk(tiny)), layout(folder), heads).head_map == ((0, 1), (0, 1))


# ---- a map of the user's ---------------------------------------------------------------


@pytest.mark.parametrize(("text", "expected"), [("[[1, 2], [3, 0]]", ((1, 2), (3, 0))), ("[2, 1]", ((2, 1), (2, 1)))])
def test_a_map_is_believed(text: str, expected: Any, tmp_path: Path) -> None:
    tiny = Tiny("llama")
    folder = edited(cut(tiny, *ONE_OF_EACH), changed("v_proj", 1.0))
    (tmp_path / "map.json").write_text(text)
    found = examine(layout(on_disk(tiny)), layout(folder), tmp_path / "map.json")
    assert (found.kind, found.head_map) == ("structured", expected)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[0, 1]]", "holds no list for each of the 2 layers; give --head-map FILE: JSON"),
        ("[]", "holds no list for each of the 2 layers"),
        ('{"0": [0, 1]}', "holds no list for each of the 2 layers"),
        ("[[0, 1], 2]", "layer 1: 2 is no list"),
        ("[[0, 1], [2]]", "layer 1: 1 heads for the 2 of the pruned model"),
        ("[[0, 1], [0, 1, 2]]", "layer 1: 3 heads for the 2 of the pruned model"),
        ("[[0, 1], [2, 2]]", "layer 1: head 2 is there twice"),
        ("[[0, 4], [0, 1]]", "layer 0: 4 is no head of the dense model, which has 0 to 3"),
        ("[-1, 0]", "layer 0: -1 is no head"),
        ("[true, 0]", "layer 0: True is no head"),
        ('["0", 1]', "layer 0: '0' is no head"),
        ("[0, 1", "this is not JSON in UTF-8"),
        (b"\xff", "this is not JSON in UTF-8"),
        ("[" * 100_000, "this is not JSON in UTF-8"),
        (None, "cannot be read (No such file or directory)"),
    ],
)
def test_a_bad_map_is_named(text: str | bytes | None, message: str, tmp_path: Path) -> None:
    file = tmp_path / "map.json"
    if text is not None:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    tiny = Tiny("llama")
    dense, pruned = layout(on_disk(tiny)), layout(cut(tiny, *ONE_OF_EACH))
    with pytest.raises(InputError, match=rf"{re.escape(str(file))}: {re.escape(message)}"):
        examine(dense, pruned, file)


# ---- refusals --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dense", "differences"),
    [
        (Tiny("mistral"), ["architecture (mistral and llama)"]),
        (Tiny("llama", layers=3), ["layers (3 and 2)"]),
        (Tiny("llama", residual=24), ["d_model (24 and 20)"]),
        (Tiny("llama", vocabulary=64), ["vocab_size (64 and 61)"]),
        (Tiny("llama", head_dim=8), ["head_dim (8 and 6)"]),
        (
            Tiny("qwen3", layers=1, head_dim=8),
            ["architecture (qwen3 and llama)", "layers (1 and 2)", "head_dim (8 and 6)"],
        ),
    ],
)
def test_another_model_is_refused_with_all_that_differs(dense: Tiny, differences: list[str]) -> None:
    message = re.escape(f"they differ in {', '.join(differences)}. Give as --dense the model")
    with pytest.raises(Refused, match=message):
        examine(layout(on_disk(dense)), layout(zeroed(Tiny("llama"))))


def test_fewer_experts_are_another_model() -> None:
    with pytest.raises(Refused, match=r"differ in experts \(3 and 2\)"):
        examine(layout(on_disk(Tiny("mixtral"))), layout(on_disk(Tiny("mixtral", experts=2))))


def test_swapped_by_zeros() -> None:
    dense, pruned = layout(on_disk(Tiny("llama"))), layout(zeroed(Tiny("llama")))
    with pytest.raises(Refused, match=r"are swapped: .*, given as the pruned one, has fewer zeros than .*/edited"):
        examine(pruned, dense)


@pytest.mark.parametrize(
    ("pruned", "more"),
    [
        (lambda: cut(Tiny("llama"), *ONE_GROUP), r"more heads \(4\), key-value heads \(2\) than"),
        (lambda: cut(Tiny("llama"), *ONE_OF_EACH), r"more heads \(4\) than"),
        (lambda: fewer_neurons(Tiny("llama"), range(8)), r"more neurons \(28\) than"),
    ],
)
def test_swapped_by_sizes(pruned: Callable[[], Path], more: str) -> None:
    folder = pruned()
    with pytest.raises(Refused, match=rf"{more} {re.escape(str(folder))}. Give the pruned model first"):
        examine(layout(folder), layout(on_disk(Tiny("llama"))))


def tuned(tensors: Tensors) -> None:
    """Another model of the same shapes, with a zero that chance made."""
    for tensor in tensors.values():
        tensor.mul_(1.01)
    tensors["model.embed_tokens.weight"][3, 3] = 0


@pytest.mark.parametrize("change", [lambda _: None, tuned], ids=["the same", "tuned"])
def test_not_pruned_at_all(change: Callable[[Tensors], None]) -> None:
    dense = on_disk(Tiny("llama", vocabulary=1000))
    with pytest.raises(Refused, match=r"is not pruned: it has the shapes of .* and no more zeros, .*Give a pruned"):
        examine(layout(dense), layout(edited(dense, change)))


def test_heads_that_do_not_share_evenly() -> None:
    folder = cut(Tiny("llama"), [[0, 1], [0, 1]], [[0, 1, 2], [0, 1, 2]])
    with pytest.raises(CheckpointError, match="3 heads on 2 key-value heads, which cannot be shared evenly"):
        examine(layout(on_disk(Tiny("llama"))), layout(folder))


EXAMINE = """
import sys
from austeer.compiler.checkpoint import Checkpoint
from austeer.compiler.facts import facts_of
from austeer.compiler.layout import Layout
from austeer.compiler.pruning import examine
examine(*(Layout.of(found, facts_of("m", found.config)) for found in map(Checkpoint.open, sys.argv[1:])))
"""


def test_files_are_examined_without_torch() -> None:
    found = loaded(EXAMINE, str(on_disk(Tiny("llama"))), str(cut(Tiny("llama"), *ONE_GROUP)))
    assert "numpy" in found
    assert not found & set(HEAVY)


def test_the_magnitude_pruned_stories() -> None:
    dense, pruned = (layout(shared(f"models/stories260K{name}")) for name in ("", "-magnitude50"))
    found = examine(dense, pruned)
    assert (found.kind, found.head_map) == ("unstructured", (tuple(range(8)),) * 5)
    for first, second in ((pruned, dense), (dense, dense), (layout(shared("models/babyllama-105")), pruned)):
        with pytest.raises(AusteerError):
            examine(first, second)


# ---- tokenizers ------------------------------------------------------------------------


class Words:
    """A tokenizer as far as it is looked at: words by a vocabulary, a first token for all texts."""

    def __init__(self, vocabulary: dict[str, int], first: int = 1) -> None:
        self.vocabulary, self.first = vocabulary, first

    def get_vocab(self) -> dict[str, int]:
        return dict(self.vocabulary)

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [self.first, *(self.vocabulary.get(word, 0) for word in text.split())]}


VOCABULARY = {"<unk>": 0, "<s>": 1, "Once": 2, "cats": 3}


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (Words({**VOCABULARY, "dogs.": 4}), r"only the pruned one has 'dogs\.' \(1 in all\), they split into other"),
        (Words({"<unk>": 0, "<s>": 1, "Once": 2}), r"only the dense one has 'cats' \(1 in all\)"),
        (Words({**VOCABULARY, "Once": 3, "cats": 2}), r"under other ids they have 'Once' \(2 in all\)"),
        (Words(VOCABULARY, first=0), r"they split into other tokens ' def .*' \(3 in all\)\. Give as --dense"),
    ],
)
def test_other_tokenizers_are_refused_with_what_differs(other: Any, message: str) -> None:
    with pytest.raises(Refused, match=rf"the tokenizers of the dense and the pruned model differ: {message}"):
        require_same_tokenizer(Words(VOCABULARY), other)  # type: ignore[arg-type]


def test_equal_tokenizers_pass() -> None:
    require_same_tokenizer(Words(VOCABULARY), Words(dict(reversed(VOCABULARY.items()))))  # type: ignore[arg-type]


def test_tokenizers_of_real_models() -> None:
    from transformers import AutoTokenizer

    names = ("stories260K", "stories260K-magnitude50", "babyllama-105")
    dense, pruned, other = (AutoTokenizer.from_pretrained(shared(f"models/{name}")) for name in names)
    require_same_tokenizer(dense, pruned)
    with pytest.raises(Refused, match="only the pruned one has"):
        require_same_tokenizer(other, pruned)
