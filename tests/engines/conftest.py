"""What the tests of engines share."""

from pathlib import Path

import pytest

from tests.engines.llama_cpp import use_converter


@pytest.fixture
def converter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """llama.cpp's converter for models that have a tokenizer, or a skip."""
    use_converter(monkeypatch, tmp_path, tokenizer=True)
