"""The two files of a PEFT adapter: adapter_config.json, and the header of adapter_model.safetensors."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


def factor_names(module: str) -> tuple[str, str]:
    """The tensors of the factors A and B of a module, which is named as in the live model."""
    return f"base_model.model.{module}.lora_A.weight", f"base_model.model.{module}.lora_B.weight"


def config_file(base: str, modules: Sequence[str], rank: int, *, transposed: bool) -> bytes:
    """adapter_config.json: every key that decides what the adapter does, and none that PEFT 0.9 did not know.

    One rank for all and lora_alpha equal to it: the scale alpha / r is 1 for engines that know rank_pattern and
    rsLoRA and for those that do not. Modules by their full paths: there are tensors for the edited ones only.
    """
    fields = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "bias": "none",
        "modules_to_save": None,
        "target_modules": list(modules),
        "layers_to_transform": None,
        "layers_pattern": None,
        "fan_in_fan_out": transposed,
        "init_lora_weights": True,
    }
    return (json.dumps(fields, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def weights_header(shapes: Mapping[str, tuple[int, int]]) -> bytes:
    """The start of a safetensors file of float32 matrices, in that order; the bytes begin at a multiple of 8."""
    # One metadata key only: safetensors does not promise an order between several.
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (rows, columns) in shapes.items():
        end = offset + 4 * rows * columns
        entries[name] = {"dtype": "F32", "shape": [rows, columns], "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
