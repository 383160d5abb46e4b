"""The interpreter against a naive reference: the same model with the forward of its modules rewritten by hand."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from austeer.compiler import Edit, Program, ProgramError, Rank1, Scale, Shift, interpret
from tests.tiny import CONFIGS, VARIANTS, Tiny, load, logits, on_disk, program, tokens

PADDED = ("llama", "gpt2", "opt", "qwen3_moe")


# ---- the naive reference --------------------------------------------------------------------

# block, projection of the attention, projection of the FFN, FFN where it has experts
LLAMA = ("model.layers.{}", "self_attn.o_proj", "mlp.down_proj", "mlp")
PATHS = {
    **dict.fromkeys(CONFIGS, LLAMA),
    "gpt2": ("transformer.h.{}", "attn.c_proj", "mlp.c_proj", ""),
    "gpt_neox": ("gpt_neox.layers.{}", "attention.dense", "mlp.dense_4h_to_h", ""),
    "opt": ("model.decoder.layers.{}", "self_attn.out_proj", "fc2", ""),
}


def changed(edit: Edit, x: Tensor) -> Tensor:
    """One edit at its site, value by value."""
    if isinstance(edit, Shift):
        return x + torch.tensor(edit.vector.tolist(), dtype=x.dtype)
    assert isinstance(edit, Scale)
    columns = list(x.unbind(-1))
    for unit, gamma in zip(edit.units, edit.gamma.tolist(), strict=True):
        columns[unit] = columns[unit] + gamma * columns[unit]
    return torch.stack(columns, -1)


def around(module: Any, before: Sequence[Edit], terms: Sequence[Rank1], after: Sequence[Edit]) -> None:
    """Rewrites the forward of one module."""
    plain: Callable[..., Any] = module.forward

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        for edit in before:
            x = changed(edit, x)
        found = plain(x, *args, **kwargs)
        y = found[0] if isinstance(found, tuple) else found
        for term in terms:
            k, v = (torch.tensor(vector.tolist(), dtype=y.dtype) for vector in (term.k, term.v))
            y = y + term.strength * (x * k).sum(-1, keepdim=True) * v
        for edit in after:
            y = changed(edit, y)
        return (y, *found[1:]) if isinstance(found, tuple) else y

    module.forward = forward


def rewritten(model: Any, tiny: Tiny, made: Program) -> Any:
    """A copy of the model that does what the program says."""
    model = deepcopy(model)
    block_path, attention, ffn, experts = PATHS[tiny.architecture]
    for layer in range(tiny.layers):
        block = model.get_submodule(block_path.format(layer))

        def at(site: str, layer: int = layer) -> list[Any]:
            return [edit for edit in made.edits if (edit.layer, edit.site) == (layer, site)]

        for path, read, written in ((attention, "heads", "attn"), (ffn, "neurons", "ffn")):
            terms = [edit for edit in at(read) if isinstance(edit, Rank1)]
            before = [edit for edit in at(read) if not isinstance(edit, Rank1)]
            if written == "ffn" and tiny.has_experts(layer):
                assert not before
                assert not terms
                path = experts  # noqa: PLW2901
            around(block.get_submodule(path), before, terms, at(written))
        around(block, (), (), at("residual"))
    return model


def everything(tiny: Tiny, seed: int = 0) -> Program:
    """Every kind at every site, also where no weight could hold it."""
    model, rng = program(tiny).model, np.random.default_rng(seed)
    edits: list[Edit] = []
    for layer in range(tiny.layers):
        for site in ("residual", "ffn", "neurons", "attn", "heads"):
            width = {"heads": model.heads, "neurons": model.neurons}.get(site, model.residual)
            if site == "neurons" and tiny.has_experts(layer):
                continue
            edits.append(Shift(layer, site, 0.3 * rng.normal(size=width)))
            edits.append(Scale(layer, site, rng.permutation(width)[:5].tolist(), rng.normal(size=5)))
            edits.append(Shift(layer, site, 0.3 * rng.normal(size=width)))
            if site in ("heads", "neurons"):
                edits.append(Rank1(layer, site, rng.normal(size=width), rng.normal(size=model.residual), 0.1))
    rng.shuffle(edits)  # pyright: ignore[reportArgumentType]
    return Program(model, tuple(edits))


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert found.dtype == expected.dtype
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("name", VARIANTS)
def test_every_edit_at_once(name: str) -> None:
    tiny = VARIANTS[name]
    made, model, ids = everything(tiny), load(on_disk(tiny)), tokens()
    with interpret(model, made):
        found = logits(model, ids)
    close(found, logits(rewritten(model, tiny, made), ids))


@pytest.mark.parametrize("architecture", CONFIGS)
def test_every_edit_alone(architecture: str) -> None:
    tiny = Tiny(architecture, layers=1, dense=(0,))
    model, ids = load(on_disk(tiny)), tokens()
    plain = logits(model, ids)
    kinds = {(type(edit), edit.site): edit for edit in everything(tiny).edits}
    assert len(kinds) == (9 if architecture == "mixtral" else 12)
    for edit in kinds.values():
        made = Program.of([edit], model=on_disk(tiny))
        with interpret(model, made):
            found = logits(model, ids)
        close(found, logits(rewritten(model, tiny, made), ids))
        assert (found - plain).abs().max() > 1e-4 * plain.abs().max(), edit.where


@pytest.mark.parametrize("architecture", ["llama", "opt"])
def test_a_model_in_float64_is_edited_in_float64(architecture: str) -> None:
    tiny = Tiny(architecture)
    made, model = everything(tiny), load(on_disk(tiny)).double()
    # Only these: 1 + gamma and strength·v are float32 by definition.
    shifts = Program(made.model, tuple(edit for edit in made.edits if isinstance(edit, Shift)))
    with interpret(model, shifts):
        found = logits(model, tokens())
    close(found, logits(rewritten(model, tiny, shifts), tokens()), 1e-12)


# ---- order ------------------------------------------------------------------------------------


def seen(model: Any, path: str, made: Program) -> tuple[Tensor, Tensor]:
    """(input, output) of a module during a run with the program."""
    kept: list[tuple[Tensor, Tensor]] = []
    with interpret(model, made):
        handle = model.get_submodule(path).register_forward_hook(
            lambda _, args, output: kept.append((args[0], output[0] if isinstance(output, tuple) else output))
        )
        logits(model, tokens())
        handle.remove()
    return kept[0]


@pytest.mark.parametrize(("site", "side"), [("heads", 0), ("attn", 1)])
def test_edits_at_one_site_apply_in_program_order(site: Any, side: int) -> None:
    folder = on_disk(Tiny("llama"))
    model, width = load(folder), {"heads": 24, "attn": 20}[site]
    path, none = "model.layers.0.self_attn.o_proj", Program.of([], model=folder)
    x = seen(model, path, none)[side]
    scale, shift = Scale(0, site, range(width), 1.0), Shift(0, site, np.ones(width))
    for edits, expected in (([scale, shift], 2 * x + 1), ([shift, scale], 2 * (x + 1))):
        close(seen(model, path, Program.of(edits, model=folder))[side], expected, 1e-6)


def test_rank1_reads_what_the_projection_reads_whatever_the_order() -> None:
    folder = on_disk(Tiny("llama"))
    model, rng = load(folder), np.random.default_rng(0)
    edits = [
        Rank1(0, "neurons", rng.normal(size=28), rng.normal(size=20), 1),
        Scale(0, "neurons", range(28), rng.normal(size=28)),
        Shift(0, "neurons", rng.normal(size=28)),
    ]
    outs = []
    for order in ((0, 1, 2), (1, 0, 2), (1, 2, 0)):
        made = Program.of([edits[place] for place in order], model=folder)
        outs.append(seen(model, "model.layers.0.mlp.down_proj", made))
    (x, y), weight = outs[0], model.model.layers[0].mlp.down_proj
    rank1 = edits[0]
    assert isinstance(rank1, Rank1)
    close(y, weight(x) + (x @ torch.tensor(rank1.k))[..., None] * torch.tensor(rank1.v))
    assert all(torch.equal(out[1], y) for out in outs[1:])


def test_edits_at_different_sites_apply_in_data_flow_order() -> None:
    tiny = Tiny("llama")
    made, model = everything(tiny), load(on_disk(tiny))
    outs = []
    for edits in (
        made.edits,
        sorted(made.edits, key=lambda edit: (edit.site, edit.layer)),
        sorted(made.edits, key=lambda edit: (-edit.layer, edit.site), reverse=False),
    ):
        # Sorting is stable: the order at each site stays.
        with interpret(model, Program(made.model, tuple(edits))):
            outs.append(logits(model, tokens()))
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])


def test_one_interpreter_within_another() -> None:
    # Documented by `compose`: at one site the outer program comes first.
    folder = on_disk(Tiny("llama"))
    model = load(folder)
    outer = Program.of([Shift(0, "attn", np.ones(20))], model=folder)
    inner = Program.of([Scale(0, "attn", range(20), 1.0)], model=folder)
    both = Program.of([*outer.edits, *inner.edits], model=folder)
    with interpret(model, outer), interpret(model, inner):
        found = logits(model, tokens())
    with interpret(model, both):
        close(found, logits(model, tokens()), 1e-6)


# ---- how a model is run -------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("architecture", PADDED)
def test_padding_changes_nothing(architecture: str, side: str) -> None:
    tiny = Tiny(architecture)
    made, model = program(tiny), load(on_disk(tiny))
    texts = [tokens(1, length, seed=length)[0] for length in (3, 9, 6)]
    ids, mask = torch.zeros(3, 9, dtype=torch.int64), torch.zeros(3, 9, dtype=torch.int64)
    places = [slice(9 - len(text), None) if side == "left" else slice(len(text)) for text in texts]
    for row, (text, place) in enumerate(zip(texts, places, strict=True)):
        ids[row, place], mask[row, place] = text, 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with interpret(model, made):
        batch = logits(model, ids, attention_mask=mask, position_ids=positions)
        for row, (text, place) in enumerate(zip(texts, places, strict=True)):
            close(batch[row, place], logits(model, text[None])[0])


@pytest.mark.parametrize("architecture", CONFIGS)
def test_a_kv_cache_changes_nothing(architecture: str) -> None:
    tiny = Tiny(architecture)
    made, model, ids = program(tiny), load(on_disk(tiny)), tokens(2, 8)
    with interpret(model, made), torch.inference_mode():
        whole = logits(model, ids)
        cache, steps = None, []
        for part in (ids[:, :5], ids[:, 5:6], ids[:, 6:]):
            output = model(input_ids=part, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            steps.append(output.logits)
    close(torch.cat(steps, 1), whole)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_generate_is_steered(architecture: str) -> None:
    tiny = Tiny(architecture)
    made, model, ids = program(tiny), load(on_disk(tiny)), tokens(1, 5)

    def generated() -> list[int]:
        options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        return model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0].tolist()

    plain = generated()
    with interpret(model, made):
        found, expected = generated(), ids[0].tolist()
        while len(expected) < len(found):
            expected.append(int(logits(model, torch.tensor([expected]), use_cache=False)[0, -1].argmax()))
    assert found == expected
    assert found != plain


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_edits_of_16_bit_models_are_computed_in_float32(dtype: torch.dtype) -> None:
    folder = on_disk(Tiny("llama"))
    model = load(folder).to(dtype)
    plain = seen(model, "model.layers.0.mlp.down_proj", Program.of([], model=folder))[1]
    # Neither dtype can hold 1e5 + x: rounded in between, x would be lost, or infinite.
    there_and_back = [Shift(0, "ffn", np.full(20, step)) for step in (1e5, -1e5)]
    found = seen(model, "model.layers.0.mlp.down_proj", Program.of(there_and_back, model=folder))[1]
    assert found.dtype == dtype
    assert (found.float() - plain.float()).abs().max() < 0.02


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "gemma2"])
def test_16_bit_models_do_what_the_float32_model_does(architecture: str, dtype: torch.dtype) -> None:
    tiny = Tiny(architecture)
    made = program(tiny, share=0.3)
    model, narrow = load(on_disk(tiny)), load(on_disk(tiny)).to(dtype)
    with interpret(model, made), interpret(narrow, made):
        expected, found = logits(model, tokens()), logits(narrow, tokens())
    assert found.dtype == dtype
    assert (found.float() - expected).abs().mean() < 0.05 * expected.abs().mean()


# ---- what is left behind --------------------------------------------------------------------------


def hooks(model: Any) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_nothing_is_left_behind() -> None:
    tiny = Tiny("llama")
    made, model, ids = program(tiny), load(on_disk(tiny)), tokens()
    before, plain = hooks(model), logits(model, ids)
    with interpret(model, made) as same:
        assert same is model
        assert hooks(model) > before
    assert hooks(model) == before
    assert torch.equal(logits(model, ids), plain)


def test_nothing_is_left_behind_after_an_exception() -> None:
    tiny = Tiny("opt")
    made, model, ids = program(tiny), load(on_disk(tiny)), tokens()
    before, plain = hooks(model), logits(model, ids)
    with pytest.raises(IndexError), interpret(model, made):
        logits(model, torch.tensor([[10_000]]))
    assert hooks(model) == before
    assert torch.equal(logits(model, ids), plain)


def test_nothing_is_left_behind_by_a_program_that_cannot_be_hooked() -> None:
    folder = on_disk(Tiny("mixtral"))
    model = load(folder)
    before = hooks(model)
    made = Program.of([Scale(0, "ffn", [0], 1), Scale(1, "neurons", [0], 1)], model=folder)
    with pytest.raises(Exception, match="layer 1 is a mixture of experts"), interpret(model, made):
        pytest.fail("entered")
    assert hooks(model) == before


def test_a_program_for_another_model_is_refused() -> None:
    model = load(on_disk(Tiny("llama")))
    with pytest.raises(ProgramError, match="does not fit"), interpret(model, program(Tiny("llama", layers=1))):
        pytest.fail("entered")


def test_edits_without_units_do_nothing() -> None:
    folder = on_disk(Tiny("llama"))
    model, ids = load(folder), tokens()
    plain = logits(model, ids)
    for edits in ([], [Scale(0, "ffn", [], [])], [Scale(0, "ffn", [3], 0.0)]):
        with interpret(model, Program.of(edits, model=folder)):
            assert torch.equal(logits(model, ids), plain)


def test_gradients_flow_through_the_edits() -> None:
    # RestoreLCC trains in front of them.
    folder = on_disk(Tiny("llama"))
    model = load(folder).requires_grad_(True)
    with interpret(model, program(Tiny("llama"))):
        model(input_ids=tokens()).logits.sum().backward()
    assert all(weight.grad is not None for weight in model.model.layers.parameters())
