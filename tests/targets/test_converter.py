"""Finding llama.cpp's converter, and what happens when it fails."""

from pathlib import Path

import pytest

from austeer.compiler.errors import OutputError, Refused, UsageError
from austeer.targets.llama_cpp import SCRIPT, VARIABLE, convert, find_converter


def script(folder: Path, text: str = "") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / SCRIPT).write_text(text)
    (folder / SCRIPT).chmod(0o755)
    return folder / SCRIPT


def test_the_variable_wins_over_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named, on_path = script(tmp_path / "named"), script(tmp_path / "path")
    monkeypatch.setenv("PATH", str(on_path.parent))
    monkeypatch.delenv(VARIABLE, raising=False)
    assert find_converter() == on_path
    monkeypatch.setenv(VARIABLE, str(named.parent))
    assert find_converter() == named


def test_a_variable_that_leads_nowhere_is_a_usage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    with pytest.raises(UsageError, match=r"AUSTEER_LLAMA_CPP is .* no convert_hf_to_gguf.py in it.*git clone"):
        find_converter()


def test_without_a_converter_the_refusal_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv(VARIABLE, raising=False)
    with pytest.raises(Refused, match=r"git clone .*llama.cpp.* sdist of llama-cpp-python.* AUSTEER_LLAMA_CPP"):
        find_converter()


FAILING = "import sys, pathlib; pathlib.Path(sys.argv[-1]).write_text('half'); sys.exit('unknown pre-tokenizer')"


@pytest.mark.parametrize(
    ("text", "said"), [(FAILING, "unknown pre-tokenizer"), ("print('nothing to do')", "nothing to")]
)
def test_a_failed_conversion_says_why_and_leaves_nothing(
    text: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(VARIABLE, str(script(tmp_path / "failing", text).parent))
    with pytest.raises(OutputError, match=said):
        convert(tmp_path, tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()
    assert capfd.readouterr() == ("", "")


def test_a_conversion_is_silent_and_gets_folder_type_and_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    text = "import sys, pathlib; print('INFO'); pathlib.Path(sys.argv[-1]).write_text(' '.join(sys.argv[1:-1]))"
    monkeypatch.setenv(VARIABLE, str(script(tmp_path / "fine", text).parent))
    convert(tmp_path / "model", tmp_path / "out.gguf", "bf16")
    assert (tmp_path / "out.gguf").read_text() == f"{tmp_path / 'model'} --outtype bf16 --outfile"
    assert capfd.readouterr() == ("", "")
