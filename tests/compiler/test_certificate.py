"""The certificate: its rule, and that a wrong checkpoint, or one that proves nothing, does not pass."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from austeer.compiler import CheckFailed, Program, Scale, UsageError, certificate
from austeer.compiler.certificate import Certificate, Comparison, stored_dtype
from austeer.compiler.interpreter import interpret
from austeer.compiler.live import WIDENED, load_model
from austeer.compiler.verbs import bases, common
from austeer.compiler.verbs.build import build
from tests.tiny import Tiny, certified, on_disk, program, scratch, tokens

CERTIFICATE = Certificate(
    reference="the base model with hooks",
    dtype="float32",
    stored="float32",
    texts=3,
    tokens=40,
    max_abs_logit_diff=1e-5,
    mean_abs_logit_diff=1e-6,
    max_abs_logit=5.0,
    mean_kl=1e-9,
    top1_agreement=1.0,
    greedy_equal=True,
    base_max_abs_logit_diff=3.0,
    base_mean_kl=0.5,
    base_top1_agreement=0.25,
    zeros_before=0.0,
    zeros_after=0.0,
    edits=2,
)


# ---- the rule -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "failures"),
    [
        ({}, []),
        ({"max_abs_logit_diff": 1e-4}, []),
        ({"max_abs_logit_diff": 1.1e-4}, ["max |Δlogit| is 0.00011, more than 0.0001"]),
        ({"max_abs_logit_diff": 4e-4, "max_abs_logit": 50.0}, []),
        ({"max_abs_logit_diff": 6e-4, "max_abs_logit": 50.0}, ["max |Δlogit| is 0.0006, more than 0.0005"]),
        ({"top1_agreement": 0.9999}, ["top-1 agreement is 99.9900%, not 100%"]),
        ({"base_mean_kl": 0.0}, ["the program makes no difference"]),
        ({"base_mean_kl": 0.0, "edits": 0}, []),
        ({"max_abs_logit_diff": math.nan, "top1_agreement": 0.5}, ["max |Δlogit|", "top-1"]),
        ({"greedy_equal": False, "mean_kl": 1.0}, []),  # told, but no part of the rule in float32
        ({"stored": "bfloat16", "max_abs_logit_diff": 1.0, "top1_agreement": 0.9}, []),
        ({"stored": "bfloat16", "mean_kl": 5.9e-4}, []),
        ({"stored": "bfloat16", "mean_kl": 6.1e-4}, ["mean KL is 0.00061 nats, more than 0.0006"]),
        ({"stored": "float16", "mean_kl": 6.1e-4}, ["mean KL"]),
        ({"stored": "float16", "mean_kl": math.nan}, ["mean KL"]),
        ({"stored": "float16", "base_mean_kl": math.nan}, ["the program makes no difference", "mean KL"]),
        ({"stored": "float16", "base_mean_kl": 0.0}, ["the program makes no difference"]),
    ],
)
def test_the_rule(changes: dict[str, Any], failures: list[str]) -> None:
    found = replace(CERTIFICATE, **changes)
    assert len(found.failures()) == len(failures)
    assert all(text.startswith(start) for text, start in zip(found.failures(), failures, strict=True))
    assert found.passed is (not failures)


def test_plain_values_and_back() -> None:
    plain = CERTIFICATE.plain()
    assert Certificate.from_plain(json.loads(json.dumps(plain))) == CERTIFICATE
    assert plain["passed"] is True
    promised = {"reference", "dtype", "texts", "tokens", "max_abs_logit_diff", "mean_kl", "top1_agreement"}
    assert promised | {"greedy_equal", "base_mean_kl", "base_top1_agreement"} <= plain.keys()


def test_comparison_of_logits() -> None:
    found = Comparison()
    reference = torch.tensor([[2.0, 0, 0], [0, 3, 0]])
    found.add(reference, torch.tensor([[2.0, 0, 0], [0, 0, 3.0]]))
    found.add(torch.tensor([[-7.0, 0, 0]]), torch.tensor([[-7.0, 0, 0]]))
    probabilities = reference[1].double().softmax(-1)
    assert (found.tokens, found.agreeing, found.max_diff, found.max_logit) == (3, 2, 3.0, 7.0)
    assert found.sum_diff == pytest.approx(2.0)
    # KL of the second row: log p differs by 3 at two places.
    assert found.kl == pytest.approx(float(3 * probabilities[1] - 3 * probabilities[2]))


def test_nan_does_not_look_like_equality() -> None:
    found = Comparison()
    found.add(torch.zeros(1, 3), torch.full((1, 3), math.nan))
    found.add(torch.zeros(1, 3), torch.zeros(1, 3))
    assert found.max_diff == math.inf


# ---- measured -------------------------------------------------------------------------------

TINY = Tiny("llama")
TEXTS = [tuple(row) for row in tokens(3, 12).tolist()]


def built(made: Program, base: Path | None = None) -> Path:
    folder = scratch()
    made.save(folder / "p.safetensors")
    build(str(base or on_disk(TINY)), [folder / "p.safetensors"], folder / "out")
    return folder / "out"


@pytest.fixture(autouse=True)
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(certificate, "GREEDY_TOKENS", 3)


def measured(out: Path, made: Program, base: Path | None = None) -> Certificate:
    return certified(base or on_disk(TINY), out, made, TEXTS)


def test_the_right_checkpoint_passes() -> None:
    made = program(TINY)
    found = measured(built(made), made)
    assert found.failures() == []
    assert (found.texts, found.tokens, found.edits) == (3, 36, len(made.edits))
    assert (found.dtype, found.stored, found.greedy_equal) == ("float32", "float32", True)
    assert found.max_abs_logit_diff < 1e-4 < 0.1 < found.base_max_abs_logit_diff
    assert found.mean_kl < 1e-6 < 1e-2 < found.base_mean_kl
    assert found.top1_agreement == 1 > found.base_top1_agreement


@pytest.mark.parametrize("wrong", ["another program", "one edit missing", "one edit too many", "a little stronger"])
def test_a_wrong_checkpoint_fails(wrong: str) -> None:
    made = program(TINY, share=0.5)
    scale = next(edit for edit in made.edits if isinstance(edit, Scale))
    stronger = Scale(scale.layer, scale.site, scale.units, scale.gamma * 1.01)
    other = {
        "another program": program(TINY, seed=9),
        "one edit missing": Program(made.model, made.edits[1:]),
        "one edit too many": program(TINY, share=0.55),
        "a little stronger": Program(made.model, tuple(stronger if edit == scale else edit for edit in made.edits)),
    }[wrong]
    assert other != made
    found = measured(built(other), made)
    assert not found.passed
    assert any("max |Δlogit|" in text for text in found.failures())


def test_the_base_itself_fails() -> None:
    made = program(TINY)
    found = measured(on_disk(TINY), made)
    assert not found.passed
    assert found.max_abs_logit_diff == found.base_max_abs_logit_diff


def test_a_program_without_effect_proves_nothing() -> None:
    made = Program.of([Scale(0, "ffn", [1], [0.0])], model=on_disk(TINY))
    found = measured(built(made), made)
    assert found.max_abs_logit_diff == 0
    assert [text.partition(" on these")[0] for text in found.failures()] == [
        "the program makes no difference to the base"
    ]


def test_a_program_without_edits_promises_no_effect() -> None:
    made = Program.of([], model=on_disk(TINY))
    assert measured(built(made), made).passed


def test_a_checkpoint_that_computes_nan_fails() -> None:
    made = program(TINY)
    out = built(made)
    tensors = load_file(out / "model.safetensors")
    tensors["model.norm.weight"][3] = math.nan
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    found = measured(out, made)
    assert any("max |Δlogit|" in text for text in found.failures())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bits_are_measured_in_float32_without_being_loaded_in_it(dtype: str) -> None:
    tiny = replace(TINY, dtype=dtype)
    base, made = on_disk(tiny), program(tiny)
    out = built(made, base)
    found, loaded = (certified(base, out, made, TEXTS, running) for running in (WIDENED, "float32"))
    assert found == loaded
    assert (found.dtype, found.stored, found.passed) == ("float32", dtype, True)
    as_stored = certified(base, out, made, TEXTS, "auto")
    assert as_stored.dtype == dtype
    assert as_stored.mean_kl > 2 * found.mean_kl  # the rest is noise of the measurement


def test_continuations_are_those_of_each_text_alone() -> None:
    model = load_model(on_disk(TINY), dtype="float32", device="cpu")
    texts = [TEXTS[0], TEXTS[1][:5], TEXTS[2], TEXTS[1][:5], TEXTS[0][:1]]
    found = certificate.observe(model, made := program(TINY), texts).greedy
    with interpret(model, made):
        assert found == tuple(certificate.greedy(model, text, 3) for text in texts)
    assert len(set(found)) > 2


def test_zeros_are_counted() -> None:
    base = scratch() / "base"
    shutil.copytree(on_disk(TINY), base)
    tensors = load_file(base / "model.safetensors")
    values = sum(tensor.numel() for tensor in tensors.values() if tensor.ndim > 1)
    tensors["model.layers.0.mlp.down_proj.weight"][:] = 0
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    made = Program.of([Scale(1, "ffn", [0], [-1.0])], model=base)
    found = measured(built(made, base), made, base)
    assert found.passed
    assert found.zeros_before == pytest.approx(20 * 28 / values)
    assert found.zeros_after == pytest.approx((20 * 28 + 28) / values)


def test_texts_are_needed() -> None:
    with pytest.raises(UsageError, match="nothing to measure on"):
        certified(on_disk(TINY), on_disk(TINY), program(TINY), [])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_stored_dtype(dtype: str) -> None:
    assert stored_dtype(on_disk(replace(TINY, dtype=dtype))) == dtype


def test_a_build_whose_certificate_fails_leaves_nothing() -> None:
    folder = scratch()
    made = program(TINY)
    base = bases.open_base(str(on_disk(TINY)))
    compiled = common.Compiled.of(made, base)

    def fails(written: Path) -> Certificate:
        assert (written / "model.safetensors").exists()
        return replace(CERTIFICATE, top1_agreement=0.5)

    with pytest.raises(CheckFailed, match="not written, for its certificate does not hold: top-1 agreement is 50"):
        common.write_compiled(compiled, folder / "out", certify=fails)
    assert list(folder.iterdir()) == []
