"""linear_neurons: scales of the residual stream as scaled rows and appended neurons."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers.activations import ACT2FN

from austeer.compiler import Edit, Program, Rank1, Refused, Scale, Shift
from austeer.compiler.facts import read_facts
from austeer.compiler.interpreter import interpret
from austeer.compiler.verbs.bases import open_base
from austeer.compiler.verbs.common import Compiled
from austeer.passes.approximation import approximation_named, approximations
from austeer.passes.linear_neurons import LINEAR_PAIRS, LinearNeurons, fit_slopes, linear_neurons
from austeer.targets.checkpoint import Writing
from austeer.targets.tables import TARGETS
from tests.tiny import VARIANTS, Tiny, load, logits, on_disk, rewritten, scratch, tokens

LEGAL = [
    "llama", "llama-unbiased", "llama-tied", "smollm3", "mistral", "qwen2", "phi3", "gpt2", "gpt2-tied", "opt",
    "opt-unbiased",
]  # fmt: skip
UNITS = (1, 3, 8)


def compiled(program: Program, path: Path, fitted: Sequence[float] = ()) -> tuple[Compiled, Any]:
    made = Compiled.of(program, open_base(str(path)), approximation=LinearNeurons(fitted=tuple(fitted)))
    folder = scratch()
    made.write(folder, Writing())
    assert set(made.compare(folder).values()) == {"ok"}
    return made, load(folder)


def texts(seed: int) -> list[tuple[int, ...]]:
    return [tuple(row) for row in tokens(4, 12, seed=seed).tolist()]


def refusal(name: str, *edits: Edit, target: str = "transformers", **config: Any) -> str:
    facts = read_facts(on_disk(VARIANTS[name]))
    facts = replace(facts, config={**facts.config, **config})
    return linear_neurons(Program(facts.geometry, edits), facts, TARGETS[target]).refusal


# ---- what the neurons do ----------------------------------------------------------------


@pytest.mark.parametrize("activation", sorted(LINEAR_PAIRS & set(ACT2FN)))
def test_two_neurons_are_linear(activation: str) -> None:
    z = torch.linspace(-30, 30, 1001, dtype=torch.float64)
    act = ACT2FN[activation]
    assert torch.allclose(act(z) - act(-z), z, rtol=0, atol=1e-12)


@pytest.mark.parametrize("activation", ["tanh", "relu2", "relu6", "mish"])
def test_not_with_every_activation(activation: str) -> None:
    z = torch.linspace(-30, 30, 1001, dtype=torch.float64)
    assert not torch.allclose(ACT2FN[activation](z) - ACT2FN[activation](-z), z, rtol=0, atol=1e-3)
    assert activation in refusal("llama", Scale(0, "residual", (1,), 1.0), hidden_act=activation)


def test_an_absent_activation_is_that_of_the_architecture() -> None:
    for name in LEGAL:
        assert refusal(name, Scale(0, "residual", (1,), 1.0), hidden_act=None, activation_function=None) == ""


@pytest.mark.parametrize("name", LEGAL)
def test_a_wider_model_is_the_same_model(name: str) -> None:
    path, ids = on_disk(VARIANTS[name]), tokens()
    program = Program.of([Scale(1, "residual", UNITS, 0.0)], model=path)
    made, live = compiled(program, path, (0.0, 0.0, 0.0))
    assert (logits(live, ids) - logits(load(path), ids)).abs().max() < 5e-6  # the widened sums have another order
    width = made.plan.config[made.plan.form.architecture.sizes.neurons]
    assert width == 256


def equal_rms(path: Path) -> Path:
    """The first FFN reads embeddings alone, all of root mean square 2."""

    def change(tensors: dict[str, Any]) -> dict[str, Any]:
        changed = dict(tensors)
        embeddings = tensors["model.embed_tokens.weight"]
        changed["model.embed_tokens.weight"] = 2 * embeddings / embeddings.pow(2).mean(-1, keepdim=True).sqrt()
        for name, tensor in tensors.items():
            if name.startswith("model.layers.0.self_attn.o_proj"):
                changed[name] = torch.zeros_like(tensor)
        return changed

    return rewritten(path, scratch() / "model", change)


@pytest.mark.parametrize("gamma", [2.0, -0.5, -1.0, -3.0])
@pytest.mark.parametrize("name", ["llama", "llama-unbiased", "mistral"])
def test_where_all_tokens_have_one_norm_it_is_exact(name: str, gamma: float) -> None:
    path, ids = equal_rms(on_disk(VARIANTS[name])), tokens()
    program = Program.of(
        [
            Scale(0, "neurons", (2,), 1.0),
            Scale(0, "ffn", (1, 2), (0.5, -0.5)),
            Rank1(0, "neurons", np.ones(28), np.ones(20), 0.1),
            Shift(0, "residual", np.linspace(-1, 1, 20)),
            Scale(0, "residual", UNITS, (gamma, gamma / 2, 1.0)),
            Scale(0, "residual", (5,), gamma),
            Shift(0, "residual", np.linspace(1, -1, 20)),
            Shift(1, "attn", np.linspace(-1, 1, 20)),
        ],
        model=path,
    )
    model = load(path)
    found = fit_slopes(model, program, LinearNeurons(), texts(3))
    weight = model.model.layers[0].post_attention_layernorm.weight.double()
    wanted = [g * 2 / float(weight[u]) for u, g in zip((*UNITS, 5), (gamma, gamma / 2, 1.0, gamma), strict=True)]
    assert found.fitted == pytest.approx(wanted, rel=1e-4)
    _, live = compiled(program, path, found.fitted)
    with interpret(model, program):
        expected = logits(model, ids)
    assert (logits(live, ids) - expected).abs().max() < 2e-5 * expected.abs().max()
    _, without = compiled(program, path)  # scaled rows alone are not it
    assert (logits(without, ids) - expected).abs().max() > 1e-2 * expected.abs().max()


@pytest.mark.parametrize("name", LEGAL)
def test_it_is_nearer_than_the_base_in_every_layer(name: str) -> None:
    path, ids = on_disk(VARIANTS[name]), tokens(4, 12, seed=6)
    for layer in (0, 1):
        program = Program.of([Scale(layer, "residual", UNITS, (1.0, -1.0, 3.0))], model=path)
        model = load(path)
        plain = logits(model, ids)
        found = fit_slopes(model, program, LinearNeurons(), texts(3))
        _, live = compiled(program, path, found.fitted)
        with interpret(model, program):
            expected = logits(model, ids)
        assert (logits(live, ids) - expected).square().mean() < 0.25 * (plain - expected).square().mean()


def test_the_slope_is_the_least_squares_one() -> None:
    path = on_disk(VARIANTS["gpt2"])
    program = Program.of([Scale(0, "residual", (4,), 1.0), Scale(1, "residual", UNITS, (1.0, -1.0, 3.0))], model=path)
    model, seen = load(path), list[tuple[torch.Tensor, torch.Tensor]]()
    found = fit_slopes(model, program, LinearNeurons(), texts(3))
    hook = model.transformer.h[1].ln_2.register_forward_hook(lambda _, args, out: seen.append((args[0][0], out[0])))
    with interpret(model, program):
        for text in texts(3):
            logits(model, torch.tensor([text]))
    hook.remove()
    m, n = (torch.cat(part).double() for part in zip(*seen, strict=True))
    for unit, gamma, slope in zip(UNITS, (1.0, -1.0, 3.0), found.fitted[1:], strict=True):
        expected = torch.linalg.lstsq(n[:, [unit]], gamma * m[:, [unit]]).solution.item()
        assert slope == pytest.approx(expected, rel=1e-5)


def test_a_unit_that_the_norm_mutes_has_no_slope() -> None:
    def change(tensors: dict[str, Any]) -> dict[str, Any]:
        name = "model.layers.0.post_attention_layernorm.weight"
        muted = tensors[name].clone()
        muted[3] = 0
        return {**tensors, name: muted}

    path = rewritten(on_disk(VARIANTS["llama"]), scratch() / "model", change)
    program = Program.of([Scale(0, "residual", UNITS, 1.0)], model=path)
    found = fit_slopes(load(path), program, LinearNeurons(), texts(3)).fitted
    assert found[1] == 0
    assert found[0] != 0 != found[2]


# ---- where it is legal ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "target", "why"),
    [
        ("gpt_neox", "transformers", "reads the stream before the attention"),
        ("gemma2", "transformers", "norm stands after"),
        ("olmo2", "transformers", "norm stands after"),
        ("mixtral", "transformers", "layer 0 is a mixture of experts"),
        ("qwen3_moe", "transformers", "layer 0 is a mixture of experts"),
        ("qwen3", "transformers", "keeps no bias of the FFN"),
        ("llama-unbiased", "sglang", "keeps no bias of the FFN"),
        ("llama-unbiased", "portable", "keeps no bias of the FFN"),
        ("gpt2", "llama.cpp", "one width"),
    ],
)
def test_where_it_is_refused(name: str, target: str, why: str) -> None:
    assert why in refusal(name, Scale(0, "residual", (1,), 1.0), target=target)


def test_a_window_that_no_model_with_biases_has() -> None:
    scale = Scale(0, "residual", (1,), 1.0)
    assert "keeps no bias of the FFN" in refusal("mistral", scale, target="llama.cpp", sliding_window=8)


def test_where_it_is_not() -> None:
    scale = Scale(0, "residual", (1,), 1.0)
    assert refusal("gpt_neox", scale, use_parallel_residual=False) == ""
    for name, target in (("gpt2", "vllm"), ("opt", "sglang"), ("mistral", "llama.cpp"), ("llama", "mlx-lm")):
        assert refusal(name, scale, target=target) == ""


def test_it_is_named_and_others_are_still_there() -> None:
    facts = read_facts(on_disk(Tiny("llama")))
    target = TARGETS["transformers"]
    program = Program(facts.geometry, (Scale(0, "residual", (1,), -1.0),))
    found = approximations(program, facts, target)
    assert [(choice.name, not choice.refusal) for choice in found] == [
        ("rescale-later", False), ("rescale-earlier", False), ("linear-neurons", True)
    ]  # fmt: skip
    assert approximation_named("linear-neurons", program, facts, target) == LinearNeurons()
    with pytest.raises(Refused, match=r"rescale-later is not legal .* gamma -1"):
        approximation_named("rescale-later", program, facts, target)


def test_a_program_without_any_is_refused_with_all_reasons() -> None:
    facts = read_facts(on_disk(VARIANTS["gpt_neox"]))
    program = Program(facts.geometry, (Scale(0, "residual", (1,), -1.0),))
    with pytest.raises(Refused, match=r"gamma -1(.|\n)*linear-neurons: the FFN reads(.|\n)*--form model-code"):
        approximations(program, facts, TARGETS["transformers"])
