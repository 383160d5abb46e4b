"""Steer2Edit against its definition: one text, one head and one neuron at a time, and edits of whole weights."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from austeer.compiler import PairsError, Rank1, Refused, UsageError, interpret
from austeer.compiler.edits import Floats
from austeer.compiler.live import live_facts
from austeer.compiler.sites import SiteName
from austeer.compiler.tokens import PairTokens, Tokens
from austeer.passes.steer2edit import Alignment, Block, elastic_net, steer2edit
from tests.passes.test_localize import some_pairs
from tests.shared import TINY, tiny

BOTH: tuple[SiteName, ...] = ("heads", "neurons")
RHO, L1_RATIO = 0.3, 0.4
HEADS = 4  # of every tiny model

# Names of the output projections below a block, by what transformers calls them: a second source beside the table.
ATTENTION = ("self_attn.o_proj", "attn.c_proj", "attention.dense", "self_attn.out_proj")
FFN = ("mlp.down_proj", "mlp.c_proj", "mlp.dense_4h_to_h", "fc2")


def projections(model: Any) -> list[tuple[str, Any]]:
    """(site, module) of every output projection that one matrix makes, in the order of the layers."""
    found = [(name, module) for name, module in model.named_modules() if hasattr(module, "weight")]
    heads = [("heads", module) for name, module in found if name.endswith(ATTENTION)]
    return heads + [("neurons", module) for name, module in found if name.endswith(FFN) and module.weight.ndim == 2]


def matrix(module: Any) -> torch.Tensor:
    """A view of the weight as [residual, inputs]."""
    return module.weight.T if type(module).__name__ == "Conv1D" else module.weight


def mean_of_answer(model: Any, modules: list[Any], pair: PairTokens, side: Tokens) -> list[list[torch.Tensor]]:
    """[input mean, output mean] of each module over a side's own tokens; the text runs alone, as a whole."""
    seen: dict[Any, list[torch.Tensor]] = {}

    def note(module: Any, inputs: Any, output: Any) -> None:
        wide = [x.reshape(-1, x.shape[-1])[len(pair.prefix) :].double().mean(0) for x in (inputs[0], output)]
        seen[module] = wide

    handles = [module.register_forward_hook(note) for module in modules]
    with torch.no_grad():
        model(input_ids=torch.tensor([pair.prefix + side]), use_cache=False)
    for handle in handles:
        handle.remove()
    return [seen[module] for module in modules]


def reference(model: Any, pairs: list[PairTokens]) -> list[tuple[torch.Tensor, list[tuple[float, torch.Tensor]]]]:
    """For each projection its v and, for each head or neuron, (cosine, k as wide as the input): the definition."""
    named = projections(model)
    modules = [module for _, module in named]
    positive = [mean_of_answer(model, modules, pair, pair.positive) for pair in pairs]
    negative = [mean_of_answer(model, modules, pair, pair.negative) for pair in pairs]

    def mean(texts: list[Any], number: int, which: int) -> torch.Tensor:
        return torch.stack([text[number][which] for text in texts]).mean(0)

    result: list[tuple[torch.Tensor, list[tuple[float, torch.Tensor]]]] = []
    for number, (site, module) in enumerate(named):
        weight = matrix(module).double()
        v = mean(positive, number, 1) - mean(negative, number, 1)
        v = v / v.norm()
        x = (mean(positive, number, 0) + mean(negative, number, 0)) / 2
        width = weight.shape[1] // HEADS if site == "heads" else 1
        parts: list[tuple[float, torch.Tensor]] = []
        for first in range(0, weight.shape[1], width):
            part = slice(first, first + width)
            cosine = torch.nn.functional.cosine_similarity(v, weight[:, part] @ x[part], dim=0)
            k = torch.zeros(weight.shape[1], dtype=torch.float64)
            k[part] = weight[:, part].T @ v / (weight[:, part].T @ v).norm()
            parts.append((float(cosine), k))
        result.append((v, parts))
    return result


def strength(cosine: float) -> float:
    return np.sign(cosine) * max(abs(cosine) - RHO * L1_RATIO, 0) / (RHO * (1 - L1_RATIO))


@pytest.mark.parametrize("name", TINY)
def test_the_definition_one_text_and_one_component_at_a_time(name: str) -> None:
    model = tiny(name)
    found = steer2edit(model, some_pairs(), BOTH, batch_tokens=40)
    expected = reference(model, some_pairs())
    assert [block.site for block in found.blocks] == [site for site, _ in projections(model)]
    for block, (v, parts) in zip(found.blocks, expected, strict=True):
        np.testing.assert_allclose(block.v, v, rtol=0, atol=2e-5)
        np.testing.assert_allclose(block.scores, [cosine for cosine, _ in parts], rtol=0, atol=2e-5)
        np.testing.assert_allclose(block.k, sum(k for _, k in parts), rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", TINY)
def test_the_program_is_the_sum_of_all_edits_of_the_weights(name: str) -> None:
    """Also with a post-norm: v is what the projection itself writes, so the weights can add it."""
    model, ids = tiny(name), torch.tensor([[5, 9, 2, 7, 11, 4]])
    edited = deepcopy(model)
    expected = reference(model, some_pairs())
    for (_, module), (v, parts) in zip(projections(edited), expected, strict=True):
        change = sum(strength(cosine) * torch.outer(v, k) for cosine, k in parts)
        matrix(module).add_(change.to(torch.float32))
    program = steer2edit(model, some_pairs(), BOTH, batch_tokens=40).program(RHO, L1_RATIO, live_facts(model).geometry)
    with torch.no_grad():
        base, goal = model(input_ids=ids).logits, edited(input_ids=ids).logits
        with interpret(model, program):
            reached = model(input_ids=ids).logits
    scale = float(goal.abs().max())
    assert float((goal - base).abs().max()) > 0.01 * scale
    torch.testing.assert_close(reached, goal, rtol=0, atol=1e-4 * scale)


@pytest.mark.parametrize("batch_tokens", [1, 17, 10**6])
def test_batching_and_order_do_not_matter(batch_tokens: int) -> None:
    model = tiny("gemma2")
    expected = steer2edit(model, some_pairs(), BOTH, batch_tokens=40)
    found = steer2edit(model, some_pairs()[::-1], BOTH, batch_tokens=batch_tokens)
    for one, other in zip(found.blocks, expected.blocks, strict=True):
        np.testing.assert_allclose(one.scores, other.scores, rtol=0, atol=1e-5)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_sides_that_do_not_differ_steer_nowhere() -> None:
    same = PairTokens((1, 2), (3,), (3,))
    found = steer2edit(tiny("llama"), [same, same], BOTH, batch_tokens=40)
    assert not any(block.v.any() or block.scores.any() for block in found.blocks)
    assert found.program(1e-6, 0.0, live_facts(tiny("llama")).geometry).edits == ()


def test_experts_take_part_with_their_heads() -> None:
    found = steer2edit(tiny("qwen3_moe-dense"), some_pairs(), BOTH, batch_tokens=40)
    assert [(block.layer, block.site) for block in found.blocks] == [(0, "heads"), (1, "heads"), (1, "neurons")]
    assert found.notes == ("layers 0 are mixtures of experts without a `neurons` site: left out",)
    with pytest.raises(Refused, match="use the site heads"):
        steer2edit(tiny("mixtral"), some_pairs(), ("neurons",), batch_tokens=40)


def test_what_cannot_be_meant_is_refused() -> None:
    with pytest.raises(PairsError, match="at least two usable pairs, got 1"):
        steer2edit(tiny("llama"), some_pairs()[:1], BOTH, batch_tokens=40)
    for sites in (("ffn",), ("heads", "attn"), ()):
        with pytest.raises(UsageError, match="heads and neurons"):
            steer2edit(tiny("llama"), some_pairs(), sites, batch_tokens=40)


@pytest.mark.parametrize("rho", [0.05, 0.4, 2.0])
@pytest.mark.parametrize("l1_ratio", [0.0, 0.3, 0.95])
def test_elastic_net_is_the_best_of_all_strengths(rho: float, l1_ratio: float) -> None:
    """Ternary search on the concave objective of the paper finds the closed form."""
    scores = np.array([-1.0, -0.4, -0.02, 0.0, 0.1, 0.35, 0.99])

    def worth(strengths: np.ndarray) -> np.ndarray:
        return scores * strengths - rho * (l1_ratio * np.abs(strengths) + (1 - l1_ratio) / 2 * strengths**2)

    low, high = np.full(7, -1e3), np.full(7, 1e3)
    for _ in range(200):
        first, second = low + (high - low) / 3, high - (high - low) / 3
        better = worth(first) < worth(second)
        low, high = np.where(better, first, low), np.where(better, high, second)
    np.testing.assert_allclose(elastic_net(scores, rho, l1_ratio), low, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("rho", "l1_ratio"), [(0, 0.5), (-1, 0.5), (np.nan, 0.5), (np.inf, 0.5), (1, 1), (1, -0.1)])
def test_elastic_net_refuses_what_has_no_best(rho: float, l1_ratio: float) -> None:
    with pytest.raises(UsageError, match="l1 ratio from 0 to below 1"):
        elastic_net([0.5], rho, l1_ratio)


def alignment(scores: list[float]) -> Alignment:
    """The neurons of layer 0 of the tiny llama, all others unaligned."""
    values: Floats = np.zeros(40, np.float32)
    values[: len(scores)] = scores
    v = np.zeros(24, np.float32)
    v[3] = 1
    return Alignment((Block(0, "neurons", v, np.ones(40, np.float32), values),), 10)


def test_select_keeps_k_and_is_an_elastic_net() -> None:
    geometry = live_facts(tiny("llama")).geometry
    some = alignment([0.5, -0.8, 0.25, 0.125])
    (edit,) = some.select(2, 4.0, geometry).edits
    assert isinstance(edit, Rank1)
    np.testing.assert_allclose(edit.k[:4], [4 * (0.5 - 0.25), -4 * (0.8 - 0.25), 0, 0], atol=1e-6)
    assert (edit.layer, edit.site, edit.strength, edit.v[3]) == (0, "neurons", 1.0, 1.0)
    assert some.penalty(2, 4.0) == pytest.approx((0.5, 0.5))
    assert some.choice(0.5, 0.5) == pytest.approx((2, 4.0))
    assert some.penalty(40, 4.0) == (0.25, 0.0)


@pytest.mark.parametrize(
    ("k", "alpha", "message"),
    [(0, 1, "from 1 to 40"), (41, 1, "from 1 to 40, got 41"), (1, 0, "above 0"), (1, np.nan, "finite")],
)
def test_select_refuses_what_cannot_be_meant(k: int, alpha: float, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        alignment([0.5]).select(k, alpha, live_facts(tiny("llama")).geometry)


@pytest.mark.parametrize(
    ("name", "prefix", "parts", "block"),
    [
        ("llama", "model.", ("embed_tokens", "norm", "rotary_emb"), "layers"),
        ("gpt2", "transformer.", ("wte", "wpe", "ln_f"), "h"),
    ],
)
def test_a_model_spread_by_device_map(
    name: str, prefix: str, parts: tuple[str, ...], block: str, tmp_path: Path
) -> None:
    """The second layer lies on disk, so its weights are read through what brings them."""
    pytest.importorskip("accelerate", reason="accelerate, which device_map needs, is not installed")
    whole = tiny(name)
    whole.save_pretrained(tmp_path / "model")
    rest = dict.fromkeys(["lm_head", *(prefix + part for part in (*parts, f"{block}.0"))], "cpu")
    places = {**rest, f"{prefix}{block}.1": "disk"}
    spread = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "offload"
    )
    assert any(parameter.is_meta for parameter in spread.parameters())
    found, expected = (steer2edit(model, some_pairs(), BOTH, batch_tokens=40) for model in (spread, whole))
    for one, other in zip(found.blocks, expected.blocks, strict=True):
        np.testing.assert_allclose(one.scores, other.scores, rtol=0, atol=1e-5)
        np.testing.assert_allclose(one.k, other.k, rtol=0, atol=1e-5)
