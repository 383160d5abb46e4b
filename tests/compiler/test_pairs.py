"""Files of pairs and texts: what is read, and what a bad file is told."""

from pathlib import Path

import pytest

from austeer.compiler.errors import PairsError
from austeer.compiler.pairs import Pair, read_pairs, read_texts, split_by_prompt
from tests.shared import shared

GOOD = b'{"prompt": "a", "positive": " b", "negative": " c"}\n'


def written(folder: Path, content: bytes) -> Path:
    path = folder / "file.jsonl"
    path.write_bytes(content)
    return path


def test_extra_keys_blank_lines_mark_and_line_ends(tmp_path: Path) -> None:
    line = '{"id": 3, "prompt": "a\u2028", "positive": "é", "negative": ""}\r\n'.encode()
    pairs = read_pairs(written(tmp_path, b"\xef\xbb\xbf" + GOOD + b"\n  \r\n" + line))
    assert pairs == (Pair("a", " b", " c"), Pair("a\u2028", "é", ""))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no pairs"),
        (b"\n \n", "holds no pairs"),
        (GOOD + b"\nnonsense\n", ":3: not JSON"),
        (GOOD + b"[1]", ":2: expected a JSON object"),
        (b'{"prompt": "a", "positive": "b"}', ":1: no 'negative'.*'prompt', 'positive'"),
        (b'{"prompt": "a", "positive": "b", "negative": 3}', ":1: 'negative' must be a string, got 3"),
        (GOOD + b'{"prompt": "\xff"}', ":2: not UTF-8"),
        (b'{"prompt": "\\ud800", "positive": "b", "negative": "c"}', ":1: 'prompt' holds half a surrogate pair"),
        (b"[" * 100_000, ":1: not JSON"),
    ],
)
def test_a_bad_pairs_file_is_told_where_and_why(tmp_path: Path, content: bytes, message: str) -> None:
    path = written(tmp_path, content)
    with pytest.raises(PairsError, match=message) as error:
        read_pairs(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("read", [read_pairs, read_texts])
def test_a_missing_file_or_a_folder(tmp_path: Path, read: object) -> None:
    assert callable(read)
    for path in (tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(PairsError, match=r"cannot be read \(.+\)"):
            read(path)


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        (b"one\n\ntwo { 3\n", ("one", "two { 3")),
        (b"{curly\n", ("{curly",)),
        (b'{"text": "a"}\n{"story": "b"}\n', ("a", "b")),
        (b'{"prompt": "a", "positive": " b", "negative": " c", "story": 2}', ("a b",)),
        (b' { "prompt": "a", "continuation": " d"}', ("a d",)),
    ],
)
def test_texts_are_lines_or_json_lines(tmp_path: Path, content: bytes, texts: tuple[str, ...]) -> None:
    assert read_texts(written(tmp_path, content)) == texts


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no texts"),
        (b'{"text": "a"}\n{"number": 1}', ":2: no text.*'number'"),
        (b'{"text": "a', ":1: not JSON"),
    ],
)
def test_a_bad_texts_file(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(PairsError, match=message):
        read_texts(written(tmp_path, content))


@pytest.mark.parametrize(
    "name", ["tinystories_text", "imdb_text", "wikitext2_test", "sentiment_prompts", "alpaca_2000"]
)
def test_texts_of_the_shared_data(name: str) -> None:
    path = shared(f"data/{name}.jsonl")
    assert len(read_texts(path)) == path.read_bytes().count(b"\n")


def test_a_prompt_is_on_one_side_whatever_the_order() -> None:
    pairs = tuple(Pair(f"prompt {i % 20}", f"{i}", "no") for i in range(60))
    rest, held = split_by_prompt(pairs, seed=1)
    assert {pair.prompt for pair in rest}.isdisjoint(pair.prompt for pair in held)
    assert len({pair.prompt for pair in held}) == 4
    assert sorted(map(repr, rest + held)) == sorted(map(repr, pairs))
    assert set(split_by_prompt(pairs[::-1], seed=1)[1]) == set(held)
    assert set(split_by_prompt(pairs, seed=2)[1]) != set(held)


def test_the_split_is_the_same_on_every_platform() -> None:
    held = split_by_prompt([Pair(letter, "a", "b") for letter in "abcdefghij"], seed=0)[1]
    assert [pair.prompt for pair in held] == ["d", "h"]


def test_pairs_without_a_prompt_are_split_one_by_one() -> None:
    rest, held = split_by_prompt([Pair("", f"{i}", "no") for i in range(10)], seed=0)
    assert (len(rest), len(held)) == (8, 2)


def test_one_prompt_cannot_be_split() -> None:
    with pytest.raises(PairsError, match="all pairs have the same prompt"):
        split_by_prompt([Pair("a", "b", "c"), Pair("a", "d", "e")], seed=0)
