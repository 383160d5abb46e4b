"""Gates: what a gated edit is, and what the interpreter makes of it, against the same model written out by hand."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from austeer.compiler import (
    Edit,
    Fitted,
    Gate,
    Gated,
    Origin,
    Program,
    ProgramError,
    Rank1,
    Refused,
    Scale,
    Shift,
    SpaceError,
    interpret,
)  # fmt: skip
from austeer.compiler.facts import Geometry
from austeer.compiler.kinds import edit_from
from austeer.compiler.text import parse, render
from tests.compiler.test_interpreter import PATHS, close
from tests.tiny import VARIANTS, Tiny, load, logits, on_disk, program, tokens

MODEL = Geometry("m", "llama", layers=2, residual=3, heads=4, neurons=2)
W = (0.5, -1.0, 0.25)
GATE = Gate(W, 0.5, 2.0)
ORIGIN = Origin("ab" * 32, "cd" * 32, 0.9, 0.8, 0.1)
FITTED = Fitted(np.eye(3)[:2], [1, 2], np.ones((2, 3)), [0, 0.5], np.arange(6).reshape(3, 2))
SCALE = Scale(0, "ffn", [2, 0], [0.5, -1])
EDITS = (
    Gated(SCALE, GATE),
    Gated(SCALE, Gate(W, 0.5, 2.0, (1, 2, 3)), FITTED),
    Gated(Shift(1, "heads", [1, 2, 3, 4]), Gate(W, 0.5, 2.0, (), ORIGIN)),
    Gated(Rank1(1, "neurons", [1, 2], [3, 4, 5], 0.5), GATE),
    Scale(0, "ffn", [2], [3.0]),  # the same unit, without a gate: another edit
)


def plain_gate(**fields: Any) -> dict[str, Any]:
    return {"w": list(W), "b": 0.5, "delta": 2.0, **fields}


# ---- what it is -----------------------------------------------------------------------------


def test_a_gated_edit_is_where_its_edit_is() -> None:
    assert (EDITS[2].layer, EDITS[2].site, EDITS[2].where) == (1, "heads", "gated shift at layer 1, site heads")


def test_as_json() -> None:
    expected = {"kind": "gated", "layer": 0, "site": "ffn", "edit": SCALE.plain(), "gate": plain_gate()}
    assert Gated(SCALE, GATE).plain() == expected
    assert json.loads(json.dumps(EDITS[1].plain()))["neurons"]["down"] == [[0, 1], [2, 3], [4, 5]]


@pytest.mark.parametrize("edit", EDITS[:4])
def test_plain_values_lead_back(edit: Edit) -> None:
    assert edit_from(edit.plain(), "x") == edit


def test_file_and_text_lead_back_bit_for_bit(tmp_path: Path) -> None:
    made = Program(MODEL, EDITS)
    made.save(tmp_path / "p.safetensors")
    assert Program.load(tmp_path / "p.safetensors") == made == parse(render(made))
    assert parse(render(made)).sha256 == Program.load(tmp_path / "p.safetensors").sha256 == made.sha256


def test_neurons_may_be_views_that_are_transposed(tmp_path: Path) -> None:
    down = np.arange(6).reshape(2, 3)
    views = Fitted(*(getattr(FITTED, name) for name in ("gate", "gate_bias", "up", "up_bias")), down.T)
    made = Program(MODEL, (Gated(SCALE, GATE, views),))
    made.save(tmp_path / "p.safetensors")
    assert Program.load(tmp_path / "p.safetensors") == made


def test_text_reads_as_documented() -> None:
    assert render(Program(MODEL, EDITS[:1])).splitlines()[1] == (
        "layer 0 ffn gated scale 2:0.5 0:-1.0 gate delta 2.0 b 0.5 w 0.5 -1.0 0.25"
    )


def test_every_part_counts_for_identity() -> None:
    others = [
        Gated(SCALE, Gate(W, 0.5, 2.0, (1, 2, 4)), FITTED),
        Gated(SCALE, Gate(W, 0.25, 2.0, (1, 2, 3)), FITTED),
        Gated(SCALE, Gate(W, 0.5, 4.0, (1, 2, 3)), FITTED),
        Gated(SCALE, Gate((1, 2, 3), 0.5, 2.0, W), FITTED),
        Gated(SCALE, Gate(W, 0.5, 2.0, (1, 2, 3), ORIGIN), FITTED),
        Gated(SCALE, Gate(W, 0.5, 2.0, (1, 2, 3))),
        Gated(Scale(0, "ffn", [2, 1], [0.5, -1]), Gate(W, 0.5, 2.0, (1, 2, 3)), FITTED),
    ]
    hashes = {Program(MODEL, (edit,)).sha256 for edit in (*others, EDITS[1], SCALE)}
    assert len(hashes) == len(others) + 2
    assert all(other != EDITS[1] for other in others)


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (lambda: Gate(W, 0.5, 0.0), "delta must be above 0"),
        (lambda: Gate(W, 0.5, float("nan")), "nan or infinity"),
        (lambda: Origin("ab", "cd" * 32, 0.9, 0.8, 0.1), "when must be a SHA-256"),
        (lambda: Origin("ab" * 32, "cd" * 32, 1.9, 0.8, 0.1), "auc must be from 0 to 1"),
        (
            lambda: edit_from({**EDITS[0].plain(), "gate": plain_gate(origin={"auc": 1})}, "e"),
            "gated: needs edit, gate",
        ),
        (lambda: Gate([W], 0.5, 1), "expected one dimension"),
        (lambda: Gated(EDITS[0], GATE), "the edit must be a scale, a shift or a rank1"),
        (lambda: Gated(Shift(0, "ffn", W), GATE, FITTED), "two neurons do it exactly"),
        (lambda: Fitted(np.eye(3), [1, 2], np.eye(3), [1, 2, 3], np.eye(3)), "gate_bias has shape"),
        (lambda: Fitted([1, 2], [1, 2], np.eye(3), [1, 2, 3], np.eye(3)), "expected 2 dimensions"),
        (lambda: Program(MODEL, (Gated(Scale(0, "ffn", [3], 1), GATE),)), "unit 3 is outside"),
        (lambda: edit_from({"kind": "gated", "gate": plain_gate()}, "edit 4"), "edit 4: a gated edit has an edit"),
        (
            lambda: edit_from({**EDITS[0].plain(), "gate": plain_gate(c=1)}, "edit 4"),
            "gated: needs edit, gate",
        ),
        (lambda: edit_from({**EDITS[0].plain(), "layer": 1}, "edit 4"), "the layer and site of its edit"),
        (lambda: edit_from({**EDITS[0].plain(), "more": 1}, "edit 4"), "unknown: more"),
    ],
)
def test_what_is_no_gated_edit_is_refused(made: Any, words: str) -> None:
    with pytest.raises(ProgramError, match=words):
        made()


@pytest.mark.parametrize(
    "gated",
    [
        Gated(SCALE, Gate((1, 2), 0, 1)),
        Gated(SCALE, Gate(W, 0, 1, (1, 2))),
        Gated(Shift(0, "heads", W), GATE),
        Gated(SCALE, GATE, Fitted(np.eye(2), [1, 2], np.eye(2), [1, 2], np.eye(2))),
    ],
)
def test_widths_must_be_the_model_s(gated: Gated) -> None:
    with pytest.raises(SpaceError):
        Program(MODEL, (gated,))


@pytest.mark.parametrize(
    "line", ["scale 2:1 gate b 1 w 1 2 3", "scale 2:1", "gated scale 1:1 gate delta 1 b 0 w 1 2 3"]
)
def test_a_text_that_cannot_be_read_names_its_line(line: str) -> None:
    with pytest.raises(ProgramError, match="line 2"):
        parse(f'model "m" llama layers=2 residual=3 heads=4 neurons=2\nlayer 0 ffn gated {line}')


# ---- what it does ---------------------------------------------------------------------------

FFN_IN = {"gpt2": "mlp.c_fc", "gpt_neox": "mlp.dense_h_to_4h", "opt": "fc1", "phi3": "mlp.gate_up_proj"}
POST_NORMS = {
    **dict.fromkeys(("gemma2", "gemma3_text", "olmo2"), ("post_attention_layernorm", "post_feedforward_layernorm")),
    "opt": ("self_attn_layer_norm", "final_layer_norm"),
}
ACTS = {"gpt2": lambda z: 0.5 * z * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (z + 0.044715 * z**3)))}
ACTS |= dict.fromkeys(("gemma2", "gemma3_text"), ACTS["gpt2"])
ACTS |= {"opt": lambda z: z.clamp(min=0), "gpt_neox": lambda z: 0.5 * z * (1 + torch.erf(z / 2**0.5))}


def gates(tiny: Tiny, seed: int = 0) -> list[Gated]:
    """Every kind at every site, gated."""
    model, rng = program(tiny).model, np.random.default_rng(seed)

    def gate() -> Gate:
        return Gate(rng.normal(size=model.residual), 0.3, rng.uniform(0.5, 3))

    edits: list[Edit] = []
    for layer in range(tiny.layers):
        for site in ("residual", "ffn", "neurons", "attn", "heads"):
            width = {"heads": model.heads, "neurons": model.neurons}.get(site, model.residual)
            edits.append(Shift(layer, site, 0.3 * rng.normal(size=width)))
            edits.append(Scale(layer, site, rng.permutation(width)[:5].tolist(), rng.normal(size=5)))
            if site in ("heads", "neurons"):
                edits.append(Rank1(layer, site, rng.normal(size=width), rng.normal(size=model.residual), 0.1))
    return [Gated(edit, gate()) for edit in edits if not tiny.has_experts(edit.layer)]


class Noted:
    """What modules read and wrote in the last pass."""

    def __init__(self, block: Any, names: set[str]) -> None:
        self.found: dict[str, tuple[Tensor, Tensor]] = {}
        for name in names:
            self._note(name, block.get_submodule(name))

    def _note(self, name: str, module: Any) -> None:
        plain = module.forward

        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            y = plain(x, *args, **kwargs)
            self.found[name] = (x, y)
            return y

        module.forward = forward
        module.plain = plain


def weight(module: Any) -> Tensor:
    return module.weight if isinstance(module, nn.Linear) else module.weight.T


def by_hand(model: Any, tiny: Tiny, edits: list[Gated]) -> Any:
    """A copy of the model whose blocks add what the gated edits say, value by value."""
    model = deepcopy(model)
    path, *projections, _ = PATHS[tiny.architecture]
    norms = POST_NORMS.get(tiny.architecture, ()) if tiny.architecture != "opt" or tiny.post_norm else ()
    for layer in range(tiny.layers):
        here = [edit for edit in edits if edit.layer == layer]
        if here:
            block = model.get_submodule(path.format(layer))
            _add(block, here, tiny, projections, norms)
    return model


def _add(block: Any, edits: list[Gated], tiny: Tiny, projections: list[str], norms: tuple[str, ...]) -> None:
    read = FFN_IN.get(tiny.architecture, "mlp.gate_proj")
    noted, plain = Noted(block, {read, *projections, *norms}), block.forward
    act = ACTS.get(tiny.architecture, lambda z: z / (1 + torch.exp(-z)))

    def forward(*args: Any, **kwargs: Any) -> Any:
        output = plain(*args, **kwargs)
        y = output[0] if isinstance(output, tuple) else output
        more = torch.zeros_like(y)
        for gated in edits:
            h = noted.found[read][0].reshape(y.shape)
            z = (h * torch.tensor(gated.gate.w)).sum(-1, keepdim=True) + gated.gate.b
            delta = gated.gate.delta
            more = more + (act(z + delta) - act(z - delta)) / (2 * delta) * contribution(gated.edit, y)
        return (y + more, *output[1:]) if isinstance(output, tuple) else y + more

    def contribution(edit: Edit, y: Tensor) -> Tensor:
        if edit.site == "residual":
            return change(edit, y)
        index = 0 if edit.site in ("heads", "attn") else 1
        module = block.get_submodule(projections[index])
        x, written = noted.found[projections[index]]
        if isinstance(edit, Rank1):
            found = edit.strength * (x * torch.tensor(edit.k)).sum(-1, keepdim=True) * torch.tensor(edit.v)
        elif edit.site in ("heads", "neurons"):
            found = change(edit, x) @ weight(module).T
        else:
            found = change(edit, written)
        if norms:
            norm, before = block.get_submodule(norms[index]), noted.found[norms[index]][0]
            found = norm.plain(before + found.reshape(before.shape)) - norm.plain(before)
        return found.reshape(y.shape)

    block.forward = forward


def change(edit: Edit, x: Tensor) -> Tensor:
    if isinstance(edit, Shift):
        return torch.tensor(edit.vector) + torch.zeros_like(x)
    assert isinstance(edit, Scale)
    gamma = torch.zeros(x.shape[-1])
    gamma[list(edit.units)] = torch.tensor(edit.gamma)
    return gamma * x


GATEABLE = [name for name, tiny in VARIANTS.items() if not all(map(tiny.has_experts, range(tiny.layers)))]


@pytest.mark.parametrize("name", GATEABLE)
def test_the_interpreter_is_the_model_written_out(name: str) -> None:
    tiny = VARIANTS[name]
    edits, model, ids = gates(tiny), load(on_disk(tiny)), tokens()
    expected = logits(by_hand(model, tiny, edits), ids)
    with interpret(model, Program(program(tiny).model, tuple(edits))):
        found = logits(model, ids)
    close(found, expected)
    assert (expected - logits(model, ids)).abs().max() > 1e-2 * expected.abs().max()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_gated_edits_read_what_the_others_leave_and_not_each_other(name: str) -> None:
    tiny = VARIANTS[name]
    folder = on_disk(tiny)
    model, ids, made = load(folder), tokens(), program(tiny)
    edits = gates(tiny)[:6]
    both = Program(made.model, (*edits, *made.edits))
    with interpret(model, Program(made.model, made.edits)):
        inner = Program(made.model, tuple(edits))
        with interpret(model, inner):  # hooks of the second see what those of the first have changed
            expected = logits(model, ids)
    with interpret(model, both):
        close(logits(model, ids), expected)


def test_an_open_gate_at_the_ffn_is_the_edit_itself() -> None:
    tiny = VARIANTS["llama"]
    model, ids, made = load(on_disk(tiny)), tokens(), program(tiny)
    width = made.model.residual
    edits = (Scale(0, "ffn", [1, 5], [2.0, -1.0]), Shift(1, "residual", np.ones(width)))
    with interpret(model, Program(made.model, edits)):
        expected = logits(model, ids)
    always = Gate(np.zeros(width), 100.0, 1.0)
    with interpret(model, Program(made.model, tuple(Gated(edit, always) for edit in edits))):
        close(logits(model, ids), expected)
    never = Gate(np.zeros(width), -100.0, 1.0)
    with interpret(model, Program(made.model, tuple(Gated(edit, never) for edit in edits))):
        close(logits(model, ids), logits(load(on_disk(tiny)), ids))


def test_a_mixture_of_experts_has_no_gate() -> None:
    tiny = VARIANTS["mixtral"]
    model, made = load(on_disk(tiny)), program(tiny)
    gated = Gated(Shift(0, "attn", np.ones(made.model.residual)), Gate(np.ones(made.model.residual), 0, 1))
    with (
        pytest.raises(Refused, match="layer 0 is a mixture of experts"),
        interpret(model, Program(made.model, (gated,))),
    ):
        pass
    assert not any(module._forward_hooks for module in model.modules())


def test_the_cache_changes_nothing() -> None:
    tiny = VARIANTS["llama"]
    model, made = load(on_disk(tiny)), program(tiny)
    ids = tokens()
    with interpret(model, Program(made.model, tuple(gates(tiny)))), torch.no_grad():
        whole = model(ids).logits[:, -1]
        first = model(ids[:, :-1], use_cache=True)
        last = model(ids[:, -1:], past_key_values=first.past_key_values).logits[:, -1]
    close(last, whole, 1e-4)
