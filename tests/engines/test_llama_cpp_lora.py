"""An adapter in llama.cpp, beside the unedited base, against the interpreter; the base alone must not agree."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from transformers import AutoTokenizer

from austeer.compiler import Program, interpret
from austeer.compiler.checkpoint import Checkpoint
from austeer.compiler.facts import facts_of
from austeer.compiler.form import ModelForm
from austeer.compiler.layout import Layout
from austeer.passes.fold import fold
from austeer.targets.checkpoint import Writing
from austeer.targets.lora import plan, write
from tests.engines.llama_cpp import converted, log_probabilities, served
from tests.engines.test_stories import CLOSE, TEXT, folds
from tests.shared import shared
from tests.tiny import load

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.usefixtures("converter")]

NAMES = {"self_attn.o_proj": "attn_output", "mlp.down_proj": "ffn_down"}


def as_gguf(adapter: Path, target: Path) -> Path:
    """What llama.cpp's convert_lora_to_gguf.py makes of an adapter for llama: the same tensors under its names."""
    gguf = pytest.importorskip("gguf", reason="llama.cpp's adapters are written with gguf")
    writer: Any = gguf.GGUFWriter(target, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(json.loads((adapter / "adapter_config.json").read_text())["r"]))
    for name, values in load_file(adapter / "adapter_model.safetensors").items():
        layer, attention_or_mlp, projection, factor = name.split(".")[4:8]
        place = f"blk.{layer}.{NAMES[f'{attention_or_mlp}.{projection}']}.weight"
        writer.add_tensor(f"{place}.{factor.lower()}", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def test_the_base_with_the_adapter_says_in_llama_cpp_what_the_interpreter_says(tmp_path: Path) -> None:
    folder = shared("models/stories260K")
    base = Checkpoint.open(folder)
    layout = Layout.of(base, facts_of("stories260K", base.config))
    program = Program.of(folds(layout.facts.geometry), model=folder)
    (tmp_path / "adapter").mkdir()
    own = ModelForm(layout.facts.architecture)
    made = plan(fold(program, layout.facts, own), layout, "llama.cpp", name="stories260K")
    write(made, tmp_path / "adapter", Writing())
    ids = AutoTokenizer.from_pretrained(folder)(TEXT)["input_ids"]
    model = load(folder)
    with interpret(model, program):
        expected = log_probabilities(model, ids)
    gguf, lora = converted(folder, tmp_path), as_gguf(tmp_path / "adapter", tmp_path / "lora.gguf")
    found = [served(gguf, ids, expected.shape[1], ids[-1], lora=adapter) for adapter in (lora, None)]
    differences = [float(np.abs(each - expected).max()) for each in found]
    assert differences[0] < CLOSE
    assert differences[1] > 1000 * CLOSE
