"""Lost components: against their definition, head by head, and against the authors' own."""

import json
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch

from austeer.compiler.edits import Floats
from austeer.compiler.head_outputs import record
from austeer.compiler.live import load_model, load_tokenizer
from austeer.compiler.pairs import read_pairs
from austeer.compiler.tokens import encode_texts
from austeer.passes.lost_components import lost_components
from tests.shared import shared, tiny


def some_loss(texts: int, heads: int, dim: int, seed: int = 0) -> Floats:
    """With a mean that is not 0, and a spectrum that falls."""
    generator = np.random.default_rng(seed)
    mixed = generator.normal(size=(texts, heads, dim)) @ generator.normal(size=(heads, dim, dim)).mean(0)
    return (mixed + generator.normal(size=(heads, dim))).astype(np.float32)


@pytest.mark.parametrize(("texts", "heads", "dim"), [(50, 4, 6), (5, 3, 12), (1, 2, 4), (8, 1, 8)])
def test_the_papers_sum_head_by_head(texts: int, heads: int, dim: int) -> None:
    lost = some_loss(texts, heads, dim)
    found = lost_components(lost)
    rank = min(texts, dim)
    assert found.directions.shape == (heads, dim, rank)
    assert found.magnitudes.shape == (heads, rank)
    for head in range(heads):
        u, s, vt = np.linalg.svd(lost[:, head].astype(np.float64), full_matrices=False)
        for k in range(1, rank + 2):
            expected = sum(u[:, i].mean() * s[i] * vt[i] for i in range(min(k, rank)))
            np.testing.assert_allclose(found.component(k)[head], expected, rtol=0, atol=2e-6)


def test_directions_are_orthonormal_and_the_largest_comes_first() -> None:
    lost = some_loss(40, 3, 6)
    found = lost_components(lost)
    squares = found.directions.swapaxes(1, 2) @ found.directions
    np.testing.assert_allclose(squares, np.broadcast_to(np.eye(6), squares.shape), atol=1e-6)
    spectrum = np.linalg.norm(lost.transpose(1, 0, 2) @ found.directions, axis=1)
    assert (np.diff(spectrum, axis=1) < 0).all()


def test_all_directions_give_the_mean_loss() -> None:
    lost = some_loss(40, 3, 6)
    np.testing.assert_allclose(lost_components(lost).component(6), lost.mean(0), atol=2e-6)


def test_signs_do_not_depend_on_the_solver(monkeypatch: pytest.MonkeyPatch) -> None:
    lost, svd = some_loss(40, 3, 6), torch.linalg.svd
    expected = lost_components(lost)
    monkeypatch.setattr(torch.linalg, "svd", lambda x, full_matrices: [-part for part in svd(x, full_matrices)])
    found = lost_components(lost)
    np.testing.assert_array_equal(found.directions, expected.directions)
    np.testing.assert_array_equal(found.magnitudes, expected.magnitudes)
    assert (found.magnitudes >= 0).all()


def test_a_head_that_lost_nothing() -> None:
    lost = some_loss(9, 3, 6)
    lost[:, 1] = 0
    component = lost_components(lost).component(3)
    np.testing.assert_array_equal(component[1], 0)
    assert np.abs(component[[0, 2]]).max(1).all()


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2", "opt"])
def test_grouped_heads_and_heads_of_their_own_width(name: str, tmp_path: Path) -> None:
    """Four query heads in two layers: a layer is no head, and two key-value heads are not four."""
    texts = [(5, 6, 7), (9, 3), (3, 4, 5, 6, 7, 8)]
    outputs = record(tiny(name), texts, tmp_path / "heads", batch_tokens=30)
    found = lost_components(outputs.layer(1))
    assert found.directions.shape == (4, outputs.dim, 3)
    np.testing.assert_allclose(found.component(3), outputs.layer(1).mean(0), atol=1e-5)


@cache
def stories() -> tuple[Floats, Floats]:
    """(lost component with k = 10, mean loss) of all heads, [5, 8, 8], as the parity data has them."""
    folders = [shared(f"models/{name}") for name in ("stories260K", "stories260K-magnitude50")]
    prompts = [pair.prompt for pair in read_pairs(shared("parity/pairs.jsonl"))]
    texts, _ = encode_texts(load_tokenizer(folders[0]), prompts, 512)
    with TemporaryDirectory() as scratch:
        dense, pruned = (
            record(
                load_model(folder, dtype="float32", device="cpu"),
                texts,
                Path(scratch) / folder.name,
                batch_tokens=4096,
            )
            for folder in folders
        )
        lost = [dense.layer(layer) - pruned.layer(layer) for layer in range(5)]
    return np.stack([lost_components(of).component(10) for of in lost]), np.stack([of.mean(0) for of in lost])


def authors(what: str) -> Floats:
    values = json.loads(shared("parity/restorelcc-stories260K-magnitude50.json").read_text())[what]
    return np.array(values).reshape(5, 8, 8)


def test_the_authors_components() -> None:
    """They are kept in float16: equal but for the last bit of the few whose float32 value lies at its border."""
    found, expected = stories()[0], authors("components")
    rounded = found.astype(np.float16)
    assert np.sum(rounded != expected) <= 3
    np.testing.assert_array_max_ulp(rounded, expected.astype(np.float16), 1)


def test_the_authors_mean_loss() -> None:
    np.testing.assert_allclose(stories()[1], authors("mean_lost"), rtol=0, atol=2e-6)
