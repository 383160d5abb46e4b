"""The settings of a run: which dtype a model works in, and how long texts may be."""

from pathlib import Path

import pytest

from austeer.compiler.live import WIDENED
from austeer.compiler.verbs import common
from austeer.compiler.verbs.bases import open_base
from austeer.compiler.verbs.common import Settings, certificate_dtype, working_dtype
from austeer.compiler.verbs.demo import MODEL
from tests.tiny import Tiny


def test_on_a_cpu_16_bits_are_worked_on_in_float32(tmp_path: Path):
    Tiny("llama", dtype="float16").save(tmp_path / "model")
    base = open_base(str(tmp_path / "model"))
    assert working_dtype(base, Settings(device="cpu")) == "float32"
    assert working_dtype(base, Settings(device="cuda:0", dtype="auto")) == "auto"
    assert working_dtype(base, Settings(device="cpu", dtype="float16")) == "float16"


def test_what_does_not_fit_in_float32_is_certified_as_stored_and_computed_in_it(monkeypatch: pytest.MonkeyPatch):
    base = open_base(str(MODEL))
    assert certificate_dtype(base, Settings(device="cpu")) == "float32"
    monkeypatch.setattr(common, "fits_in_float32", lambda values, device: values < 10)  # noqa: ARG005
    assert working_dtype(base, Settings(device="cpu")) == "auto"
    assert certificate_dtype(base, Settings(device="cpu")) == WIDENED
    assert certificate_dtype(base, Settings(device="cpu", dtype="bfloat16")) == "bfloat16"


def test_the_model_limits_the_length_of_texts():
    assert Settings().length_for({"max_position_embeddings": 100}) == 100
    assert Settings().length_for({"n_positions": 4096}) == 2048
    assert Settings(max_length=50).length_for({"n_positions": 4096}) == 50
