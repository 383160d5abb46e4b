"""Models of 16 bits that compute in float32: as if they were loaded in it, in less memory."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from austeer.compiler import Program, widened
from austeer.compiler.forward import computing_dtype, run_texts
from austeer.compiler.interpreter import interpret
from austeer.compiler.live import WIDENED, live_facts, load_model, port, weight_of
from austeer.compiler.verbs.bases import open_base
from austeer.compiler.verbs.common import Compiled
from austeer.targets.checkpoint import Writing
from tests.compiler.test_gates import gates
from tests.shared import TINY, tiny
from tests.tiny import VARIANTS, Tiny, logits, on_disk, program, programs_edits, tokens

IDS = tokens(2, 11)


def both(folder: Path) -> tuple[Any, Any]:
    """(widened, loaded in float32)"""
    ours, wide = (load_model(folder, dtype=dtype, device="cpu") for dtype in (WIDENED, "float32"))
    return ours, wide


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal bits, but that the experts of a mixture are summed in another order."""
    assert found.dtype == expected.dtype == torch.float32
    return bool((found - expected).abs().max() <= 1e-6 * expected.abs().max())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", VARIANTS)
def test_it_does_what_the_model_does_that_is_loaded_in_float32(name: str, dtype: str) -> None:
    made = replace(VARIANTS[name], dtype=dtype)
    ours, wide = both(on_disk(made))
    plain = logits(wide, IDS)
    assert close(logits(ours, IDS), plain)
    assert close(run_texts(ours, IDS.tolist())[0], run_texts(wide, IDS.tolist())[0])
    edits = programs_edits(made, on_disk(made), 0) + ([] if made.has_experts(0) else gates(made))
    program = Program.of(edits, model=on_disk(made))
    with interpret(ours, program), interpret(wide, program):
        assert close(logits(ours, IDS), steered := logits(wide, IDS))
        assert close(stepwise(ours, IDS), stepwise(wide, IDS))
    assert close(logits(ours, IDS), plain)  # and the edits go again
    assert not close(steered, plain)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_as_stored_it_would_say_something_else(dtype: str) -> None:
    folder = on_disk(replace(VARIANTS["llama"], dtype=dtype))
    ours, wide = both(folder)
    assert close(logits(ours, IDS), logits(wide, IDS))
    assert not close(logits(load_model(folder, device="cpu"), IDS).float(), logits(wide, IDS))


@pytest.mark.parametrize("name", TINY)
def test_windows_caps_and_a_cache_change_nothing(name: str, tmp_path: Path) -> None:
    tiny(name).save_pretrained(tmp_path)
    narrow = load_model(tmp_path, dtype="bfloat16", device="cpu")
    narrow.save_pretrained(tmp_path)
    ours, wide = both(tmp_path)
    steps = [stepwise(model, IDS) for model in (ours, wide)]
    assert close(*steps)
    assert ours.dtype == torch.bfloat16


def stepwise(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Logits of one token after the other, with a cache."""
    cache, found = None, list[torch.Tensor]()
    with torch.inference_mode():
        for column in ids.split(1, dim=1):
            output = model(input_ids=column, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            found.append(output.logits)
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("form", ["checkpoint", "lora", "model-code"])
@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "mixtral"])
def test_every_form_of_output_is_measured_in_it(name: str, form: str, tmp_path: Path) -> None:
    made = replace(VARIANTS[name], dtype="bfloat16")
    base = on_disk(made)
    edits = [edit for edit in program(made).edits if edit.kind == "rank1" and edit.site == "heads"]
    compiled = Compiled.of(Program.of(edits, model=base), open_base(str(base)), form=form)
    compiled.write(tmp_path, Writing())
    ours, wide = (compiled.load(tmp_path, dtype, "cpu") for dtype in (WIDENED, "float32"))
    assert close(logits(ours, IDS), expected := logits(wide, IDS))
    assert not close(logits(load_model(base, dtype="float32", device="cpu"), IDS), expected)


def test_weights_stay_what_they_are() -> None:
    made = replace(VARIANTS["llama-tied"], dtype="bfloat16")
    stored, ours = (load_model(on_disk(made), dtype=dtype, device="cpu") for dtype in ("auto", WIDENED))
    before = dict(ours.named_parameters())
    logits(ours, IDS)
    after = dict(ours.named_parameters())
    assert all(after[name] is weight for name, weight in before.items())
    assert all(torch.equal(after[name], weight) for name, weight in stored.named_parameters())
    assert {weight.dtype for weight in after.values()} == {ours.dtype} == {torch.bfloat16}
    assert ours.lm_head.weight is ours.model.embed_tokens.weight
    assert computing_dtype(ours) == torch.float32 != computing_dtype(stored)
    module = port(ours, live_facts(ours), 0, "heads").module
    assert torch.equal(weight_of(module, transposed=False), before["model.layers.0.self_attn.o_proj.weight"].float())


@pytest.mark.parametrize("name", ["llama", "llama-tied", "mixtral", "qwen3_moe", "phi3", "gemma3_text"])
def test_no_more_is_widened_at_a_time_than_a_block(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, wide = both(on_disk(replace(VARIANTS[name], dtype="bfloat16", vocabulary=211)))
    expected = logits(wide, IDS[:1, :4])
    monkeypatch.setattr(widened, "BLOCK_BYTES", 4 * 24 * 20)
    with copies() as sizes:
        assert close(logits(ours, IDS[:1, :4]), expected)
    assert 20 * 20 < max(sizes) <= 24 * 28


@contextmanager
def copies() -> Iterator[Sequence[int]]:
    """The numbers of values that were copied from another dtype."""
    sizes: list[int] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            output = func(*args, **(kwargs or {}))
            if func is torch.ops.aten.to.dtype:
                sizes.append(output.numel())
            return output

    with Watch():
        yield sizes


def test_a_model_of_32_bits_is_left_alone() -> None:
    ours, wide = both(on_disk(Tiny("llama")))
    assert torch.equal(logits(ours, IDS), logits(wide, IDS))
    assert not any("forward" in vars(module) for module in ours.modules())
