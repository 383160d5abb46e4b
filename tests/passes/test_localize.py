"""AUSteer's scores: against their definition, one text at a time, and against the authors' own."""

import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from austeer.compiler import PairsError, Program, Refused, Scale, UsageError, interpret
from austeer.compiler.edits import Floats
from austeer.compiler.facts import Geometry
from austeer.compiler.live import live_facts, load_model, load_tokenizer, port
from austeer.compiler.pairs import read_pairs
from austeer.compiler.sites import SITES, SiteName
from austeer.compiler.tokens import PairTokens, Tokens, encode_pairs
from austeer.passes.localize import Scores, localize
from tests.shared import TINY, shared, tiny

AUTHORS: dict[SiteName, str] = {"heads": "attention", "ffn": "ffn", "residual": "layer"}
GEOMETRY = Geometry("model", "llama", layers=3, residual=4, heads=4, neurons=8)


def some_pairs() -> list[PairTokens]:
    generator = random.Random(5)

    def tokens(low: int, high: int) -> Tokens:
        return tuple(generator.randrange(64) for _ in range(generator.randint(low, high)))

    return [PairTokens(tokens(0, 8), tokens(1, 4), tokens(1, 4)) for _ in range(9)]


def last_activations(model: Any, site: SiteName, layers: tuple[int, ...], text: Tokens) -> torch.Tensor:
    """[layers, width] at the last token of one text that is run alone."""
    seen: list[torch.Tensor] = []
    facts, handles = live_facts(model), []
    for layer in layers:
        place = port(model, facts, layer, site)
        if place.side == "input":
            handles.append(place.module.register_forward_pre_hook(lambda _, args: seen.append(args[0])))
        else:
            handles.append(place.module.register_forward_hook(lambda _, __, out: seen.append(out)))
    with torch.no_grad():
        model(input_ids=torch.tensor([text]), use_cache=False)
    for handle in handles:
        handle.remove()
    outputs = [x[0] if isinstance(x, tuple) else x for x in seen]
    return torch.stack([x.reshape(len(text), -1)[-1] for x in outputs])


def naive(
    model: Any, site: SiteName, layers: tuple[int, ...], pairs: list[PairTokens], dtype: torch.dtype = torch.float32
) -> Floats:
    """The definition, one text at a time, with activations rounded to `dtype` before the subtraction."""
    more, less = 0, 0
    for pair in pairs:
        sides = (pair.positive, pair.negative)
        positive, negative = (last_activations(model, site, layers, pair.prefix + side).to(dtype) for side in sides)
        more, less = more + (positive > negative).int(), less + (positive < negative).int()
    beta = torch.maximum(more, less) / torch.tensor(len(pairs), dtype=torch.float32)
    return torch.where(more < less, -beta, beta).numpy()


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("name", TINY)
def test_scores_are_those_of_each_text_run_alone(name: str, site: SiteName) -> None:
    model = tiny(name)
    if name in ("mixtral", "qwen3_moe") and site == "neurons":
        pytest.skip("no layer has the site")
    scores = localize(model, some_pairs(), site, batch_tokens=40)
    np.testing.assert_array_equal(scores.beta, naive(model, site, scores.layers, some_pairs()))
    assert scores.beta.dtype == np.float32
    assert scores.pairs == 9


@pytest.mark.parametrize("batch_tokens", [1, 17, 10**6])
def test_batching_and_order_do_not_matter(batch_tokens: int) -> None:
    model = tiny("gemma2")
    expected = localize(model, some_pairs(), "ffn", batch_tokens=40).beta
    np.testing.assert_array_equal(localize(model, some_pairs()[::-1], "ffn", batch_tokens=batch_tokens).beta, expected)


def test_equal_activations_count_for_neither_side() -> None:
    same = PairTokens((1, 2), (3,), (3,))
    beta = localize(tiny("llama"), [same, same], "ffn", batch_tokens=40).beta
    np.testing.assert_array_equal(beta, 0)
    one = PairTokens((1, 2), (3,), (4,))
    assert set(np.abs(localize(tiny("llama"), [same, one], "ffn", batch_tokens=40).beta).ravel()) == {0.5}


def test_as_many_up_as_down_is_positive() -> None:
    pairs = [PairTokens((1,), (3,), (4,)), PairTokens((1,), (4,), (3,))]
    np.testing.assert_array_equal(localize(tiny("llama"), pairs, "ffn", batch_tokens=40).beta, 0.5)


def test_scores_of_a_steered_model_and_no_hook_stays() -> None:
    model = tiny("llama")
    flip = Program.of([Scale(0, "ffn", (3,), [-2.0])], model=live_facts(model).geometry)
    base = localize(model, some_pairs(), "ffn", batch_tokens=40).beta
    with interpret(model, flip):
        flipped = localize(model, some_pairs(), "ffn", batch_tokens=40).beta
    assert flipped[0, 3] == -base[0, 3]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_experts_have_no_neurons_site() -> None:
    scores = localize(tiny("qwen3_moe-dense"), some_pairs(), "neurons", batch_tokens=40)
    assert scores.layers == (1,)
    assert scores.notes == ("layers 0 are mixtures of experts without a `neurons` site: left out",)
    with pytest.raises(Refused, match="use the site ffn"):
        localize(tiny("mixtral"), some_pairs(), "neurons", batch_tokens=40)


def test_one_pair_is_too_few() -> None:
    with pytest.raises(PairsError, match="at least two usable pairs, got 1"):
        localize(tiny("llama"), some_pairs()[:1], "ffn", batch_tokens=40)


@cache
def parity() -> tuple[Any, list[PairTokens]]:
    folder, pairs = shared("models/stories260K"), read_pairs(shared("parity/pairs.jsonl"))
    encoded = encode_pairs(load_tokenizer(folder), pairs, 512)
    return load_model(folder, dtype="float32", device="cpu"), list(encoded.pairs)


def authors(site: SiteName) -> Floats:
    scores = json.loads(shared(f"parity/austeer-stories260K-{AUTHORS[site]}.json").read_text())["scores"]
    return np.array(scores, dtype=np.float32).reshape(5, 64)


@pytest.mark.parametrize("site", AUTHORS)
def test_the_authors_scores_one_text_at_a_time(site: SiteName) -> None:
    model, pairs = parity()
    np.testing.assert_array_equal(naive(model, site, tuple(range(5)), pairs, torch.float16), authors(site))


@pytest.mark.parametrize(("site", "borderline"), [("heads", 1), ("ffn", 0), ("residual", 1)])
def test_the_authors_scores_in_batches(site: SiteName, borderline: int) -> None:
    """Equal, but for one pair of one unit at two sites: there an activation lies within float32 noise (1e-6) of a
    float16 rounding border, so the order of a sum decides.
    """
    model, pairs = parity()
    found = localize(model, pairs, site, batch_tokens=4096, round_to_half=True).beta
    assert np.sum(found != authors(site)) <= borderline
    np.testing.assert_allclose(found, authors(site), rtol=0, atol=1.01 / 200)


@pytest.mark.parametrize(("site", "differing", "most"), [("heads", 55, 21), ("ffn", 25, 2), ("residual", 67, 3)])
def test_without_the_rounding_only_ties_near_zero_differ(site: SiteName, differing: int, most: int) -> None:
    """Of 320 units `differing` change, by at most `most` of 200 pairs: two small values that float16 made equal."""
    model, pairs = parity()
    found, expected = localize(model, pairs, site, batch_tokens=4096).beta, authors(site)
    apart = np.rint(200 * np.abs(np.abs(found) - np.abs(expected)))
    assert abs(int(np.sum(found != expected)) - differing) <= 3
    assert apart.max() <= most + 1
    best = [set(np.argsort(-np.abs(beta), axis=None, kind="stable")[:20]) for beta in (found, expected)]
    assert best[0] == best[1]


def scores_of(rows: list[list[float]], layers: tuple[int, ...] = (0, 2)) -> Scores:
    return Scores("ffn", layers, np.array(rows, dtype=np.float32), 10)


def test_select_ranks_globally_and_breaks_ties_by_layer_then_unit() -> None:
    scores = scores_of([[0.5, -0.9, 0.5, 0.6], [0.9, 0.5, -1.0, 0.6]])
    assert scores.select(1, 2.0, GEOMETRY).edits == (Scale(2, "ffn", (2,), [-2.0]),)
    four = scores.select(4, 2.0, GEOMETRY).edits
    assert [(edit.layer, edit.units) for edit in four if isinstance(edit, Scale)] == [(0, (1, 3)), (2, (0, 2))]
    six = scores.select(6, 2.0, GEOMETRY).edits
    assert [(edit.layer, edit.units) for edit in six if isinstance(edit, Scale)] == [(0, (0, 1, 3)), (2, (0, 2, 3))]


def test_gamma_is_alpha_times_beta_rounded_once() -> None:
    (edit,) = scores_of([[0.56, 0.1, 0.1, 0.1]], (1,)).select(1, 0.3, GEOMETRY).edits
    assert isinstance(edit, Scale)
    assert edit.gamma[0] == np.float32(0.3 * float(np.float32(0.56)))


@pytest.mark.parametrize(
    ("k", "alpha", "message"),
    [
        (0, 1, "from 1 to 4"),
        (-1, 1, "from 1 to 4"),
        (5, 1, "from 1 to 4 at site ffn, got 5"),
        (1, np.nan, "finite"),
        (1, np.inf, "finite"),
    ],
)
def test_select_refuses_what_cannot_be_meant(k: int, alpha: float, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        scores_of([[0.5, 0.6, 0.7, 0.8]], (1,)).select(k, alpha, GEOMETRY)


@pytest.mark.parametrize("site", SITES)
def test_a_model_spread_by_device_map(site: SiteName, tmp_path: Path) -> None:
    """Spread over what a machine without accelerators has: the second layer lies on disk and comes when it runs."""
    pytest.importorskip("accelerate", reason="accelerate, which device_map needs, is not installed")
    whole = tiny("llama")
    whole.save_pretrained(tmp_path / "model")
    rest = dict.fromkeys(("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    spread = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map={**rest, "model.layers.1": "disk"}, offload_folder=tmp_path / "offload"
    )
    assert spread.model.layers[1].mlp.down_proj.weight.is_meta
    found, expected = (localize(model, some_pairs(), site, batch_tokens=40).beta for model in (spread, whole))
    np.testing.assert_array_equal(found, expected)
