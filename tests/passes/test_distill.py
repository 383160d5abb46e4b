"""distill: gated edits as neurons fitted to what they add."""

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from austeer.compiler import Edit, Gate, Gated, PairsError, Program, Rank1, Refused, Scale, Shift, UsageError
from austeer.compiler.forward import logits as head
from austeer.compiler.forward import run_texts
from austeer.compiler.interpreter import interpret
from austeer.compiler.live import live_facts, load_model, load_tokenizer
from austeer.compiler.neutral import sample_neutral
from austeer.compiler.pairs import Pair, read_texts
from austeer.compiler.tokens import Tokens, encode_pairs, encode_texts
from austeer.compiler.verbs.bases import open_base
from austeer.compiler.verbs.common import Compiled
from austeer.passes import distill as module
from austeer.passes import fit_neurons
from austeer.passes.distill import Distilled, distill
from austeer.passes.localize import localize
from austeer.targets.checkpoint import Writing
from tests.shared import shared
from tests.tiny import VARIANTS, load, on_disk, scratch, tokens

UNITS = (1, 4, 7)
TEXTS = [tuple(row) for row in tokens(80, 48, seed=1).tolist()]
LAYER = 1
WIDTH = 24


@pytest.fixture(autouse=True)
def _quick(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "slow" not in request.keywords:
        monkeypatch.setattr(fit_neurons, "STEPS", 20)
        monkeypatch.setattr(fit_neurons, "BATCH", 256)


@pytest.fixture
def _converged(_quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit_neurons, "STEPS", 250)


def gated(edit: Edit, seed: int = 0) -> Gated:
    return Gated(edit, Gate(np.random.default_rng(seed).normal(size=WIDTH), 0.0, 2.0))


SCALE = Scale(LAYER, "ffn", UNITS, (2.0, -1.0, 3.0))


def prepared(name: str, *edits: Edit) -> tuple[Any, Program]:
    """A tiny model of this width, and a program for it."""
    model = load(on_disk(replace(VARIANTS[name], residual=WIDTH)))
    return model, Program(live_facts(model).geometry, edits)


def fitted(name: str, *edits: Edit, neurons: int = 32, target: float = 2.0, seed: int = 0) -> tuple[Gated, Distilled]:
    """The last edit with its neurons, and how they came out."""
    made, records = distill(*prepared(name, *edits), TEXTS, neurons=neurons, target_r2=target, seed=seed)
    last = made.edits[-1]
    assert isinstance(last, Gated)
    return last, records[-1]


# ---- how well it fits -------------------------------------------------------------------


@pytest.mark.usefixtures("_converged")
@pytest.mark.parametrize(
    ("name", "bar"), [("llama", 0.75), ("llama-unbiased", 0.75), ("phi3", 0.75), ("gpt2", 0.7), ("opt", 0.7)]
)
def test_few_neurons_do_most_of_a_scale_at_ffn(name: str, bar: float) -> None:
    edit, record = fitted(name, gated(SCALE))
    assert edit.neurons is not None
    assert record.neurons == edit.neurons.count == 32
    assert bar < record.held_out_r2 < record.fit_r2 < 1
    others = np.delete(edit.neurons.down, UNITS, axis=0)
    assert not others.any()
    assert edit.neurons.down[list(UNITS)].all()


@pytest.mark.usefixtures("_converged")
def test_a_scale_of_heads_writes_to_all_units() -> None:
    edit, record = fitted("llama", gated(Scale(LAYER, "heads", UNITS, 2.0)))
    assert edit.neurons is not None
    assert edit.neurons.down.all()
    assert 0.3 < record.held_out_r2 < 1


@pytest.mark.usefixtures("_converged")
def test_a_rank1_is_fitted_too() -> None:
    _, record = fitted("llama", gated(Rank1(LAYER, "neurons", np.ones(28), np.ones(WIDTH), 0.5)))
    assert record.held_out_r2 > 0.6


def test_neurons_have_the_biases_of_their_ffn() -> None:
    for name, biased, has_up in (("llama", True, True), ("llama-unbiased", False, True), ("gpt2", True, False)):
        neurons = fitted(name, gated(SCALE), neurons=4)[0].neurons
        assert neurons is not None
        assert neurons.gate_bias.any() == biased
        assert neurons.up.any() == has_up
        assert neurons.up_bias.any() == (biased and has_up)


def test_r2_is_that_of_what_the_edit_adds() -> None:
    """Against the interpreter: the last block's output with the program, less that without."""
    model, program = prepared("llama", Shift(0, "ffn", np.ones(WIDTH)), gated(SCALE))
    made, (record,) = distill(model, program, TEXTS, neurons=32, target_r2=2.0, seed=3)
    streams = [_last_stream(model, Program(program.model, edits)) for edits in (program.edits, program.edits[:1])]
    wanted, read = streams[0][0] - streams[1][0], streams[1][1]
    neurons = made.edits[1].neurons  # pyright: ignore[reportAttributeAccessIssue]
    gate, gate_bias, up, up_bias, down = (
        torch.tensor(getattr(neurons, name)) for name in "gate gate_bias up up_bias down".split()
    )
    found = (torch.nn.functional.silu(read @ gate.T + gate_bias) * (read @ up.T + up_bias)) @ down.T
    r2 = 1 - (found - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum()
    assert float(r2) == pytest.approx(0.8 * record.fit_r2 + 0.2 * record.held_out_r2, abs=0.01)


@torch.no_grad()
def _last_stream(model: Any, program: Program) -> tuple[torch.Tensor, torch.Tensor]:
    """What the last block writes, and what its FFN reads: [tokens, residual] each."""
    block, seen = model.model.layers[-1], dict[str, torch.Tensor]()
    with interpret(model, program):
        handles = [
            block.register_forward_hook(lambda _, __, output: seen.update(out=output)),
            block.mlp.gate_proj.register_forward_pre_hook(lambda _, args: seen.update(read=args[0])),
        ]
        model(input_ids=torch.tensor(TEXTS))
        for handle in handles:
            handle.remove()
    return seen["out"].flatten(0, 1), seen["read"].flatten(0, 1)


# ---- how many, and which ----------------------------------------------------------------


def test_more_neurons_are_tried_until_the_target_or_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FEWEST", 4)
    _, record = fitted("llama", gated(SCALE), neurons=11, target=2.0)
    sizes, scores = zip(*record.curve, strict=True)
    assert sizes == (4, 8, 11)
    assert record.held_out_r2 == max(scores)
    _, record = fitted("llama", gated(SCALE), neurons=11, target=-1.0)
    assert [size for size, _ in record.curve] == [4]


def test_edits_of_a_layer_share_the_budget() -> None:
    shift = gated(Shift(LAYER, "heads", np.ones(WIDTH)))
    alone = gated(Scale(0, "ffn", (2,), 1.0))
    made, records = distill(
        *prepared("llama", gated(SCALE), SCALE, shift, gated(SCALE, seed=1), alone),
        TEXTS,
        neurons=12,
        target_r2=2.0,
        seed=0,
    )
    assert [(record.edit, record.layer, record.site, record.neurons) for record in records] == [
        (0, 1, "ffn", 5), (3, 1, "ffn", 5), (4, 0, "ffn", 12)
    ]  # fmt: skip
    assert made.edits[1] == SCALE
    assert made.edits[2] == shift


def test_without_gated_scales_nothing_changes_and_no_text_is_needed() -> None:
    model, program = prepared("mixtral", Shift(0, "heads", np.ones(WIDTH)), SCALE)
    assert distill(model, program, (), neurons=1, target_r2=1.0, seed=0) == (program, ())


def test_it_is_the_same_by_seed_and_leaves_the_model_alone() -> None:
    before = torch.get_rng_state()
    made = [fitted("llama", gated(SCALE), neurons=4, seed=seed) for seed in (0, 0, 1)]
    assert made[0] == made[1]
    assert made[0] != made[2]
    assert torch.equal(before, torch.get_rng_state())
    model, program = prepared("llama", gated(SCALE))
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    distill(model, program, TEXTS, neurons=4, target_r2=2.0, seed=0)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


# ---- what it refuses --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "why"),
    [("mixtral", "mixture of experts"), ("gemma2", "a norm stands after"), ("opt-post", "a norm stands after")],
)
def test_where_no_neuron_can_carry_it(name: str, why: str) -> None:
    with pytest.raises(Refused, match=rf"gated scale at layer 1, site ffn: .*{why}"):
        fitted(name, gated(SCALE))


def test_too_few_neurons_or_texts() -> None:
    with pytest.raises(UsageError, match="2 neurons are too few for the 2 gated edits"):
        fitted("llama", gated(Shift(LAYER, "ffn", np.ones(WIDTH))), gated(SCALE), neurons=2)
    with pytest.raises(PairsError, match="at least two texts"):
        distill(*prepared("llama", gated(SCALE)), TEXTS[:1], neurons=4, target_r2=0.9, seed=0)


def test_an_edit_that_adds_nothing() -> None:
    """It reads its site as the edits without a gate leave it."""
    with pytest.raises(Refused, match="it adds nothing in some texts"):
        fitted("llama", gated(SCALE), Scale(LAYER, "ffn", UNITS, -1.0), gated(SCALE))


# ---- on models that can read ------------------------------------------------------------


def story(name: str, layer: int) -> tuple[Any, Program, list[Tokens], list[Tokens]]:
    """A story model, a gated scale of the units that tell emotions apart, texts to fit to, and held-out ones.

    The gate is random and open on half of the tokens.
    """
    folder = shared(f"models/{name}")
    model, tokenizer = load_model(folder, dtype="float32", device="cpu"), load_tokenizer(folder)
    texts, _ = encode_texts(tokenizer, read_texts(shared("data/tinystories_text.jsonl")), 256)
    rows = [json.loads(line) for line in shared("data/tinystories_emotion.jsonl").read_text().splitlines()]
    pairs = [Pair(row["prompt"], row["positive"], row["negative"]) for row in rows if row["split"] == "train"][:200]
    scores = localize(model, encode_pairs(tokenizer, pairs, 256).pairs, "ffn", batch_tokens=8192)
    beta = scores.beta[layer]
    units = np.argsort(-np.abs(beta), kind="stable")[:8]
    fit = [*texts[:100], *sample_neutral(model, tokenizer, 200, 256, 0)]
    scale = Scale(layer, "ffn", units.tolist(), 2 * beta[units])
    made = Gated(scale, half_open(model, layer, fit[:20]))
    return model, Program(live_facts(model).geometry, (made,)), fit, list(texts[100:])


def half_open(model: Any, layer: int, texts: Sequence[Tokens]) -> Gate:
    h = list[torch.Tensor]()
    projection = model.model.layers[layer].mlp.gate_proj
    handle = projection.register_forward_pre_hook(lambda _, args: h.append(args[0][0]))
    for text in texts:
        run_texts(model, [text])
    handle.remove()
    w = torch.randn(h[0].shape[1], generator=torch.Generator().manual_seed(1))
    z = torch.cat(h) @ w
    scale = 4 * 8 / float((z - z.median()).abs().max())
    return Gate(scale * w, -scale * float(z.median()), 8.0)


def divergence(model: Any, other: Any, program: Program, texts: Sequence[Tokens]) -> float:
    """KL(interpreter ‖ other), mean over tokens."""
    total = count = 0.0
    for text in texts:
        with interpret(model, program):
            expected = head(model, run_texts(model, [text])[0]).log_softmax(-1)
        found = head(other, run_texts(other, [text])[0]).log_softmax(-1)
        total += float((expected.exp() * (expected - found)).sum())
        count += len(text)
    return total / count


@pytest.mark.slow
@pytest.mark.parametrize(("name", "layer"), [("stories260K", 1), ("babyllama-105", 3)])
def test_256_neurons_in_a_story_model(name: str, layer: int) -> None:
    model, program, fit, held_out = story(name, layer)
    made, (record,) = distill(model, program, fit, neurons=256, target_r2=0.97, seed=0)
    assert record.held_out_r2 > 0.95
    assert record.curve[1][1] > 0.85  # of 64
    compiled = Compiled.of(made, open_base(str(shared(f"models/{name}"))))
    folder = scratch() / "out"
    compiled.write(folder, Writing())
    live = load_model(folder, dtype="float32", device="cpu")
    steered, left = (divergence(model, other, program, held_out) for other in (model, live))
    assert left < 0.1 * steered
