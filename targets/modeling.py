"""The code of the form `model-code`: one file, the same for every program, with the names of one architecture.

Its model type is one of our own. Under the base's, transformers and vLLM would load the stock classes where code is
not trusted, drop the edits, and say nothing.
"""

from pathlib import Path
from string import Template
from typing import Any

from austeer.compiler.architectures import ARCHITECTURES, Architecture
from austeer.compiler.checkpoint import CONFIG, read_json
from austeer.compiler.errors import CheckpointError

CODE = "modeling_austeer.py"

_TEMPLATE = Path(__file__).with_name("modeling_austeer.template")
_PREFIX = "austeer_"


def code(entry: Architecture) -> bytes:
    """The content of the file for an architecture."""
    template = Template(_TEMPLATE.read_text("utf-8"))
    return template.substitute(stock=entry.class_name, model_type=_PREFIX + entry.model_type).encode()


def config_keys(entry: Architecture) -> dict[str, Any]:
    """The keys of config.json that lead to the code."""
    causal = f"Austeer{entry.class_name}"
    classes = {"AutoConfig": "AusteerConfig", "AutoModel": "AusteerModel", "AutoModelForCausalLM": causal}
    module = CODE.removesuffix(".py")
    return {
        "architectures": [causal],
        "model_type": _PREFIX + entry.model_type,
        "auto_map": {auto: f"{module}.{name}" for auto, name in classes.items()},
    }


def require_own_code(folder: Path) -> None:
    """CheckpointError unless the code that config.json leads to is, byte for byte, what this version writes."""
    config = read_json(folder / CONFIG)
    entry = ARCHITECTURES.get(str(config.get("model_type")).removeprefix(_PREFIX))
    try:
        found = (folder / CODE).read_bytes()
    except OSError as error:
        raise CheckpointError(f"{folder / CODE}: cannot be read ({error.strerror}); compile again") from None
    if entry is None or found != code(entry) or any(config.get(k) != v for k, v in config_keys(entry).items()):
        raise CheckpointError(
            f"{folder}: its code is not what this version of austeer-compile writes, so it is not run here; compile "
            f"again, or read {CODE} and load the model yourself with trust_remote_code"
        )
