"""Hooked and compiled model agree, by the certificate's own rule, on real models in every stored dtype."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from austeer.compiler import Program, Rank1, Scale, Shift
from austeer.compiler.facts import read_facts
from austeer.compiler.live import load_tokenizer
from austeer.compiler.pairs import read_texts
from austeer.compiler.sites import SPACE
from austeer.compiler.tokens import encode_texts, take_tokens
from austeer.compiler.verbs.build import build
from tests.shared import shared
from tests.tiny import certified

MODELS = ("stories260K", "babyllama-105", "imdb-llama-7m", "imdb-gpt2-2.6m")
DTYPES = ("float32", "float16", "bfloat16")


def stored_as(model: Path, dtype: str, folder: Path) -> Path:
    """A copy of a model with its weights cast."""
    shutil.copytree(model, folder)
    for path in (folder / "model.safetensors", folder / "config.json"):
        path.chmod(0o644)
    weights = load_file(model / "model.safetensors")
    tensors = {name: tensor.to(getattr(torch, dtype)) for name, tensor in weights.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "torch_dtype": dtype}))
    return folder


def some_program(model: Path) -> Program:
    """A few edits of every kind in every layer, strong enough to be seen."""
    rng, facts = np.random.default_rng(0), read_facts(model)
    geometry = facts.geometry
    edits = []
    for layer in range(geometry.layers):
        for site in ("heads", "attn", "neurons", "ffn"):
            width = geometry.width(SPACE[site])
            units = sorted(rng.choice(width, width // 10, replace=False).tolist())
            edits.append(Scale(layer, site, units, rng.uniform(-1, 1, len(units))))
            edits.append(Shift(layer, site, rng.normal(0, 0.02, width)))
        k, v = rng.normal(size=geometry.heads), rng.normal(size=geometry.residual)
        edits.append(Rank1(layer, "heads", k / np.linalg.norm(k), v / np.linalg.norm(v), 0.1))
    return Program.of(edits, model=model)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MODELS)
def test_hooked_and_compiled_agree(name: str, dtype: str, tmp_path: Path):
    model = stored_as(shared(f"models/{name}"), dtype, tmp_path / "model")
    texts = read_texts(shared("data/tinystories_text.jsonl" if "imdb" not in name else "data/imdb_text.jsonl"))
    tokens, _ = encode_texts(load_tokenizer(model), texts[:8], 96)
    program = some_program(model)
    program.save(tmp_path / "program.safetensors")
    build(str(model), [tmp_path / "program.safetensors"], tmp_path / "out")

    found = certified(model, tmp_path / "out", program, take_tokens(tokens, 512))
    assert found.failures() == []
    assert found.base_mean_kl > 0.01  # the program shows
    if dtype == "float32":
        assert found.greedy_equal
