"""Localization against the bare forward passes, and against the straightforward way."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from austeer.compiler.forward import begin
from austeer.compiler.live import live_facts, port
from austeer.compiler.tokens import PairTokens, Tokens, batches
from austeer.passes.localize import localize
from benchmarks.report import Report, Row
from benchmarks.samples import clock_for, interleaved, ratio, seconds

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

SITE, BATCH_TOKENS = "ffn", 4096
MOST_OVERHEAD, LEAST_GAIN = 1.05, 10.0
METHOD = (
    "Token ids in, scores out, on one random llama, in turns. Bare: the same batches and shared prefixes, no hooks, no "
    "counting, no LM head. Straightforward: each text alone through the whole model, all hidden states and all "
    "activations of the site kept, a Python loop over the units for the counts; on some of the pairs, scaled up. "
    "On the CPU: processor time of one thread."
)


def run(rounds: int = 9, pairs: int = 64, plain_pairs: int = 8, device: str = "cpu") -> Report:
    """Localizes `pairs` pairs both ways; the straightforward way on `plain_pairs` of them only."""
    import torch

    model = random_llama(device)
    data = random_pairs(pairs, model.config.vocab_size)
    few = sorted(data, key=lambda pair: sum(pair.shape))[pairs // plain_pairs // 2 :: pairs // plain_pairs]
    _require_equal_scores(model, few)
    works: dict[str, Callable[[], object]] = {
        "bare": lambda: bare(model, data),
        "localize": lambda: localize(model, data, SITE, batch_tokens=BATCH_TOKENS),
        "straightforward": lambda: straightforward(model, few),
    }
    clock = clock_for(device)
    taken = interleaved({name: partial(seconds, work, clock) for name, work in works.items()}, rounds)
    plain = [spent * pairs / plain_pairs for spent in taken["straightforward"]]
    details = {
        "device": device,
        "threads": torch.get_num_threads(),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "pairs": pairs,
        "plain_pairs": plain_pairs,
        "seconds": taken,
    }
    rows = [
        Row("localize / bare forward passes", ratio(taken["localize"], taken["bare"]), at_most=MOST_OVERHEAD),
        Row(
            "straightforward / localize",
            ratio(plain, taken["localize"]),
            at_least=LEAST_GAIN,
            note=f"the first on {plain_pairs} of {pairs} pairs, times {pairs / plain_pairs:g}",
        ),
    ]
    return Report("localize", METHOD, rows, details)


def random_llama(device: str) -> "PreTrainedModel":
    """A float32 llama of about 130 million parameters with random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000, hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12,
        max_position_embeddings=1024,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().requires_grad_(False).to(device)


def random_pairs(count: int, vocabulary: int) -> list[PairTokens]:
    """Pairs with a common prefix of 8 to 96 tokens, and sides of 1 to 16."""
    generator = np.random.default_rng(0)

    def text(low: int, high: int) -> Tokens:
        return tuple(generator.integers(3, vocabulary, generator.integers(low, high + 1)).tolist())

    return [PairTokens(text(8, 96), text(1, 16), text(1, 16)) for _ in range(count)]


def bare(model: "PreTrainedModel", pairs: list[PairTokens]) -> None:
    """The forward passes that localization needs, and nothing else."""
    for batch in batches(pairs, BATCH_TOKENS):
        states = begin(model, batch).run(model)
    states[0, 0, 0].item()  # waits for the device, as localization does at its end


def straightforward(model: "PreTrainedModel", pairs: list[PairTokens]) -> list[list[float]]:
    """β of each unit of each layer, as one would write it first."""
    positive = [_activations(model, pair.prefix + pair.positive) for pair in pairs]
    negative = [_activations(model, pair.prefix + pair.negative) for pair in pairs]
    return [
        [_score(positive, negative, layer, unit) for unit in range(model.config.hidden_size)]
        for layer in range(model.config.num_hidden_layers)
    ]


def _score(positive: "list[list[Tensor]]", negative: "list[list[Tensor]]", layer: int, unit: int) -> float:
    more = less = 0
    for plus, minus in zip(positive, negative, strict=True):
        momentum = float(plus[layer][0, -1, unit] - minus[layer][0, -1, unit])
        more += momentum > 0
        less += momentum < 0
    return (-less if more < less else more) / len(positive)


def _activations(model: "PreTrainedModel", text: Tokens) -> "list[Tensor]":
    """The activations of the site in all layers, for all tokens."""
    import torch

    facts, kept = live_facts(model), []
    hooks: list[Any] = []
    for layer in range(facts.geometry.layers):
        module = port(model, facts, layer, SITE).module
        hooks.append(module.register_forward_hook(lambda _, __, output: kept.append(output.clone())))
    with torch.no_grad():
        model(torch.tensor([text], device=model.device), output_hidden_states=True)
    for hook in hooks:
        hook.remove()
    return kept


def _require_equal_scores(model: "PreTrainedModel", pairs: list[PairTokens]) -> None:
    """Both ways must find the same, up to the units whose momentum is within rounding of zero."""
    fast = localize(model, pairs, SITE, batch_tokens=BATCH_TOKENS).beta
    differing = float((np.abs(fast - np.float32(straightforward(model, pairs))) > 1e-6).mean())
    if differing > 0.01:
        raise RuntimeError(f"{differing:.1%} of the scores differ: this would compare different things")
