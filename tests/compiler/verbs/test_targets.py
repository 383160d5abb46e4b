"""targets: the table as it is printed, and the README's matrix."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from austeer.compiler import UsageError
from austeer.compiler.architectures import ARCHITECTURES
from austeer.compiler.cli import main
from austeer.compiler.verbs.targets import markdown, targets
from austeer.targets.tables import TARGETS

README = Path(__file__).parents[3] / "README.md"


def test_every_cell_has_a_lowering_or_a_reason() -> None:
    support = targets()
    assert {target.name for target in support.targets} == {
        "transformers", "vllm", "sglang", "llama.cpp", "tgi", "mlx-lm", "ctranslate2", "onnxruntime-genai", "portable",
    }  # fmt: skip
    assert len(support.cells) == len(TARGETS) * len(ARCHITECTURES) * (5 + 5 + 2 + 5)
    assert all(bool(cell.lowerings) != bool(cell.refusal) for cell in support.cells)
    assert all(target.version for target in support.targets)


def test_the_readme_s_matrix_is_the_table() -> None:
    text = README.read_text("utf-8")
    assert markdown() in text, "README.md: replace the support matrix by what markdown() gives"


def test_one_target_is_printed_with_its_reasons() -> None:
    done = CliRunner().invoke(main, ["targets", "vllm"])
    assert done.exit_code == 0
    assert "vLLM 0.33.0 drops mlp.down_proj.bias of mixtral in silence" in " ".join(done.stdout.split())


def test_as_json() -> None:
    report = json.loads(CliRunner().invoke(main, ["targets", "portable", "--json"]).stdout)
    assert [target["name"] for target in report["targets"]] == ["portable"]
    cell = next(cell for cell in report["cells"] if (cell["architecture"], cell["kind"], cell["site"])
                == ("llama", "shift", "residual"))  # fmt: skip
    assert cell["lowerings"] == [{"how": "constant layer", "exact": True}]
    scaled = next(cell for cell in report["cells"] if (cell["architecture"], cell["kind"], cell["site"])
                  == ("llama", "scale", "residual"))  # fmt: skip
    assert [way["how"] for way in scaled["lowerings"]] == ["rescale-later", "rescale-earlier", "rescale-both"]
    assert not any(way["exact"] for way in scaled["lowerings"])  # SGLang has no FFN bias, so none of the neurons
    assert "read through a norm" in scaled["refusal"]


def test_gates_as_json() -> None:
    ways = {
        (target, architecture): [(way["how"], way["exact"]) for way in cell["lowerings"]]
        for target in ("transformers", "sglang")
        for architecture in ("llama", "mistral", "gemma2")
        for cell in targets(target).plain()["cells"]
        if (cell["architecture"], cell["kind"], cell["site"]) == (architecture, "gated", "ffn")
    }
    with_bias = [("neurons (shift)", True), ("fitted neurons", False), ("neurons without bias", False)]
    assert ways["transformers", "llama"] == with_bias
    assert ways["transformers", "mistral"][0] == ("neurons as llama (shift)", True)
    assert ("neurons without bias", False) in ways["transformers", "mistral"]
    assert ways["sglang", "llama"] == [("neurons without bias", False)]
    assert ways["transformers", "gemma2"] == []


def test_gates_have_a_column(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    rows = CliRunner().invoke(main, ["targets", "transformers"]).stdout.splitlines()
    cells = [[cell.strip() for cell in row.strip("┃│").split("│")] for row in rows]
    columns = {first: last for first, *_, last in (row for row in cells if row[1:])}
    assert any("gated @ all sites" in row for row in rows)
    assert columns["llama"] == "neurons (shift), fitted neurons, neurons without bias"
    assert columns["qwen3"] == "neurons without bias"
    assert columns["gemma2"] == "refused"


def test_an_unknown_target() -> None:
    with pytest.raises(UsageError, match="there are transformers, vllm"):
        targets("tpu")
