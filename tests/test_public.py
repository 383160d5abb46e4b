"""The public surface: what others import, and the one tree of errors."""

import inspect
import re
from pathlib import Path

import click

import austeer.compiler
from austeer.compiler import errors
from austeer.compiler.cli import main
from austeer.compiler.verbs.methods import METHODS
from austeer.targets.engines.registry import ENGINES

ROOT = Path(__file__).parents[1]


def test_public_names():
    assert sorted(austeer.compiler.__all__) == [
        "AusteerError", "CheckFailed", "CheckpointError", "Edit", "Fitted", "Gate", "Gated", "InputError", "Origin",
        "OutputError", "PairsError", "Program", "ProgramError", "Rank1", "Refused", "Scale", "Shift", "SpaceError",
        "UsageError", "interpret",
    ]  # fmt: skip
    assert all(getattr(austeer.compiler, name).__module__ for name in austeer.compiler.__all__)


def test_commands_and_options():
    assert set(main.commands) == {"build", "demo", "import", "inspect", "push", "restore", "steer", "targets", "verify"}
    for name, command in main.commands.items():
        parameters = [parameter for parameter in command.params if isinstance(parameter, click.Option)]
        options = {option for parameter in parameters for option in parameter.opts}
        assert "--json" in options, name
        if name in ("steer", "restore", "build", "verify"):
            assert {"--device", "--dtype", "--batch-tokens", "--max-length", "--seed"} <= options


def test_the_command_line_offers_the_methods_that_there_are():
    method = next(parameter for parameter in main.commands["steer"].params if parameter.name == "method")
    assert isinstance(method.type, click.Choice)
    assert list(method.type.choices) == list(METHODS)


def test_verify_takes_engines_and_their_names_are_fixed():
    assert "--engine" in {option for parameter in main.commands["verify"].params for option in parameter.opts}
    assert set(ENGINES) == {
        "ctranslate2", "llama.cpp", "mlx-lm", "onnxruntime-genai", "openvino", "peft", "transformers", "vllm",
    }  # fmt: skip


def test_the_tree_of_errors_is_drawn_as_it_is():
    classes = [value for value in vars(errors).values() if inspect.isclass(value)]
    lines = [line for line in (errors.__doc__ or "").splitlines() if "─" in line or line == "    AusteerError"]
    drawn = [line.strip(" ├└│─").split()[0] for line in lines]
    assert sorted(drawn) == sorted(cls.__name__ for cls in classes)
    assert all(issubclass(cls, errors.AusteerError) for cls in classes)
    assert {cls.__name__ for cls in classes if cls.exit_code == 2} == {"UsageError"}


def test_every_folder_with_code_is_a_listed_package():
    found = re.search(r"^packages = \[(.*?)\]$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE | re.DOTALL)
    assert found is not None
    listed = re.findall(r'"([\w.]+)"', found[1])
    folders = {path.parent for top in ("compiler", "passes", "targets") for path in (ROOT / top).rglob("*.py")}
    assert {"austeer." + ".".join(folder.relative_to(ROOT).parts) for folder in folders} == set(listed)
