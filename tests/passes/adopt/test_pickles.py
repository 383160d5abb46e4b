"""Artefacts that are pickles: AUSteer's scores and Steer2Edit's edits, as their authors save them; and attacks."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from austeer.compiler import InputError, Program, ProgramError, Rank1, Refused, Scale, UsageError, interpret
from austeer.compiler.facts import read_facts
from austeer.passes.adopt.artefact import Adopted, Asked
from austeer.passes.adopt.formats import recognise
from tests.shared import shared
from tests.tiny import Tiny, load, logits, on_disk, tokens

TINY = Tiny("llama")  # 2 layers, residual 20, heads 4 x 6, neurons 28
MODEL = on_disk(TINY)


def adopted(path: Path, model: Path = MODEL, **asked: Any) -> Adopted:
    kind, file = recognise(path)
    return kind.read(file, read_facts(model), Asked(**asked))


# ---- AUSteer ------------------------------------------------------------------------------


def screening(folder: Path, scores: list[float], width: int, window: int = 1) -> Path:
    """The three files of AUSteer's screening."""
    starts = range(0, width, window)
    layers = len(scores) // len(starts)
    torch.save([layer for layer in range(layers) for _ in starts], folder / "all_layer_ids.pt")
    torch.save([(at, min(at + window, width)) for _ in range(layers) for at in starts], folder / "all_indices.pt")
    torch.save(scores, folder / "all_scores.pt")
    return folder / "all_scores.pt"


def masked(scores: list[float], width: int, k: int, alpha: float) -> "np.ndarray[Any, Any]":
    """The published selection: by falling |score|, one unit after the other, until k entries are not zero."""
    mask = np.zeros(len(scores))
    for place in sorted(range(len(scores)), key=lambda place: abs(scores[place]), reverse=True):
        mask[place] = scores[place]
        if np.count_nonzero(mask) >= k:
            break
    return (mask * alpha).reshape(-1, width)


@pytest.mark.parametrize(("site", "width"), [("heads", 24), ("ffn", 20), ("residual", 20)])
@pytest.mark.parametrize("k", [1, 7, 30])
def test_austeer_scores_scale_the_units_that_austeer_scales(site: Any, width: int, k: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(k)
    scores = (rng.integers(1, 9, 2 * width) * rng.choice([-1, 1], 2 * width) / 8).tolist()  # many ties
    found = adopted(screening(tmp_path, scores, width), site=site, top_k=k, alpha=3.0)
    gamma = np.zeros((2, width))
    for edit in found.edits:
        assert isinstance(edit, Scale)
        assert edit.site == site
        gamma[edit.layer, list(edit.units)] = edit.gamma
    assert np.allclose(gamma, masked(scores, width, k, 3.0), atol=1e-6)
    assert found.notes == ()


def test_a_folder_of_scores(tmp_path: Path) -> None:
    screening(tmp_path, [0.5] * 40, 20)
    assert len(adopted(tmp_path, site="ffn", top_k=1, alpha=1.0).edits) == 1


def test_scores_alone_are_taken_in_order_and_said_so(tmp_path: Path) -> None:
    torch.save([0.5] * 40, tmp_path / "all_scores.pt")
    assert "taken as one a unit" in adopted(tmp_path, site="ffn", top_k=1, alpha=1.0).notes[0]


def test_the_authors_own_scores(tmp_path: Path) -> None:
    scores = json.loads(shared("parity/austeer-stories260K-ffn.json").read_text())["scores"]
    path = screening(tmp_path, scores, 64)
    found = adopted(path, shared("models/stories260K"), site="ffn", top_k=10, alpha=2.0)
    assert sum(len(edit.units) for edit in found.edits if isinstance(edit, Scale)) == 10


@pytest.mark.parametrize(
    ("scores", "more", "error", "words"),
    [
        ([0.5] * 40, {"site": None}, UsageError, "say --site"),
        ([0.5] * 40, {"top_k": None}, UsageError, "say --top-k and --alpha"),
        ([0.5] * 40, {"alpha": None}, UsageError, "say --top-k and --alpha"),
        ([0.5] * 40, {"top_k": 41}, UsageError, "from 1 to 40"),
        ([0.5] * 40, {"alpha": float("inf")}, UsageError, "finite"),
        ([0.5] * 48, {}, InputError, "48 scores; site ffn of model has 2 layers of 20 units"),
        ([0.5] * 39 + [1.5], {}, InputError, "outside of -1 to 1"),
        ([0.5] * 39 + [float("nan")], {}, InputError, "outside of -1 to 1"),
        ([0.5] * 39 + ["x"], {}, InputError, "not AUSteer's list"),
        ({"a": 1}, {}, InputError, "not AUSteer's list"),
        (torch.ones(40), {}, InputError, "not AUSteer's list"),
    ],
)
def test_bad_scores(scores: Any, more: dict[str, Any], error: type[Exception], words: str, tmp_path: Path) -> None:
    torch.save(scores, tmp_path / "all_scores.pt")
    with pytest.raises(error, match=words):
        adopted(tmp_path, **{"site": "ffn", "top_k": 2, "alpha": 1.0, **more})


def test_scores_of_another_order_or_of_windows(tmp_path: Path) -> None:
    path = screening(tmp_path, [0.5] * 40, 20)
    torch.save([1] * 20 + [0] * 20, tmp_path / "all_layer_ids.pt")
    with pytest.raises(InputError, match="does not name the layers in order"):
        adopted(path, site="ffn", top_k=2, alpha=1.0)
    screening(tmp_path, [0.5] * 40, 20)
    torch.save([(unit, unit + 2) for _ in range(2) for unit in range(20)], tmp_path / "all_indices.pt")
    with pytest.raises(Refused, match="windows of several units"):
        adopted(path, site="ffn", top_k=2, alpha=1.0)


# ---- Steer2Edit ---------------------------------------------------------------------------


def rank1_edits() -> dict[str, Any]:
    """What Steer2Edit saves: a few heads and neurons of two layers."""
    torch.manual_seed(0)
    unit = torch.nn.functional.normalize
    return {
        "attn": {
            (0, 1): {"lambda": 0.7, "k_hat": unit(torch.randn(6), dim=0)},
            (0, 3): {"lambda": -0.4, "k_hat": unit(torch.randn(6), dim=0)},
            (1, 0): {"lambda": 1.2, "k_hat": unit(torch.randn(6), dim=0)},
        },
        "mlp": {(0, 5): {"lambda": 0.9}, (1, 27): {"lambda": -1.1}, (1, 2): {"lambda": 0.3}},
        "meta": {
            "vhat_attn": {layer: unit(torch.randn(20), dim=0) for layer in range(2)},
            "vhat_mlp": {layer: unit(torch.randn(20), dim=0) for layer in range(2)},
            "rho_attn": 0.1,
            "rho_mlp": 0.1,
            "alpha": 0.95,
            "format": {"attn": "ΔW_block = λ * vhat_attn[layer] @ k_hat^T", "mlp": "Δw_col    = λ * vhat_mlp[layer]"},
        },
    }


@torch.inference_mode()
def test_steer2edit_is_the_edit_of_the_weights(tmp_path: Path) -> None:
    edits = rank1_edits()
    torch.save(edits, tmp_path / "rank1.pt")
    found = adopted(tmp_path / "rank1.pt")
    edited = load(MODEL)
    for (layer, head), fields in edits["attn"].items():
        columns = edited.model.layers[layer].self_attn.o_proj.weight[:, head * 6 : (head + 1) * 6]
        columns += fields["lambda"] * torch.outer(edits["meta"]["vhat_attn"][layer], fields["k_hat"])
    for (layer, neuron), fields in edits["mlp"].items():
        edited.model.layers[layer].mlp.down_proj.weight[:, neuron] += (
            fields["lambda"] * edits["meta"]["vhat_mlp"][layer]
        )
    expected, model = logits(edited, tokens()), load(MODEL)
    with interpret(model, Program.of(found.edits, model=MODEL)):
        assert (logits(model, tokens()) - expected).abs().max() < 1e-5 * expected.abs().max()
    assert (logits(model, tokens()) - expected).abs().max() > 1e-2 * expected.abs().max()
    assert [(edit.layer, edit.site) for edit in found.edits] == [
        (0, "heads"),
        (0, "neurons"),
        (1, "heads"),
        (1, "neurons"),
    ]
    assert all(isinstance(edit, Rank1) for edit in found.edits)


def test_layers_of_steer2edit(tmp_path: Path) -> None:
    torch.save(rank1_edits(), tmp_path / "rank1.pt")
    assert {edit.layer for edit in adopted(tmp_path / "rank1.pt", layers=frozenset({1})).edits} == {1}


def put(*path: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(edits: dict[str, Any]) -> None:
        for key in path[:-1]:
            edits = edits[key]
        edits[path[-1]] = value

    return change


WRONG: dict[str, tuple[Callable[[dict[str, Any]], Any], type[Exception], str]] = {
    "no meta": (lambda edits: edits.pop("meta"), InputError, "no 'meta'"),
    "no attn": (lambda edits: edits.pop("attn"), InputError, "no 'attn'"),
    "no direction": (lambda edits: edits["meta"]["vhat_mlp"].pop(1), InputError, "there is no 1"),
    "a list": (put("mlp", value=[1]), InputError, "names None"),
    "a text for an address": (put("mlp", "x", value={}), InputError, "names 'x'"),
    "three numbers": (put("attn", (0, 0, 0), value={}), InputError, r"names \(0, 0, 0\)"),
    "a negative layer": (put("mlp", (-1, 0), value={"lambda": 1.0}), InputError, r"names \(-1, 0\)"),
    "a neuron too many": (put("mlp", (0, 28), value={"lambda": 1.0}), InputError, r"mlp \(0, 28\) .* 28 times 1"),
    "a neuron far away": (put("mlp", (0, 10**12), value={"lambda": 1.0}), InputError, "28 times 1"),
    "a layer too many": (put("mlp", (2, 0), value={"lambda": 1.0}), InputError, "there is no 2"),
    "a head too many": (put("attn", (0, 4), value={"lambda": 1.0, "k_hat": torch.ones(6)}), InputError, "4 times 6"),
    "a wide head": (
        put("attn", (0, 1, "k_hat")[0:2], value={"lambda": 1.0, "k_hat": torch.ones(7)}),
        InputError,
        "7 un",
    ),
    "no strength": (put("mlp", (0, 5), value={}), InputError, "no 'lambda'"),
    "nan": (put("mlp", (0, 5), value={"lambda": float("nan")}), ProgramError, r"mlp \(0, 5\): lambda"),
    "nan in v": (put("meta", "vhat_mlp", 0, value=torch.full((20,), np.nan)), ProgramError, "vhat_mlp of layer 0"),
    "a narrow v": (put("meta", "vhat_mlp", 0, value=torch.ones(19)), ProgramError, "v has 19 values"),
    "whole numbers": (put("meta", "vhat_mlp", 0, value=torch.ones(20, dtype=torch.int64)), InputError, "not a dense"),
    "a sparse v": (put("meta", "vhat_mlp", 0, value=torch.ones(20).to_sparse()), InputError, "not a dense"),
    "a matrix": (put("meta", "vhat_mlp", 0, value=torch.ones(20, 1)), ProgramError, "one dimension"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_edits_are_named(case: str, tmp_path: Path) -> None:
    change, error, words = WRONG[case]
    edits = rank1_edits()
    change(edits)
    torch.save(edits, tmp_path / "rank1.pt")
    with pytest.raises(error, match=words):
        Program.of(adopted(tmp_path / "rank1.pt").edits, model=MODEL)


# ---- attacks ------------------------------------------------------------------------------


class Attack:
    """Creates a folder when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.trace),))


@pytest.mark.parametrize("name", ["all_scores.pt", "all_indices.pt", "rank1.pt"])
@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_pickle_is_not_run(name: str, legacy: bool, tmp_path: Path) -> None:
    screening(tmp_path, [0.5] * 40, 20)
    torch.save({"meta": Attack(tmp_path / "ran")}, tmp_path / name, _use_new_zipfile_serialization=not legacy)
    path = tmp_path / ("rank1.pt" if name == "rank1.pt" else "all_scores.pt")
    asked = {} if name == "rank1.pt" else {"site": "ffn", "top_k": 1, "alpha": 1.0}
    with pytest.raises(InputError, match=f"{name}: damaged, or more than plain data, which is never run"):
        adopted(path, **asked)
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / name, weights_only=False)  # the attack works where it is let in
    assert (tmp_path / "ran").exists()


def plain_pickle() -> bytes:
    return pickle.dumps({"meta": 1})


@pytest.mark.parametrize("data", [b"", b"x", b"PK\x03\x04", plain_pickle()[:-1], b"\x80\x02" + b"(" * 10_000 + b"."])
def test_damaged_pickles(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "rank1.pt").write_bytes(data)
    with pytest.raises(InputError, match=r"rank1\.pt: damaged, or more than plain data"):
        adopted(tmp_path / "rank1.pt")


@pytest.mark.parametrize("part", [0.3, 0.6, 0.95])
def test_a_pickle_cut_short(part: float, tmp_path: Path) -> None:
    path = tmp_path / "rank1.pt"
    torch.save(rank1_edits(), path)
    path.write_bytes(path.read_bytes()[: int(part * path.stat().st_size)])
    with pytest.raises(InputError, match="damaged"):
        adopted(path)


def test_scores_under_another_name(tmp_path: Path) -> None:
    torch.save([0.5] * 40, tmp_path / "scores.pt")
    with pytest.raises(InputError, match=r"recognised by their name, all_scores\.pt"):
        adopted(tmp_path / "scores.pt")
