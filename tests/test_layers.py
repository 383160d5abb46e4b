"""The order of the layers, and how little has to be imported for a build."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import Tiny, on_disk, program

ROOT = Path(__file__).resolve().parents[1]
LAYERS = ("compiler", "passes", "targets")
# On top of all three: the verbs, and the command line.
TOP = ("austeer.compiler.cli", "austeer.compiler.verbs")
HEAVY = ("torch", "transformers", "tokenizers", "accelerate", "peft")


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(("austeer", *(part for part in parts if part != "__init__")))


MODULES = {module_of(path): path for layer in LAYERS for path in sorted((ROOT / layer).rglob("*.py"))}


def imports(source: str) -> set[str]:
    """Every module that a file imports, wherever in it, also `from package import module`."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def is_in(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)


def offences(module: str, source: str) -> set[str]:
    """The imports that go against the order of the layers."""
    found, wrong = imports(source), set[str]()
    if is_in(module, TOP):
        return wrong
    wrong |= {name for name in found if is_in(name, TOP)}
    if is_in(module, ("austeer.compiler",)):
        wrong |= {name for name in found if is_in(name, ("austeer.passes", "austeer.targets"))}
    if is_in(module, ("austeer.passes",)):
        wrong |= {name for name in found if is_in(name, ("austeer.targets",))}
    return wrong


def test_all_layers_are_looked_at() -> None:
    assert {"austeer.compiler.patch", "austeer.passes.fold", "austeer.targets.checkpoint"} <= MODULES.keys()
    assert {"austeer.compiler", "austeer.compiler.verbs.build"} <= MODULES.keys()


@pytest.mark.parametrize("module", MODULES)
def test_no_layer_imports_one_above_it(module: str) -> None:
    assert offences(module, MODULES[module].read_text("utf-8")) == set()


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("austeer.compiler.patch", "from austeer.passes.fold import fold"),
        ("austeer.compiler.patch", "def f():\n    import austeer.targets.checkpoint"),
        ("austeer.compiler.patch", "from austeer import passes"),
        ("austeer.compiler.patch", "from austeer.compiler.verbs import build"),
        ("austeer.compiler.patch", "from austeer.compiler import cli"),
        ("austeer.passes.fold", "if TYPE_CHECKING:\n    from austeer.targets.checkpoint import Plan"),
        ("austeer.passes.fold", "from austeer.compiler.verbs.build import build"),
        ("austeer.targets.hub", "import austeer.compiler.cli"),
    ],
)
def test_the_check_finds_what_it_looks_for(module: str, source: str) -> None:
    assert offences(module, source)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_modules_import_only_each_other_the_standard_library_and_the_dependencies(module: str) -> None:
    known = {
        "austeer",
        "click",
        "huggingface_hub",
        "jinja2",
        "matplotlib",
        "numpy",
        "optuna",
        "peft",
        "rich",
        "safetensors",
        "sklearn",
        "torch",
        "transformers",
        "yaml",
    }
    roots = {name.partition(".")[0] for name in imports(MODULES[module].read_text("utf-8"))}
    assert roots <= known | set(sys.stdlib_module_names)


def loaded(code: str, *arguments: str) -> set[str]:
    """The packages that a fresh Python has imported after running the code."""
    code += "\nimport sys\nprint('\\n'.join({name.partition('.')[0] for name in sys.modules}))"
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True, timeout=120
    )
    return set(done.stdout.split())


def test_importing_the_package_costs_nothing() -> None:
    assert not loaded("import austeer.compiler, austeer.passes, austeer.targets") & {*HEAVY, "numpy", "click", "rich"}


def test_the_public_names_need_no_torch() -> None:
    code = "from austeer.compiler import Program, Scale, Shift, Rank1, Refused\nScale(0, 'ffn', [1], 1.0)"
    found = loaded(code)
    assert not found & set(HEAVY)
    assert "numpy" in found  # what is loaded does show


def test_every_public_name_is_there_and_nothing_else() -> None:
    code = """
import austeer.compiler as compiler
for name in compiler.__all__:
    getattr(compiler, name)
try:
    compiler.nothing
except AttributeError:
    pass
else:
    raise SystemExit("an unknown name was found")
"""
    assert "torch" not in loaded(code)


BUILD = """
import sys
from austeer.compiler.verbs.build import build
from austeer.compiler.verbs.inspect import inspect
build(sys.argv[1], [sys.argv[2]], sys.argv[3])
inspect(sys.argv[3])
"""


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "phi3", "gemma2"])
def test_a_build_loads_neither_torch_nor_transformers(architecture: str, tmp_path: Path) -> None:
    tiny = Tiny(architecture, dtype="bfloat16")
    program(tiny).save(tmp_path / "p.safetensors")
    found = loaded(BUILD, str(on_disk(tiny)), str(tmp_path / "p.safetensors"), str(tmp_path / "out"))
    assert not found & set(HEAVY)
    assert (tmp_path / "out/austeer.json").exists()
