"""Gates fitted to texts of two kinds."""

import json
import random
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from austeer.compiler import CheckFailed, PairsError, Refused, UsageError
from austeer.compiler.gating import gate_value
from austeer.compiler.live import activation_of, ffn_input, live_facts, load_model, load_tokenizer
from austeer.compiler.tokens import Tokens, encode_texts
from austeer.passes import gate_tokens
from austeer.passes.gate import AUC_BOUND, CLOSED, DELTA, REACH, FittedGate, GateFit, fit_gates
from austeer.passes.gate_texts import FEWEST_TEXTS, PARTS, GateText, split_texts
from austeer.passes.gate_tokens import sample_tokens
from tests.shared import shared, tiny

BOS = 0
KINDS = ["llama", "qwen3", "phi3", "gpt2", "gpt_neox", "opt"]


def texts(vocabulary: range, count: int = 30, seed: int = 0) -> list[Tokens]:
    generator = random.Random(seed)
    return [(BOS, *generator.choices(vocabulary, k=generator.randint(4, 9))) for _ in range(count)]


WHEN, UNLESS = texts(range(10, 16)), texts(range(20, 26), seed=1)


def fit(model: Any, when: list[Tokens] = WHEN, unless: list[Tokens] = UNLESS, **options: Any) -> GateFit:
    return fit_gates(
        model, **{"layers": (0, 1), "when": when, "unless": unless, "seed": 3, "batch_tokens": 64} | options
    )


@cache
def fitted(name: str) -> GateFit:
    return fit(tiny(name))


def inputs(model: Any, layer: int, tokens: Tokens) -> torch.Tensor:
    """What the FFN of a layer reads, float32 [tokens, residual], by the definition: of one text, run alone."""
    seen: list[torch.Tensor] = []
    module = ffn_input(model, live_facts(model), layer).module
    with module.register_forward_pre_hook(lambda _, args: seen.append(args[0])), torch.no_grad():
        model(input_ids=torch.tensor([tokens]), use_cache=False)
    return seen[0].reshape(len(tokens), -1)


def judged(model: Any, one: FittedGate, layer: int, tokens: list[Tokens]) -> tuple[np.ndarray, np.ndarray]:
    """(z, g) of all tokens of the texts but their first."""
    h = torch.cat([inputs(model, layer, text)[1:] for text in tokens])
    z = h @ torch.tensor(one.gate.w) + one.gate.b
    return z.numpy(), gate_value(one.gate, activation_of(live_facts(model)))(h)[:, 0].numpy()


def parts(of: tuple[GateText, ...], *, held: bool, wanted: bool) -> list[Tokens]:
    return [text.tokens for text in of if (text.part == 0) is held and text.wanted is wanted]


# ---- the gate ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_gates_open_in_the_texts_they_are_for(name: str) -> None:
    for layer, (one,) in fitted(name).gates.items():
        assert one.auc > 0.8, layer
        assert one.when.open > 0.4 > 0.3 > one.unless.open
        assert one.when.mean > 0.5 > 0.3 > one.unless.mean


@pytest.mark.parametrize("name", KINDS)
def test_figures_are_those_of_the_held_out_texts(name: str) -> None:
    model = tiny(name)
    divided, _ = split_texts(WHEN, UNLESS, seed=3)
    for layer, (one,) in fitted(name).gates.items():
        for wanted, figures in ((True, one.when), (False, one.unless)):
            _, g = judged(model, one, layer, parts(divided, held=True, wanted=wanted))
            assert figures.tokens == len(g)
            assert figures.open == pytest.approx((g > 0.5).mean(), abs=1e-9)
            assert figures.mean == pytest.approx(g.mean(), abs=1e-5)


@pytest.mark.parametrize("name", KINDS)
def test_gates_saturate_on_both_sides(name: str) -> None:
    for layer, (one,) in fitted(name).gates.items():
        z, g = judged(tiny(name), one, layer, WHEN + UNLESS)
        assert np.abs(z).max() <= REACH * DELTA * (1 + 1e-4)
        assert max(map(abs, one.reach)) == pytest.approx(REACH * DELTA, rel=1e-4)
        assert g.min() < 0.02
        assert g.max() > 0.98
        assert one.gate.delta == DELTA


@pytest.mark.parametrize("closed", [0.6, CLOSED])
def test_the_threshold_closes_as_many_tokens_as_asked(closed: float) -> None:
    model = tiny("llama")
    divided, _ = split_texts(WHEN, UNLESS, seed=3)
    for layer, (one,) in fit(model, closed=[closed]).gates.items():
        z, _ = judged(model, one, layer, parts(divided, held=False, wanted=False))
        assert (z <= 1e-3).mean() >= closed > (z <= -1e-3).mean() - 1 / len(z)


def test_held_out_texts_decide_nothing_but_the_scale() -> None:
    divided, _ = split_texts(WHEN, UNLESS, seed=3)
    others = texts(range(30, 60), 60, seed=9)
    changed = [other if text.part == 0 else text.tokens for text, other in zip(divided, others, strict=True)]
    before, after = fitted("llama"), fit_or_none(changed)
    for layer, (one,) in after.gates.items():
        (first,) = before.gates[layer]
        assert one.threshold == pytest.approx(first.threshold, rel=1e-4)
        assert np.allclose(one.gate.w / one.gate.b, first.gate.w / first.gate.b, rtol=1e-3)
        assert one.auc != first.auc


def fit_or_none(changed: list[Tokens]) -> GateFit:
    """With the bound out of the way: what is held out is noise here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("austeer.passes.gate.AUC_BOUND", 0.0)
        return fit(tiny("llama"), changed[:30], changed[30:])


def test_the_seed_decides_all() -> None:
    first, again, other = fitted("llama"), fit(tiny("llama")), fit(tiny("llama"), seed=4)
    for layer, (one,) in first.gates.items():
        assert one.gate.w.tobytes() == again.gates[layer][0].gate.w.tobytes()
        assert one.gate.b == again.gates[layer][0].gate.b
        assert one.rounding == again.gates[layer][0].rounding
        assert one.gate.w.tobytes() != other.gates[layer][0].gate.w.tobytes()


def test_sixteen_bits_cost_little_and_bfloat16_the_most() -> None:
    for (one,) in fitted("llama").gates.values():
        assert 0 < one.rounding["float16"].largest < one.rounding["bfloat16"].largest < 0.05
        assert all(rounding.mean < rounding.largest for rounding in one.rounding.values())


@pytest.mark.parametrize("name", KINDS)
def test_the_constant_direction_is_as_constant_as_it_says(name: str) -> None:
    divided, _ = split_texts(WHEN, UNLESS, seed=3)
    held = parts(divided, held=True, wanted=True) + parts(divided, held=True, wanted=False)
    for layer, (one,) in fitted(name).gates.items():
        h = torch.cat([inputs(tiny(name), layer, text)[1:] for text in held])
        residual = (h @ torch.tensor(one.gate.constant) - 1).square().mean().sqrt()
        assert one.constant_residual == pytest.approx(float(residual), rel=1e-2, abs=1e-4)
        # The biases of a LayerNorm make one, if a small one; RMSNorm has none.
        assert (one.constant_residual < 0.15) is (name in ("gpt2", "gpt_neox", "opt"))


def test_counts() -> None:
    found = fitted("llama")
    assert (found.when.texts, found.when.held_out_texts) == (24, 6)
    assert found.when.tokens + found.when.held_out_tokens == sum(len(text) - 1 for text in WHEN)
    assert found.unless.tokens + found.unless.held_out_tokens == sum(map(len, UNLESS))
    assert found.notes == ()


# ---- what is not offered ----------------------------------------------------------------


def test_layers_that_do_not_separate_are_left_out_but_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    first = fitted("llama")
    least, most = sorted(first.auc.values())
    assert least < most, "the two layers must differ for this test to say anything"
    monkeypatch.setattr("austeer.passes.gate.AUC_BOUND", (least + most) / 2)
    found = fit(tiny("llama"))
    assert found.auc == first.auc
    assert [found.auc[layer] for layer in found.gates] == [most]


def test_texts_of_one_kind_are_not_told_apart() -> None:
    with pytest.raises(CheckFailed, match=rf"layer 0 0\.\d\d, layer 1 0\.\d\d, and a gate needs {AUC_BOUND}"):
        fit(tiny("llama"), texts(range(10, 60), 40, seed=5), texts(range(10, 60), 40, seed=6))


@pytest.mark.parametrize(
    ("when", "unless", "name"), [([], UNLESS, "when"), (WHEN, [], "unless"), (WHEN, UNLESS[:4], "unless")]
)
def test_a_side_of_too_few_texts(when: list[Tokens], unless: list[Tokens], name: str) -> None:
    with pytest.raises(PairsError, match=f"of the {name} texts {min(len(when), len(unless))} can be used: give more"):
        fit(tiny("llama"), when, unless)


def test_texts_of_both_sides() -> None:
    with pytest.raises(
        PairsError, match="2 of the when texts are unless texts too, the first is number 3 there and number 31"
    ):
        fit(tiny("llama"), WHEN, [*UNLESS, WHEN[2], WHEN[4]])


@pytest.mark.parametrize("name", ["gemma2", "olmo2", "opt-post"])
def test_behind_a_norm_no_neurons_can_be_a_gate(name: str) -> None:
    with pytest.raises(Refused, match="--form model-code"):
        fit(tiny(name))
    assert fit(tiny(name), in_weights=False).gates


def test_mixtures_of_experts() -> None:
    with pytest.raises(Refused, match="mixture of experts"):
        fit(tiny("mixtral"))
    found = fit(tiny("qwen3_moe-dense"))
    assert list(found.auc) == [1]
    assert found.notes == ("layers 0 are mixtures of experts, which host no gate: left out",)


@pytest.mark.parametrize("closed", [0.4, 1.0, float("nan")])
def test_a_share_that_no_threshold_has(closed: float) -> None:
    with pytest.raises(UsageError, match="closed tokens"):
        fit(tiny("llama"), closed=[closed])


# ---- texts and tokens -------------------------------------------------------------------


def test_own_places_by_their_definition() -> None:
    generator = random.Random(2)
    words = list(dict.fromkeys(tuple(generator.choices(range(3), k=generator.randint(1, 6))) for _ in range(200)))
    when, unless = words[::2], words[1::2]
    divided, notes = split_texts(when, unless, seed=0)
    for text in divided:
        others = unless if text.wanted else when
        beginnings = {other[:end] for other in others for end in range(len(other) + 1)}
        assert text.own == next(end for end in range(len(text.tokens)) if text.tokens[: end + 1] not in beginnings)
    assert len(divided) < len(words)
    assert notes[0].startswith(f"{len(words) - len(divided)} of the when and unless texts are left out")


def test_every_part_has_texts_of_both_sides() -> None:
    divided, _ = split_texts(WHEN[:FEWEST_TEXTS], UNLESS, seed=0)
    for wanted, least in ((True, 1), (False, 6)):
        assert [sum((text.part, text.wanted) == (part, wanted) for text in divided) for part in range(PARTS)] == [
            least
        ] * PARTS


def test_repeated_texts_count_once() -> None:
    divided, notes = split_texts([*WHEN, *WHEN[:3]], UNLESS, seed=0)
    assert len({text.tokens for text in divided}) == len(divided) == 60
    assert notes[0].startswith("3 of the when and unless texts are left out")


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_activations_are_those_of_each_text_alone(name: str) -> None:
    divided, _ = split_texts(WHEN, UNLESS, seed=0)
    sample, h = sample_tokens(tiny(name), (0, 1), divided, seed=0, batch_tokens=50)
    for layer in (0, 1):
        alone = [inputs(tiny(name), layer, text.tokens)[text.own if text.wanted else 0 :] for text in divided]
        assert torch.allclose(torch.from_numpy(h[layer]), torch.cat(alone), atol=1e-4)
    assert sample.shared.sum() == len(UNLESS)
    assert not sample.wanted[sample.shared].any()


def test_a_sample_where_there_are_too_many_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate_tokens, "MOST_TOKENS", 200)
    divided, _ = split_texts(WHEN, UNLESS, seed=0)
    sample, h = sample_tokens(tiny("llama"), (1,), divided, seed=0, batch_tokens=64)
    assert len(sample.wanted) == len(h[1]) == 200
    assert sample.wanted.sum() == 100
    monkeypatch.setattr(gate_tokens, "MOST_VALUES", 60 * 24)
    assert len(sample_tokens(tiny("llama"), (1,), divided, seed=0, batch_tokens=64)[0].wanted) == 60


# ---- real data --------------------------------------------------------------------------


def test_narration_and_speech_on_a_story_model() -> None:
    """Open in what a story tells, closed in what its people say: tokens between quotation marks."""
    folder, data = shared("models/stories260K"), shared("data")
    rows = [json.loads(line) for line in (data / "tinystories_emotion.jsonl").read_bytes().splitlines()]
    stories = [json.loads(line)["text"] for line in (data / "tinystories_text.jsonl").read_bytes().splitlines()]
    told = [row["prompt"] for row in rows if row["split"] == "train" and '"' not in row["prompt"]][:100]
    said = [f'"{part}"' for story in stories[100:] for part in story.split('"')[1::2] if story.count('"') % 2 == 0]
    model, tokenizer = load_model(folder, device="cpu"), load_tokenizer(folder)
    when, unless = (encode_texts(tokenizer, side, 200)[0] for side in (told, [text for text in said if len(text) > 26]))
    found = fit(model, list(when), list(unless), layers=(0, 4), batch_tokens=4096)
    assert list(found.gates) == [4]
    assert found.gates[4][0].auc > 0.94
    assert found.gates[4][0].when.open > 0.75
    assert found.gates[4][0].unless.open < 0.1


def test_several_shares_are_one_probe_with_several_thresholds() -> None:
    for gates in fit(tiny("llama"), closed=[0.6, 0.95]).gates.values():
        low, high = gates
        assert low.auc == high.auc
        assert low.threshold < high.threshold
        assert low.unless.open > high.unless.open
