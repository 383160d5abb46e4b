"""Localization against the bare forward passes, and against the straightforward way."""

from collections.abc import Callable
from dataclasses import dataclass
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
    "Token ids in, scores out, on one random llama in bfloat16, as most models are stored, in turns. Bare: the same batches and shared prefixes, no "
    "hooks, no counting, no LM head. Straightforward: each text alone through the whole model, all hidden states and "
    "all activations of the site kept, a Python loop over the units for the counts; on some of the pairs, scaled up. The "
    "longer the texts, the more both ways are bound by the same arithmetic; the limit holds for minimal pairs. "
    "On the CPU: processor time of one thread."
)


@dataclass(frozen=True)
class Texts:
    """Pairs of one kind: how long prefixes and sides are, in tokens, and the least gain to be shown."""

    what: str
    prefix: tuple[int, int]
    side: tuple[int, int]
    least_gain: float | None = None


KINDS = (
    Texts("minimal pairs, 5 tokens", (2, 8), (1, 2), LEAST_GAIN),
    Texts("sentences, 16 tokens", (8, 24), (1, 4)),
    Texts("paragraphs, 60 tokens", (8, 96), (1, 16)),
)


def run(rounds: int = 9, pairs: int = 64, plain_pairs: int = 8, device: str = "cpu") -> Report:
    """Localizes `pairs` pairs of each kind both ways; the straightforward way on `plain_pairs` of them only."""
    import torch

    model = random_llama(device)
    samples = {kind: random_pairs(pairs, kind, model.config.vocab_size) for kind in KINDS}
    for data in samples.values():
        _require_equal_scores(model, data[:plain_pairs])  # in float32: in bfloat16 too many signs are rounding
    model.to(torch.bfloat16)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    details = {"device": device, "threads": torch.get_num_threads(), "parameters": parameters, "pairs": pairs}
    report = Report("localize", METHOD, details=details)
    for kind, data in samples.items():
        _measure(model, kind, data, rounds, plain_pairs, report)
    return report


def _measure(
    model: "PreTrainedModel", kind: Texts, data: list[PairTokens], rounds: int, plain_pairs: int, report: Report
) -> None:
    """Adds the two rows of one kind of texts."""
    share = len(data) // plain_pairs
    few = sorted(data, key=lambda pair: sum(pair.shape))[share // 2 :: share]
    works: dict[str, Callable[[], object]] = {
        "bare": lambda: bare(model, data),
        "localize": lambda: localize(model, data, SITE, batch_tokens=BATCH_TOKENS),
        "straightforward": lambda: straightforward(model, few),
    }
    clock = clock_for(model.device.type)
    taken = interleaved({name: partial(seconds, work, clock) for name, work in works.items()}, rounds)
    plain = [spent * share for spent in taken["straightforward"]]
    report.details[kind.what] = {"plain_pairs": plain_pairs, "seconds": taken}
    overhead, gain = ratio(taken["localize"], taken["bare"]), ratio(plain, taken["localize"])
    note = f"the first on {plain_pairs} of {len(data)} pairs, times {share}"
    report.rows += [
        Row(f"{kind.what}: localize / bare forward passes", overhead, at_most=MOST_OVERHEAD),
        Row(f"{kind.what}: straightforward / localize", gain, at_least=kind.least_gain, note=note),
    ]


def random_llama(device: str) -> "PreTrainedModel":
    """A llama of about 130 million parameters with random float32 weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000, hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12,
        max_position_embeddings=1024,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().requires_grad_(False).to(device)


def random_pairs(count: int, kind: Texts, vocabulary: int) -> list[PairTokens]:
    """Pairs of a kind; the lengths are uniform within its bounds."""
    generator = np.random.default_rng(0)

    def text(bounds: tuple[int, int]) -> Tokens:
        return tuple(generator.integers(3, vocabulary, generator.integers(*bounds, endpoint=True)).tolist())

    return [PairTokens(text(kind.prefix), text(kind.side), text(kind.side)) for _ in range(count)]


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
